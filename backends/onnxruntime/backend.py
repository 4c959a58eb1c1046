"""The ONNX Runtime backend: options, the choice of lowerings, and a staged file that runs before it is written."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from moeify.backends.calls import Call, Seen
from moeify.backends.deploy import Choice, Deployment, one_of
from moeify.backends.onnxruntime.kernel_names import EXPERT_DTYPES
from moeify.errors import BadOption, RuntimeUnavailable
from moeify.ir.export_report import ExportReport
from moeify.ir.program import Program

if TYPE_CHECKING:  # onnx and the runtime are imported when they are used: `moeify backends` works without them
    from moeify.backends.onnxruntime.lowering import Choose, Lowered, Lowering, Neutral
    from moeify.backends.onnxruntime.mixture import Mixture
    from moeify.backends.onnxruntime.save import Staged

NEEDS = "1.31"  # the version that the operators' attributes and kernels were tested with
TARGETS = ("cpu", "cuda", "portable")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0}
_SCALE_BYTES = 4.0
_HALF_ON_CPU = (
    "ONNX Runtime computes float16 on the CPU in float32, with casts: the file is smaller and not faster there; 1.31 "
    "can crash on such a file unless its optimizer NchwcTransformer is disabled, as moeify's Session does"
)
_SPLIT = "standard ONNX: rows split by expert, one pair of Gemm nodes an expert"


@dataclass(frozen=True)
class OnnxRuntime(Deployment):
    """ONNX at opset 23 for ONNX Runtime: standard operators or moeify's fused kernel on the CPU, com.microsoft.MoE and
    QMoE on CUDA.
    """

    name = "onnxruntime"
    TITLE: ClassVar[str] = "ONNX Runtime"
    SUFFIX: ClassVar[str] = ".onnx"
    FALLBACKS: ClassVar[tuple[str, ...]] = ("split",)
    TRANSLATING: ClassVar[str] = "translating to ONNX"
    LOWER: ClassVar[Mapping[str, str]] = {
        "dispatch_ffn": f"{_SPLIT}; moeify's own kernel, com.microsoft.MoE or QMoE where they express it and are "
        "faster",
        "permute": _SPLIT,
        "unpermute": _SPLIT,
        "grouped_linear": _SPLIT,
        "experts": _SPLIT,
        "jitter_like": "gone: ones in evaluation",
        "normal_like": "gone: zeros in evaluation",
        "gumbel_like": "gone: zeros in evaluation",
        "uniform_like": "gone: zeros in evaluation",
        "balanced_assignment": "gone: the highest score in evaluation",
        "sinkhorn": "gone: the scores themselves in evaluation",
    }
    NEVER: ClassVar[Mapping[str, str]] = {"ffn": "clean-up turns every dense block back into ATen operators"}

    bits: int = 0  # of quantised expert weights: 8, 4, or 0 for none
    expert_dtype: str = ""  # what the kernel lowering stores experts in; by default the model's type
    threads: int = 0  # 0: all cores
    lowering: str = ""  # forces one

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("target", self.target, TARGETS)
        one_of("dtype", self.dtype, tuple(DTYPES))
        one_of("bits", str(self.bits), ("0", "4", "8"))
        if self.bits and (self.target != "cuda" or self.dtype == "float32"):
            raise BadOption(
                f"quantised experts need the cuda target and float16 or bfloat16, not {self.target} and {self.dtype}",
                hint="--target cuda --dtype float16; ONNX Runtime puts QMoE in float32 on the CPU without a word",
            )
        if self.expert_dtype:
            self._check_expert_dtype()
        if self.dtype == "bfloat16" and self.target != "cuda":
            raise BadOption(
                f"bfloat16 needs the cuda target, not {self.target}: ONNX Runtime's CPU provider has no kernels for it",
                hint="--target cuda, or --dtype float16",
            )

    def _check_expert_dtype(self) -> None:
        one_of("expert dtype", self.expert_dtype, tuple(EXPERT_DTYPES))
        if self.target != "cpu":
            raise BadOption(
                f"the kernel lowering, which stores experts in a type of their own, is for cpu, not {self.target}",
                hint="--dtype float16 or bfloat16, or --bits 8 or 4" if self.target == "cuda" else "--target cpu",
            )
        if self.lowering not in ("", "kernel"):
            raise BadOption(
                f"the {self.lowering} lowering does not store experts as {self.expert_dtype}",
                hint="leave out --lowering: --expert-dtype asks for the kernel lowering",
            )

    @property
    def precision(self) -> str:
        if self.bits:
            return f"int{self.bits}"
        return max(self.dtype, self._storage()[0] or self.dtype, key=list(_WEIGHT_BYTES).index)  # digits fall

    def versions(self) -> dict[str, str]:
        """Of the packages that have a say in what is written."""
        _require_packages()
        return {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript")} | {
            "onnxruntime": importlib.import_module("onnxruntime").__version__
        }

    def cast(self, program: Program) -> tuple[Program, list[str]]:
        """The program in the wanted type, and what that did to it. Raises Refused for weights that overflow."""
        if self.dtype == "float32":
            return program, []
        from moeify.backends.half import to_half

        half, report = to_half(program, DTYPES[self.dtype])
        return half, [str(report)] if self.target == "cuda" else [str(report), _HALF_ON_CPU]

    def cast_inputs(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The inputs of a program in the types of one that ``cast`` gave."""
        if self.dtype == "float32":
            return tuple(inputs)
        from moeify.backends.half import half_inputs

        return half_inputs(tuple(inputs), DTYPES[self.dtype])

    def slower_than_dense(self, block: Mapping[str, Any]) -> str | None:
        """A warning when a block will take longer than the dense one did; ``block`` is a BlockReport as dict."""
        if self.target == "cuda":
            return None  # the constants are of CPUs; no GPU has been timed
        from moeify.backends.onnxruntime import cost
        from moeify.backends.roofline import Shape

        shape = Shape(block["experts"], block["d_model"], block["d_expert"], block["d_model"], block["top_k"])
        storage, sharing = self._storage()
        stored = _WEIGHT_BYTES[storage or "float32"] + (_SCALE_BYTES / sharing if sharing else 0.0)
        lowerings = [cost.SPLIT, cost.CONTRIB, *([cost.KERNEL] if self._has_library() else [])]
        if self.expert_dtype or self.lowering == cost.KERNEL:
            lowerings = [cost.KERNEL]
        return cost.warning(
            shape,
            block["d_ff"],
            block["gated"],
            self.tokens,
            self.threads or None,
            lowerings=lowerings,
            weight_bytes=stored,
        )

    def neutral(self, program: Program) -> Neutral:
        """The program in ONNX, before any choice. Raises Refused, NotExportable or RuntimeUnavailable."""
        self.check(program)
        _require_packages()
        from moeify.backends.onnxruntime.lowering import neutral

        return neutral(program)

    def chooser(self, tolerance: float, measured: Any = None) -> Choose:
        """Picks the lowering of each block. Raises UnknownName or BadOption for a ``lowering`` that makes no sense."""
        _require_packages()
        from moeify.backends.onnxruntime import choose

        if self.dtype == "bfloat16" and self.provider() != "cuda":
            raise RuntimeUnavailable(
                "a bfloat16 file cannot be verified here: the CUDA provider is not usable and the CPU provider has no "
                "kernels for it",
                hint="export it on a machine with CUDA, or --dtype float16",
            )
        return choose.chooser(
            self.target,
            tokens=self.tokens,
            threads=self.threads or None,
            dtype=self.dtype,
            bits=self.bits or None,
            storage=self.expert_dtype,
            has_library=self._has_library(),
            tolerance=tolerance,
            forced=self.lowering or None,
            measured=measured,
        )

    def measured(self) -> Any:
        """What times the lowerings of a block on this machine, for ``chooser``."""
        from moeify.backends.onnxruntime import measure

        return measure.measure(self._table(), tokens=self.tokens, threads=self.threads or None)

    @contextmanager
    def lower(self, source: Neutral, chosen: Choose, path: Path, forced: Mapping[str, str]) -> Iterator[OnnxFile]:
        """Lower a copy and stage a file at ``path``; it is written by ``OnnxFile.finish`` and not before.

        ``forced`` names the lowering of some calls, by ``Call.name``. Raises OutputNotWritten, Refused.
        """
        from moeify.backends.onnxruntime.lowering import lower
        from moeify.backends.onnxruntime.save import staged
        from moeify.backends.onnxruntime.session import DTYPE_KEY

        def pick(mixture: Mixture) -> Choice:
            by_name = forced.get(mixture.call.name)
            return Choice(by_name, "its first lowering failed verification") if by_name else chosen(mixture)

        lowered = lower(source, pick, self._table())
        lowered.model.metadata_props[DTYPE_KEY] = self.dtype  # a Session reads it, in verification too
        with staged(lowered.model, path) as file:
            yield OnnxFile(lowered, file, self.provider(), self.threads or None)

    def provider(self) -> str:
        """Where the file is verified: on CUDA when that is the target and it is usable here, else on the CPU."""
        from moeify.backends.onnxruntime.session import cuda_is_usable

        return "cuda" if self.target == "cuda" and cuda_is_usable() else "cpu"

    def _has_library(self) -> bool:
        from moeify.backends.onnxruntime import kernel_library

        return self.target == "cpu" and kernel_library.is_built()

    def _storage(self) -> tuple[str, int]:
        """What the kernel lowering stores experts in, and inputs to a scale; "" is the model's own type."""
        return EXPERT_DTYPES[self.expert_dtype] if self.expert_dtype else ("", 0)

    def _table(self) -> Mapping[str, Lowering]:
        from moeify.backends.onnxruntime import choose, contrib, kernel, portable, qmoe, split

        storage, block = self._storage()
        return {
            choose.SPLIT: split.lower,
            choose.KERNEL: functools.partial(kernel.lower, storage=storage, block=block),
            choose.CONTRIB: portable.lower if self.target == "portable" else contrib.lower,
            choose.QMOE: functools.partial(qmoe.lower, bits=self.bits, block=None),
        }


class OnnxFile:
    """A lowered model in a file that is not at its place yet: a ``Deployed``."""

    def __init__(self, lowered: Lowered, file: Staged, provider: str, threads: int | None) -> None:
        self.lowered, self.file = lowered, file
        self.module: fx.GraphModule = lowered.module
        self.calls: Sequence[Call] = lowered.calls
        self.choices: Sequence[Choice] = lowered.choices
        self.provider, self.threads = provider, threads
        self.notes, on = _kernel_notes(lowered)
        self.verified_on = f"ONNX Runtime's {provider} provider{on}"

    def seen(self, inputs: Sequence[torch.Tensor]) -> dict[str, Seen]:
        """What the runtime computes in every call, by ``Call.name``."""
        from moeify.backends.onnxruntime.session import Session

        taps = self.lowered.taps
        names = list(dict.fromkeys(name for tap in taps for name in (tap.rows, tap.experts, tap.output)))
        session = Session(self.file.with_outputs(names), provider=self.provider, threads=self.threads)
        values = dict(zip(session.output_names, session.run(inputs)))
        values |= dict(zip(session.input_names, inputs))  # rows can be an input of the model
        for name, value in self.file.model.graph.initializers.items():
            if name in names:  # so can experts be constants, where every token gets all and their number is fixed
                assert value.const_value is not None
                values[name] = torch.from_numpy(value.const_value.numpy().copy())
        return {
            call.name: Seen(values[tap.rows], values[tap.experts], values[tap.output])
            for call, tap in zip(self.lowered.calls, taps)
        }

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of the file as it will be deployed."""
        from moeify.backends.onnxruntime.session import Session

        return Session(self.file.file, provider=self.provider, threads=self.threads).run(inputs)

    def placements(self) -> list[dict[str, Any]]:
        """The nodes that the CUDA provider will not take, with the reasons."""
        from moeify.backends.onnxruntime.readiness import placements

        found = placements(self.lowered.model)
        return [dataclasses.asdict(one) for one in found if one.matters or one.provider != "cuda"]

    def finish(self, report: ExportReport) -> list[Path]:
        """Write the report into the file's metadata and put it in its place; gives the files written."""
        return self.file.finish(metadata(report))


def _kernel_notes(lowered: Lowered) -> tuple[Sequence[str], str]:
    """What the report says of a file with the kernel's nodes, and of what ran in verification."""
    from moeify.backends.onnxruntime import kernel_library
    from moeify.backends.onnxruntime.cost import KERNEL

    if not any(choice.lowering == KERNEL for choice in lowered.choices):
        return (), ""
    here = kernel_library.here()
    note = (
        "the kernel lowering is computed by moeify's kernel library, which Session loads by itself and other programs "
        "register ('moeify build-kernels --print-path'); where it is not loaded, the standard operators in the file "
        "run, at the speed of split"
    )
    return (note,), f" with {here}"


def metadata(report: ExportReport) -> dict[str, str]:
    """What the file says of itself: ``moeify.report`` holds recipe, versions and errors."""
    return {"moeify.report": json.dumps(report.to_dict()), "moeify.needs_onnxruntime": NEEDS}


def _require_packages() -> None:
    for package in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeUnavailable(
                f"the onnxruntime backend needs the package {package}, which is not installed",
                hint="pip install 'moeify[onnxruntime]'",
            )
