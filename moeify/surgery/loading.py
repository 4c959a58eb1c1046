"""Reading a checkpoint folder: a skeleton without weights, the recipe applied to its structure, the tensors put in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.errors import BadRecipe, StateDictMismatch, UnreadableFile
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.surgery import block_json, shards, skeleton
from moeify.surgery.conversion import REPORT, Conversion
from moeify.surgery.layout import CONFIG, FIELDS, FORMAT, MARKER, VERSION
from moeify.surgery.pretrained import guard
from moeify.surgery.region import has_tensor
from moeify.surgery.replace import rewrite
from moeify.surgery.tensors import assign, collect

_NAMES = ("token_ids_of", "weights", "buffers", "aliases")  # fields that give a name by name


def load(folder: str | Path, *, factory: skeleton.Factory | str | None = None, allow: Sequence[str] = ()) -> nn.Module:
    """Read a checkpoint folder: the model in eval mode, on the CPU.

    The dense skeleton is built without weights, the recipe is applied to its structure, and the tensors are put in.
    ``factory`` (a function or ``pkg.mod:function``) overrides what the folder says; ``allow`` names modules outside
    transformers that the folder may import. Raises InputError (UnreadableFile, StateDictMismatch) or UsageError.
    """
    folder = Path(folder)
    data = _read_marker(folder)
    config_file = folder / CONFIG
    config = config_file.read_text() if config_file.is_file() else None
    model = skeleton.rebuild(data["skeleton"], config, factory, allow)
    try:
        conversion = Conversion(
            recipe=Recipe.from_dict(data["recipe"]),
            blocks=[block_json.from_data(item, model) for item in data["blocks"]],
            token_ids_of=data["token_ids_of"],
            provenance=data["provenance"],
            factory=factory if isinstance(factory, str) else data["skeleton"].get("factory"),
        )
        report = Report.from_dict(data["report"]) if data["report"] is not None else None
        _check_skeleton(model, conversion, folder)
        rewrite(model, conversion, known=None)
    except (BadRecipe, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _not_understood(folder, error) from error
    _fill(model, folder, data)
    guard(model)
    if report is not None:
        object.__setattr__(model, REPORT, report)
    return model.eval()


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        raise UnreadableFile(
            f"{folder} is not a checkpoint folder: it has no {MARKER}", hint="give the folder that save wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"cannot read {folder / MARKER}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UnreadableFile(f"{folder / MARKER} does not describe a checkpoint folder")
    if data.get("format_version") != VERSION:
        raise UnreadableFile(
            f"the checkpoint has format version {data.get('format_version')}, this moeify reads version {VERSION}",
            where=str(folder),
            hint="install the version of moeify that wrote it",
        )
    for name, kinds in FIELDS.items():
        if name not in data:
            raise UnreadableFile(f"{folder / MARKER} has no field {name!r}")
        value = data[name]
        texts = value.values() if name in _NAMES and isinstance(value, dict) else value if name == "frozen" else ()
        if not isinstance(value, kinds) or not all(isinstance(text, str) for text in texts):
            raise UnreadableFile(f"{folder / MARKER} has something else than it should in its field {name!r}")
    return data


def _check_skeleton(model: nn.Module, conversion: Conversion, folder: Path) -> None:
    for block in conversion.blocks:
        for ref in block.weights.values():
            if not has_tensor(model, ref.parameter):
                raise _misfit(f"it has no {ref.parameter}", folder)


def _fill(model: nn.Module, folder: Path, data: Mapping[str, Any]) -> None:
    wanted = collect(model)
    aliases: dict[str, str] = data["aliases"]
    slots = {**wanted.weights, **{name: wanted.weights[first] for name, first in wanted.aliases.items()}}
    _compare(set(slots), set(data["weights"]) | set(aliases), folder)
    also: dict[str, list[str]] = {}
    for alias, first in aliases.items():
        also.setdefault(first, []).append(alias)
    frozen = set(data["frozen"])
    seen: set[str] = set()
    for name, tensor in _tensors(folder, data["weights"]):
        for place in (name, *also.get(name, ())):
            if slots[place].shape != tensor.shape:
                shapes = f"{list(tensor.shape)} in the checkpoint and {list(slots[place].shape)} in the model"
                raise StateDictMismatch(f"{place} has shape {shapes}", where=str(folder))
        value = tensor
        if isinstance(slots[name], nn.Parameter):
            value = nn.Parameter(tensor, requires_grad=name not in frozen)
        for place in (name, *also.get(name, ())):
            assign(model, place, value)
        seen.add(name)
    _compare(set(data["weights"]), seen, folder)
    for name, tensor in _tensors(folder, data["buffers"]):
        if name in wanted.buffers:
            assign(model, name, tensor)


def _tensors(folder: Path, index: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise UnreadableFile(f"the checkpoint names the file {file!r} outside its folder", where=str(folder))
        for name, tensor in shards.read(folder / file):
            if index.get(name) == file:
                yield name, tensor


def _compare(wanted: set[str], given: set[str], folder: Path) -> None:
    problems = [f"missing {_some(wanted - given)}"] if wanted - given else []
    problems += [f"unexpected {_some(given - wanted)}"] if given - wanted else []
    if problems:
        raise _misfit("; ".join(problems), folder)


def _misfit(problem: str, folder: Path) -> StateDictMismatch:
    return StateDictMismatch(
        f"the checkpoint does not fit its model: {problem}",
        where=str(folder),
        hint="build the model with the code that the checkpoint was written with",
    )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _not_understood(folder: Path, error: Exception) -> UnreadableFile:
    return UnreadableFile(f"{folder / MARKER} does not make sense: {type(error).__name__}: {error}")
