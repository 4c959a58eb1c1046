"""What each router is and can do, asked of the router itself: its options, and a small one that is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeify.errors import BadRecipe
from moeify.ir.modes import FLAGS
from moeify.nn.losses import LOSSES
from moeify.nn.losses.base import Routed
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.router import Router, RouterSpec
from moeify.nn.routers.topk import TopK
from moeify.training.blocks import updates

_D, _E, _V, _T = 8, 8, 16, 6  # width, experts, vocabulary and tokens of the router that is run
_ZERO = 1e-10  # of values about 1 in float64: what is less is rounding, on one machine 0 and on another not


@dataclass(frozen=True)
class RouterFacts:
    """Of a router with its default options.

    ``experts`` says how many a token gets; ``weights`` what they are: "1 each" (what a split with all experts on
    needs), "sum to 1" (what a copy needs to be exact), "free". ``learns`` says from what: "the loss" where a gradient
    of the model's output reaches it, the name of a loss that it cannot do without, "a fit on data" before training,
    "after_step", "nothing". ``losses`` are the router losses whose gradient reaches it. ``random`` is whether training
    draws something.
    """

    name: str
    experts: str
    weights: str
    mixes_tokens: str
    needs: str
    random: bool
    learns: tuple[str, ...]
    losses: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of ``HEADER``."""
        yes = "yes" if self.random else ""
        return (
            self.name, self.experts, self.weights, self.mixes_tokens, self.needs, yes,
            ", ".join(self.learns), ", ".join(self.losses),
        )  # fmt: skip


HEADER = ("router", "experts", "weights", "mixes tokens", "needs", "random", "learns from", "router losses")


def facts(name: str) -> RouterFacts:
    """Raises UnknownName."""
    spec: RouterSpec = ROUTERS.parse(name)
    top_k = top_k_of(spec)
    ran = _run(spec, top_k)
    needed = [loss for loss in ran.losses if LOSSES.parse(loss).needs_reward]
    learns = ["the loss"] if ran.trained else needed
    if spec.fit_with_data:
        learns.append("a fit on data")
    if updates(ran.router):
        learns.append("after_step")
    return RouterFacts(
        name,
        _experts(spec, top_k),
        "1 each" if spec.gates_are_one(2) else "sum to 1" if spec.gates_sum_to_one else "free",
        spec.mixes_tokens,
        "token ids" if spec.needs_token_ids else "a split" if isinstance(spec, TopK) else "",
        any(operator.endswith("_like") for operator in ran.operators & FLAGS.keys()),
        tuple(learns) or ("nothing",),
        tuple(ran.losses),
    )


def all_facts() -> list[RouterFacts]:
    """In the order of the table of names."""
    return [facts(name) for name in ROUTERS]


def top_k_of(spec: RouterSpec) -> int:
    """2 where the router takes that, else what it takes: one expert, or all."""
    return next(top_k for top_k in (2, 1, _E) if _takes(spec, top_k))


def _takes(spec: RouterSpec, top_k: int) -> bool:
    try:
        spec.build(_D, _E, top_k, dtype=torch.float32, vocabulary=_V)
    except BadRecipe:
        return False
    return True


def _experts(spec: RouterSpec, top_k: int) -> str:
    if top_k == _E:
        return "all"
    at_most = "at most " if spec.leaves_out(_E, _E) else ""
    return at_most + ("k" if _takes(spec, 4) else str(top_k))


@dataclass
class _Ran:
    router: Router
    operators: set[str]
    trained: bool  # whether a gradient of its weights reaches a parameter
    losses: list[str]  # those of which one does


def _run(spec: RouterSpec, top_k: int) -> _Ran:
    """The router in training mode and in float64, on a few random tokens."""
    router = spec.build(_D, _E, top_k, dtype=torch.float64, vocabulary=_V)
    made = torch.Generator().manual_seed(0)
    for parameter in router.parameters():  # away from zero, where gradients may vanish
        parameter.data.copy_(torch.randn(parameter.shape, generator=made))
    for buffer in router.buffers():
        buffer.zero_()
    values: dict[str, Tensor] = {}
    router.observer = values.update
    x_TD = torch.randn(_T, _D, generator=made).double()
    with _Operators() as ran, torch.random.fork_rng():
        _, weights_TK = router.train()(x_TD, torch.arange(_T))
    trained = _reaches((weights_TK * torch.randn(weights_TK.shape, generator=made)).sum(), router)
    routed = Routed({**values, "inputs": x_TD}, _E, reward=torch.randn(_T, generator=made))
    every = [LOSSES.parse(name) for name in LOSSES]
    losses = [one.name for one in every if set(one.reads) <= routed.values.keys() and _reaches(one.of(routed), router)]
    return _Ran(router, ran.names, trained, losses)


def _reaches(value: Tensor, router: Router) -> bool:
    parameters = list(router.parameters())
    if not value.requires_grad or not parameters:
        return False
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool((gradient.abs() > _ZERO).any()) for gradient in found)


class _Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(function._schema.name))
        return function(*args, **(kwargs or {}))
