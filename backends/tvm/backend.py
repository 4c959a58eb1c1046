"""The TVM backend: options, compilation, and a staged folder that runs before it is put in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from moeify.backends.calls import Call, Seen
from moeify.backends.deploy import Choice, Deployment, one_of
from moeify.backends.tvm.machine import Machine, machine
from moeify.backends.tvm.packages import PACKAGE, require
from moeify.errors import BadOption
from moeify.ir.export_report import ExportReport
from moeify.ir.program import Program

if TYPE_CHECKING:  # tvm is imported when it is used: `moeify backends` works without it
    from moeify.backends.tvm.artefact import Stage
    from moeify.backends.tvm.families import Families
    from moeify.backends.tvm.importing import Imported
    from moeify.backends.tvm.lowering import Source

TUNED, REFERENCE = "tuned", "reference"
LOWERINGS = (TUNED, REFERENCE)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KERNELS = "fused kernels in TIR: dispatch, grouped product with activation, grouped product with weighted sum"
_GROUPED = "kernels in TIR: permutation, grouped products"
_ALONE = "TVM's all-to-all is not implemented, so a program compiled by it runs in one process"


@dataclass(frozen=True)
class Tvm(Deployment):
    """A library compiled by TVM for one machine, with fused dispatch kernels made for the model's own shapes."""

    name = "tvm"
    TITLE: ClassVar[str] = "TVM"
    TRANSLATING: ClassVar[str] = "exporting the graph"
    LOWER: ClassVar[Mapping[str, str]] = {
        "dispatch_ffn": _KERNELS,
        "permute": _GROUPED,
        "unpermute": _GROUPED,
        "grouped_linear": _GROUPED,
        "experts": _GROUPED,
        "jitter_like": "gone: ones in evaluation",
        "normal_like": "gone: zeros in evaluation",
        "gumbel_like": "gone: zeros in evaluation",
        "uniform_like": "gone: zeros in evaluation",
        "balanced_assignment": "gone: the highest score in evaluation",
        "sinkhorn": "gone: the scores themselves in evaluation",
    }
    NEVER: ClassVar[Mapping[str, str]] = {
        "ffn": "clean-up turns every dense block back into ATen operators",
        "all_to_all_rows": _ALONE,
        "all_to_all_even": _ALONE,
    }

    arch: str = ""  # of the GPU, with the cuda target
    expert_dtype: str = "float32"  # what the experts are stored in on the CPU; computed in float32
    threads: int = 0  # expected when it runs, for the warning of blocks that are slower than dense; 0: all cores
    lowering: str = ""  # forces one

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("dtype", self.dtype, ("float32", "float16") if self.target == "cuda" else tuple(DTYPES))
        one_of("expert dtype", self.expert_dtype, tuple(DTYPES))
        if self.target != "cuda" and self.dtype != "float32":
            raise BadOption(
                f"{self.dtype} needs the cuda target: on a CPU the kernels compute in float32",
                hint=f"--expert-dtype {self.dtype} stores the experts so and reads half the bytes",
            )
        if self.target == "cuda" and self.expert_dtype != "float32":
            raise BadOption(
                "on the cuda target the experts have the type of the model", hint=f"--dtype {self.expert_dtype}"
            )
        if self.target == "cuda" and self.lowering == REFERENCE:
            raise BadOption("the reference lowering is for CPUs: its kernels are plain loops", hint="--target cpu")

    @property
    def precision(self) -> str:
        return self.dtype if self.dtype != "float32" else self.expert_dtype

    def versions(self) -> dict[str, str]:
        return {PACKAGE: require()}

    def cast(self, program: Program) -> tuple[Program, list[str]]:
        if self.dtype == "float32":
            return program, []
        from moeify.backends.half import to_half

        half, report = to_half(program, DTYPES[self.dtype])
        return half, [str(report)]

    def cast_inputs(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self.dtype == "float32":
            return tuple(inputs)
        from moeify.backends.half import half_inputs

        return half_inputs(tuple(inputs), DTYPES[self.dtype])

    def slower_than_dense(self, block: Mapping[str, Any]) -> str | None:
        if self.target != "cpu":
            return None  # the constants are of this kind of CPU
        from moeify.backends.tvm import cost

        return cost.warning_of(block, self.tokens, self.threads or None, self.expert_dtype)

    def machine(self) -> Machine:
        """Raises BadOption for a target that there is not, RuntimeUnavailable without TVM."""
        require()
        return machine(self.target, self.arch)

    def chooser(self, tolerance: float, measured: Any = None) -> Machine:
        """The machine: there is one tuned lowering of a block for each, and one plain one to hold it against."""
        if self.lowering:
            one_of("lowering", self.lowering, LOWERINGS)
        found = self.machine()
        if found.kind == "cuda":
            from moeify.backends.tvm.cuda.nvcc import find_nvcc

            find_nvcc()
        return found

    def measured(self) -> Any:
        raise BadOption("there is nothing to measure: TVM has one tuned lowering", hint="leave out --measure")

    def neutral(self, program: Program) -> Source:
        self.check(program)
        require()
        from moeify.backends.tvm.lowering import source

        return source(program)

    def families(self, kind: str) -> Families:
        """The operators that this target lowers itself."""
        if self.lowering == REFERENCE:
            from moeify.backends.tvm.cpu import reference

            return reference.TABLE
        if kind == "cuda":
            from moeify.backends.tvm.cuda import table as cuda

            return cuda.table()
        from moeify.backends.tvm.cpu import table as cpu

        return cpu.table(DTYPES[self.expert_dtype])

    @contextmanager
    def lower(self, source: Source, chosen: Machine, path: Path, forced: Mapping[str, str]) -> Iterator[TvmFolder]:
        from moeify.backends.tvm import artefact

        with artefact.staged(path) as stage:
            imported, notes = self.build(source, chosen, stage)
            yield TvmFolder(self, source, imported, chosen, stage, notes)

    def build(self, source: Source, chosen: Machine, stage: Stage) -> tuple[Imported, list[str]]:
        """Import, compile and link into the staging folder; what there is to say of the kernels."""
        from moeify.backends.tvm import host, importing, linking
        from moeify.backends.tvm.header import FORMAT
        from moeify.backends.tvm.lowering import inputs_json, outputs_json, ranges_json

        link = linking.linker(chosen)
        imported = importing.import_graph(source.module, source.inputs, chosen, self.families(chosen.kind))
        header = {
            "format": FORMAT,
            "inputs": inputs_json(source.inputs),
            "outputs": outputs_json(source),
            "ranges": ranges_json(source),
            "weights": [weight.name for weight in imported.weights],
            "target": chosen.text,
            "device": chosen.kind,
            "needs": {PACKAGE: require()},
            "cpu_flags": host.flags_of(chosen.target),
        }
        executable, notes = compiled(imported, chosen)
        stage.write(executable, imported.weights, header, fcompile=link)
        return imported, notes

    def choice(self, call: Call, chosen: Machine) -> Choice:
        """What a call is lowered to, for the report."""
        if self.lowering == REFERENCE:
            return Choice(REFERENCE, "asked for")
        if len(call.nodes) > 1:
            return Choice("grouped", "the activation has no name: its own operators stand between the products")
        tile = f"tiles of {chosen.tile.rows} x {chosen.tile.columns}" if chosen.kind == "cpu" else f"for {chosen.arch}"
        stored = f", {self.expert_dtype} weights" if self.expert_dtype != "float32" else ""
        return Choice("fused", f"kernels of its own shape, {tile}{stored}")


def compiled(imported: Imported, chosen: Machine) -> tuple[Any, list[str]]:
    """The relax.VMExecutable of an imported program, and what there is to say of its kernels."""
    if chosen.kind == "cuda":
        from moeify.backends.tvm.cuda import pipeline as cuda

        built = cuda.build(imported.mod, chosen)
        registers = max(kernel.registers for kernel in built.kernels)
        shared = max(kernel.shared + kernel.asked for kernel in built.kernels)
        note = (
            f"{len(built.kernels)} CUDA kernels compiled for {chosen.arch}: at most {registers} registers a "
            f"thread by the compiler's report, and {shared} bytes of shared memory a block"
        )
        return built.executable, [note]
    from moeify.backends.tvm.cpu import pipeline as cpu

    return cpu.compile(imported.mod, chosen), []


def _twin(imported: Imported, chosen: Machine) -> Any:
    """The same Relax and TIR compiled for this machine's CPU; the threads of a GPU's kernels take turns."""
    from moeify.backends.tvm.cpu import pipeline

    here = dataclasses.replace(machine("cpu"), tile=chosen.tile)
    if chosen.kind != "cuda":
        return pipeline.compile(imported.mod, here)
    from moeify.backends.tvm.cuda.serial import serial_module

    return pipeline.compile(serial_module(imported.mod), here)


class TvmFolder:
    """A compiled program in a folder that is not at its place yet: a ``Deployed``.

    What this machine cannot run (a GPU's library without the GPU, another CPU's) is checked by its twin: the same
    Relax and TIR compiled for the CPU that is here.
    """

    def __init__(
        self,
        backend: Tvm,
        source: Source,
        imported: Imported,
        chosen: Machine,
        stage: Stage,
        notes: Sequence[str] = (),
    ) -> None:
        from moeify.backends.tvm import host
        from moeify.backends.tvm.loader import Compiled, load

        self.backend, self.stage, self.notes = backend, stage, notes
        self.module: fx.GraphModule = source.module
        self.calls: Sequence[Call] = source.calls
        self.choices: Sequence[Choice] = [backend.choice(call, chosen) for call in source.calls]
        self.provider = "cpu"
        self._runs: Compiled
        gpu = host.gpu_arch() if chosen.kind == "cuda" else None
        if gpu is not None and host.gpu_runs(chosen.arch, gpu):
            self.provider, self.verified_on = "cuda", f"this machine's GPU ({gpu})"
            self._runs = load(stage.folder)
        elif chosen.native:
            self.verified_on = "this machine's CPU"
            self._runs = load(stage.folder)
        else:
            what = "that CPU is not here"
            if chosen.kind == "cuda":
                what = "no GPU is here" if gpu is None else f"the GPU here is {gpu}"
            self.verified_on = f"this machine's CPU, compiled for it from the same TIR ({what})"
            self._runs = stage.twin(_twin(imported, chosen))

    def seen(self, inputs: Sequence[torch.Tensor]) -> dict[str, Seen]:
        from moeify.backends.tvm.observe import seen

        return seen(self._runs, self.calls, inputs)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._runs.run(list(inputs))

    def placements(self) -> list[dict[str, Any]]:
        return []  # one library: everything runs where it was compiled for

    def finish(self, report: ExportReport) -> list[Path]:
        return self.stage.finish(report.to_dict())
