"""One call of one router, as those who observe a model get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moeify.nn.routers.router import Router

NOTHING, WHAT = "there are no mixtures to observe", "give what moeify.convert or moeify.load returned"


@dataclass(frozen=True)
class Observation:
    """One call of one router. ``block`` is the path of the mixture in module form and the anchor in graph form;
    ``values`` are those that ``Router`` describes, and ``inputs`` [T, D], what the router was given. ``router`` shares
    the model's tensors: what its ``after_step`` changes is changed in the model. ``training`` is the model's mode.
    """

    block: str
    router: Router
    values: Mapping[str, Tensor]
    training: bool


Keep = Callable[[Observation], None]
