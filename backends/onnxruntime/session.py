"""Running an exported model: an ONNX Runtime session that says what is wrong instead of doing something else."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from moeify.backends.inputs import Inputs, Spec, Taken
from moeify.backends.onnxruntime.arrays import Buffer, element, element_number, is_torch, to_arrays, value_of
from moeify.backends.onnxruntime.kernel_library import Kernels, kernels, register
from moeify.backends.onnxruntime.model_header import read_header
from moeify.backends.onnxruntime.profiling import Profile, read_profile
from moeify.errors import BadInputSpec, BadOption, RuntimeUnavailable, UnknownName, UnreadableFile, UsageError

DTYPE_KEY = "moeify.dtype"  # metadata of a file: float32, float16 or bfloat16
# Of files in float16. ONNX Runtime 1.31 ends the process (segmentation fault) where this optimizer, which lays out
# float32 convolutions for CPUs, meets a float16 product of a transposed input that is about to be cast to float32.
_HALF = {"optimization.disable_specified_optimizers": "NchwcTransformer"}
NEEDS_KEY = "moeify.needs_onnxruntime"  # metadata of a file: the oldest version that it was tested with
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SILENT, _ERRORS = 4, 3  # severities of the runtime's logger
# What the runtime says of a model that is newer than itself.
_TOO_NEW = re.compile(r"(max supported IR version|opset \d+ is under development|is not a registered function)", re.I)


class Session:
    """A model in ONNX Runtime.

    ``threads`` are those within an operator (None: one a core). ``options`` are the runtime's: an attribute of its
    SessionOptions (``{"graph_optimization_level": ...}``) or a key of its configuration (``{"session....": "1"}``).
    Files in float16 get one by default: see ``_HALF``.
    ``profile`` records the times of nodes for ``Session.profile``. The native kernel library is loaded where the model
    has fused blocks and the library is built, unless ``use_kernels`` is False; ``kernels`` says what runs.

    Raises UnreadableFile (missing, damaged, or its weights are not beside it), RuntimeUnavailable (the runtime is
    older than the file needs, or the provider cannot be used here: there is no falling back), UnknownName, BadOption.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        provider: Literal["cpu", "cuda"] | str = "cpu",
        threads: int | None = None,
        profile: bool = False,
        use_kernels: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if provider not in _PROVIDERS:
            raise UnknownName("provider", provider, _PROVIDERS)
        source = model if isinstance(model, bytes) else Path(model)
        header = read_header(source)
        metadata = header.metadata
        _require_version(metadata)
        self.kernels: Kernels | None = kernels(header, use_kernels)  # None: the model has no fused blocks
        if provider == "cuda":
            require_cuda()
        self.provider = provider
        self._profiles = tempfile.mkdtemp(prefix="moeify-profile-") if profile else None
        if self._profiles is not None:
            weakref.finalize(self, shutil.rmtree, self._profiles, True)
        needed = _HALF if metadata.get(DTYPE_KEY) == "float16" else {}
        settings = _settings(threads, self._profiles, {**needed, **(options or {})})
        if self.kernels is not None and self.kernels.library is not None:
            register(settings, self.kernels.library)
        self._session = _open(source, provider, settings)
        specs = {one.name: _spec(one) for one in self._session.get_inputs()}
        self._taken = Taken("the model", specs, element)
        self._outputs = {one.name: _spec(one) for one in self._session.get_outputs()}
        self._profile: Profile | None = None

    @property
    def input_names(self) -> list[str]:
        return list(self._taken.specs)

    @property
    def output_names(self) -> list[str]:
        return list(self._outputs)

    @property
    def metadata(self) -> dict[str, str]:
        """Of the file; ``moeify.report`` is what was verified when it was written."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Inputs) -> list[Any]:
        """The outputs in order, as torch tensors on the CPU when an input is one, else as numpy arrays.

        ``inputs`` by name, or in the order of ``input_names``. Raises BadInputSpec for a name, type or shape that
        the model does not take.
        """
        named = self._taken.named(inputs)
        values = {name: value_of(value) for name, value in named.items()}
        with _failures(self._session):
            outputs = self._session.run_with_ort_values(self.output_names, values)
        return to_arrays(outputs, any(is_torch(value) for value in named.values()))

    def bind(self, inputs: Inputs, outputs: Mapping[str, Any] | None = None) -> Binding:
        """Inputs bound in place, to be run many times: what is written into them later is seen by the next run.

        ``outputs`` are tensors or arrays to be written into. Raises BadInputSpec as ``run`` does.
        """
        return Binding(self, self._taken.named(inputs), outputs or {})

    def profile(self) -> Profile:
        """Seconds by block and stage, of every run so far. Ends the recording; later calls give the same."""
        if self._profiles is None:
            raise UsageError("this session records no profile", hint="Session(model, profile=True)")
        if self._profile is None:
            self._profile = read_profile(Path(self._session.end_profiling()))
        return self._profile


class Binding:
    """Inputs and outputs of a session, bound to memory."""

    def __init__(self, session: Session, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._session, self._binding = session._session, session._session.io_binding()
        self._given, self._taken = dict(outputs), session._taken
        self._names = session.output_names
        self._as_torch = any(is_torch(value) for value in inputs.values())
        buffers = {name: Buffer.of(value) for name, value in inputs.items()}
        self._kept = list(buffers.values())
        for name, held in buffers.items():
            number = element_number(held.element)
            self._binding.bind_input(name, held.device, held.index, number, held.shape, held.pointer)
        unknown = next((name for name in outputs if name not in self._names), None)
        if unknown is not None:
            raise BadInputSpec(f"the model has no output {unknown!r}", hint=f"it has {', '.join(self._names)}")
        for name in self._names:
            if name in outputs:
                self._bind_output(session._outputs[name], outputs[name])
            else:
                self._binding.bind_output(name, session.provider if self._as_torch else "cpu")

    def run(self) -> list[Any]:
        """The outputs in order: what was given for them, and views of the runtime's memory for the others, which the
        next run writes over. On the CUDA provider with torch inputs they are on CUDA, else on the CPU.
        """
        with _failures(self._session):
            self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        values = to_arrays(self._binding.get_outputs(), self._as_torch)
        return [self._given.get(name, value) for name, value in zip(self._names, values)]

    def _bind_output(self, spec: Spec, value: Any) -> None:
        self._taken.check(spec, value, {})
        try:
            held = Buffer.of(value, writable=True)
        except ValueError as error:
            raise BadInputSpec(f"the memory for the output {spec.name!r} {error}") from error
        self._kept.append(held)
        number = element_number(held.element)
        self._binding.bind_output(spec.name, held.device, held.index, number, held.shape, held.pointer)


def cuda_is_usable() -> bool:
    """Whether the runtime can run something on CUDA here: package, libraries, driver and device."""
    return not _cuda_problem()


def require_cuda() -> None:
    """Raises RuntimeUnavailable with what is missing."""
    problem = _cuda_problem()
    if problem:
        raise RuntimeUnavailable(
            f"the CUDA provider of ONNX Runtime {onnxruntime.__version__} cannot be used here: {problem}",
            hint="install onnxruntime-gpu with its CUDA and cuDNN libraries and a driver, or run on provider='cpu'",
        )


@functools.cache
def _cuda_problem() -> str:
    """Tried on a model of one node with the fallback to the CPU off; "" if it works. The runtime itself only warns."""
    if _PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        return "this package of the runtime is built without it"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        onnxruntime.preload_dlls()  # the libraries of the nvidia packages and of torch, where they are installed
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        with _silent():
            onnxruntime.InferenceSession(_ONE_NODE, options, providers=[_PROVIDERS["cuda"]])
    except Exception as error:  # the runtime has an exception of its own for every status
        text = str(error)
        return "its libraries or a device are missing" if "fallback" in text else _line(error)
    return ""


# ir_version 10, opset 13, graph "g": float y [1] = Neg(float x [1]). Serving needs no onnx package, so it is spelt out.
_ONE_NODE = bytes.fromhex(
    "080a3a320a0b0a017812017922034e65671201675a0f0a0178120a0a08080112040a02080162"
    "0f0a0179120a0a08080112040a02080142040a00100d"
)


def _require_version(metadata: Mapping[str, str]) -> None:
    needed = metadata.get(NEEDS_KEY, "0")
    if _version(onnxruntime.__version__) < _version(needed):
        raise RuntimeUnavailable(
            f"the model needs ONNX Runtime {needed} and this is {onnxruntime.__version__}",
            hint=f"pip install 'onnxruntime>={needed}'",
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _settings(threads: int | None, profiles: str | None, options: Mapping[str, Any]) -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _ERRORS
    settings.intra_op_num_threads = threads or 0
    if profiles is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = os.path.join(profiles, "profile")
    for name, value in options.items():
        try:
            if "." in name:
                settings.add_session_config_entry(name, value)
            elif hasattr(settings, name):
                setattr(settings, name, value)
            else:
                raise BadOption(f"ONNX Runtime has no session option {name!r}")
        except TypeError as error:
            raise BadOption(f"the session option {name} does not take {value!r}") from error
    return settings


def _open(source: Path | bytes, provider: str, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    providers = list(dict.fromkeys([_PROVIDERS[provider], _PROVIDERS["cpu"]]))
    where = None if isinstance(source, bytes) else str(source)
    try:
        with _silent():
            return onnxruntime.InferenceSession(where or source, settings, providers=providers)
    except Exception as error:  # the runtime has an exception of its own for every status
        text = _line(error)
        lacks_kernel = type(error).__name__ == "NotImplemented"
        if lacks_kernel or _TOO_NEW.search(text):
            unfit = f"the {provider} provider has no such operator for these types" if lacks_kernel else None
            raise RuntimeUnavailable(
                f"ONNX Runtime {onnxruntime.__version__} cannot run this model: {text}",
                where=where,
                hint=unfit or "install a newer onnxruntime",
            ) from error
        hint = "its weights lie in a file of their own, which belongs beside it" if "external" in text.lower() else None
        raise UnreadableFile(f"ONNX Runtime cannot load this model: {text}", where=where, hint=hint) from error


@contextlib.contextmanager
def _failures(session: onnxruntime.InferenceSession) -> Iterator[None]:
    """What the runtime raises within a run, as one of ours: an index out of range, sizes that do not fit."""
    try:
        yield
    except Exception as error:
        raise BadInputSpec(
            f"the model fails on these inputs: {_line(error)}", where=", ".join(session.get_providers())
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What goes wrong is raised; the runtime also prints it, in colour."""
    onnxruntime.set_default_logger_severity(_SILENT)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # the runtime's own: warnings


def _spec(one: Any) -> Spec:
    """Of an onnxruntime.NodeArg."""
    return Spec(one.name, one.type.removeprefix("tensor(").removesuffix(")"), tuple(one.shape))


def _line(error: BaseException) -> str:
    """The runtime's message without its status in front."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text[0])
