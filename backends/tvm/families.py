"""The operators that a target lowers itself, and what each is given.

A target has a table of these functions; the importer calls them. Each emits into ``Emitter`` and gives the relax
variable of the result, or None to say that it does not take this case: then TVM's own operators are emitted.
Names of weights are names of parameters of the program, to be asked of ``emitter.weights``. Letters: T tokens, K
experts of a token, E experts, D and F widths, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Lower = Callable[..., Any]


@dataclass(frozen=True)
class Experts:
    """The stacked weights of one block by name: up and gate [E, F, D], down [E, O, F], biases [E, F] and [E, O]."""

    up: str
    gate: str | None
    down: str
    up_bias: str | None
    gate_bias: str | None
    down_bias: str | None
    activation: str
    num_experts: int
    d_model: int
    d_expert: int
    d_out: int


@dataclass(frozen=True)
class Families:
    """linear(emitter, x [..., D], weight, bias | None, activation="identity") -> [..., O]; weight [O, D] by name.

    matmul(emitter, a [..., M, K], b [..., K, N]) -> [..., M, N], both computed.
    attention(emitter, q [B, H, S, Dk], k [B, G, L, Dk], v [B, G, L, Dv], mask [.., S, L] float or bool | None, causal,
        scale) -> [B, H, S, Dv]; H is a multiple of G.
    layer_norm(emitter, x [..., D], weight | None, bias | None, eps); weight and bias are relax expressions [D].
    rms_norm(emitter, x [..., D], weight | None, eps).
    softmax(emitter, x) over the last axis.
    topk(emitter, scores [T, E], k) -> (values [T, K], indices [T, K] int64): the largest, descending, of equal ones
        the first, as torch.sort(stable=True, descending=True).
    route(emitter, logits [T, E], k) -> (probabilities [T, K], indices [T, K] int64): softmax over E, then topk.
    dispatch_ffn(emitter, x [T, D], experts [T, K] int64, weights [T, K], Experts) -> [T, O].
    permute(emitter, x [T, D], experts [T, K], num_experts) -> (rows [R, D], counts [E] int64, order [R] int64).
    experts(emitter, rows [R, D], counts [E], Experts) -> [R, O].
    grouped_linear(emitter, rows [R, I], counts [E], weight, bias | None) -> [R, O].
    unpermute(emitter, rows [R, D], order [R], weights [T, K]) -> [T, D].
    """

    table: Mapping[str, Lower]

    def __call__(self, name: str, emitter: Any, *args: Any, **kwargs: Any) -> Any:
        """None where the target has no lowering of that name, or has none for these arguments."""
        lower = self.table.get(name)
        return None if lower is None else lower(emitter, *args, **kwargs)
