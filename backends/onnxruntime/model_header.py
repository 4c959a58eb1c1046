"""What an ONNX file says of itself, read without its graph: the head of a ModelProto, field by field."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from moeify.errors import UnreadableFile

# Field numbers of onnx.proto.
_IR_VERSION, _GRAPH, _OPSET_IMPORT, _METADATA = 1, 7, 8, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class Header:
    """Versions of the operator sets by domain ("" is ONNX), and the metadata."""

    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(model: Path | bytes) -> Header:
    """Raises UnreadableFile for what is missing, empty, truncated or no ONNX model. Weights are skipped, not read."""
    where = "the bytes of the model" if isinstance(model, bytes) else str(model)
    try:
        stream: BinaryIO = io.BytesIO(model) if isinstance(model, bytes) else model.open("rb")
    except OSError as error:
        raise UnreadableFile(f"cannot read {where}: {error.strerror or error}") from error
    with stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        try:
            header, has_graph = _read(stream, size)
        except (ValueError, UnicodeDecodeError, IndexError) as error:
            raise UnreadableFile(
                f"{where} is not an ONNX model: {error}", hint="it is damaged or of another kind"
            ) from error
    if not has_graph or not header.ir_version:
        raise UnreadableFile(
            f"{where} is not an ONNX model: it holds no graph", hint="it is damaged or of another kind"
        )
    return header


def _read(stream: BinaryIO, size: int) -> tuple[Header, bool]:
    header, has_graph = Header(), False
    while stream.tell() < size:
        number, kind = divmod(_varint(stream), 8)
        if kind == _VARINT:
            value = _varint(stream)
            if number == _IR_VERSION:
                header.ir_version = value
        elif kind == _BYTES:
            length = _varint(stream)
            if stream.tell() + length > size:
                raise ValueError("it ends in the middle of a field")
            if number in (_OPSET_IMPORT, _METADATA):
                first, second = _pair(stream.read(length))
                if number == _METADATA:
                    header.metadata[str(first)] = str(second)
                else:
                    header.opsets[str(first)] = int(second or 0)
            else:
                has_graph = has_graph or number == _GRAPH
                stream.seek(length, os.SEEK_CUR)
        elif kind in (_FIXED64, _FIXED32):
            stream.seek(8 if kind == _FIXED64 else 4, os.SEEK_CUR)
        else:
            raise ValueError("its fields are not those of a protobuf message")
    return header, has_graph


def _pair(message: bytes) -> tuple[str | int, str | int]:
    """Fields 1 and 2 of a small message; absent ones are ""."""
    found: dict[int, str | int] = {}
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number, kind = divmod(_varint(stream), 8)
        found[number] = _varint(stream) if kind == _VARINT else stream.read(_varint(stream)).decode()
    return found.get(1, ""), found.get(2, "")


def _varint(stream: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)
        if not byte or shift > 63:
            raise ValueError("it ends in the middle of a number" if not byte else "it holds a number of over 64 bits")
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if not byte[0] & 0x80:
            return value
