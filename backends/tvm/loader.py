"""Running a compiled library: ``load(OUT).run(inputs)``."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeify.backends.inputs import Inputs, Taken
from moeify.backends.tvm import packages
from moeify.backends.tvm.header import BadHeader, Header, parse
from moeify.backends.tvm.host import require_flags, require_gpu, require_kind
from moeify.errors import BadInputSpec, RuntimeUnavailable, UnknownName, UnreadableFile

LIBRARY, PARAMETERS, HEADER = "lib.so", "params.safetensors", "moeify.json"
_LONGEST_HEADER = 64 << 20  # bytes
_KEPT = 16  # different sizes of inputs whose memory is kept for the next run


def load(folder: str | Path, device: str | None = None, *, threads: int | None = None) -> Compiled:
    """Open what ``moeify export --to tvm`` wrote. ``device`` is "cpu" or "cuda", None what it was compiled for.

    ``lib.so`` is machine code and runs with your rights: load folders of people whose programs you would run. The
    weights and moeify.json are data and are checked. It needs TVM's runtime and safetensors, no compiler; threads
    within a kernel are all processors or ``threads``.

    Raises UnreadableFile (missing or damaged), RuntimeUnavailable (another version of TVM, another processor, no such
    device), UnknownName, BadOption.
    """
    folder = Path(folder)
    header, report = read_header(folder)
    packages.require_for(header.needs.get(packages.PACKAGE, packages.NEEDS), str(folder))
    if device not in (None, "cpu", "cuda"):
        raise UnknownName("device", str(device), ("cpu", "cuda"))
    if device not in (None, header.device):
        raise RuntimeUnavailable(
            f"this library was compiled for {header.device}, not for {device}",
            where=str(folder),
            hint=f"export it again with --target {device}",
        )
    return Compiled(_library(folder / LIBRARY, header), folder, header, report, threads)


def read_header(folder: Path) -> tuple[Header, dict[str, Any]]:
    """``moeify.json``, checked, and the report of the export in it (empty if it has none). Raises UnreadableFile."""
    file = folder / HEADER
    if not folder.is_dir():
        raise UnreadableFile(f"there is no folder {folder}", hint="moeify export MODEL.pt2 --to tvm -o OUT writes one")
    try:
        if file.stat().st_size > _LONGEST_HEADER:
            raise UnreadableFile("the description of the library is too long", where=str(file))
        data = json.loads(file.read_text("utf-8"))
        report = data.get("report", {}) if isinstance(data, dict) else {}
        return parse(data), report if isinstance(report, dict) else {}
    except FileNotFoundError:
        raise UnreadableFile(f"{folder} is not what moeify export writes: it has no {HEADER}") from None
    except (OSError, ValueError, RecursionError) as error:
        text = error if isinstance(error, BadHeader) else str(error).split("\n")[0]
        raise UnreadableFile(f"cannot read the description of the library: {text}", where=str(file)) from error


class Compiled:
    """A program compiled by TVM, with its weights. Made by ``load``.

    ``header`` says what it takes, ``report`` what was verified when it was written.
    """

    def __init__(
        self,
        library: Any,
        folder: Path,
        header: Header,
        report: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        from tvm.runtime.vm import VirtualMachine

        from moeify.backends.tvm import parameters
        from moeify.backends.tvm import threads as pool
        from moeify.backends.tvm.arrays import dtype_of

        pool.prepare()
        self.header, self.report = header, dict(report or {})
        self._where, self._threads, self._pool = str(folder), threads, pool
        self._device = _device(header, self._where)
        self._weights = parameters.read(folder / PARAMETERS, header.weights, self._device)
        try:
            self.machine = VirtualMachine(library, self._device)
            self._main = self.machine["main"]
        except Exception as error:  # of the FFI: a class for each kind of C++ error
            raise UnreadableFile(
                f"the library holds no program of ours: {_line(error)}", where=str(folder / LIBRARY)
            ) from error
        self._one_at_a_time = threading.Lock()
        self._sizes: set[tuple[int, ...]] = set()
        specs = {spec.name: spec for spec in header.inputs}
        self._taken = Taken("the library", specs, dtype_of, header.ranges)
        pool.use(threads)

    @property
    def input_names(self) -> list[str]:
        return list(self._taken.specs)

    def run(self, inputs: Inputs) -> list[Any]:
        """The outputs in order: torch tensors when an input is one, else numpy arrays.

        ``inputs`` by name, or in the order of ``input_names``. They are not copied where they are contiguous,
        writable, aligned to 64 bytes and on the device; outputs share memory with TVM's. On CUDA, results are on the
        GPU when an input is a tensor there, and on the CPU otherwise. Threads may share one, and take turns.

        Raises BadInputSpec for a name, type or shape that the program does not take.
        """
        from moeify.backends.tvm.arrays import from_tvm, is_torch, to_tvm

        named = self._taken.named(inputs)
        given = [to_tvm(value, self._device) for value in named.values()]
        with self._one_at_a_time:
            self._pool.use(self._threads)
            self._forget(tuple(size for tensor in given for size in tensor.shape))
            try:
                result = self._main(*given, *self._weights)
            except Exception as error:  # of the FFI, as above
                raise BadInputSpec(f"the library fails on these inputs: {_line(error)}", where=self._where) from error
        tensors = [value for value in named.values() if is_torch(value)]
        like = next((value for value in tensors if value.device.type != "cpu"), tensors[0] if tensors else None)
        return [from_tvm(value, like) for value in (result if not hasattr(result, "shape") else [result])]

    def _forget(self, sizes: tuple[int, ...]) -> None:
        """TVM keeps memory for every size that a tensor ever had, and gives none of it to one of another size."""
        if sizes not in self._sizes and len(self._sizes) == _KEPT:
            self._sizes.clear()
            _clear_pool()
        self._sizes.add(sizes)


def _device(header: Header, where: str) -> Any:
    import tvm

    if header.device == "cpu":
        return tvm.cpu()
    require_gpu(header.target.removeprefix("cuda "), where)
    return tvm.cuda()


def _clear_pool() -> None:
    """Give back memory that no tensor is in."""
    import tvm

    tvm.get_global_func("vm.builtin.memory_manager.clear")()


def _library(file: Path, header: Header) -> Any:
    import tvm

    if not file.is_file():
        raise UnreadableFile(f"{file.parent} is not what moeify export writes: it has no {LIBRARY}")
    require_kind(file)
    require_flags(header.cpu_flags, str(file))
    try:
        return tvm.runtime.load_module(str(file))
    except Exception as error:  # of the FFI
        text = _line(error).removeprefix(f"Failed to load dynamic shared library {file} ")
        raise UnreadableFile(f"cannot load the library: {text}", where=str(file)) from error


def _line(error: BaseException) -> str:
    """TVM's message without its own source in front."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^Check failed: .*? is false: |^Check failed: ", "", text)
    return re.sub(r"^ErrorContext\(.*\) (?=match_cast|expect|\w)", "", text)[:400]
