"""One run of tuning, from a captured program to a converted one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from moeify.api.batches import batch as batch_of
from moeify.api.convert import require_blocks
from moeify.api.output_kinds import output_kinds
from moeify.api.quality_runs import Records, dense_run
from moeify.api.tune_budget import Budget, choices_of
from moeify.api.tune_data import CHOOSE, Parts, Wanted, beside, cut, smaller
from moeify.api.tune_goal import Goal
from moeify.api.tune_report import TuneReport, measure_of
from moeify.api.tune_search import Search
from moeify.api.tune_stages import Stages
from moeify.api.tune_time import Around, Clock, around, can_measure
from moeify.api.tune_trial import Trials, deciding, predicted
from moeify.api.user_data import UserData
from moeify.data.examples import Batch, open_data
from moeify.errors import BadInputSpec, NotExportable
from moeify.fitting import profile_file
from moeify.fitting.collect import collect
from moeify.ir.profile import Profile
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.ir.weights import generator_for
from moeify.pipeline.default import FIND
from moeify.pipeline.runner import run
from moeify.tuning.allocation import estimate, groups_of
from moeify.tuning.gradients import sensitivities
from moeify.tuning.likelihood import drawn_likelihood


@dataclass
class Tuned:
    """What tuning gave: the recipe, the converted program, the profile that its split was fitted with."""

    recipe: Recipe
    program: Program
    profile: Profile
    report: TuneReport

    @property
    def graph(self) -> nn.Module:
        """The converted model as a torch.fx graph, trainable."""
        from moeify.api.load import trainable

        return trainable(self.program, self.report.conversion)


@dataclass
class Tuning:
    """The model is captured before, and once: every conversion starts from a clone of it."""

    program: Program
    name: str
    place: Path | None
    goal: Goal
    given: UserData
    recipe: Recipe  # which blocks may be split, and the seed
    stages: Stages

    def run(self) -> Tuned:
        """Raises Refused where nothing that was tried meets the goal, and what reading the data raises."""
        with self.stages.of("find"):
            self.stages.stage("finding feed-forward blocks")
            dense = self.program.clone()
            dense.recipe = self.recipe
            run(dense, FIND)
            require_blocks(dense)
            kinds = output_kinds(self.program, self.goal.classes)
            predictions = predicted(kinds)
        with self.stages.of("profile"):
            parts, source, notes = self._parts(dense)
            profile = self._profile(dense, parts, source)
        groups = groups_of(dense, profile, self.goal.parts)
        with self.stages.of("estimate"):
            self.stages.stage("measuring what each block is worth", total=len(parts.choose) + len(groups))
            labels = drawn_likelihood(predictions, generator_for(self.recipe.seed, "tuning.labels"))
            found = sensitivities(dense, parts.choose, labels, self.stages)
            estimate(groups, dense.parameter, profile.blocks, found, self.stages)
            rows = {"fit": int(profile.facts["tokens"]), "choose": max(len(one.inputs_ND) for one in found.values())}
            del found
            inputs, surroundings = self._surroundings(dense)
        budget = Budget(groups, surroundings, self.goal)
        with tempfile.TemporaryDirectory(prefix="moeify-tune-") as folder, self._clock(inputs, notes) as clock:
            records = Records(Path(folder))
            self._record(dense, parts.test, records)
            trials = Trials(
                self.program, self.name, self.place, profile, kinds, records, len(parts.test), clock, self.stages, notes
            )
            measure = measure_of(kinds[deciding(kinds)[0]].kind)
            search = Search(self.goal, self.recipe, budget, trials, measure)
            at = search.run()
        chosen = search.done[at]
        rows["test"] = chosen.rows
        report = search.report(at, self.name, source, parts.tested, rows, choices_of(groups, budget, at, profile))
        report.notes = notes
        report.stages = self.stages.seconds
        assert chosen.program is not None
        return Tuned(chosen.recipe, chosen.program, profile, report)

    def _parts(self, dense: Program) -> tuple[Parts, str, list[str]]:
        data = open_data(self.given.data, dense, self.given.options, self.place)
        test = None
        if self.goal.test is not None:
            test = open_data(self.goal.test, dense, self.given.options, self.place)
        first = next(iter(data.batches), None)
        if first is None:
            raise BadInputSpec(f"{data.source}: there is no batch in it")
        with dense_run(dense) as one:
            each = one(first).rows / _examples(first)

        def rows(batch: Batch) -> float:
            return each * _examples(batch)

        wanted = Wanted(self.goal.fit_tokens, CHOOSE, self.goal.test_tokens)
        if self.given.profile is None:
            parts = cut(data, test, rows, wanted)
        else:
            ready, name = self._given_profile()
            profile_file.check(ready, dense, name)
            parts = beside(ready, name, data, test, rows, wanted)
        counts = {spec.shape[:1] for spec in dense.inputs}  # one name where all inputs have a row per example
        if len(counts) == 1 and all(isinstance(size, str) for shape in counts for size in shape):
            choose, held = smaller(parts.choose, rows, CHOOSE), smaller(parts.test, rows, math.inf)
            parts = replace(parts, choose=choose, test=held)
        return parts, data.source, list(data.notes)

    def _given_profile(self) -> tuple[Profile, str]:
        if isinstance(self.given.profile, Profile):
            return self.given.profile, "the profile"
        path = Path(str(self.given.profile))
        return profile_file.read(path), str(path)

    def _profile(self, dense: Program, parts: Parts, source: str) -> Profile:
        if self.given.profile is not None:
            return self._given_profile()[0]
        self.stages.stage("profiling the blocks", total=len(parts.fit))
        return collect(
            dense,
            parts.fit,
            tokens=self.goal.fit_tokens,
            seed=self.recipe.seed,
            source=source,
            progress=self.stages,
        )

    def _surroundings(self, dense: Program) -> tuple[tuple[torch.Tensor, ...], Around]:
        """Inputs of about ``time_tokens`` tokens, and what the model does around its blocks on them."""
        with dense_run(dense) as one:
            made = batch_of(dense, self.goal.time_tokens, one(dense.example).rows)
            record = one(made.inputs)
        threads = self.goal.threads or torch.get_num_threads()
        return made.inputs, around(self.program, record, dense.converted(), threads)

    def _record(self, dense: Program, batches: Sequence[Batch], records: Records) -> None:
        with self.stages.of("measure"), dense_run(dense) as one:
            self.stages.stage("running the dense model on the test data", total=len(batches))
            for number, batch in enumerate(batches):
                records.add(number, one(batch))
                self.stages.advance()

    def _clock(
        self, inputs: tuple[torch.Tensor, ...], notes: list[str]
    ) -> AbstractContextManager[Clock | None, bool | None]:
        if not (self.goal.time and can_measure()):
            return nullcontext()
        self.stages.stage("exporting the dense model to ONNX Runtime")
        try:
            with self.stages.of("time"):
                return Clock(self.program, inputs, self.goal.time_tokens, self.goal.threads)
        except NotExportable as error:
            notes.append(f"not timed: {error.what}")
            return nullcontext()


def _examples(batch: Batch) -> int:
    return len(batch[0]) if batch[0].dim() else 1
