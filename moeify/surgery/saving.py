"""Writing the checkpoint folder of a converted model."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from moeify.ir.report import Report
from moeify.surgery import block_json, shards, skeleton
from moeify.surgery.conversion import REPORT, conversion_of
from moeify.surgery.folder import writing
from moeify.surgery.layout import BUFFERS, CONFIG, FORMAT, MARKER, VERSION, WEIGHTS, is_ours
from moeify.surgery.tensors import collect


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    factory: str | None = None,
    report: Report | None = None,
) -> None:
    """Write the checkpoint folder of a model that ``apply`` converted.

    ``factory`` (``pkg.mod:function``) rebuilds the dense model where it is not a transformers model. A folder of
    ours, an empty one or none is replaced as a whole; anything else is refused. Raises UsageError, Refused,
    OutputNotWritten.
    """
    with writing(Path(folder), is_ours) as fresh:
        write_files(model, fresh, factory=factory, report=report)


def write_files(
    model: nn.Module,
    folder: Path,
    *,
    factory: str | None = None,
    report: Report | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, str]:
    """Write the files into an existing folder; gives the shard by tensor name. ``values`` replaces the model's own
    tensors.
    """
    conversion = conversion_of(model)
    tensors = collect(model)
    weights = {name: (values or {}).get(name, tensor) for name, tensor in tensors.weights.items()}
    described, config = skeleton.describe(model, factory or conversion.factory)
    index = shards.write(weights, folder, WEIGHTS)
    buffers = shards.write(tensors.buffers, folder, BUFFERS)
    data = {
        "format": FORMAT,
        "format_version": VERSION,
        "skeleton": described,
        "recipe": conversion.recipe.to_dict(),
        "blocks": [block_json.to_data(block, model) for block in conversion.blocks],
        "token_ids_of": conversion.token_ids_of,
        "weights": index,
        "buffers": buffers,
        "aliases": tensors.aliases,
        "frozen": tensors.frozen,
        "versions": _versions(),
        "provenance": conversion.provenance,
        "report": (found.to_dict() if (found := report or getattr(model, REPORT, None)) is not None else None),
    }
    if config is not None:
        (folder / CONFIG).write_text(config)
    (folder / MARKER).write_text(json.dumps(data, indent=1, default=str) + "\n")
    return index


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("moeify", "torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
