"""A model file or folder to an nn.Module. Nothing in the file is executed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from moeify.errors import NonFiniteWeights, TorchScriptFile, UnreadableFile
from moeify.frontend.exported import EXPORTED, exported_examples
from moeify.frontend.hf_folder import read_folder
from moeify.frontend.inputs import Example
from moeify.frontend.pickles import read_pickle
from moeify.frontend.pt2 import read_pt2
from moeify.frontend.reasons import first_line
from moeify.frontend.sniff import HF, PT2, SAFETENSORS, TORCHSCRIPT, sniff
from moeify.frontend.state_dicts import build, unwrap

_SHOWN = 3


@dataclass(frozen=True)
class Loaded:
    """A model that was read: ``kind`` is a kind of sniff, ``notes`` are lines for people.

    ``input_hints`` are example inputs that came with the file (``.pt2``), which ``capture`` finds by itself.
    """

    module: nn.Module
    kind: str
    path: Path
    sha256: str
    notes: tuple[str, ...] = ()
    input_hints: tuple[Example, ...] = field(default=(), repr=False)


def load(path: str | Path, *, factory: str | None = None, allow: Sequence[str] = ()) -> Loaded:
    """Read a pickled module of torch.nn classes, a state_dict (with ``factory``), a ``.pt2`` or a Hugging Face folder.

    ``factory`` is ``pkg.mod:function``; ``allow`` are module paths whose classes a pickle may use besides torch.nn's.
    The module is in eval mode. Raises an InputError: UnreadableFile, UnsafePickle, TorchScriptFile, StateDictMismatch,
    NonFiniteWeights; UsageError for a factory that does not work.
    """
    path = Path(path)
    kind = sniff(path)
    notes: list[str] = []
    hints: tuple[Example, ...] = ()
    if kind == TORCHSCRIPT:
        raise TorchScriptFile(
            f"{path} is a TorchScript archive: it holds compiled code and no module that torch.export can read",
            hint="save the Python model instead: torch.save(model.state_dict(), ...) and --factory, "
            "or torch.export.save",
        )
    if kind == HF:
        module, notes = read_folder(path)
    elif kind == PT2:
        exported, _ = read_pt2(path)
        module = exported.module(check_guards=False)
        module.meta[EXPORTED] = exported
        hints = tuple(exported_examples(exported))
        if not hints:
            notes.append("the archive holds no example inputs")
    else:
        thing = _read_safetensors(path) if kind == SAFETENSORS else read_pickle(path, kind, allow)
        module = _module(path, thing, factory, notes)
    _check_whole(path, module)
    for submodule in module.modules():
        submodule.training = False
    _check_finite(path, module)
    return Loaded(module, kind, path, _digest(path), tuple(notes), hints)


def _module(path: Path, thing: Any, factory: str | None, notes: list[str]) -> nn.Module:
    if isinstance(thing, nn.Module):
        if factory:
            notes.append(f"the factory {factory} is not used: {path} holds a whole module")
        return thing
    found = unwrap(thing)
    if found is None:
        raise UnreadableFile(
            f"{path} holds {_describe(thing)}, neither a module nor a state_dict",
            hint="save model.state_dict() or the model itself with torch.save",
        )
    state, key = found
    if key:
        notes.append(f"the state_dict is the entry {key!r} of {path}")
    return build(path, state, factory)


def _describe(thing: Any) -> str:
    name = type(thing).__name__
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UnreadableFile(
            f"{path} is truncated or damaged: {first_line(error)}",
            hint="copy or download it again",
        ) from error


def _check_whole(path: Path, module: nn.Module) -> None:
    """A pickle sets the attributes of a module, and may set what no constructor would. Raises UnreadableFile."""
    try:
        tensors = [*module.parameters(), *module.buffers()]
        whole = all(isinstance(t, torch.Tensor) for t in tensors)
    except (AttributeError, TypeError):
        whole = False
    if not whole:
        raise UnreadableFile(
            f"{path} is damaged: it holds a {type(module).__name__} with parts that are neither modules nor tensors",
            hint="copy or download it again",
        )


def _check_finite(path: Path, module: nn.Module) -> None:
    """Raises NonFiniteWeights naming the parameters that hold NaN or infinity, and the buffers that hold NaN.

    Infinity in a buffer is a mask.
    """
    bad = [name for name, value in module.named_parameters() if not _is_sound(value, infinity=False)]
    bad += [name for name, value in module.named_buffers() if not _is_sound(value, infinity=True)]
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise NonFiniteWeights(
            f"{len(bad)} weights of {path} hold NaN or infinity: {', '.join(bad[:_SHOWN])}{more}"
            if len(bad) > 1
            else f"the weight {bad[0]} of {path} holds NaN or infinity",
            hint="the training run that wrote it has diverged: take an earlier checkpoint",
        )


def _is_sound(value: torch.Tensor, infinity: bool) -> bool:
    if value.is_meta or not value.is_floating_point() or not value.numel():
        return True
    with torch.no_grad():
        if value.layout is not torch.strided:
            value = value.to_dense()
        if value.element_size() == 1:  # aminmax knows no float8
            value = value.float()
        low, high = torch.aminmax(value)
    return not bool(low.isnan()) if infinity else bool(low.isfinite() and high.isfinite())  # NaN reaches both


def _digest(path: Path) -> str:
    """SHA-256 of the file, or of all files of a folder in order of their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file()):
        if path.is_dir():
            digest.update(f"{file.name}\0".encode())
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
