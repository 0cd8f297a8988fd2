"""Settings are of the types that their dataclass says, however they were made."""

import functools
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from qexport.errors import InputError

__all__ = ["as_given", "check_types"]


def as_given(settings: Any) -> None:
    """Let a frozen dataclass be given as on the command line, and check the types of the rest.

    Text is taken for paths, text and lists for tuples of text, 2 for bits "2" and -1 for groups as
    wide as a layer. Raises InputError for a field of another type.
    """
    plain: dict[str, Any] = {"bits": str(settings.bits)}
    if settings.group_size == -1:
        plain["group_size"] = None
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type in (Path, Path | None) and isinstance(value, (str, os.PathLike)):
            plain[field.name] = Path(value)
        elif isinstance(value, list):
            plain[field.name] = tuple(value)
        elif field.type == tuple[str, ...] and isinstance(value, str):
            plain[field.name] = (value,)
    for name, value in plain.items():
        object.__setattr__(settings, name, value)  # the settings are frozen from then on
    check_types(settings)


def check_types(settings: Any) -> None:
    """Raise InputError, which names the option, for a field of a dataclass of another type."""
    kind: Any = type(settings)
    for name, adapter in _adapters(kind).items():
        value = getattr(settings, name)
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            # of a union's members the last is None's, where there is one
            wanted = error.errors()[0]["msg"].removeprefix("Input ")
            raise InputError(f"--{name.replace('_', '-')} {value!r} {wanted}.") from None


@functools.cache
def _adapters(kind: Any) -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(kind).items()}
