"""``python -m bench.router_table``: writes docs/ROUTERS.md, what each router is and which backend takes it.

The first columns are ``moeify routers --table``. The others are tried: a small model with the router is exported to
ONNX Runtime and to TVM, run there and compared, and its experts are spread over two ranks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import moeify
from moeify.api.load import read_graph
from moeify.backends import BACKENDS
from moeify.errors import MoeifyError
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.topk import TopK
from moeify.pipeline.runner import run
from moeify.training.router_facts import HEADER, facts, top_k_of

PAGE = Path(__file__).parent.parent / "docs" / "ROUTERS.md"
SUFFIX = {"onnxruntime": ".onnx", "tvm": "-tvm"}
TRIED = ("ONNX Runtime", "TVM", "expert parallel")
_BEFORE = """# Routers

`k` is --top-k. "Weights" says what the weights of a token's experts are: with `1 each` a split is exact with all
experts on, with `sum to 1` a copy is exact. "Learns from" says what trains the router: a gradient of the model's loss,
a router loss that it cannot do without, a fit on data before training, or `moeify.after_step`. "Router losses" are
those whose gradient reaches it. A router that mixes tokens is refused in a causal model without `allow-causal=true`.

The first columns are `moeify routers --table`, with default options. The last ones were tried with a small model by
`python -m bench.router_table`, which writes this page: exported for the CPU, run in the runtime and compared with the
program, and the experts spread over two ranks.

Two gates of the literature are no routers and are refused by name, with the reason: `attentive` (Krishnamurthy et al.,
arXiv 2302.14703) weighs experts by their hidden values, so all of them must run first; `moeify.nn.attentive` has it for
layers of your own. `soft-moe` (Puigcerver et al., arXiv 2308.00951) gives experts weighted means of tokens.

"""


class Dense(nn.Module):
    """Token ids [batch, sequence] through one feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.down(torch.relu(self.up(x)))


def tried(name: str, folder: Path) -> list[str]:
    """The cells of ``TRIED``."""
    spec = ROUTERS.parse(name)
    splits = isinstance(spec, TopK)
    torch.manual_seed(0)
    dense, file = folder / "dense.pt2", folder / f"{name}.pt2"
    torch.export.save(torch.export.export(Dense().eval(), (torch.zeros(2, 8, dtype=torch.int64),)), dense)
    recipe = moeify.Recipe(
        method="split-random" if splits else "copy",
        router=name,
        experts=8,
        top_k=top_k_of(spec),
    )
    try:
        moeify.convert_file(dense, file, recipe)
    except MoeifyError as error:
        return [f"not converted: {_first_line(error)}"] * len(TRIED)
    cells = []
    for backend in SUFFIX:
        try:
            moeify.export_file(file, folder / f"{name}{SUFFIX[backend]}", BACKENDS.parse(backend))
            cells.append("yes")
        except MoeifyError as error:
            cells.append(f"no: {_first_line(error)}")
        except Exception as error:  # a bug of the backend is a fact about it too
            cells.append(f"fails: {type(error).__name__}")
    try:
        program, _ = read_graph(file)
        run(program, ["shard-experts{ranks=2}"])
        cells.append("yes")
    except MoeifyError as error:
        cells.append(f"no: {_first_line(error)}")
    return cells


def _first_line(error: MoeifyError) -> str:
    return error.what.splitlines()[0].rstrip(":")


def page() -> str:
    lines = [_line((*HEADER, *TRIED)), _line(["---"] * (len(HEADER) + len(TRIED)))]
    with tempfile.TemporaryDirectory() as folder:
        for name in ROUTERS:
            cells = tried(name, Path(folder))
            print(name, *cells, sep="\t", file=sys.stderr, flush=True)
            lines.append(_line((*facts(name).cells(), *cells)))
    return _BEFORE + "\n".join(lines) + "\n"


def _line(cells: object) -> str:
    return "| " + " | ".join(cells) + " |"  # type: ignore[call-overload]


if __name__ == "__main__":
    PAGE.write_text(page())
