"""A converted program to a target's file: lowered, verified on the target's runtime, and only then written."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeify.api.load import read_graph
from moeify.api.progress import Progress, Silent
from moeify.api.reporting import versions
from moeify.backends.deploy import Deployed, Deployment
from moeify.backends.onnxruntime.backend import OnnxRuntime
from moeify.data import tensors as data_files
from moeify.errors import OutputNotWritten, UsageError, VerificationFailed
from moeify.ir.export_report import ExportedCall, ExportReport
from moeify.ir.program import Program, flat
from moeify.verify.lowered import CallError, call_errors
from moeify.verify.measure import in_float32, outputs_error

# In float32 the bound is for correctness. In fewer bits, of the model or of the experts alone, it is for nonsense (a
# transposed weight gives an error of 1): what rounding costs is reported, and --tolerance holds it to what the user can
# bear. Of experts alone it is about a tenth of the bound in a block (float16 3e-4, bfloat16 2e-3, int8 7e-3), and grows
# through the layers of a model.
TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1, "int8": 1e-1, "int4": 7e-1}
# Share of tokens that may go to other experts because of a near-tie: rounding of a score is this likely to matter.
_REROUTED = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}


def export_file(
    model: str | Path,
    output: str | Path | None = None,
    backend: Deployment | None = None,
    *,
    data: str | Path | None = None,
    tolerance: float | None = None,
    measure: bool = False,
    fallback: str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """``moeify export``: lower what ``moeify convert`` wrote, verify it on the runtime, write ``output``.

    ``data`` replaces the example inputs in verification; ``fallback="split"`` lowers a block again when its first
    lowering fails verification. Raises a MoeifyError of the cause; nothing is written then.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    backend = backend or OnnxRuntime()
    _check_fallback(fallback, backend)
    path = _output_path(Path(model), Path(output) if output is not None else None, backend)
    if tolerance is None:
        tolerance = TOLERANCE[backend.precision]
    chosen = backend.chooser(tolerance)  # options that make no sense are refused before any work
    timed = backend.measured() if measure else None
    progress.stage(f"reading {model}")
    program, facts = read_graph(Path(model))
    inputs = data_files.read(data, program.inputs) if data else program.example
    dense = {block["anchor"]: block for block in facts["report"]["blocks"] if block["converted"]}
    report = ExportReport(
        model=str(model),
        backend=backend.name,
        target=backend.target,
        dtype=backend.dtype,
        tokens=backend.tokens,
        tolerance=tolerance,
        recipe=facts["recipe"],
        versions=versions() | backend.versions(),
    )
    progress.stage("running the program")
    reference = flat(program.run(*inputs))
    progress.stage(backend.TRANSLATING)
    program, notes = backend.cast(program)
    report.notes += notes
    source = backend.neutral(program)
    if timed is not None:
        progress.stage("measuring the lowerings")
        chosen = backend.chooser(tolerance, timed)
    job = _Job(backend, program, source, chosen, inputs, reference, dense, report, path, progress)
    try:
        job.attempt({})
    except _Failed as failure:
        if fallback is None or not failure.calls:
            raise failure.error from None
        report.notes.append(f"{failure.error.what}; lowered again with {fallback}")
        try:
            job.attempt(dict.fromkeys(failure.calls, fallback))
        except _Failed as again:
            raise again.error from None
    report.seconds = time.perf_counter() - started
    return report


class _Failed(Exception):
    """Verification failed; ``calls`` are those that another lowering may mend."""

    def __init__(self, error: VerificationFailed, calls: Sequence[str] = ()) -> None:
        super().__init__(error.what)
        self.error, self.calls = error, calls


@dataclasses.dataclass
class _Job:
    backend: Deployment
    program: Program
    source: Any  # the backend's form of the program before any choice
    chosen: Any  # what picks the lowering of each block
    inputs: tuple[torch.Tensor, ...]
    reference: list[torch.Tensor]
    dense: dict[str, dict[str, Any]]  # anchor -> what the conversion's report says of the block
    report: ExportReport
    path: Path
    progress: Progress

    def attempt(self, forced: dict[str, str]) -> None:
        """Lower, verify, write. Raises _Failed before anything is written."""
        self.progress.stage("lowering")
        with self.backend.lower(self.source, self.chosen, self.path, forced) as file:
            self._describe(file)
            self.progress.stage(f"verifying on {file.verified_on}")
            self._verify(file)
            self.progress.stage(f"writing {self.path}")
            self.report.output = str(self.path)
            files = file.finish(self.report)
        self.report.files = [str(one) for one in files]
        self.report.bytes = sum(one.stat().st_size for one in files)

    def _describe(self, file: Deployed) -> None:
        report = self.report
        report.provider, report.verified_on = file.provider, file.verified_on
        report.notes += [note for note in file.notes if note not in report.notes]
        report.placements = file.placements() if self.backend.target == "cuda" else []
        report.blocks = []
        for call, choice in zip(file.calls, file.choices):
            block = self.dense[call.block]
            entry = ExportedCall(
                block["path"], call.number, choice.lowering, choice.why, block["experts"], block["top_k"]
            )
            entry.warning = self.backend.slower_than_dense(block)
            report.blocks.append(entry)
        report.warnings = list(dict.fromkeys(b.warning for b in report.blocks if b.warning))

    def _verify(self, file: Deployed) -> None:
        report = self.report
        inputs = self.backend.cast_inputs(self.inputs)
        twin = dataclasses.replace(self.program, graph_module=file.module)
        with in_float32(twin) as module:
            errors = call_errors(module, file.calls, file.seen(inputs), [_wide(t) for t in inputs])
        failed = []
        for call, entry in zip(file.calls, report.blocks):
            error = errors[call.name]
            entry.relative_error, entry.rerouted = error.relative_error, error.rerouted
            if not self._agrees(error):
                failed.append((call.name, entry))
        report.rerouted = sum(entry.rerouted for entry in report.blocks)
        report.tokens_verified = sum(error.tokens for error in errors.values())
        if failed:
            raise _Failed(self._refusal(failed[0][1]), [name for name, _ in failed])
        outputs = [_wide(value) for value in file.run(inputs)]
        report.model_relative_error = outputs_error(outputs, self.reference)
        report.max_relative_error = max([report.model_relative_error, *(e.relative_error for e in errors.values())])
        # A token that went elsewhere at a near-tie moves the outputs, which is no error of the lowering; it makes no
        # NaN and no other shape.
        allowed = report.tolerance if not report.rerouted else sys.float_info.max
        if not report.model_relative_error <= allowed:
            raise _Failed(
                VerificationFailed(
                    f"every block is within {report.tolerance:.0e} of the program and the whole model is off by "
                    f"{report.model_relative_error:.1e}",
                    hint="nothing was written; --tolerance accepts more",
                )
            )
        report.verified = True

    def _agrees(self, error: CallError) -> bool:
        allowed = max(1.0, _REROUTED[self.backend.dtype] * error.tokens)
        return error.relative_error <= self.report.tolerance and error.rerouted <= allowed

    def _refusal(self, entry: ExportedCall) -> VerificationFailed:
        if entry.relative_error is not None and entry.relative_error <= self.report.tolerance:
            what = f"{entry.rerouted} tokens go to other experts than in the program"
        else:
            what = f"the relative error is {entry.relative_error:.1e}, above {self.report.tolerance:.0e}"
        mend = "".join(
            f"; --fallback {name} lowers such blocks again, --tolerance accepts more"
            for name in self.backend.FALLBACKS
            if name != entry.lowering
        )
        return VerificationFailed(
            f"the {entry.lowering} lowering fails verification: {what}",
            where=entry.path,
            hint=f"nothing was written{mend}",
        )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_fallback(fallback: str | None, backend: Deployment) -> None:
    if fallback is None or fallback in backend.FALLBACKS:
        return
    known = f"{', '.join(backend.FALLBACKS)} takes every block" if backend.FALLBACKS else "this backend has none"
    raise UsageError(f"there is no fallback {fallback!r}", hint=known)


def _output_path(model: Path, output: Path | None, backend: Deployment) -> Path:
    """``moe.onnx`` or the folder ``moe-tvm``, here, for ``moe.pt2``. Raises early what would fail at the end."""
    stem = model.name.removesuffix(".pt2")
    path = output if output is not None else Path(stem + (backend.SUFFIX or f"-{backend.name}"))
    if backend.SUFFIX and path.suffix != backend.SUFFIX:
        hint = f"write {path.with_suffix(backend.SUFFIX)}"
        raise UsageError(f"the output {path} does not end in {backend.SUFFIX}", hint=hint)
    if not path.absolute().parent.is_dir():
        raise OutputNotWritten(f"cannot write {path}: the folder {path.parent} does not exist")
    if backend.SUFFIX and path.is_dir():
        raise OutputNotWritten(f"cannot write {path}: it is a folder")
    if not backend.SUFFIX and path.exists() and not path.is_dir():
        raise OutputNotWritten(f"cannot write {path}: it is a file, and {backend.TITLE} gets a folder")
    return path
