"""``python -m tests.tvm_architectures [--plain] [WORDS]``: every architecture, converted, in TVM against the Program.

One line per architecture: its largest error at the example's sizes and at others, or why it is refused. ``--plain``
takes the reference kernels and TVM's own pipeline in the place of ours.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence

import torch
import tvm
from torch import Tensor

from moeify.backends.exporting import drop_router_noise, export
from moeify.backends.tvm.cpu import pipeline, reference
from moeify.backends.tvm.cpu.table import table
from moeify.backends.tvm.families import Families
from moeify.backends.tvm.importing import import_graph
from moeify.backends.tvm.machine import machine
from moeify.errors import Refused
from moeify.frontend.grad_regions import inline_grad_regions
from moeify.ir.program import Program, flat
from tests.architectures import ARCHITECTURES, Architecture
from tests.onnx_mixtures import relative
from tests.test_onnx_architectures import converted, grown
from tests.tvm_functions import Run, calling


def compiled(program: Program, families: Families, *, plain: bool = False) -> Run:
    """The program as a function of torch tensors. Raises Refused."""
    drop_router_noise(program)
    native = machine()
    imported = import_graph(export(program).module(check_guards=False), program.inputs, native, families)
    executable = tvm.compile(imported.mod, target=native.target) if plain else pipeline.compile(imported.mod, native)
    return calling(executable, imported.weights)


def program_of(one: Architecture) -> Program:
    """Converted, with regions of no_grad inlined as the front end does."""
    made = converted(one)
    inline_grad_regions(made.graph_module)
    return made


def error(program: Program, run: Run, inputs: Sequence[Tensor]) -> float:
    """The largest error over all outputs, whose shapes and types must be those of the Program."""
    expected, results = flat(program.run(*inputs)), run(*inputs)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in expected]
    return max(relative(result, value.double()) for result, value in zip(results, expected) if value.numel())


def main(words: list[str]) -> int:
    """Prints the table; 1 when something is neither right nor refused."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    plain = "--plain" in words
    words = [word.lower() for word in words if not word.startswith("-")]
    families = reference.TABLE if plain else table()
    counts = {"right": 0, "refused": 0, "wrong": 0}
    for one in ARCHITECTURES.values():
        if one.expected and (not words or any(word in one.name.lower() for word in words)):
            start = time.perf_counter()
            kind, text = _verdict(one, families, plain)
            counts[kind] += 1
            print(f"{one.name:44} {time.perf_counter() - start:6.1f} s  {kind:8} {text}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return int(counts["wrong"] > 0)


def _verdict(one: Architecture, families: Families, plain: bool) -> tuple[str, str]:
    try:
        made = program_of(one)
        run = compiled(made, families, plain=plain)
        worst = [error(made, run, inputs) for inputs in (made.example, grown(made))]
    except Refused as refusal:
        return "refused", "; ".join(line.strip() for line in str(refusal).splitlines()[1:-1])
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [""]
        return "wrong", f"{type(problem).__name__}: {lines[0][:150]} ... {lines[-1][:150]}"
    return ("right" if max(worst) < 1e-5 else "wrong"), f"{worst[0]:.1e} {worst[1]:.1e}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
