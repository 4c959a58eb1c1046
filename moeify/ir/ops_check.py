"""The cheap checks that operators make of their arguments before they run."""

from __future__ import annotations

from torch import Tensor

WEIGHT_ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def same_dtype(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError when a tensor has another dtype than the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != first.dtype:
            raise ValueError(f"moeify::{op}: {name} is {_dtype(tensor)} and the rows are {_dtype(first)}")


def shape(op: str, name: str, tensor: Tensor | None, *sizes: int) -> None:
    """Raises ValueError when a tensor that is there has another shape."""
    if tensor is not None and tuple(tensor.shape) != sizes:
        raise ValueError(f"moeify::{op}: {name} has shape {list(tensor.shape)}, expected {list(sizes)}")


def routing(op: str, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor | None = None) -> None:
    """Raises ValueError when tokens, chosen experts and their weights do not belong together."""
    if x_TD.dim() != 2 or experts_TK.dim() != 2 or x_TD.shape[0] != experts_TK.shape[0]:
        raise ValueError(
            f"moeify::{op}: x has shape {list(x_TD.shape)} and experts {list(experts_TK.shape)}, "
            "expected [T, D] and [T, K]"
        )
    if experts_TK.dtype.is_floating_point:
        raise ValueError(f"moeify::{op}: experts are {_dtype(experts_TK)}, expected int64")
    shape(op, "weights", weights_TK, *experts_TK.shape)


def scores(op: str, scores_TE: Tensor) -> None:
    """Raises ValueError for what are no scores of at least one expert."""
    if scores_TE.dim() != 2 or not scores_TE.shape[1] or not scores_TE.dtype.is_floating_point:
        what = f"scores are {_dtype(scores_TE)} of shape {list(scores_TE.shape)}"
        raise ValueError(f"moeify::{op}: {what}, expected floats [T, E]")


def grouped_counts(op: str, counts_E: Tensor, rows: int, num_experts: int) -> None:
    """``counts`` for rows of which the last may belong to no expert."""
    shape(op, "counts", counts_E, num_experts)
    if counts_E.device.type == "cpu" and int(counts_E.sum()) > rows:
        raise ValueError(f"moeify::{op}: counts add up to {int(counts_E.sum())} and there are {rows} rows")


def counts(op: str, counts_E: Tensor, rows: int, num_experts: int) -> None:
    """Raises ValueError when the counts are not one per expert. Their sum is looked at on the CPU only."""
    shape(op, "counts", counts_E, num_experts)
    if counts_E.device.type == "cpu" and int(counts_E.sum()) != rows:
        raise ValueError(f"moeify::{op}: counts add up to {int(counts_E.sum())} and there are {rows} rows")


def expert_weights(
    op: str,
    width: int,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """Raises ValueError when the stacked weights do not fit each other or rows of this width."""
    if up.dim() != 3 or up.shape[2] != width:
        raise ValueError(f"moeify::{op}: up has shape {list(up.shape)}, expected [E, F, {width}]")
    E, F, _ = up.shape
    if down.dim() != 3 or down.shape[0] != E or down.shape[2] != F:
        raise ValueError(f"moeify::{op}: down has shape {list(down.shape)}, expected [{E}, D, {F}]")
    shape(op, "gate", gate, E, F, width)
    shape(op, "up_bias", up_bias, E, F)
    shape(op, "gate_bias", gate_bias, E, F)
    shape(op, "down_bias", down_bias, E, down.shape[1])
    if gate is None and gate_bias is not None:
        raise ValueError(f"moeify::{op}: there is a gate_bias and no gate")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
