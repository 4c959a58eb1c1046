"""The frontier of a model's allocations, in shares of what the dense model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moeify.api.tune_goal import Goal
from moeify.api.tune_report import BlockChoice
from moeify.api.tune_time import Around
from moeify.errors import Refused
from moeify.ir.block import Block
from moeify.ir.profile import Profile
from moeify.tuning.allocation import Group, allocations
from moeify.tuning.choices import Choice, flops, seconds
from moeify.tuning.frontier import Point


@dataclass
class Budget:
    """``points`` go from dense to the least work: expected seconds for a speed, else FLOPs.

    Raises Refused where no split would save anything.
    """

    groups: Sequence[Group]
    around: Around
    goal: Goal
    points: list[Point] = field(init=False)

    def __post_init__(self) -> None:
        self.points = allocations(self.groups, self._seconds if self.goal.speedup is not None else self._flops)
        if len(self.points) == 1:
            raise Refused(
                f"no split of a block is expected to be faster than the dense one at {self.goal.time_tokens} tokens",
                hint="tune for more tokens, or for FLOPs with --keep",
            )

    def flops(self, point: Point) -> float:
        """Of the feed-forward blocks."""
        return self._sum(point, self._flops) / self._sum(self.points[0], self._flops)

    def time(self, point: Point) -> float:
        """Of the whole model, expected."""
        whole, dense = (self._sum(one, self._seconds) + self.around.seconds for one in (point, self.points[0]))
        return whole / dense

    def choices(self, point: Point) -> dict[str, Choice]:
        """By block path."""
        return {group.path: group.choices[option] for group, option in zip(self.groups, point.options)}

    def _sum(self, point: Point, cost: Callable[[Block, Choice], float]) -> float:
        return sum(group.cost(group.choices[option], cost) for group, option in zip(self.groups, point.options))

    def _flops(self, block: Block, choice: Choice) -> float:
        return flops(block, choice, self.around.rows[block.anchor])

    def _seconds(self, block: Block, choice: Choice) -> float:
        lowerings = self.around.lowerings[block.anchor]
        return seconds(block, choice, self.around.rows[block.anchor], self.goal.threads, lowerings)


def choices_of(groups: Sequence[Group], budget: Budget, at: int, profile: Profile) -> list[BlockChoice]:
    """What became of every block at a point."""
    made = []
    for group, option in zip(groups, budget.points[at].options):
        choice = group.choices[option]
        halves = [loss for one, loss in zip(group.choices, group.losses) if 2 * one.active == one.parts]
        for block in group.blocks:
            made.append(
                BlockChoice(
                    path=block.path,
                    d_ff=block.d_ff,
                    share=choice.active / choice.parts,
                    experts=choice.experts,
                    top_k=choice.top_k,
                    shared=choice.shared,
                    nonzero=float(profile.blocks[block.anchor].active_F.mean()),
                    loss=group.losses[option],
                    half_loss=halves[0] if halves else None,
                )
            )
    return made
