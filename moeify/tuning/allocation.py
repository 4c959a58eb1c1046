"""The blocks of a program with all that each may become, and the allocations that are worth having."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moeify.errors import Refused
from moeify.experts.cutting import check_can_be_cut
from moeify.fitting.collect import Steps
from moeify.ir.block import Block
from moeify.ir.profile import BlockProfile, Profile
from moeify.ir.program import Program
from moeify.tuning import pruning
from moeify.tuning.choices import Choice, choices
from moeify.tuning.frontier import Option, Point, frontier
from moeify.tuning.gradients import Sensitivity


@dataclass
class Group:
    """Blocks of one module path, for which a recipe cannot say different things. ``losses`` go with ``choices``."""

    path: str
    blocks: list[Block]
    choices: list[Choice]
    losses: list[float] = field(default_factory=list)

    def cost(self, choice: Choice, of: Callable[[Block, Choice], float]) -> float:
        return sum(of(block, choice) for block in self.blocks)


def groups_of(program: Program, profile: Profile, parts: int) -> list[Group]:
    """The selected blocks in graph order; dense is the only choice of those that cannot be cut.

    Raises Refused where none can.
    """
    by_path: dict[str, list[Block]] = {}
    for block in program.converted():
        by_path.setdefault(block.path, []).append(block)
    made, reasons = [], []
    for path, blocks in by_path.items():
        found = choices(blocks, [profile.blocks[block.anchor] for block in blocks], parts)
        try:
            for block in blocks:
                check_can_be_cut(block, "experts")
        except Refused as refusal:
            reasons.append(f"{path or 'the model'}: {refusal.what}")
            found = found[:1]
        if len(found) == 1 and not reasons:
            reasons.append(f"{path or 'the model'}: {blocks[0].d_ff} hidden units do not split into equal parts")
        made.append(Group(path, blocks, found))
    if all(len(group.choices) == 1 for group in made):
        raise Refused("none of the feed-forward blocks can be split", where=reasons[0])
    return made


def estimate(
    groups: Sequence[Group],
    read: Callable[[str], Tensor],
    profiles: Mapping[str, BlockProfile],
    sensitivities: Mapping[str, Sensitivity],
    progress: Steps | None = None,
) -> None:
    """Fill in the expected loss of every choice: sums over the blocks of a group."""
    for group in groups:
        group.losses = [0.0] * len(group.choices)
        for block in group.blocks if len(group.choices) > 1 else ():
            widths = [choice.width(block) for choice in group.choices[1:]]
            found = pruning.losses(block, read, profiles[block.anchor], sensitivities[block.anchor], widths)
            group.losses = [a + b for a, b in zip(group.losses, [0.0, *found])]
        if progress is not None:
            progress.advance()


def allocations(groups: Sequence[Group], cost: Callable[[Block, Choice], float]) -> list[Point]:
    """``frontier`` of the groups for a cost of each block."""
    return frontier(
        [
            [Option(loss, group.cost(choice, cost)) for choice, loss in zip(group.choices, group.losses)]
            for group in groups
        ]
    )
