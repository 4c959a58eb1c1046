"""``python -m bench.bench_gpu``: one feed-forward block on a GPU, dense against its experts, in each runtime.

Two ways to make experts of a block of hidden width F: ``split``, 8 experts of F/8, two for a token (a quarter of the
work), and ``copy``, 8 experts of F, two for a token (twice the work). Everything is in half precision: bfloat16 in
PyTorch, whose grouped GEMM is for it, float16 in ONNX Runtime and TVM. The dense block is PyTorch's in every row;
``loop`` is PyTorch with one product an expert. Medians of interleaved rounds; inputs and outputs stay on the GPU.
Without one it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import moeify
from moeify.api.export import export_file
from moeify.ir import kernels_grouped

EXPERTS, TOP_K = 8, 2
FORMS = {"split": "split-random", "copy": "copy"}  # with the method that makes it
Run = Callable[[], object]


class Ffn(nn.Module):
    """A residual block with SiLU, which every runtime's kernel has."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def recipe(form: str) -> moeify.Recipe:
    """Routers of copies start at zero, where every token goes to the same experts: noise spreads them."""
    router = "softmax-topk{init-std=0.5}" if form == "copy" else "topk"
    return moeify.Recipe(method=FORMS[form], experts=EXPERTS, top_k=TOP_K, router=router)


def converted(width: int, hidden: int, form: str, folder: Path) -> Path:
    """The block of experts as a file."""
    torch.manual_seed(0)
    dense, output = folder / "dense.pt2", folder / f"{form}.pt2"
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(Ffn(width, hidden).eval(), (torch.randn(2, 3, width),), dynamic_shapes=sizes)
    torch.export.save(program, dense)
    moeify.convert_file(dense, output, recipe(form))
    return output


def in_torch(width: int, hidden: int, form: str | None, x: Tensor, *, loop: bool = False) -> Run:
    """The dense block, or the block of experts made from it, in bfloat16."""
    torch.manual_seed(0)
    x, module = x.bfloat16(), Ffn(width, hidden).to("cuda", torch.bfloat16).eval()
    if form is not None:
        module = moeify.convert(
            module, recipe(form), inputs=(torch.zeros(2, 3, width, device="cuda", dtype=torch.bfloat16),)
        ).eval()

    def run() -> object:
        with torch.no_grad():
            return module(x)

    def run_loop() -> object:
        with torch.no_grad(), mock.patch.object(kernels_grouped, "fits", return_value=False):
            return module(x)

    return run_loop if loop else run


def in_onnxruntime(file: Path, x: Tensor) -> Run:
    from moeify.backends.onnxruntime.backend import OnnxRuntime
    from moeify.backends.onnxruntime.session import Session

    output = file.with_suffix(".onnx")
    if not output.exists():
        export_file(file, output, OnnxRuntime(target="cuda", dtype="float16"), tolerance=2e-2)
    session = Session(output, provider="cuda")
    bound = session.bind([x.half()], {session.output_names[0]: torch.empty_like(x.half())})
    return bound.run


def in_tvm(file: Path, x: Tensor) -> Run:
    from moeify.backends.tvm import load
    from moeify.backends.tvm.backend import Tvm

    output = file.with_name(f"{file.stem}-tvm")
    major, minor = torch.cuda.get_device_capability()
    if not output.exists():
        export_file(file, output, Tvm(target="cuda", arch=f"sm_{major}{minor}", dtype="float16"), tolerance=2e-2)
    compiled, half = load(output, "cuda"), x.half()
    return lambda: compiled.run([half])


def medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Seconds, each timed with the device idle before and after."""
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def measured(width: int, hidden: int, tokens: list[int], runtimes: list[str], rounds: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        if runtimes != ["torch"]:
            files = {form: converted(width, hidden, form, Path(folder)) for form in FORMS}
        for count in tokens:
            x = torch.randn(1, count, width, device="cuda")
            for runtime in runtimes:
                runs = {"dense": in_torch(width, hidden, None, x)}
                if runtime == "torch":
                    runs |= {form: in_torch(width, hidden, form, x) for form in FORMS}
                    runs |= {f"{form} loop": in_torch(width, hidden, form, x, loop=True) for form in FORMS}
                else:
                    make = {"onnxruntime": in_onnxruntime, "tvm": in_tvm}[runtime]
                    runs |= {form: make(file, x) for form, file in files.items()}
                sizes = {"width": width, "hidden": hidden, "tokens": count, "runtime": runtime}
                rows.append({**sizes, **medians(runs, rounds)})
                del runs
                torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,16,128,512,4096")
    parser.add_argument("--shapes", default="768x3072", help="width x hidden width, comma separated")
    parser.add_argument("--runtimes", default="torch,onnxruntime,tvm")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, help="write the times, in seconds")
    told = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU that torch can use here: nothing is measured")
        return 0
    rows: list[dict[str, Any]] = []
    for shape in told.shapes.split(","):
        width, hidden = map(int, shape.split("x"))
        rows += measured(width, hidden, [int(n) for n in told.tokens.split(",")], told.runtimes.split(","), told.rounds)
        if told.json:
            told.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))
    table = Table(title=f"{torch.cuda.get_device_name()}, times over PyTorch's dense block", title_justify="left")
    for name in ("width", "hidden", "tokens", "runtime", "dense", "split", "split loop", "copy", "copy loop"):
        table.add_column(name, justify="left" if name == "runtime" else "right")
    for row in rows:
        cells = [f"{row[form] / row['dense']:.2f}" if form in row else "" for form in table_forms()]
        table.add_row(str(row["width"]), str(row["hidden"]), str(row["tokens"]), row["runtime"],
                      f"{row['dense'] * 1e6:.0f} us", *cells)  # fmt: skip
    Console(width=120).print(table)
    return 0


def table_forms() -> tuple[str, ...]:
    return ("split", "split loop", "copy", "copy loop")


if __name__ == "__main__":
    raise SystemExit(main())
