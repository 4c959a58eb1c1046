"""What a model has to do at least: FLOPs and bytes, and the time below which no runtime can do it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from moeify.backends.calls import Call, find_calls
from moeify.ir.program import Program

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
# The stacked weights of a converted block, and what stands for them in a dense twin.
_OF_BLOCK = re.compile(rf"\.(experts|dense)\.({'|'.join(_ROLES)})$")
_LOOKED_UP = (_aten.embedding.default, _aten.index_select.default)  # these read rows of a table, not all of it


@dataclass(frozen=True)
class Peaks:
    """What the machine can do, measured: FLOP/s of a large matrix product, bytes/s read from memory."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, size: float) -> float:
        """The roofline: the longer of computing and reading."""
        return max(flops / self.flops, size / self.bandwidth)


@dataclass(frozen=True)
class FfnWork:
    """One call of a block: ``experts`` FFNs of ``weights`` elements each (a dense one: 1), of which a row goes through
    ``top_k``, and the bytes of an element.
    """

    experts: int
    top_k: int
    weights: int
    item: int

    def seconds(self, rows: int, peaks: Peaks) -> float:
        """Experts are taken to be chosen evenly: ``E * (1 - (1 - K / E) ** rows)`` of them have rows, and are read."""
        touched = self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** rows)
        return peaks.seconds(2.0 * self.weights * rows * self.top_k, touched * self.weights * self.item)


@dataclass(frozen=True)
class Rest:
    """The model without its blocks' experts, for one batch: FLOPs of its products, bytes of its weights."""

    flops: float
    bytes: float


def floor(ffns: Sequence[FfnWork], rows: Sequence[int], rest: Rest, peaks: Peaks) -> float:
    """Seconds of the whole model: a roofline for every call of a block, and one for all that is not a block."""
    blocks = sum(ffn.seconds(n, peaks) for ffn, n in zip(ffns, rows, strict=True))
    return blocks + peaks.seconds(rest.flops, rest.bytes)


def sparse_ffns(program: Program) -> list[FfnWork]:
    """The calls of converted blocks in graph order."""
    graph, found = program.graph, []
    nodes = {node.name: node for node in graph.nodes}
    for call in find_calls(graph):
        up = program.parameter(f"{call.block}.experts.up")
        top_k = nodes[call.experts].meta["val"].shape[1]
        found.append(FfnWork(up.shape[0], int(top_k), _expert_weights(program, call), up.element_size()))
    return found


def dense_ffns(sparse: Sequence[FfnWork], program: Program, d_ff: dict[str, int]) -> list[FfnWork]:
    """The same calls as they were: one FFN of the block's hidden width, by anchor in ``d_ff``."""
    found = []
    for ffn, call in zip(sparse, find_calls(program.graph), strict=True):
        width = program.parameter(f"{call.block}.experts.up").shape[1]
        found.append(FfnWork(1, 1, ffn.weights // width * d_ff[call.block], ffn.item))
    return found


def observe(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[list[int], Rest]:
    """Run once: the rows of every call, and the work outside the experts (routers and shared experts are outside)."""
    watch = _Rows(program.graph_module, find_calls(program.graph))
    # It sees ATen operators, and none inside a moe.* kernel.
    counter = FlopCounterMode(display=False, custom_mapping={_ATTENTION: _attention_flops})
    with torch.no_grad(), counter:
        watch.run(*inputs)
    return watch.rows, Rest(counter.get_total_flops(), _bytes_outside(program))


def rest_of_twin(twin: Program, dense: Sequence[FfnWork], rows: Sequence[int], inputs: Sequence[torch.Tensor]) -> Rest:
    """The same of a dense twin (see ``dense_twin``): all of it less its FFNs."""
    _, whole = observe(twin, inputs)
    ffns = sum(2.0 * ffn.weights * n for ffn, n in zip(dense, rows, strict=True))
    return Rest(whole.flops - ffns, whole.bytes)


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, out_shape: object = None, **__: object
) -> int:
    """The CPU's attention kernel, which torch's counter does not know; it knows the same one on a GPU."""
    return sdpa_flop_count(query, key, value)


class _Rows(fx.Interpreter):
    """Notes the number of rows of every call."""

    def __init__(self, module: fx.GraphModule, calls: Sequence[Call]) -> None:
        super().__init__(module)
        self._calls = {call.rows: [i for i, c in enumerate(calls) if c.rows == call.rows] for call in calls}
        self.rows = [0] * len(calls)

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        for index in self._calls.get(n.name, ()):
            assert isinstance(value, torch.Tensor)
            self.rows[index] = value.shape[0]
        return value


def _expert_weights(program: Program, call: Call) -> int:
    """Elements of the matrices of one expert."""
    names = {name for name, _ in program.graph_module.named_parameters(remove_duplicate=False)}
    stacked = [f"{call.block}.experts.{role}" for role in _ROLES[:3]]
    sizes = [program.parameter(name) for name in stacked if name in names]
    return sum(weight.numel() // weight.shape[0] for weight in sizes)


def _bytes_outside(program: Program) -> float:
    """Bytes of the weights that are read whole and belong to no expert."""
    seen: dict[int, int] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        whole = any(user.target not in _LOOKED_UP for user in node.users)
        if not whole or _OF_BLOCK.search(name):
            continue
        tensor = program.parameter(name)
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return float(sum(seen.values()))
