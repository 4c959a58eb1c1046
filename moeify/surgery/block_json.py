"""Blocks as plain data, for the ``moeify.json`` of a checkpoint folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from moeify.errors import UnreadableFile
from moeify.ir.block import Block, WeightRef
from moeify.surgery import region_json

_LEFT_OUT = ("calls", "region")  # calls are names of nodes of a graph that the folder does not hold


def to_data(block: Block, model: nn.Module) -> dict[str, Any]:
    """Everything of a block but its call sites; ``model`` is the converted model. Raises Refused for an activation
    that plain data cannot hold.
    """
    data: dict[str, Any] = {}
    for field in dataclasses.fields(block):
        value = getattr(block, field.name)
        if field.name in _LEFT_OUT:
            continue
        data[field.name] = dataclasses.asdict(value) if isinstance(value, WeightRef) else value
    if block.region is not None:
        data["region"] = region_json.to_data(block.region, model, block.anchor)
    return data


def from_data(data: Mapping[str, Any], model: nn.Module) -> Block:
    """The block again, without call sites; ``model`` gives the tensors that its activation reads. Raises
    UnreadableFile.
    """
    known = {field.name for field in dataclasses.fields(Block)} - {"calls"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise UnreadableFile(f"a block of the checkpoint has the unknown field {unknown[0]!r}")
    fields = dict(data)
    for name, value in fields.items():
        if isinstance(value, Mapping) and name != "region":
            fields[name] = _weight(value)
    fields["linears"] = tuple(fields.get("linears", ()))
    if fields.get("region") is not None:
        fields["region"] = region_json.from_data(fields["region"], model)
    try:
        return Block(calls=[], **fields)
    except TypeError as error:
        raise UnreadableFile(f"a block of the checkpoint is incomplete: {error}") from error


def _weight(data: Mapping[str, Any]) -> WeightRef:
    steps = tuple(tuple(step) for step in data["steps"])
    return WeightRef(data["parameter"], tuple(data["shape"]), steps)
