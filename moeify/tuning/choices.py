"""What a block may become: a split that keeps a share of its hidden units on, or the dense block that it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeify.backends.onnxruntime import cost
from moeify.ir.block import Block
from moeify.ir.profile import BlockProfile

PARTS = 16  # a block is cut into at most so many
STEP = 2  # parts from one share to the next
_MOSTLY_ZERO = 0.5  # share of hidden values that are not zero, below which hidden units are taken to take turns


@dataclass(frozen=True)
class Choice:
    """Of ``parts`` equal parts ``active`` are on for a token: ``shared`` always, and ``top_k`` of the ``experts``.

    All parts on is the block left dense, without experts.
    """

    parts: int
    active: int
    experts: int = 0
    top_k: int = 0
    shared: int = 0

    @property
    def dense(self) -> bool:
        return self.active == self.parts

    def width(self, block: Block) -> int:
        """Hidden units that are on."""
        return block.d_ff * self.active // self.parts


def choices(blocks: Sequence[Block], profiles: Sequence[BlockProfile], parts: int = PARTS) -> list[Choice]:
    """Those of blocks that share a recipe: dense first, then ever fewer parts. Dense alone where their widths have no
    common divisor.

    Hidden units that are on for nearly every token (GELU, SwiGLU) switch almost independently, so that no grouping
    follows them: all parts but one are shared. Where most hidden values are zero (ReLU, squared ReLU), half are.
    """
    common = math.gcd(*(block.d_ff for block in blocks))
    count = max(number for number in range(1, parts + 1) if common % number == 0)
    active = sum(float(profile.active_F.mean()) for profile in profiles) / len(profiles)
    found = [Choice(count, count)]
    for on in range(count - STEP, 0, -STEP):
        top_k = max(1, on // 2) if active < _MOSTLY_ZERO else 1
        found.append(Choice(count, on, count - on + top_k, top_k, on - top_k))
    return found


def flops(block: Block, choice: Choice, rows: Sequence[int]) -> float:
    """Of all calls of the block, of ``rows`` tokens each, routing included: a multiply-add is two."""
    router = 0 if choice.dense else 2 * block.d_model * choice.experts
    return sum(rows) * (block.flops_per_token * choice.active / choice.parts + router)


def seconds(
    block: Block, choice: Choice, rows: Sequence[int], threads: int | None, lowerings: Sequence[str] = (cost.SPLIT,)
) -> float:
    """Expected of all calls of the block, of ``rows`` tokens each, in ONNX Runtime on a CPU (``onnxruntime.cost``).

    Routed experts are lowered to the fastest of ``lowerings``, by default to standard operators, which every block can
    be; shared ones are a dense FFN.
    """
    total = 0.0
    for tokens in rows:
        whole = cost.Shape(1, block.d_model, block.d_ff, block.d_out, 1)
        if choice.dense:
            total += cost.dense_seconds(whole, block.d_ff, block.gated, tokens, threads)
            continue
        width = block.d_ff // choice.parts
        routed = cost.Shape(choice.experts, block.d_model, width, block.d_out, choice.top_k)
        total += min(cost.seconds(name, routed, block.gated, tokens, threads) for name in lowerings)
        if choice.shared:
            total += cost.dense_seconds(whole, width * choice.shared, block.gated, tokens, threads)
    return total
