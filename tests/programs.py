"""Small Programs as find-ffn leaves them, built by hand: what the tests of the later passes start from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.ir.block import Block, CallSite, WeightRef
from moeify.ir.metadata import KEY, Tag
from moeify.ir.program import InputSpec, Program
from moeify.ir.recipe import Recipe

D, F = 8, 24


class Ffn(nn.Module):
    """``x + ffn(norm(x))`` with one ``moe.ffn`` call."""

    def __init__(
        self, *, gated: bool = False, bias: bool = True, activation: str = "gelu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, F, bias=bias)
        self.gate = nn.Linear(D, F, bias=bias) if gated else None
        self.down = nn.Linear(F, D, bias=bias)
        self.activation, self.dropout = activation, dropout

    def forward(self, x: Tensor) -> Tensor:
        gate, gate_bias = (self.gate.weight, self.gate.bias) if self.gate is not None else (None, None)
        return x + torch.ops.moeify.ffn(
            self.norm(x),
            self.up.weight,
            gate,
            self.down.weight,
            self.up.bias,
            gate_bias,
            self.down.bias,
            self.activation,
            self.dropout,
            False,
        )


class CustomFfn(nn.Module):
    """An FFN whose activation has no name: PReLU, or a norm over the hidden width (``pointwise=False``)."""

    def __init__(self, *, pointwise: bool = True, channels_first: bool = False) -> None:
        super().__init__()
        self.channels_first = channels_first
        self.up = nn.Conv2d(D, F, 1) if channels_first else nn.Linear(D, F)
        self.act: nn.Module = nn.PReLU() if pointwise else nn.LayerNorm(F)
        self.down = nn.Conv2d(F, D, 1) if channels_first else nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Layers(nn.Module):
    """An embedding, FFN layers, a head. A layer that occurs twice in ``layers`` is called twice with the same
    weights."""

    def __init__(self, layers: list[nn.Module], vocabulary: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, D)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Images(nn.Module):
    """A channels-first block alone."""

    def __init__(self) -> None:
        super().__init__()
        self.block = CustomFfn(channels_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def capture(model: nn.Module, example: Tensor, dynamic: tuple[int, ...] = (0, 1)) -> Program:
    """The model as a Program without blocks."""
    shapes = (dict.fromkeys(dynamic, torch.export.Dim.AUTO),)
    with torch.enable_grad():
        exported = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes, strict=False)
    graph_module = exported.module(check_guards=False)
    shape = tuple(f"s{i}" if i in dynamic else size for i, size in enumerate(example.shape))
    return Program(graph_module, (InputSpec("x", example.dtype, shape),), (example,))  # type: ignore[arg-type]


def program(layers: list[nn.Module]) -> Program:
    """``Layers`` of named activations, with their blocks found."""
    model = Layers(layers)
    made = capture(model, torch.randint(40, (2, 5)))
    by_weight: dict[str, Block] = {}
    for node in list(made.graph.nodes):
        if node.target != torch.ops.moeify.ffn.default:
            continue
        up = node.args[1].target
        path = up.removesuffix(".up.weight")
        block = by_weight.setdefault(up, _block(model.get_submodule(path), path))
        node.meta[KEY] = Tag(block.anchor, len(block.calls), "output")
        block.calls.append(CallSite(node.args[0].name, node.name, (node.name,)))
    made.blocks = list(by_weight.values())
    made.selected = {block.anchor: True for block in made.blocks}
    return made


def plain(count: int = 1, **recipe: Any) -> Program:
    return _fresh("plain", count, recipe)


def gated(count: int = 1, **recipe: Any) -> Program:
    return _fresh("gated", count, recipe)


def with_dropout(**recipe: Any) -> Program:
    return _fresh("dropout", 1, recipe)


def shared_weights(**recipe: Any) -> Program:
    """One block, called twice."""
    return _fresh("shared weights", 1, recipe)


def custom(*, pointwise: bool = True, **recipe: Any) -> Program:
    """One block whose activation has no name."""
    return _fresh("custom" if pointwise else "custom norm", 1, recipe)


def images(**recipe: Any) -> Program:
    """One channels-first block whose activation has no name."""
    return _fresh("images", 1, recipe)


def _fresh(kind: str, count: int, recipe: dict[str, Any]) -> Program:
    """A Program of its own: captured once, copied for every test."""
    made = _captured(kind, count).clone()
    made.blocks = [copy.copy(block) for block in made.blocks]
    made.recipe = Recipe(**recipe)
    return made


@functools.cache
def _captured(kind: str, count: int) -> Program:
    torch.manual_seed(0)
    if kind == "plain":
        return program([Ffn() for _ in range(count)])
    if kind == "gated":
        return program([Ffn(gated=True, bias=False, activation="silu") for _ in range(count)])
    if kind == "dropout":
        return program([Ffn(dropout=0.1)])
    if kind == "shared weights":
        return program([Ffn()] * 2)
    if kind == "images":
        model: nn.Module = Images()
        return _custom(capture(model, torch.randn(2, D, 4, 5), (0, 2, 3)), model, "block")
    model = Layers([CustomFfn(pointwise=kind == "custom")])
    return _custom(capture(model, torch.randint(40, (2, 5))), model, "layers.0")


def _custom(made: Program, model: nn.Module, path: str) -> Program:
    layer = model.get_submodule(path)
    assert isinstance(layer, CustomFfn)
    linear = torch.ops.aten.conv2d.default if layer.channels_first else torch.ops.aten.linear.default
    nodes = list(made.graph.nodes)
    up = next(n for n in nodes if n.target == linear and n.args[1].target == f"{path}.up.weight")
    down = next(n for n in nodes if n.target == linear and n.args[1].target == f"{path}.down.weight")
    call = nodes[nodes.index(up) : nodes.index(down) + 1]
    block = _block(layer, path, activation="custom")
    block.region = _region(made, call)
    block.region_is_pointwise = isinstance(layer.act, nn.PReLU)
    block.layout = "channels-first" if layer.channels_first else "channels-last"
    block.calls.append(CallSite(up.args[0].name, down.name, tuple(n.name for n in call)))
    down.meta[KEY] = Tag(block.anchor, 0, "output")
    made.blocks = [block]
    made.selected = {block.anchor: True}
    return made


def _region(made: Program, call: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {call[0]: graph.placeholder("u")}

    def read(node: fx.Node) -> fx.Node:
        if node not in copied:
            assert node.op == "get_attr"
            copied[node] = graph.node_copy(node)
        return copied[node]

    for node in call[1:-1]:
        copied[node] = graph.node_copy(node, read)
    graph.output(copied[call[-2]])
    return fx.GraphModule(made.graph_module, graph)


def _block(layer: nn.Module, path: str, activation: str | None = None) -> Block:
    assert isinstance(layer, (Ffn, CustomFfn))
    is_gated = isinstance(layer, Ffn) and layer.gate is not None
    has_bias = layer.up.bias is not None

    def matrix(name: str) -> WeightRef:
        shape = getattr(layer, name).weight.shape
        steps = (("reshape", *shape[:2]),) if len(shape) > 2 else ()
        return WeightRef(f"{path}.{name}.weight", tuple(shape[:2]), steps)

    def bias(name: str) -> WeightRef | None:
        return WeightRef(f"{path}.{name}.bias", tuple(getattr(layer, name).bias.shape)) if has_bias else None

    return Block(
        path=path,
        anchor=path,
        calls=[],
        up=matrix("up"),
        down=matrix("down"),
        gate=matrix("gate") if is_gated else None,
        up_bias=bias("up"),
        gate_bias=bias("gate") if is_gated else None,
        down_bias=bias("down"),
        activation=activation or layer.activation,  # type: ignore[union-attr, arg-type]
        hidden_dropout=layer.dropout if isinstance(layer, Ffn) else 0.0,
    )


def outputs_before_and_after(made: Program, rewrite: Callable[[Program], None]) -> tuple[Tensor, Tensor]:
    """The program's output on its example, before and after a rewrite."""
    before = made.run(*made.example)
    rewrite(made)
    return before, made.run(*made.example)
