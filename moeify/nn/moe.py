"""The mixture-of-experts layer of module form."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeify.ir.ops  # noqa: F401  defines torch.ops.moeify
from moeify.errors import UsageError
from moeify.ir.activations import lookup
from moeify.ir.ops_ffn import ffn
from moeify.nn.routers.router import Router

ROLES = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")

Layout = Literal["channels-last", "channels-first"]


class Weights(nn.Module):
    """The weights of an FFN by role, or of several stacked along a first axis; absent roles are None."""

    up: Tensor
    down: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(self, shapes: dict[str, tuple[int, ...]], **kind: torch.device | torch.dtype | None) -> None:
        super().__init__()
        for role in ROLES:
            value = nn.Parameter(torch.empty(shapes[role], **kind)) if role in shapes else None  # type: ignore[arg-type]
            self.register_parameter(role, value)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(inputs), as torch.nn.Linear."""
        for role, parameter in self.named_parameters():
            inputs = self.down.shape[-1] if role.startswith("down") else self.up.shape[-1]
            nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def roles(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The weights in the order in which operators take them."""
        return self.up, self.gate, self.down, self.up_bias, self.gate_bias, self.down_bias

    def extra_repr(self) -> str:
        return ", ".join(f"{role}={list(parameter.shape)}" for role, parameter in self.named_parameters())


class MoE(nn.Module):
    """``y = sum_k w_k * expert_k(x) [+ sigmoid(shared_gate(x)) * shared(x)] [+ output_bias]``.

    Maps ``[..., d_model]`` to ``[..., d_out]``, or ``[N, d_model, *spatial]`` to ``[N, d_out, *spatial]`` with layout
    ``channels-first``; any number of tokens, none included. An expert is ``down(act(up(x)))``, or
    ``down(act(gate(x)) * up(x))`` when ``gate`` is among the roles.

    ``roles`` names the weights an expert has: ``up`` and ``down``, and any of ``gate``, ``up_bias``, ``gate_bias``,
    ``down_bias``; the shared FFN has the same ones, or ``shared_roles``, which may differ in ``down_bias``.
    ``activation`` is a name of ``moeify.ir.activations`` or a module over rows, called with (u) or (u, g) and giving
    the hidden value, gate product included. ``hidden_dropout`` acts in training mode, and only with a named activation.
    ``shared`` is the width of the shared FFN, all always-on experts together; where it is a multiple of ``d_expert``
    the module sees rows of that width. Parameters are drawn as in torch.nn.Linear, the router's excepted; on the meta
    device they are left alone.

    Raises UsageError for arguments that contradict each other, UnknownName for an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        d_out: int,
        d_expert: int,
        num_experts: int,
        router: Router,
        *,
        roles: Collection[str] = ("up", "down"),
        activation: str | nn.Module = "gelu",
        hidden_dropout: float = 0.0,
        shared: int | None = None,
        shared_roles: Collection[str] | None = None,
        shared_gate: bool = False,
        output_bias: bool = False,
        layout: Layout = "channels-last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared_roles is not None:
            _check_shared(roles, shared_roles, shared)
        _check(roles, activation, hidden_dropout, shared, shared_gate, layout, router, num_experts)
        kind = {"device": torch.device(device) if device is not None else None, "dtype": dtype}
        self.d_model, self.d_out, self.d_expert, self.num_experts = d_model, d_out, d_expert, num_experts
        self.layout = layout
        self.hidden_dropout = hidden_dropout
        self.activation = activation if isinstance(activation, str) else "custom"
        self.region = None if isinstance(activation, str) else activation
        self.experts = Weights(_shapes(roles, (num_experts,), d_model, d_expert, d_out), **kind)
        self.router = router
        self.shared = Weights(_shapes(shared_roles or roles, (), d_model, shared, d_out), **kind) if shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False, **kind) if shared_gate else None
        self.output_bias = nn.Parameter(torch.zeros(d_out, **kind)) if output_bias else None  # type: ignore[arg-type]
        if self.experts.up.device.type != "meta":
            self.experts.reset_parameters()
            if self.shared is not None:
                self.shared.reset_parameters()

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """``token_ids`` has the shape of x without its feature axis; only routers that need it read it."""
        if self.layout == "channels-first":
            x = x.movedim(1, -1)
        x_TD = x.reshape(-1, self.d_model)
        experts_TK, weights_TK = self.router(x_TD, None if token_ids is None else token_ids.reshape(-1))
        y_TD = self._experts(x_TD, experts_TK, weights_TK)
        if self.shared is not None:
            always_TD = self._shared(x_TD, self.shared)
            if self.shared_gate is not None:
                always_TD = torch.sigmoid(self.shared_gate(x_TD)) * always_TD
            y_TD = y_TD + always_TD
        if self.output_bias is not None:
            y_TD = y_TD + self.output_bias
        y = y_TD.reshape(*x.shape[:-1], self.d_out)
        return y.movedim(-1, 1) if self.layout == "channels-first" else y

    def _experts(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        moe = torch.ops.moeify
        if self.region is None and not (self.hidden_dropout and self.training):
            return moe.dispatch_ffn(x_TD, experts_TK, weights_TK, *self.experts.roles(), self.activation)
        up, gate, down, up_bias, gate_bias, down_bias = self.experts.roles()
        rows_RD, counts_E, order_R = moe.permute(x_TD, experts_TK, self.num_experts)
        pre_up = moe.grouped_linear(rows_RD, counts_E, up, up_bias)
        pre_gate = None if gate is None else moe.grouped_linear(rows_RD, counts_E, gate, gate_bias)
        hidden_RF = self._hidden(pre_up, pre_gate)
        return moe.unpermute(moe.grouped_linear(hidden_RF, counts_E, down, down_bias), order_R, weights_TK)

    def _shared(self, x_TD: Tensor, weights: Weights) -> Tensor:
        if self.region is None:
            return ffn(x_TD, *weights.roles(), self.activation, self.hidden_dropout, self.training)
        up, gate, down, up_bias, gate_bias, down_bias = weights.roles()
        pre_up = F.linear(x_TD, up, up_bias)
        pre_gate = None if gate is None else F.linear(x_TD, gate, gate_bias)
        # The module may hold a norm or parameters over the width of one expert.
        width = self.d_expert if up.shape[0] % self.d_expert == 0 else up.shape[0]
        hidden = self._hidden(pre_up.reshape(-1, width), None if pre_gate is None else pre_gate.reshape(-1, width))
        return F.linear(hidden.reshape(pre_up.shape), down, down_bias)

    def _hidden(self, pre_up: Tensor, pre_gate: Tensor | None) -> Tensor:
        if self.region is not None:
            return self.region(pre_up) if pre_gate is None else self.region(pre_up, pre_gate)
        act = lookup(self.activation)
        hidden = act(pre_up) if pre_gate is None else act(pre_gate) * pre_up
        return F.dropout(hidden, self.hidden_dropout, self.training)

    def extra_repr(self) -> str:
        parts = [f"{self.d_model} -> {self.d_out}", f"{self.num_experts} experts of {self.d_expert}", self.activation]
        if self.hidden_dropout:
            parts.append(f"hidden_dropout={self.hidden_dropout}")
        if self.layout != "channels-last":
            parts.append(self.layout)
        return ", ".join(parts)


def _shapes(
    roles: Collection[str], stack: tuple[int, ...], d_model: int, d_hidden: int, d_out: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "up": (d_hidden, d_model),
        "gate": (d_hidden, d_model),
        "down": (d_out, d_hidden),
        "up_bias": (d_hidden,),
        "gate_bias": (d_hidden,),
        "down_bias": (d_out,),
    }
    return {role: (*stack, *shapes[role]) for role in roles}


def _check_shared(roles: Collection[str], shared_roles: Collection[str], shared: int | None) -> None:
    if not shared:
        raise UsageError("shared_roles names the weights of the shared experts, and there are none")
    # They differ in what is added once for all experts, and in nothing else.
    differing = sorted((set(roles) ^ set(shared_roles)) - {"down_bias"})
    if differing:
        raise UsageError(f"routed and shared experts differ in {differing[0]!r}: only down_bias may differ")


def _check(
    roles: Collection[str],
    activation: str | nn.Module,
    hidden_dropout: float,
    shared: int | None,
    shared_gate: bool,
    layout: str,
    router: Router,
    num_experts: int,
) -> None:
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise UsageError(f"an expert has no weight {unknown[0]!r}", hint=f"choose among {', '.join(ROLES)}")
    for role in ("up", "down"):
        if role not in roles:
            raise UsageError(f"an expert without {role!r} is no feed-forward block")
    if "gate_bias" in roles and "gate" not in roles:
        raise UsageError("an expert with a gate_bias has no gate")
    if isinstance(activation, str):
        lookup(activation)
    elif hidden_dropout:
        raise UsageError(
            f"hidden_dropout is {hidden_dropout} and the activation is a module",
            hint="put the dropout inside the module",
        )
    if shared_gate and not shared:
        raise UsageError("shared_gate gates the shared experts, and there are none")
    if layout not in ("channels-last", "channels-first"):
        raise UsageError(f"layout is {layout!r}: it must be channels-last or channels-first")
    if router.num_experts != num_experts:
        raise UsageError(f"the router chooses among {router.num_experts} experts and there are {num_experts}")
