"""Converting a point of the frontier, and measuring what is left of the dense model and how fast it is."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moeify.api.convert import rewrite
from moeify.api.dumps import Dumps
from moeify.api.output_kinds import PREDICTIONS, OutputKind
from moeify.api.quality import output_quality
from moeify.api.quality_report import OutputQuality
from moeify.api.quality_runs import MixtureRun, Record, Records
from moeify.api.tune_report import kept
from moeify.api.tune_stages import Stages
from moeify.api.tune_time import Clock, Timed
from moeify.api.user_data import UserData
from moeify.data import tensors
from moeify.errors import NotExportable, Refused
from moeify.ir.profile import Profile
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.ir.report import Report
from moeify.tuning.likelihood import Predicted


@dataclass
class Trial:
    """A conversion with what was measured of it on ``rows`` of a block. ``timed`` is None where it was not timed;
    ``program`` is None when a better one was found.
    """

    program: Program | None
    recipe: Recipe
    report: Report
    outputs: list[OutputQuality]
    quality: float
    rows: int
    timed: Timed | None


@dataclass
class Trials:
    """Conversions of one captured program, all held against the same records of the dense one."""

    program: Program  # as captured; every conversion starts from a clone of it
    name: str
    place: Path | None
    profile: Profile
    kinds: Sequence[OutputKind]
    records: Records
    batches: int
    clock: Clock | None
    stages: Stages
    notes: list[str]

    def run(self, recipe: Recipe) -> Trial:
        gc.collect()  # the conversion before has left cycles that hold its weights
        program = self.program.clone()
        program.recipe = recipe
        with self.stages.of("convert"):
            given = UserData(profile=self.profile)
            report = rewrite(program, given, self.name, self.stages, Dumps(), self.place)
        with self.stages.of("measure"):
            self.stages.stage("running on the test data", total=self.batches)
            run = MixtureRun(program, self.kinds)
            run.compare(self._paired(program))
            outputs = [output_quality(one) for one in run.outputs]
        quality = min(kept(outputs[at]) for at in deciding(self.kinds))
        rows = max(one.errors.rows for one in run.blocks.values())
        return Trial(program, recipe, report, outputs, quality, rows, self._time(program))

    def _paired(self, program: Program) -> Iterator[tuple[tuple[Tensor, ...], Record]]:
        for number in range(self.batches):
            record = self.records.read(number)
            yield tensors.fit(record.inputs, program.inputs, "the test data"), record
            self.stages.advance()

    def _time(self, program: Program) -> Timed | None:
        if self.clock is None:
            return None
        self.stages.stage("timing in ONNX Runtime")
        try:
            with self.stages.of("time"):
                return self.clock.time(program)
        except NotExportable as error:
            self.notes.append(f"not timed: {error.what}")
            self.clock = None
            return None


def deciding(kinds: Sequence[OutputKind]) -> list[int]:
    """The outputs that are held to a quality: scores of next tokens where there are any, else other scores, else
    embeddings, else all. Raises Refused for a model without outputs.
    """
    for wanted in (PREDICTIONS[:1], PREDICTIONS[1:], ("embeddings",), ("values",)):
        found = [at for at, one in enumerate(kinds) if one.kind in wanted]
        if found:
            return found
    raise Refused("the model has no output, so there is nothing to keep")


def predicted(kinds: Sequence[OutputKind]) -> list[Predicted]:
    """What the deciding outputs predict."""
    shapes = {"embeddings": "directions", "values": "values"}
    return [Predicted(at, shapes.get(kinds[at].kind, "scores"), kinds[at].mask) for at in deciding(kinds)]  # type: ignore[arg-type]
