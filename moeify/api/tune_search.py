"""Moving along the frontier by conversions, and what they say of it."""

from __future__ import annotations

import math

from moeify.api.tune_budget import Budget
from moeify.api.tune_goal import Goal
from moeify.api.tune_report import BlockChoice, FrontierPoint, TuneReport, loss_at, quality_at
from moeify.api.tune_trial import Trial, Trials
from moeify.errors import Refused
from moeify.ir.recipe import Recipe
from moeify.tuning.frontier import Point
from moeify.tuning.recipes import recipe_of
from moeify.tuning.walk import Walk

_WORTH = 0.02  # share of the dense blocks' work, or of the loss: what saves less is not worth another conversion


class Search:
    """Conversions along the frontier until one meets the goal and no better one is expected to."""

    def __init__(self, goal: Goal, base: Recipe, budget: Budget, trials: Trials, measure: str) -> None:
        self.done: dict[int, Trial] = {}  # by position on the frontier
        self._goal, self._base, self._budget, self._trials, self._measure = goal, base, budget, trials, measure
        points = budget.points[1:]
        if goal.keep is not None:
            self._order = list(range(1, len(points) + 1))
            values, bound = [point.loss for point in points], loss_at(measure, goal.keep)
        else:
            self._order = list(range(len(points), 0, -1))  # that of least work is the surest
            if goal.speedup is not None:
                # What is saved is off by a factor; of the time, all but the blocks is known.
                values, bound = [-self._saving(at) for at in self._order], 1.0 / goal.speedup - 1.0
            else:
                assert goal.flops is not None
                values, bound = [self._flops(at) for at in self._order], goal.flops
                if values[0] > bound:
                    raise Refused(
                        f"the least that splits into {goal.parts} parts leave is {values[0]:.1%} of the FLOPs",
                        hint="ask for more, or cut the blocks into more --parts",
                    )
        self._walk = Walk(values, bound)

    def run(self) -> int:
        """The position of the best point that meets the goal. Raises Refused with what was measured."""
        found = self._walk.run(self._value, self._goal.tries, self._worth)
        if found is None:
            raise self._refusal()
        for at in self._spread(self._goal.points):
            self._convert(at, f"for the frontier, {self._flops(at):.0%} of the FLOPs")
        self._forget()
        return self._order[found]

    def _value(self, position: int) -> float:
        """Converts, and gives what the goal is about: the loss that goes with the quality, or a share of time or of
        work.
        """
        at = self._order[position]
        count = f"conversion {len(self.done) + 1} of at most {self._goal.tries}"
        self._convert(at, f"{count}, {self._flops(at):.0%} of the FLOPs")
        if self._goal.keep is not None:
            return loss_at(self._measure, self.done[at].quality)
        return self._time(at) - 1.0 if self._goal.speedup is not None else self._flops(at)

    def _convert(self, at: int, text: str) -> None:
        self._forget()
        self._trials.stages.prefix = f"{text}: "
        self.done[at] = self._trials.run(self._recipe(self._budget.points[at]))
        self._trials.stages.prefix = ""

    def _forget(self) -> None:
        """Models whose weights are not to be written: all but the best."""
        best = None if self._walk.met is None else self._order[self._walk.met]
        for at, trial in self.done.items():
            if at != best:
                trial.program = None

    def _spread(self, count: int) -> list[int]:
        """So many positions that were not converted, at even steps of FLOPs down to the least."""
        left = [at for at in range(1, len(self._budget.points)) if at not in self.done]
        least = self._flops(len(self._budget.points) - 1)
        found: list[int] = []
        for step in range(1, min(count, len(left)) + 1):
            wanted = 1 - (1 - least) * step / count
            _, nearest = min((abs(self._flops(at) - wanted), at) for at in left)
            left.remove(nearest)
            found.append(nearest)
        return found

    def _flops(self, at: int) -> float:
        return self._budget.flops(self._budget.points[at])

    def _saving(self, at: int) -> float:
        """Expected, of the dense model's time."""
        return 1.0 - self._budget.time(self._budget.points[at])

    def _recipe(self, point: Point) -> Recipe:
        """``tokens`` are such that ``moeify convert`` stops reading the data where the profile did."""
        choices = self._budget.choices(point)
        split = [group for group in self._budget.groups if not choices[group.path].dense]
        blocks = self._trials.profile.blocks
        tokens = max(blocks[block.anchor].tokens for group in split for block in group.blocks)
        return recipe_of(self._base, choices, tokens)

    def _worth(self, position: int, later: int) -> bool:
        met, next_ = (self._budget.points[self._order[at]] for at in (position, later))
        if self._goal.keep is not None:
            return met.cost - next_.cost >= _WORTH * self._budget.points[0].cost
        return met.loss - next_.loss >= _WORTH * met.loss

    def _refusal(self) -> Refused:
        tried = "; ".join(
            f"{self._flops(at):.1%} of the FLOPs: {self._measure} {trial.quality:.4f}, "
            f"{1 / self._time(at):.2f} x the speed ({'measured' if trial.timed is not None else 'expected'})"
            for at, trial in sorted(self.done.items())
        )
        if self._goal.keep is not None:
            what, hint = f"keeps {self._goal.keep:g} ({self._measure})", "ask for less, or give more data to fit to"
        else:
            what = f"is {self._goal.speedup:g} x as fast at {self._goal.time_tokens} tokens"
            hint = "ask for less, or for more tokens at a time"
        return Refused(f"no split that was tried {what}. Of the dense feed-forward blocks' {tried}", hint=hint)

    def _time(self, at: int) -> float:
        timed = self.done[at].timed if at in self.done else None
        return timed.ratio if timed is not None else self._budget.time(self._budget.points[at])

    def report(
        self, at: int, model: str, source: str, tested: str, rows: dict[str, int], blocks: list[BlockChoice]
    ) -> TuneReport:
        chosen, goal, budget = self.done[at], self._goal, self._budget
        loss, saving = self._loss_factor(), self._saving_factor()
        points = []
        for number, point in enumerate(budget.points):
            trial = self.done.get(number)
            points.append(
                FrontierPoint(
                    flops=budget.flops(point),
                    loss=point.loss,
                    expected_quality=quality_at(self._measure, point.loss * loss),
                    expected_time=1.0 - saving * self._saving(number),
                    quality=None if trial is None else trial.quality,
                    measured_time=None if trial is None or trial.timed is None else trial.timed.ratio,
                    chosen=number == at,
                )
            )
        return TuneReport(
            model=model,
            goal=next(name for name in ("keep", "speedup", "flops") if getattr(goal, name) is not None),
            target=goal.keep or goal.speedup or goal.flops or 0.0,
            measure=self._measure,
            quality=chosen.quality,
            speedup=1.0 / self._time(at),
            speedup_measured=chosen.timed is not None,
            lowerings=[] if chosen.timed is None else list(chosen.timed.lowerings),
            time_tokens=goal.time_tokens,
            threads=goal.threads,
            flops=budget.flops(budget.points[at]),
            blocks=blocks,
            frontier=points,
            outputs=chosen.outputs,
            source=source,
            tested=tested,
            rows=rows,
            recipe=chosen.recipe.to_dict(),
            conversion=chosen.report,
        )

    def _loss_factor(self) -> float:
        """Measured over predicted losses of all that was converted: expected qualities are corrected by it. 1 where no
        loss was measured.
        """
        measured = sum(loss_at(self._measure, trial.quality) for trial in self.done.values())
        predicted = sum(self._budget.points[at].loss for at in self.done)
        return measured / predicted if predicted > 0 and 0 < measured < math.inf else 1.0

    def _saving_factor(self) -> float:
        """The same of the time that is saved; 1 where nothing was timed."""
        timed = {at: trial.timed.ratio for at, trial in self.done.items() if trial.timed is not None}
        predicted = sum(self._saving(at) for at in timed)
        return sum(1.0 - ratio for ratio in timed.values()) / predicted if predicted > 0 else 1.0
