"""A model of one mixture, written out, whose plan can be worked by hand."""

from __future__ import annotations

from moeify.distributed.mixtures import Mixture
from moeify.distributed.plan import Model

# D 4096, F 1024, 8 experts, top-2, gated, bfloat16, router [8, 4096]
MIXTURE = Mixture(
    path="a", anchor="a", calls=1, d_model=4096, d_out=4096, d_expert=1024, experts=8, top_k=2, matrices=3,
    expert_weights=3 * 4096 * 1024, expert_parameters=3 * 4096 * 1024, local_weights=8 * 4096,
    local_parameters=8 * 4096, item=2,
)  # fmt: skip
MODEL = Model("m", (MIXTURE,), 1000, 2000, 10**8)
