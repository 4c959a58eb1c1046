"""Small libraries made by hand: what tests of the artefact and its loader compile, link and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import relax, tirx

from moeify.backends.tvm import linking
from moeify.backends.tvm.artefact import staged
from moeify.backends.tvm.host import flags_of
from moeify.backends.tvm.machine import Machine, machine
from moeify.backends.tvm.types import tensor_type
from moeify.backends.tvm.weights import Weights

WIDTH, OUT = 8, 4


@dataclass
class Library:
    """What is written: the executable, its weights, the header, and the linker."""

    executable: Any
    weights: Weights
    header: dict[str, Any]
    link: Callable[..., None]

    def write(self, path: Path, report: dict[str, Any] | None = None) -> list[Path]:
        with staged(path) as stage:
            stage.write(self.executable, self.weights, self.header, fcompile=self.link)
            return stage.finish(report or {})


def values() -> dict[str, torch.Tensor]:
    """The parameters of ``masked``: a matrix, and a scale in half precision."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(WIDTH, OUT, generator=draw)
    return {"layer.matrix": matrix, "layer.scale": torch.randn(OUT, generator=draw).half()}


def masked(target: Machine | None = None) -> Library:
    """``(x @ matrix where mask, else twice that) * scale`` and ``not mask``, for any number of rows from 0 to 100."""
    target = target or machine()
    weights = Weights(values().__getitem__)
    rows = tirx.Var("rows", "int64")
    x = relax.Var("x", tensor_type((rows, WIDTH), "float32"))
    mask = relax.Var("mask", tensor_type((rows,), "bool"))
    matrix, scale = weights.plain("layer.matrix"), weights.plain("layer.scale")
    builder = relax.BlockBuilder()
    with builder.function("main", [x, mask, matrix, scale], attrs={"num_input": 2}):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, matrix))
            twice = builder.emit(relax.op.multiply(y, relax.const(2.0, "float32")))
            y = builder.emit(relax.op.where(relax.op.reshape(mask, (rows, 1)), y, twice))
            y = builder.emit_output(relax.op.multiply(y, relax.op.astype(scale, "float32")))
            other = builder.emit_output(relax.op.logical_not(mask))
        builder.emit_func_output(relax.Tuple([y, other]))
    header = {
        "format": 1,
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["rows", WIDTH]},
            {"name": "mask", "dtype": "bool", "shape": ["rows"]},
        ],
        "outputs": [{"dtype": "float32", "shape": ["rows", OUT]}, {"dtype": "bool", "shape": ["rows"]}],
        "weights": [weight.name for weight in weights],
        "target": target.text,
        "device": target.kind,
        "needs": {"apache-tvm": "0.27.0"},
        "ranges": {"rows": [0, 100]},
        "cpu_flags": flags_of(target.target),
    }
    executable = tvm.compile(builder.get(), target=target.target)
    return Library(executable, weights, header, linking.linker(target))


def expected(x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """What ``masked`` computes."""
    have = values()
    y = x @ have["layer.matrix"]
    return [torch.where(mask[:, None], y, 2 * y) * have["layer.scale"].float(), ~mask]
