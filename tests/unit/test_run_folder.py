"""Who may write to a run's folder, and when."""

from pathlib import Path

import pytest

from qexport.errors import InputError
from qexport.output import mark
from qexport.run_folder import claimed, finished


def test_a_folder_is_looked_at_again_before_it_is_written_to(tmp_path: Path) -> None:
    """Between the first look and the claim a long text is tokenized, and others do not wait."""
    mine, theirs = {"bits": "2"}, {"bits": "3"}
    run = tmp_path / "run"
    assert finished(run, mine, resume=True) is None
    run.mkdir()
    mark(run, "run", (), status="begun", settings=theirs)
    (run / "checkpoint-5").mkdir()
    with (
        pytest.raises(InputError, match="holds another run"),
        claimed(run, mine, resume=True, progress=lambda _: True),
    ):
        pass
    assert (run / "checkpoint-5").is_dir()
    with claimed(run, mine, resume=False, progress=lambda _: True):
        assert not (run / "checkpoint-5").exists()
