"""``moe.ffn``: one dense FFN, what find-ffn leaves in the place of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moeify.ir.activations import lookup
from moeify.ir.ops_library import define_composite


def ffn(
    x: Tensor,
    up_FD: Tensor,
    gate_FD: Tensor | None,
    down_DF: Tensor,
    up_bias_F: Tensor | None,
    gate_bias_F: Tensor | None,
    down_bias_D: Tensor | None,
    activation: str,
    hidden_dropout: float = 0.0,
    train: bool = False,
) -> Tensor:
    """``x [..., D]`` to ``[..., D_out]``; the hidden value is dropped out with ``hidden_dropout`` when ``train``."""
    act = lookup(activation)
    hidden = F.linear(x, up_FD, up_bias_F)
    if gate_FD is None:
        hidden = act(hidden)
    else:
        hidden = act(F.linear(x, gate_FD, gate_bias_F)) * hidden
    if hidden_dropout and train:
        hidden = F.dropout(hidden, hidden_dropout, True)
    return F.linear(hidden, down_DF, down_bias_D)


define_composite(
    "ffn(Tensor x, Tensor up, Tensor? gate, Tensor down, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, "
    "str activation, float hidden_dropout=0.0, bool train=False) -> Tensor",
    ffn,
)
