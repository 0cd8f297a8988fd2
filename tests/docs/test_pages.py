"""Every code block of every page runs, or says why not; what is made of data is current."""

import json
import re
import shutil
from pathlib import Path

import pytest

from docs.made import current, pages
from docs.pictures import PICTURES
from tests.conftest import Cli
from tests.docs.page import Reader, blocks

ROOT = Path(__file__).parent.parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in pages() if "adr" not in path.parts}
CHINESE = "README.zh-CN.md"  # has the blocks of README.md, and comments of its own


@pytest.fixture(scope="session")
def before(world: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a packed folder and a text, for pages that begin with them."""
    folder = tmp_path_factory.mktemp("before")
    line = json.dumps({"text": "The Rhine rises in the Alps and flows to the North Sea. " * 8})
    (folder / "train.jsonl").write_text(f"{line}\n" * 200)
    settings = ("--bits", "2", "--group-size", "64", "--max-steps", "2", "--max-length", "64")
    model = world / "SmolLM2-135M"
    made = cli("train", model, "--data", "builtin", *settings, "-o", "run", cwd=folder)
    assert made.returncode == 0, made.stderr
    made = cli("pack", "run", "--format", "native", "-o", "packed", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.parametrize("name", [name for name in PAGES if name != CHINESE])
def test_blocks_of_a_page(name: str, world: Path, before: Path, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(world, folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    with Reader(folder, before, cli) as reader:
        for block in blocks(PAGES[name].read_text(encoding="utf-8")):
            reader.take(block)


def test_the_chinese_readme_has_the_same_blocks() -> None:
    def code(name: str) -> list[tuple[str, str, str]]:
        found = blocks(PAGES[name].read_text(encoding="utf-8"))
        return [(one.language, one.mark, re.sub(r" *# .*", "", one.code)) for one in found]

    assert code(CHINESE) == code("README.md")


@pytest.mark.parametrize("name", PAGES)
def test_what_is_made_is_current(name: str) -> None:
    assert PAGES[name].read_text(encoding="utf-8") == current(PAGES[name]), (
        "`python -m docs.made` makes tables and pictures anew"
    )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_current(name: str) -> None:
    drawn = (ROOT / "docs/pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == PICTURES[name]()
