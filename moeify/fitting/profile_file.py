"""A profile as one safetensors file: tensors, and a JSON text in the header. Reading it executes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeify.backends.writing import atomically
from moeify.errors import Refused, UnreadableFile
from moeify.fitting.collect import digest
from moeify.ir.profile import BlockProfile, Profile
from moeify.ir.program import Program

_KEY, _VERSION = "moeify.profile", 1
_MEANS = ("mean_F", "mean_abs_F", "mean_square_F", "active_F", "firing_F")


def write(profile: Profile, path: Path) -> None:
    """Whole or not at all. Raises OutputNotWritten."""
    tensors: dict[str, Tensor] = {}
    blocks = []
    for number, (anchor, block) in enumerate(profile.blocks.items()):
        names = [*_MEANS, "inputs_ND", *(["importance_F"] if block.importance_F is not None else [])]
        tensors.update({f"blocks.{number}.{name}": getattr(block, name) for name in names})
        blocks.append({"anchor": anchor, "tokens": block.tokens, "top_quarter": block.top_quarter})
    for number, batch in enumerate(profile.batches):
        # safetensors refuses tensors that share memory, and batches from Python may.
        tensors.update({f"batches.{number}.{i}": tensor.cpu().clone() for i, tensor in enumerate(batch)})
    header = {
        "version": _VERSION,
        "top": profile.top,
        "facts": dict(profile.facts),
        "blocks": blocks,
        "batches": [len(batch) for batch in profile.batches],
    }
    with atomically(path) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, {_KEY: json.dumps(header)})


def read(path: Path) -> Profile:
    """Raises UnreadableFile for a file that is missing, damaged, of another kind or of a newer version."""
    if not path.is_file():
        raise UnreadableFile(f"there is no profile {path}", hint="make one with: moeify profile MODEL --data DATA")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is not None:
                return _profile(json.loads(text), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableFile(
            f"the profile {path} is damaged", hint="make it again with: moeify profile MODEL --data DATA"
        ) from error
    raise UnreadableFile(f"{path} is no profile", hint="make one with: moeify profile MODEL --data DATA")


def check(profile: Profile, program: Program, source: str) -> None:
    """Raises Refused where a profile is not that of the program's selected blocks, or of other weights."""
    for block in program.converted():
        found = profile.blocks.get(block.anchor)
        if found is None:
            raise Refused(
                f"{source} has no block {block.anchor!r}",
                hint=f"it holds {', '.join(list(profile.blocks)[:4])}: profile this model, with the blocks selected",
            )
        have = (found.units, found.inputs_ND.shape[1])
        if have != (block.d_ff, block.d_model):
            raise Refused(
                f"{source} is of another model: it has {have[0]} hidden units and inputs of width {have[1]}, "
                f"the block has {block.d_ff} and {block.d_model}",
                where=block.path,
            )
    if profile.facts.get("sha256") != digest(program):
        raise Refused(f"{source} is of other weights than this model's", hint="profile this model again")


def _profile(header: dict[str, Any], tensors: dict[str, Tensor]) -> Profile:
    """Raises ValueError, KeyError or TypeError for what ``write`` does not write."""
    if header["version"] != _VERSION:
        raise ValueError(f"version {header['version']}")
    blocks = {}
    for number, entry in enumerate(header["blocks"]):
        means = {name: tensors[f"blocks.{number}.{name}"] for name in _MEANS}
        importance = tensors.get(f"blocks.{number}.importance_F")
        inputs = tensors[f"blocks.{number}.inputs_ND"]
        shapes = {value.shape for value in (*means.values(), importance) if value is not None}
        if len(shapes) != 1 or means["mean_F"].dim() != 1 or inputs.dim() != 2:
            raise ValueError(f"block {number} has statistics of shapes {shapes}")
        blocks[str(entry["anchor"])] = BlockProfile(
            tokens=int(entry["tokens"]),
            **means,
            importance_F=importance,
            inputs_ND=inputs,
            top_quarter=entry["top_quarter"],
        )
    batches = [
        tuple(tensors[f"batches.{number}.{i}"] for i in range(count)) for number, count in enumerate(header["batches"])
    ]
    return Profile(blocks, batches, int(header["top"]), {str(k): str(v) for k, v in header["facts"].items()})
