"""Hash layers: a fixed table from token ids to experts, nothing to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeify.errors import BadOption, BadRecipe, Refused
from moeify.nn.routers.router import Router, RouterSpec


@dataclass(frozen=True)
class Hash(RouterSpec):
    """The experts of a token are read from a fixed random table over token ids; equal weights."""

    name: ClassVar[str] = "hash"
    needs_token_ids: ClassVar[bool] = True

    table: str = "random"

    def __post_init__(self) -> None:
        if self.table not in ("random", "balanced"):
            raise BadOption(f"hash.table is {self.table!r}", hint="choose one of balanced, random")

    @property
    def gates_sum_to_one(self) -> bool:
        return True

    def build(
        self, d_model: int, num_experts: int, top_k: int, *, dtype: torch.dtype, vocabulary: int | None = None
    ) -> Router:
        if vocabulary is None:
            raise Refused("the hash router needs the size of the vocabulary, and there is none here")
        return HashRouter(self, num_experts, top_k, vocabulary)


class HashRouter(Router):
    """``S = table[token id]``, k different experts, ``g = 1 / k``. The table is the buffer ``table`` [V, K].

    ``random`` draws the experts of every id independently; ``balanced`` gives every expert the same number of
    ids, to within one, in each of the k columns. Ids are balanced, not occurrences: no frequencies are known
    here. Shards of one granular copy are chosen together. Roller et al., arXiv 2106.04426.
    """

    table: Tensor

    def __init__(self, spec: Hash, num_experts: int, top_k: int, vocabulary: int) -> None:
        super().__init__()
        self.spec, self.num_experts, self.top_k = spec, num_experts, top_k
        self.register_buffer("table", torch.empty(vocabulary, top_k, dtype=torch.int64))

    def reset(self, generator: torch.Generator, repeat: int = 1) -> None:
        if self.top_k % repeat:
            raise BadRecipe(f"top-k {self.top_k} is not a multiple of {repeat}")
        groups, chosen = self.num_experts // repeat, self.top_k // repeat
        make = _balanced if self.spec.table == "balanced" else _random
        group_VK = make(self.table.shape[0], groups, chosen, generator)
        members = torch.arange(repeat)
        self.table.copy_((group_VK[:, :, None] * repeat + members).flatten(1))

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if token_ids_T is None:
            raise Refused("the hash router needs token ids, and this call has none")
        experts_TK = self.table.index_select(0, token_ids_T)
        weights_TK = torch.full_like(experts_TK, 1.0 / self.top_k, dtype=x_TD.dtype)
        self.observe(experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK


def _random(rows: int, experts: int, chosen: int, generator: torch.Generator) -> Tensor:
    """``chosen`` different experts for every row, all sets equally likely."""
    columns: list[Tensor] = []
    for taken in range(chosen):
        draw = torch.randint(experts - taken, (rows,), generator=generator)
        # Skip what the row has already: counting up through its earlier experts in ascending order.
        for earlier in torch.stack(columns).sort(0).values if columns else ():
            draw = draw + (draw >= earlier)
        columns.append(draw)
    return torch.stack(columns, dim=1)


def _balanced(rows: int, experts: int, chosen: int, generator: torch.Generator) -> Tensor:
    """Like ``_random``, and every expert equally often in every column, to within one."""
    rank = torch.randperm(rows, generator=generator)
    # Ranks e*n .. e*n + e - 1 hold every remainder once; shifting all of them alike keeps the balance.
    shifts = _random(rows // experts + 1, experts - 1, chosen - 1, generator) + 1 if chosen > 1 else None
    columns = [rank % experts]
    if shifts is not None:
        columns += [(rank + shift) % experts for shift in shifts[rank // experts].unbind(1)]
    return torch.stack(columns, dim=1)
