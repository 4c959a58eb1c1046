"""The ``moe.*`` operators, which the target must have kernels for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.backends.tvm.conversions.translation import Convert, Translation
from moeify.backends.tvm.families import Experts

_moe = torch.ops.moeify


def _experts_of(t: Translation, args: Mapping[str, Any]) -> Experts | None:
    """The stacked weights; None when one of them is computed from the inputs."""
    up, down = args["up_EFD"], args["down_EDF"]
    roles = ("up_EFD", "gate_EFD", "down_EDF", "up_bias_EF", "gate_bias_EF", "down_bias_ED")
    names = [t.name(args[role]) for role in roles]
    if any(name is None and args[role] is not None for name, role in zip(names, roles)):
        return None
    experts, hidden, width = up.meta["val"].shape
    first, gate, last, up_bias, gate_bias, down_bias = names
    assert first is not None
    assert last is not None
    out = down.meta["val"].shape[1]
    return Experts(first, gate, last, up_bias, gate_bias, down_bias, args["activation"], experts, width, hidden, out)


def _dispatch(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    experts = _experts_of(t, args)
    if experts is None:
        return NotImplemented
    inputs = (t.tensor(args[name]) for name in ("x_TD", "experts_TK", "weights_TK"))
    return _found(t.families("dispatch_ffn", t.emitter, *inputs, experts))


def _experts(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    experts = _experts_of(t, args)
    if experts is None:
        return NotImplemented
    return _found(t.families("experts", t.emitter, t.tensor(args["rows_RD"]), t.tensor(args["counts_E"]), experts))


def _permute(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    x, experts = t.tensor(args["x_TD"]), t.tensor(args["experts_TK"])
    return _found(t.families("permute", t.emitter, x, experts, args["num_experts"]))


def _grouped_linear(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    weight, bias = t.name(args["weight_EOI"]), t.name(args["bias_EO"])
    if weight is None or (bias is None and args["bias_EO"] is not None):
        return NotImplemented
    rows, counts = t.tensor(args["rows_RI"]), t.tensor(args["counts_E"])
    return _found(t.families("grouped_linear", t.emitter, rows, counts, weight, bias))


def _unpermute(t: Translation, node: fx.Node, args: Mapping[str, Any]) -> Any:
    inputs = [t.tensor(value) for value in args.values()]
    return _found(t.families("unpermute", t.emitter, *inputs))


def _found(result: Any) -> Any:
    return NotImplemented if result is None else result


TABLE: dict[Any, Convert] = {
    _moe.dispatch_ffn.default: _dispatch,
    _moe.experts.default: _experts,
    _moe.permute.default: _permute,
    _moe.grouped_linear.default: _grouped_linear,
    _moe.unpermute.default: _unpermute,
}
