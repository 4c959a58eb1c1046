"""What find-ffn says about one dense feed-forward block, and what near misses it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class WeightRef:
    """A dense weight by parameter name, and the views that bring it into canonical layout.

    Canonical layout is ``[out, in]`` for matrices and ``[out]`` for biases, as in ``torch.nn.Linear``. ``steps`` are
    applied in order: ``("t",)`` transposes a matrix, ``("reshape", *sizes)``, ``("permute", *dims)`` and ``("slice",
    dim, start, stop, step)`` do what their names say.
    """

    parameter: str
    shape: tuple[int, ...]  # of the canonical weight
    steps: tuple[tuple[Any, ...], ...] = ()

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The canonical view of the parameter's value."""
        for op, *args in self.steps:
            if op == "t":
                tensor = tensor.t()
            elif op == "reshape":
                tensor = tensor.reshape(args)
            elif op == "permute":
                tensor = tensor.permute(args)
            elif op == "slice":
                dim, start, stop, step = args
                tensor = tensor[(slice(None),) * dim + (slice(start, stop, step),)]
            else:
                raise AssertionError(f"unknown view step {op!r}")
        return tensor


@dataclass(frozen=True)
class CallSite:
    """One call of a block: names of nodes of the graph that find-ffn leaves.

    ``input`` is the tensor the up linear reads and ``output`` the node whose readers read the FFN's result; both have
    shape ``[..., D]`` (``[N, D, *spatial]`` when the block's ``layout`` is ``channels-first``). For a block with
    ``region`` (an activation without a name) the nodes of the call stand in the graph as they were captured, listed
    in ``nodes`` in graph order; for all others ``output`` is one ``moe.ffn`` node and ``nodes`` is ``(output,)``.
    """

    input: str
    output: str
    nodes: tuple[str, ...] = ()


@dataclass
class Block:
    """One dense FFN: ``y = down(act(up(x)))`` or, gated, ``y = down(act(gate(x)) * up(x))``, biases optional.

    ``path`` is the deepest module that holds the whole block, for people; ``anchor`` the module path under which the
    new parameters live in both forms of the result (``{anchor}.experts.up``, ``{anchor}.router.weight``, ...).
    ``owner`` is the path of a submodule that holds this block and nothing else, so that module form can replace it,
    or None; ``linears`` are the module paths of the up (gate) and down layers where modules hold them.
    """

    path: str
    anchor: str
    calls: list[CallSite]
    up: WeightRef
    down: WeightRef
    gate: WeightRef | None = None
    up_bias: WeightRef | None = None
    gate_bias: WeightRef | None = None
    down_bias: WeightRef | None = None
    activation: str = "identity"  # a name of ir.activations, or "custom" when `region` holds it
    region: fx.GraphModule | None = None  # (u_RF[, g_RF]) -> h_RF over rows; reads other parameters by get_attr
    region_is_pointwise: bool = True  # False: a norm over F inside; such a block cannot be cut along F
    hidden_dropout: float = 0.0  # of the hidden value; blocks with region keep theirs inside it
    layout: str = "channels-last"  # or "channels-first" (1x1 convolutions)
    rows: str = "token"  # "token", "sample" (one row per example) or "channel" (token-mixing MLP)
    owner: str | None = None
    output_dropout: float = 0.0  # of the result, inside ``owner``: module form must keep it
    linears: tuple[str, ...] = ()
    source: str | None = None  # the user's own file:line
    reason: str | None = None  # why it may not be rewritten (by default); None: it may
    notes: list[str] = field(default_factory=list)

    @property
    def d_model(self) -> int:
        return self.up.shape[1]

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    @property
    def d_out(self) -> int:
        return self.down.shape[0]

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def weights(self) -> dict[str, WeightRef]:
        """The block's weights by role (``up``, ``gate``, ``down``, ``up_bias``, ``gate_bias``, ``down_bias``), absent
        ones left out.
        """
        roles = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
        return {role: ref for role in roles if (ref := getattr(self, role)) is not None}

    @property
    def parameters(self) -> int:
        """Number of parameters of the dense block."""
        return sum(_numel(ref.shape) for ref in self.weights.values())

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds of the linear layers counted as two, biases and activation left out."""
        return 2 * sum(_numel(ref.shape) for role, ref in self.weights.items() if not role.endswith("bias"))


@dataclass(frozen=True)
class NearMiss:
    """A place that looks like an FFN and is not one, with the reason in one line."""

    path: str
    reason: str
    source: str | None = None


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
