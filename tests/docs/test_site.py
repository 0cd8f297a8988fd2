"""The site builds without a warning, its links lead somewhere, and it fetches nothing."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import nbformat
import pytest
from nbclient import NotebookClient

from qexport.cli import COMMANDS, group
from tests.docs.page import blocks

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (made.returncode, made.stdout + made.stderr) == (0, "")
    return folder


class _Page(HTMLParser):
    """Names that a page has, what it links to, and what a browser fetches to show it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.names |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "source", "iframe") and "src" in found:
            self.fetched.append(found["src"])
        if tag == "link" and found.get("rel") not in ("prev", "next", "canonical"):
            self.fetched.append(found.get("href", ""))


def test_links_lead_somewhere_and_nothing_is_fetched(site: Path) -> None:
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 50
    for path, page in pages.items():
        for address in page.fetched:
            assert not urlsplit(address).netloc, f"{path} fetches {address}"
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path} links to {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].names, f"{path}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_pages(site: Path, name: str) -> None:
    """Every option of every command, as its --help has it."""
    text = (site / "commands" / f"{name}.html").read_text(encoding="utf-8")
    for command in _leaves(group.get_command(click.Context(group), name)):
        for parameter in command.params:
            for flag in parameter.opts if isinstance(parameter, click.Option) else ():
                assert flag in text, f"{name} {flag}"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_commands(name: str) -> None:
    """Every example of an epilog is understood, whatever files it speaks of."""
    for command in _leaves(group.get_command(click.Context(group), name)):
        text = (command.epilog or "").replace("\b", "").replace("\\\n", " ")
        for line in text.splitlines():
            if line.strip().startswith(f"qexport {name}"):
                words = line.split("&&")[0].split("#")[0].split()
                flags = {word for word in words if re.fullmatch("-[a-z]|--[a-z-]+", word)}
                known = {
                    flag for one in command.params for flag in (*one.opts, *one.secondary_opts)
                }
                assert flags <= known, line


def _leaves(command: click.Command | None) -> list[click.Command]:
    assert command is not None
    if isinstance(command, click.Group):
        return [leaf for child in command.commands.values() for leaf in _leaves(child)]
    return [command]


def test_quickstart_notebook(world: Path, tmp_path: Path) -> None:
    """The notebook runs from top to bottom where a model of that name is."""
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    (tmp_path / "SmolLM2-135M").symlink_to(world / "SmolLM2-135M")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    assert "0 differing codes, 0 differing bits" in printed[3]
    assert "no grid that holds seq2" in printed[4]
    assert printed[-1].strip()


def test_blocks_are_found() -> None:
    text = "a\n<!-- fails: 2 -->\n```console\nx\n```\n"
    text += "    <!-- file: a.b -->\n    ```json\n    1\n    ```\n"
    found = list(blocks(text))
    assert [(block.language, block.code, block.mark, block.value) for block in found] == [
        ("console", "x\n", "fails", "2"),
        ("json", "1\n", "file", "a.b"),
    ]
