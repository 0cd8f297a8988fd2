"""What is told of another library's error."""

import pytest

from qexport.errors import first_line


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("one\ntwo", "one"),
        ("\n  sizes differ for layer:\n   a: [2, 3]\n   b", "sizes differ for layer: a: [2, 3]"),
        ("ends with a comma,\nand goes on", "ends with a comma"),
        ("alone:", "alone:"),
        ("", "ValueError"),
        ("x" * 500, "x" * 200),
    ],
)
def test_the_first_line_and_what_it_leads_to(said: str, told: str) -> None:
    assert first_line(ValueError(said)) == told
