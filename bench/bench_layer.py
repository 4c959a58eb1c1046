"""The eager MoE layer on the CPU, 2 threads, float32: D=768, F=3072, E=8, k=2, T=512.

Bars, inference: the layer, router included, takes at most 1.15 x the dense FFN on the same number of rows (T * k),
and SwiGLU experts take less time than transformers' Mixtral experts in both implementations. The training step (forward
and backward, all gradients) is reported without a bar.

The layer and the dense FFN run first, alone in the process, as they would in a program of their own. Then all
candidates run in turn, and the two are timed again among them: by then larger tensors have made the C library keep
freed memory, which spares the dense FFN the page faults of its 25 MB of intermediate values, about a tenth of its time.

Figures are medians, and a ratio is the median of the ratios of one round each, so that a busy neighbour weighs on both
sides.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeify.nn.moe import MoE
from moeify.nn.routers.softmax_topk import SoftmaxTopK

D, F, E, K, T = 768, 3072, 8, 2, 512
ROUNDS, WARM_UP, TRAINING_ROUNDS = 15, 1, 3
BAR = 1.15
Calls = dict[str, Callable[[], torch.Tensor]]
DENSE, LAYER, OURS = "dense FFN", "MoE layer", "SwiGLU experts"
MIXTRAL = {"eager": "Mixtral experts, eager", "grouped_mm": "Mixtral experts, grouped_mm"}


def layer(gated: bool) -> MoE:
    router = SoftmaxTopK().build(D, E, K, dtype=torch.float32)
    router.reset(torch.Generator().manual_seed(0))
    roles = ("up", "gate", "down") if gated else ("up", "down", "up_bias", "down_bias")
    return MoE(D, D, F, E, router, roles=roles, activation="silu" if gated else "gelu")


def mixtral(implementation: str, ours: MoE) -> nn.Module:
    """Mixtral's experts with the weights of ours."""
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([ours.experts.get_parameter("gate"), ours.experts.up], 1))
        experts.down_proj.copy_(ours.experts.down)
    return experts


def plain() -> Calls:
    """The dense FFN and the layer, on the same number of rows."""
    dense, moe = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)), layer(gated=False)
    x, rows = torch.randn(T, D), torch.randn(T * K, D)
    return {DENSE: lambda: dense(rows), LAYER: lambda: moe(x)}


def gated() -> Calls:
    """SwiGLU experts: ours, and transformers' with the same weights."""
    x, swiglu = torch.randn(T, D), layer(gated=True)
    with torch.no_grad():
        chosen, gates = swiglu.router(x)
    found: Calls = {
        OURS: lambda: torch.ops.moeify.dispatch_ffn(x, chosen, gates, *swiglu.experts.roles(), "silu"),
    }
    for implementation, name in MIXTRAL.items():
        experts = mixtral(implementation, swiglu)
        found[name] = lambda experts=experts: experts(x, chosen, gates)  # type: ignore[misc]
        with torch.no_grad():
            torch.testing.assert_close(found[name](), found[OURS](), rtol=1e-4, atol=1e-5)
    return found


def times(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))


def training_step(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    return lambda: call().sum().backward()


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    calls = plain()
    with torch.no_grad():
        alone = times(calls, ROUNDS)
    calls |= gated()
    with torch.no_grad():
        inference = times(calls, ROUNDS)
    training = times({name: training_step(call) for name, call in calls.items()}, TRAINING_ROUNDS)
    result: dict[str, Any] = {
        "inference_ms": {name: round(1e3 * statistics.median(v), 2) for name, v in inference.items()},
        "training_ms": {name: round(1e3 * statistics.median(v), 2) for name, v in training.items()},
        "alone_ms": {name: round(1e3 * statistics.median(v), 2) for name, v in alone.items()},
        "layer_over_dense": round(ratio(alone, LAYER, DENSE), 3),
        "layer_over_dense_among_others": round(ratio(inference, LAYER, DENSE), 3),
        "training_layer_over_dense": round(ratio(training, LAYER, DENSE), 3),
        "bar": BAR,
    }
    for implementation, name in MIXTRAL.items():
        result[f"experts_over_mixtral_{implementation}"] = round(ratio(inference, OURS, name), 3)
        result[f"training_experts_over_mixtral_{implementation}"] = round(ratio(training, OURS, name), 3)
    held = result["layer_over_dense"] <= BAR and all(result[f"experts_over_mixtral_{i}"] < 1 for i in MIXTRAL)
    result["held"] = held
    if "--json" in sys.argv:
        print(json.dumps(result))
    else:
        show(result, inference, training)
    return 0 if held else 1


def show(result: dict, inference: dict[str, list[float]], training: dict[str, list[float]]) -> None:
    table = Table(title=f"MoE layer, D={D} F={F} E={E} k={K} T={T}, float32, {torch.get_num_threads()} threads")
    for column in ("", "inference", "over base", "training step", "over base", "base"):
        table.add_column(column, justify="left" if column in ("", "base") else "right")
    pairs = [(DENSE, DENSE), (LAYER, DENSE), *((name, OURS) for name in MIXTRAL.values()), (OURS, OURS)]
    for name, base in pairs:
        table.add_row(
            name,
            f"{result['inference_ms'][name]:.1f} ms",
            f"{ratio(inference, name, base):.2f}",
            f"{result['training_ms'][name]:.1f} ms",
            f"{ratio(training, name, base):.2f}",
            base,
        )
    Console().print(table)
    verdict = "held" if result["held"] else "MISSED"
    Console().print(
        f"alone in the process: dense FFN {result['alone_ms'][DENSE]} ms, MoE layer {result['alone_ms'][LAYER]} ms, "
        f"ratio {result['layer_over_dense']} (bar {BAR})"
    )
    Console().print(f"the bar, and SwiGLU experts faster than Mixtral's: {verdict}")


if __name__ == "__main__":
    sys.exit(main())
