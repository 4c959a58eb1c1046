"""The router of experts that split a dense block: the highest scores, each with weight 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import BadOption, Refused
from moeify.ir.block import Block, WeightRef
from moeify.ir.weights import WeightRecipe
from moeify.nn.routers.choose import highest
from moeify.nn.routers.router import Router, RouterSpec, Units
from moeify.nn.routers.topk_scores import LinearTopK, MlpTopK, NeuronTopK

# By kind of score: how it may start, the usual one first.
STARTS = {
    "linear": ("centroid", "normal", "zeros", "regress", "classify"),
    "mlp": ("normal", "zeros", "regress", "classify"),
    "neuron": ("analytic", "regress", "classify"),
}
FITTED = ("regress", "classify")


@dataclass(frozen=True)
class TopK(RouterSpec):
    """The k experts of the highest scores, each with weight exactly 1, so that the parts of a split block add up.

    ``score`` is ``linear``; ``mlp``, two layers of which the first has ``hidden`` outputs and a ReLU (D2DMoE, arXiv
    2310.04361); or ``neuron``, the size of an expert's first ``representatives`` hidden units, computed from rows of
    the dense block (CMoE, arXiv 2502.04416). The weights are constants: training changes experts, and the router only
    where something fits it.

    ``init`` is how the scores start. ``centroid``: the mean direction of the expert's rows of the gate projection, or
    of up where there is none (the parameter centre of MoEfication, arXiv 2110.01786). ``analytic``: the rows of the
    representatives themselves. ``normal``: N(0, init_std^2). ``zeros``: all scores alike, so the first k are chosen.
    ``regress`` and ``classify`` start as the kind of score usually does and say what is to be fitted on data: the
    size of each expert's output, or whether the expert is among the largest. ``auto`` is the usual one, regressed where
    there are data; neuron scores stay analytic.
    """

    name: ClassVar[str] = "topk"

    score: str = "linear"
    hidden: int = 64
    representatives: int = 1
    init: str = "auto"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_at_least_zero("init_std")
        if self.score not in STARTS:
            raise BadOption(f"{self.name}.score is {self.score!r}", hint=f"choose one of {', '.join(STARTS)}")
        if self.init not in ("auto", *STARTS[self.score]):
            raise BadOption(
                f"{self.name}.init is {self.init!r}, which a score of kind {self.score} cannot start from",
                hint=f"choose one of {', '.join(STARTS[self.score])}",
            )
        for option in ("hidden", "representatives"):
            if getattr(self, option) < 1:
                raise BadOption(f"{self.name}.{option} is {getattr(self, option)}: it must be at least 1")

    def choose(self, scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """``S`` = the k highest scores, the lower expert among equals; ``g = 1``."""
        _, experts_TK = highest(scores_TE, top_k)
        return experts_TK, torch.ones_like(experts_TK, dtype=scores_TE.dtype)

    @property
    def gates_sum_to_one(self) -> bool:
        return False

    def gates_are_one(self, top_k: int) -> bool:
        return True

    @property
    def start(self) -> str:
        """What the scores start from before anything is fitted."""
        return STARTS[self.score][0] if self.init in ("auto", *FITTED) else self.init

    @property
    def fit(self) -> str | None:
        """``regress`` or ``classify`` where the scores are to be fitted."""
        return self.init if self.init in FITTED else None

    @property
    def fit_with_data(self) -> str | None:
        """The same where there are data, which ``auto`` makes use of."""
        return "regress" if self.init == "auto" and self.score != "neuron" else self.fit

    def for_block(self, block: Block) -> RouterSpec:
        if self.score != "neuron":
            return self
        if block.region is not None:
            raise Refused(
                "the neuron score computes hidden units in the router, and the block's activation has no name",
                where=block.path,
                hint=f"use --router {self.name}{{score=linear}}",
            )
        return _OfBlock(self, block.activation, tuple(role for role in block.weights if not role.startswith("down")))

    def recipes(self, block: Block, units: Units | None, dtype: torch.dtype) -> list[WeightRecipe]:
        if self.start not in ("centroid", "analytic"):
            return []
        if units is None:
            raise Refused(
                f"the {self.start} start of {self.name} needs experts that are parts of the dense block",
                where=block.path,
                hint="use a method that splits it, or another router: its experts are whole, and "
                f"{self.name}'s weights are 1",
            )
        if self.start == "centroid":
            return [_centroid(block, units, dtype)]
        if self.representatives > units.width:
            raise BadOption(
                f"{self.name}.representatives is {self.representatives}, and an expert has {units.width} hidden units",
                where=block.path,
            )
        roles = [(role, ref) for role, ref in block.weights.items() if not role.startswith("down")]
        return [_rows(block, role, ref, units, j, dtype) for role, ref in roles for j in range(self.representatives)]

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        if self.score == "neuron":
            raise Refused("the neuron score computes hidden units of a block, and no block is given")
        std = self.init_std if self.start == "normal" else 0.0
        if self.score == "linear":
            return LinearTopK(self.choose, d_model, num_experts, top_k, std, dtype)
        return MlpTopK(self.choose, d_model, self.hidden, num_experts, top_k, std, dtype)


@dataclass(frozen=True)
class _OfBlock(RouterSpec):
    """The options with what the neuron score needs of its block; ``roles`` are those of ``Block.weights``."""

    spec: TopK
    activation: str
    roles: tuple[str, ...]

    @property
    def fit_with_data(self) -> str | None:
        return self.spec.fit_with_data

    def recipes(self, block: Block, units: Units | None, dtype: torch.dtype) -> list[WeightRecipe]:
        return self.spec.recipes(block, units, dtype)

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        return NeuronTopK(
            self.spec.choose,
            self.activation,
            self.roles,
            self.spec.representatives,
            d_model,
            num_experts,
            top_k,
            dtype,
        )


def _centroid(block: Block, units: Units, dtype: torch.dtype) -> WeightRecipe:
    ref = block.gate or block.up

    def compute(weight: Tensor) -> Tensor:
        rows_FD = F.normalize(weight.float(), dim=1)
        return F.normalize(torch.stack([rows_FD[members].mean(0) for members in units.find().to(weight.device)]), dim=1)

    shape = (units.num_experts, ref.shape[1])
    return WeightRecipe(f"{block.anchor}.router.weight", shape, (ref,), compute, dtype)


def _rows(block: Block, role: str, ref: WeightRef, units: Units, j: int, dtype: torch.dtype) -> WeightRecipe:
    def compute(weight: Tensor) -> Tensor:
        return weight[units.find()[:, j].to(weight.device)]

    shape = (units.num_experts, *ref.shape[1:])
    return WeightRecipe(f"{block.anchor}.router.{role}.{j}", shape, (ref,), compute, dtype)
