"""Writing an ONNX model: into a folder beside the target first, then renamed, its weights before the graph."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx_ir as ir

from moeify.backends.writing import reason
from moeify.errors import OutputNotWritten

# Protobuf takes 2 GiB at most and holds a file twice while it writes it; weights above this go to a file of their own.
EXTERNAL_ABOVE = 512 << 20
_SMALL = 1024  # bytes; shapes and scalars stay in the graph, where shape inference sees them


class Staged:
    """A model file that is being made in ``folder``, a temporary one beside ``path``."""

    def __init__(self, model: ir.Model, path: Path, folder: Path) -> None:
        self.model, self.path, self.folder = model, path, folder
        self.file = folder / path.name
        self.data: Path | None = None
        if _weight_bytes(model) > EXTERNAL_ABOVE:
            self.data = folder / _free_name(path)
            ir.external_data.unload_from_model(model, folder, self.data.name, size_threshold_bytes=_SMALL)
        self.save(self.file)

    def save(self, file: Path) -> None:
        """Write the graph as it is now; weights in the data file are not written again."""
        ir.save(self.model, file)

    def with_outputs(self, names: list[str]) -> Path:
        """A twin of the file, in the same folder, that also gives these values."""
        graph = self.model.graph
        values = {value.name: value for node in graph for value in node.outputs}
        added = [values[name] for name in names if name in values and not values[name].is_graph_output()]
        twin = self.folder / f"tapped-{self.path.name}"
        graph.outputs.extend(added)
        try:
            self.save(twin)
        finally:
            for value in added:
                graph.outputs.remove(value)
        return twin

    def finish(self, metadata: Mapping[str, str]) -> list[Path]:
        """Write the metadata into the file and put it in its place; gives the files.

        An older file's weights are removed last, so that an interruption leaves one of the two whole.
        """
        self.model.metadata_props.update(metadata)
        self.save(self.file)
        before = _data_of(self.path)
        if self.data is not None:
            _sync(self.data)
            os.replace(self.data, self.path.with_name(self.data.name))
        _sync(self.file)
        os.replace(self.file, self.path)
        if before is not None and (self.data is None or before.name != self.data.name):
            with suppress(OSError):
                before.unlink()
        return [self.path] if self.data is None else [self.path, self.path.with_name(self.data.name)]


@contextmanager
def staged(model: ir.Model, path: Path) -> Iterator[Staged]:
    """Nothing is at ``path`` that was not there before unless ``finish`` was called; the folder goes in any case.

    Raises OutputNotWritten for what the operating system refuses.
    """
    folder = path.with_name(f".{path.stem}.{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        yield Staged(model, path, folder)
    except OSError as error:
        raise OutputNotWritten(
            f"cannot write {path}: {reason(error)}", hint="nothing was changed; free space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _free_name(path: Path) -> str:
    """``moe.onnx.data``, or ``moe.onnx.1.data`` where that belongs to the file that will be replaced."""
    name, number = f"{path.name}.data", 0
    while path.with_name(name).exists():
        number += 1
        name = f"{path.name}.{number}.data"
    return name


def _data_of(path: Path) -> Path | None:
    """The data file of ours that the file at ``path`` reads, if any."""
    if not path.is_file():
        return None
    try:
        model = ir.load(path)
    except Exception:  # whatever stood there was no ONNX file; it is replaced
        return None
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = str(tensor.location)
            ours = location.startswith(f"{path.name}.") and location.endswith(".data") and "/" not in location
            return path.with_name(location) if ours else None
    return None


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
