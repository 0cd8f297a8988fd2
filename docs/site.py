"""mkdocs' hook: pages of the commands, made from the commands, and links that leave this folder.

A link of a page to a file of the repository that is not in docs/ leads to a copy of it below
`source/`; what is Markdown there becomes a page. Pictures of docs/pictures are put into the page as
they are, so that they have its colours.
"""

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from qexport.cli import COMMANDS

__all__ = ["command_page", "on_files", "on_page_markdown"]

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the commands' pages, and what pages link to outside of docs/."""
    for name in COMMANDS:
        files.append(File.generated(config, f"commands/{name}.md", content=command_page(name)))
    waiting = [file.src_uri for file in files.documentation_pages() if file.abs_src_path]
    targets = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]  # of the navigation
    while targets or waiting:
        if not targets:
            targets = list(_targets(waiting.pop()))
            continue
        target = targets.pop()
        outside = _uri(target)
        if outside.startswith("source/") and files.get_file_from_path(outside) is None:
            if not target.is_file():
                raise FileNotFoundError(f"a page links to {target}, which is no file")
            files.append(File.generated(config, outside, content=target.read_bytes()))
            waiting += [outside] if outside.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where files stand in the site, and put pictures in."""
    uri = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        image, text, address = match.groups()
        target = _target(uri, address)
        if target is None:
            return match[0]
        if image and target.suffix == ".svg":
            return f'<div class="picture">{target.read_text(encoding="utf-8").strip()}</div>'
        here = os.path.relpath(_uri(target), PurePosixPath(uri).parent)
        mark = address.partition("#")[2]
        return f"{image}[{text}]({here}{'#' + mark if mark else ''})"

    return "".join(
        part if _CODE.fullmatch(part) else _LINK.sub(link, part) for part in _apart(markdown)
    )


def command_page(name: str) -> str:
    """Markdown of one command: what it does, its options, its examples; a group with its own."""
    command: click.Command = importlib.import_module(f"qexport.cli.{name}").command
    context = click.Context(command, info_name=f"qexport {name}")
    parts = [f"# qexport {name}\n", *_sections(command, context)]
    return "\n".join(parts)


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield f"```text\n{' '.join(usage.split())}\n```\n"
    yield _prose(inspect.cleandoc(command.help or ""))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            inner = click.Context(child, info_name=name, parent=context)
            yield f"\n## {context.info_name} {name}\n"
            yield from _sections(child, inner)
        return
    yield "\n| option | | default |\n|-|-|-|"
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            yield _option(parameter, context)
    if command.epilog:
        yield f"\n```text\n{inspect.cleandoc(command.epilog.replace(chr(8), ''))}\n```"


def _option(option: click.Option, context: click.Context) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    kind = "" if option.is_flag else f" {option.make_metavar(context)}"
    default = option.get_default(context)
    plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    repeated = " Repeatable." if option.multiple else ""
    cells = (f"{flags}{_safe(kind)}", _safe(option.help or "") + repeated, str(default) * plain)
    return f"| {' | '.join(cells)} |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _prose(text: str) -> str:
    """Paragraphs of a docstring as click reads it: those that begin with \\b keep their lines."""
    return "\n\n".join(
        f"```text\n{part.replace(chr(8), '').strip()}\n```" if chr(8) in part else _safe(part)
        for part in text.split("\n\n")
    )


def _apart(markdown: str) -> Iterator[str]:
    """The text in pieces, code in pieces of its own."""
    at = 0
    for match in _CODE.finditer(markdown):
        yield markdown[at : match.start()]
        yield match[0]
        at = match.end()
    yield markdown[at:]


def _targets(uri: str) -> Iterator[Path]:
    text = _file(uri).read_text(encoding="utf-8")
    for part in _apart(text):
        if not _CODE.fullmatch(part):
            for match in _LINK.finditer(part):
                target = _target(uri, match[3])
                if target is not None:
                    yield target


def _file(uri: str) -> Path:
    """Where a page of the site stands in the repository."""
    return ROOT / uri.removeprefix("source/") if uri.startswith("source/") else ROOT / "docs" / uri


def _target(uri: str, address: str) -> Path | None:
    """The file that a link of a page means, or None where it is no file of ours."""
    path = address.partition("#")[0]
    if not path or ":" in path:
        return None
    return Path(os.path.normpath(_file(uri).parent / path))


def _uri(target: Path) -> str:
    """Where a file of the repository stands in the site."""
    docs = ROOT / "docs"
    inside = target.is_relative_to(docs)
    found: Any = target.relative_to(docs) if inside else Path("source") / target.relative_to(ROOT)
    return PurePosixPath(found).as_posix()
