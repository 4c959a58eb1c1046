"""A program and its dense twin compiled by TVM for this machine: what benchmarks run beside other runtimes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from moeify.backends.tvm import artefact, packages
from moeify.backends.tvm.backend import Tvm
from moeify.backends.tvm.loader import Compiled, load
from moeify.ir.program import Program

FUSED = "fused"  # what a converted block is in a library


class Libraries:
    """Libraries on the CPU with one number of threads, in a temporary folder that goes with this."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="moeify-")
        self._open: dict[str, Compiled] = {}

    def __enter__(self) -> Libraries:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, name: str, program: Program) -> None:
        """Compile a program, not verified; a name that is there is replaced.

        Raises NotExportable, Refused for an operator that there is no conversion of, and RuntimeUnavailable without
        TVM or a compiler to link with.
        """
        packages.require()
        from moeify.backends.tvm.lowering import source

        backend = Tvm()
        with artefact.staged(Path(self._folder.name, name)) as stage:
            backend.build(source(program), backend.machine(), stage)
            stage.finish({})
        self._open[name] = load(Path(self._folder.name, name), threads=self.threads)

    def call(self, name: str, inputs: tuple[torch.Tensor, ...]) -> Any:
        """Run one of them. Inputs come in the program's order."""
        return self._open[name].run(inputs)
