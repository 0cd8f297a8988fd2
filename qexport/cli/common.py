"""What the commands share: the command class with --config, and where output goes."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Command", "Numbers", "fail", "json_option", "print_json", "progress_console", "size"]

_LARGEST = 1 << 24


class Command(click.Command):
    """A command whose options may also stand in a YAML file, below flags and environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--config"],
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="YAML file with any of these options, by their long names.",
                callback=_read_config,
                is_eager=True,
                expose_value=False,
            )
        )

    def recipe(self, values: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """The options of a file that is written in another's words; a command may know some."""
        return values

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Options may stand in the environment too: QEXPORT_SERVE_API_KEY for serve's --api-key."""
        prefix = None if parent is None else parent.auto_envvar_prefix
        for parameter in self.params:
            if prefix and isinstance(parameter, click.Option) and parameter.envvar is None:
                flag = max(parameter.opts, key=len).lstrip("-")
                parameter.envvar = f"{prefix}_{info_name}_{flag}".replace("-", "_").upper()
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.BadParameter as error:
            name = None if error.param is None else error.param.name
            if error.ctx is not None and name is not None:
                source = error.ctx.get_parameter_source(name)
                if source == ParameterSource.ENVIRONMENT and error.param is not None:
                    error.param_hint = str(error.param.envvar)  # it is what has to be mended
            raise


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    try:
        values = _loaded(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise click.UsageError(f"{path} is not valid YAML: {reason}", ctx) from error
    if not isinstance(values, dict):
        raise click.UsageError(f"{path} does not hold options by name.", ctx)
    if isinstance(ctx.command, Command):
        values = ctx.command.recipe(values)
    ctx.default_map = {**(ctx.default_map or {}), **_options(values, ctx, path)}


def _loaded(text: str) -> Any:
    """What YAML says; a key that stands twice is an error, where yaml itself takes the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = [str(key) for key in keys if keys.count(key) > 1]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} stands twice in it.")
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _options(values: Mapping[Any, Any], ctx: click.Context, path: Path) -> dict[str, Any]:
    names = {}
    many = {p.name for p in ctx.command.params if isinstance(p, click.Option) and p.multiple}
    for parameter in ctx.command.params:
        for option in [parameter.name or "", *parameter.opts]:
            names[option.lstrip("-").replace("-", "_")] = parameter.name or ""
    flags = {p.name for p in ctx.command.params if isinstance(p, click.Option) and p.is_flag}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            raise click.UsageError(f"{path}: {key} is not an option of {ctx.info_name}.", ctx)
        if name in found:
            raise click.UsageError(f"{path}: {key} is said twice; give it once.", ctx)
        if name in flags and not isinstance(value, bool):
            raise click.UsageError(f"{path}: {key} is {value!r}; give true or false.", ctx)
        found[name] = _value(value, name in many)
    return found


def _value(value: Any, many: bool) -> Any:
    """As the command line would have it: text, or a list of texts for what may be repeated."""
    if many and isinstance(value, dict):  # PATTERN: BITS
        return [f"{key}={one}" for key, one in value.items()]
    if many and value is not None:
        return [str(one) for one in value] if isinstance(value, list) else [str(value)]
    return value if isinstance(value, bool) or value is None else str(value)


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic from 8.4 on
    """Positive numbers with commas between them, as a tuple."""

    name = "numbers"

    def __init__(self, kind: "type[int] | type[float]" = int) -> None:
        self._kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Fails with click's usage error."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < number < _LARGEST for number in found):
            self.fail(
                f"{value!r} is not one or more positive numbers below {_LARGEST}, as in 1,2,4.",
                *(param, ctx),
            )
        return tuple(dict.fromkeys(found))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_json(value: Any) -> None:
    """A result for machines, on stdout; JSON has no infinity and no NaN, and gets null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_console() -> "Console":
    """Where progress and notes go: stderr."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, markup=False)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def fail(message: str, code: int) -> NoReturn:
    """One sentence on stderr, and out."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
