"""A split block after the rewrite, computed unit by unit from its own weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.experts.base import ExpertPlan
from moeify.ir.block import Block, WeightRef
from moeify.ir.hidden import hidden


@dataclass(frozen=True)
class Mixture:
    """``y = sum over the chosen e of g_e (W_e h_e + b_e) + W_s h_s + b``, in float32, with copies of the weights.

    The F hidden units stand in the order of the experts, the shared ones last: ``down_DF`` holds W_e and W_s side by
    side, ``expert_F`` the expert of each unit, E for the shared ones. Biases are None where the block has none.
    """

    dense: Block  # its weights in that order, read by role
    weights: dict[str, Tensor]  # by role: up, gate and their biases
    down_DF: Tensor
    down_bias_ED: Tensor | None
    output_bias_D: Tensor | None
    expert_F: Tensor
    experts: int

    @classmethod
    def of(cls, block: Block, plan: ExpertPlan, read: Callable[[str], Tensor]) -> Mixture:
        """``read`` gives a parameter of the rewritten program by its full name."""
        weights: dict[str, Tensor] = {}
        for role in plan.weights:
            if not role.startswith("down"):
                parts = [read(plan.weights[role].name).flatten(0, 1)]
                parts += [read(plan.shared[role].name)] if plan.shared else []
                weights[role] = torch.cat(parts).float()
        down = [read(plan.weights["down"].name).transpose(0, 1).flatten(1)]
        down += [read(plan.shared["down"].name)] if plan.shared else []
        down_DF = torch.cat(down, 1).float()
        routed = plan.num_experts * plan.d_expert
        expert_F = torch.arange(down_DF.shape[1], device=down_DF.device) // plan.d_expert
        expert_F[routed:] = plan.num_experts
        refs = {role: WeightRef(role, tuple(value.shape)) for role, value in weights.items()}
        dense = dataclasses.replace(block, **refs)  # type: ignore[arg-type]
        down_bias = plan.weights.get("down_bias")
        return cls(
            dense,
            weights,
            down_DF,
            None if down_bias is None else _copy(read(down_bias.name)),
            None if plan.output_bias is None else _copy(read(plan.output_bias.name)),
            expert_F,
            plan.num_experts,
        )

    def hidden(self, x_ND: Tensor) -> Tensor:
        """h [N, F]."""
        return hidden(self.dense, self.weights.__getitem__, x_ND)

    def output(self, h_NF: Tensor, gates_NE: Tensor) -> Tensor:
        """y [N, D]. Gates of 1 throughout give the dense block."""
        y_ND = (h_NF * self.per_unit(gates_NE)) @ self.down_DF.t()
        if self.down_bias_ED is not None:
            y_ND += gates_NE @ self.down_bias_ED
        return y_ND if self.output_bias_D is None else y_ND + self.output_bias_D

    def per_unit(self, gates_NE: Tensor) -> Tensor:
        """The gate of each hidden unit [N, F], 1 for the shared ones."""
        return torch.cat([gates_NE, gates_NE.new_ones(len(gates_NE), 1)], 1)[:, self.expert_F]

    def sizes(self, h_NF: Tensor) -> Tensor:
        """``|W_e h_e + b_e|`` of every expert [N, E]: by how much the block's output changes when it is left out."""
        sizes = []
        for expert in range(self.experts):
            units = self.expert_F == expert
            out_ND = h_NF[:, units] @ self.down_DF[:, units].t()
            if self.down_bias_ED is not None:
                out_ND += self.down_bias_ED[expert]
            sizes.append(out_ND.norm(dim=1))
        return torch.stack(sizes, 1)


def _copy(value: Tensor) -> Tensor:
    return value.to(torch.float32, copy=True)
