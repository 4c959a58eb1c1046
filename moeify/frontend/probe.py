"""What a model does in training that its eval capture does not show: attention dropout, random Python decisions."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from moeify.frontend.calling import mode, run
from moeify.frontend.inputs import Example
from moeify.frontend.meta import is_meta
from moeify.frontend.reasons import first_line

SDPA = torch.ops.aten.scaled_dot_product_attention.default
_MHA = inspect.signature(torch.nn.functional.multi_head_attention_forward)
_RANDOM = {
    torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.randint, torch.randperm, torch.bernoulli,
    torch.multinomial, torch.normal,
    torch.Tensor.bernoulli_, torch.Tensor.uniform_,
    torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.exponential_,
}  # fmt: skip


class _WatchRandomness(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.attention: list[float] = []
        self.random: list[str] = []
        self.lost = 0  # dropouts that eval code leaves out

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.attention.append(float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)))
        elif func is torch.nn.functional.multi_head_attention_forward:  # the mode does not see inside
            call = _MHA.bind(*args, **kwargs)
            call.apply_defaults()
            dropout = float(call.arguments["dropout_p"]) if call.arguments["training"] else 0.0
            if call.arguments["need_weights"]:
                self.lost += dropout > 0
            else:
                self.attention.append(dropout)
        elif func in _RANDOM:
            self.random.append(func.__name__)
        return func(*args, **kwargs)


def attention_dropout(
    module: nn.Module, graph_module: fx.GraphModule, examples: list[Example], notes: list[str]
) -> list[float]:
    """``dropout_p`` of each scaled_dot_product_attention of the graph in training, in graph order.

    Runs the model once in train mode; its buffers and the random state are put back. Zeros, and a note, where the
    number of calls in training differs from the number in the graph.
    """
    nodes = sum(node.target is SDPA for node in graph_module.graph.nodes)
    if is_meta(module):
        if nodes:
            notes.append("attention dropout in training is unknown: the weights are on the meta device")
        return [0.0] * nodes
    watch = _WatchRandomness()
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    python_state, cpu_state = random.getstate(), torch.get_rng_state()
    try:
        with torch.no_grad(), mode(module, training=True), watch:
            run(module, {e.name: e.tensor.clone() for e in examples})
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        notes.append(f"the model does not run in train mode ({reason}): dropout is unknown")
        return [0.0] * nodes
    finally:
        random.setstate(python_state)
        torch.set_rng_state(cpu_state)
        with torch.no_grad():
            for name, value in module.named_buffers():
                if name in buffers and value.shape == buffers[name].shape:
                    value.copy_(buffers[name])
    if watch.random:
        names = ", ".join(sorted(set(watch.random)))
        notes.append(f"training draws random numbers in Python ({names}), which the graph does not repeat")
    if watch.lost:
        notes.append(f"{watch.lost} nn.MultiheadAttention with need_weights: no attention dropout in the graph")
    if len(watch.attention) == nodes:
        return watch.attention
    if any(watch.attention):
        notes.append(
            f"attention dropout is off in the graph: {len(watch.attention)} calls in training, {nodes} in the graph"
        )
    return [0.0] * nodes
