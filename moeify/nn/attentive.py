"""The attentive gate: experts are weighted by how their hidden values answer those of the gate.

It is no router. A router gives a token its experts before any of them has run, and only those run; this gate asks all
of them first. So it stands in a layer that computes every expert, and a router learns its weights afterwards (see
samples/mnist_gates.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class AttentiveGate(nn.Module):
    """Logits ``z_i = <W_q g, W_k h_i> / sqrt(A)``, whose softmax over the experts are their weights.

    g [T, G] are hidden values of a gate network, h_i [T, E, F] those of expert i, A is ``d_attention``; W_q [A, G] is
    ``query.weight`` and W_k [A, F], which all experts share, ``key.weight``. There are no biases: one of the keys would
    add the same to every logit.

    Krishnamurthy, Watkins, Gaertner, Improving Expert Specialization in Mixture of Experts, arXiv 2302.14703.
    """

    def __init__(self, d_gate: int, d_expert: int, d_attention: int) -> None:
        super().__init__()
        self.query = nn.Linear(d_gate, d_attention, bias=False)
        self.key = nn.Linear(d_expert, d_attention, bias=False)

    def forward(self, gate_TG: Tensor, hidden_TEF: Tensor) -> Tensor:
        query_TA, key_TEA = self.query(gate_TG), self.key(hidden_TEF)
        return torch.einsum("ta,tea->te", query_TA, key_TEA) / math.sqrt(query_TA.shape[-1])
