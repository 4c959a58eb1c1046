"""Named things (passes, methods, routers, backends) and the text that names them with their options.

A named thing is a frozen dataclass with a class attribute ``name``; its options are its fields and its text is
``name{option=value,other-option=value}``, which ``parse`` reads back. A registry is a table of strings, so that
importing it imports none of the things it names.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from moeify.errors import BadOption, UnknownName, UsageError


@dataclasses.dataclass(frozen=True)
class Registry:
    """A table ``name -> "module:Class"``, and of methods that people may ask for and that do not fit, ``name -> (why,
    what to do instead)``.
    """

    kind: str
    table: Mapping[str, str]
    absent: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def cls(self, name: str) -> type:
        """The class of that name. Raises UnknownName, or UsageError where it is known why there is none."""
        if name in self.absent:
            why, hint = self.absent[name]
            raise UsageError(f"there is no {self.kind} {name!r}: {why}", hint=hint)
        if name not in self.table:
            raise UnknownName(self.kind, name, self.table)
        module, _, attribute = self.table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def parse(self, text: str) -> Any:
        """``name{option=value}`` to an instance. Raises UnknownName or BadOption."""
        match = re.fullmatch(r"\s*([A-Za-z0-9_.-]+)\s*(?:\{(.*)\})?\s*", text)
        if not match:
            raise BadOption(f"cannot read the {self.kind} {text!r}", hint="write name or name{option=value,...}")
        cls = self.cls(match[1])
        return cls(**_read_options(cls, match[1], match[2] or ""))

    def summaries(self) -> list[tuple[str, str, str]]:
        """(name, options with their defaults, first sentence of the docstring) of every entry, for listings."""
        return [(name, _defaults(self.cls(name)), _first_sentence(self.cls(name))) for name in self.table]


def render(thing: Any) -> str:
    """The text of a named thing; options that have their default value are left out."""
    parts = [
        f"{field.name.replace('_', '-')}={_write(getattr(thing, field.name))}"
        for field in dataclasses.fields(thing)
        if getattr(thing, field.name) != field.default
    ]
    return thing.name + (f"{{{','.join(parts)}}}" if parts else "")


def _read_options(cls: type, name: str, text: str) -> dict[str, Any]:
    types = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if key not in fields:
            known = ", ".join(sorted(f.replace("_", "-") for f in fields)) or "none"
            raise BadOption(f"{name} has no option {key.replace('_', '-')!r}", hint=f"its options: {known}")
        options[key] = _read(types[key], value.strip() if equals else "true", f"{name}.{key}")
    return options


def _read(kind: Any, text: str, what: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
    except (KeyError, ValueError):
        pass
    raise BadOption(f"{what} wants {getattr(kind, '__name__', kind)}, not {text!r}")


def _write(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _defaults(cls: type) -> str:
    fields = [f for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
    return ", ".join(f"{f.name.replace('_', '-')}={_write(f.default)}" for f in fields)


def _first_sentence(cls: type) -> str:
    paragraph = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()
