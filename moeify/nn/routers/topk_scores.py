"""The modules of the topk and dynamic-k routers, one for each kind of score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.ir.activations import lookup
from moeify.nn.routers.choose import like, repeated_normal, softmax
from moeify.nn.routers.router import Router

Choice = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # scores [T, E], k -> experts [T, K], weights [T, K]


class TopKRouter(Router):
    """``choice`` among ``scores(x)``."""

    def __init__(self, choice: Choice, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.choice, self.num_experts, self.top_k = choice, num_experts, top_k

    def scores(self, x_TD: Tensor) -> Tensor:
        """[T, E]."""
        raise NotImplementedError(type(self).__name__)  # abstract: each one defines its own

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores_TE = self.scores(x_TD)
        experts_TK, weights_TK = self.choice(scores_TE, self.top_k)
        weights_TK = like(weights_TK, x_TD)
        if self.observer is not None:
            self.observe(logits=scores_TE, probabilities=softmax(scores_TE), experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK


class LinearTopK(TopKRouter):
    """``W x + b``: ``weight`` [E, D], ``bias`` [E], which starts at zero."""

    def __init__(
        self, choice: Choice, d_model: int, num_experts: int, top_k: int, std: float, dtype: torch.dtype
    ) -> None:
        super().__init__(choice, num_experts, top_k)
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=dtype))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        shape = (self.num_experts, self.weight.shape[1])
        with torch.no_grad():
            self.weight.copy_(repeated_normal(shape, self.std, generator, repeat, self.weight))
            self.bias.zero_()

    def scores(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight, self.bias)


class MlpTopK(TopKRouter):
    """``W relu(U x + a) + b``: ``up`` [H, D], ``up_bias`` [H], ``weight`` [E, H], ``bias`` [E].

    The first layer starts as torch.nn.Linear does, uniform in +-1/sqrt(D); the biases start at zero.
    """

    def __init__(
        self, choice: Choice, d_model: int, hidden: int, num_experts: int, top_k: int, std: float, dtype: torch.dtype
    ) -> None:
        super().__init__(choice, num_experts, top_k)
        self.std = std
        self.up = nn.Parameter(torch.empty(hidden, d_model, dtype=dtype))
        self.up_bias = nn.Parameter(torch.empty(hidden, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=dtype))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        hidden, d_model = self.up.shape
        with torch.no_grad():
            drawn = torch.rand(hidden, d_model, generator=generator).mul_(2).sub_(1).div_(math.sqrt(d_model))
            self.up.copy_(drawn)
            self.weight.copy_(repeated_normal((self.num_experts, hidden), self.std, generator, repeat, self.weight))
            self.up_bias.zero_()
            self.bias.zero_()

    def scores(self, x_TD: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x_TD, self.up, self.up_bias)), self.weight, self.bias)


class NeuronTopK(TopKRouter):
    """``sum over j of |h_{e,j}(x)|`` with ``h = act(u)`` or ``act(g) * u``: hidden units of the dense block.

    The rows of the j-th unit of every expert are ``up.{j}`` [E, D], and ``gate.{j}``, ``up_bias.{j}`` [E],
    ``gate_bias.{j}`` where the block has them. They are parameters of the router's own, filled from the block
    (``RouterSpec.recipes``); ``reset`` alone leaves zeros.
    """

    def __init__(
        self,
        choice: Choice,
        activation: str,
        roles: Sequence[str],
        representatives: int,
        d_model: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(choice, num_experts, top_k)
        self.activation = activation
        self.representatives = representatives
        for role in ("up", "gate", "up_bias", "gate_bias"):
            shape = (num_experts,) if role.endswith("bias") else (num_experts, d_model)
            drawn = [nn.Parameter(torch.empty(shape, dtype=dtype)) for _ in range(representatives)]
            self.add_module(role, nn.ParameterList(drawn) if role in roles else None)

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def scores(self, x_TD: Tensor) -> Tensor:
        score_TE = self._size(x_TD, 0)
        for j in range(1, self.representatives):
            score_TE = score_TE + self._size(x_TD, j)
        return score_TE

    def _size(self, x_TD: Tensor, j: int) -> Tensor:
        act = lookup(self.activation)
        u_TE = self._linear(x_TD, "up", j)
        return (act(u_TE) if self.gate is None else act(self._linear(x_TD, "gate", j)) * u_TE).abs()

    def _linear(self, x_TD: Tensor, role: str, j: int) -> Tensor:
        rows, bias = getattr(self, role), getattr(self, f"{role}_bias")
        return F.linear(x_TD, rows[j], None if bias is None else bias[j])
