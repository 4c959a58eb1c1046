"""Running a bound module over all examples: loss, outputs and throughput."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeify.distributed.runner_data import Examples, part, rows_of
from moeify.distributed.runner_group import Ranks
from moeify.distributed.runner_loss import Loss
from moeify.errors import BadInputSpec, MoeifyError
from moeify.ir.program import flat

_WHERE = "evaluation"
_NO_MEMORY = ("can't allocate memory", "out of memory")


@dataclass
class Evaluation:
    """``loss`` is the mean over ``terms``; ``seconds`` are those of the first rank, ``tokens`` those of the ids."""

    examples: int
    seconds: float
    tokens: int = 0
    loss: float | None = None
    terms: int = 0
    perplexity: float | None = None
    outputs: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "examples_per_second": self.examples / self.seconds}


def device_of(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def run_model(module: nn.Module, examples: Examples, batch: dict[str, Tensor]) -> Any:
    """Raises BadInputSpec when the model does not run on the data."""
    try:
        return module(*(batch[name] for name in examples.inputs))
    except MoeifyError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        if any(text in str(error) for text in _NO_MEMORY):
            raise
        raise BadInputSpec(f"the model does not run on the data: {str(error).splitlines()[0]}") from error


def evaluate(
    module: nn.Module,
    ranks: Ranks,
    examples: Examples,
    loss: Loss | None,
    batch: int,
    *,
    whole_batches: bool = False,
    ids: str | None = None,
    outputs: bool = False,
    done: Callable[[], None] = lambda: None,
) -> tuple[Evaluation, list[Tensor]]:
    """Every example once, in order, ``batch`` at a time over all ranks. With ``outputs``, what the model gives for all
    of them, on rank 0; without a loss or with ``outputs``, mean and root mean square of it. ``whole_batches`` leaves
    out examples that do not fill one.

    Raises NonFiniteValues for a loss that is NaN or infinity, BadInputSpec, RankLost.
    """
    module.eval()
    total, terms = 0.0, 0.0
    parts: list[list[Tensor]] = []
    summaries: list[_Summary] = []
    started = time.perf_counter()
    last = examples.count - examples.count % batch if whole_batches else examples.count
    if not last:
        raise BadInputSpec(f"{examples.count} examples do not fill a batch of {batch}")
    with torch.no_grad():
        for start in range(0, last, batch):
            which = list(range(start, min(start + batch, last)))
            mine = part(which, ranks.size, ranks.rank)
            tensors = examples.take(mine.which, device_of(module))
            output = run_model(module, examples, tensors)
            if loss is not None:
                value, count = loss(output, tensors, mine.counted)
                total, terms = total + float(value), terms + count
            if outputs or loss is None:
                values = _per_example(output, mine.which, mine.counted)
                summaries = summaries or [_Summary(tuple(x.shape[1:])) for x in values]
                for summary, x in zip(summaries, values, strict=True):
                    summary.add(x)
            if outputs:
                rows = rows_of(len(which), ranks.size)
                parts.append([ranks.to_first(x, rows, _WHERE) for x in values])
            done()
    made = Evaluation(last, 0.0)
    if loss is not None:
        total, terms, _ = ranks.total_loss(total, terms, _WHERE)
        made.loss, made.terms = total / max(terms, 1.0), round(terms)
    sums = ranks.total([x for summary in summaries for x in (summary.total, summary.squares)] or [0.0], _WHERE)
    made.seconds = time.perf_counter() - started
    if ids is not None:
        made.tokens = examples.tensors[ids][:last].numel()
        made.perplexity = math.exp(made.loss) if made.loss is not None and made.loss < 700 else None  # of float64
    made.outputs = [x.described(last, *sums[2 * i : 2 * i + 2]) for i, x in enumerate(summaries)]
    return made, [torch.cat(pieces) for pieces in zip(*parts)] if ranks.rank == 0 else []


def _per_example(output: Any, which: list[int], counted: int) -> list[Tensor]:
    found = flat(output)
    for position, value in enumerate(found):
        if not value.dim() or len(value) != len(which):
            raise BadInputSpec(
                f"output {position} of the model has shape {tuple(value.shape)}: not a row for each of {len(which)} "
                "examples",
                hint="give a --loss, or run without --outputs",
            )
    return [value[:counted] for value in found]


@dataclass
class _Summary:
    """Of one output: the shape that it has for an example, and sums over what this rank has seen, in float64."""

    shape: tuple[int, ...]
    total: float = 0.0
    squares: float = 0.0

    def add(self, x: Tensor) -> None:
        wide = x.double()
        self.total += float(wide.sum())
        self.squares += float(wide.square().sum())

    def described(self, examples: int, total: float, squares: float) -> dict[str, Any]:
        """With the sums of all ranks."""
        count = max(examples * math.prod(self.shape), 1)
        return {"shape": [examples, *self.shape], "mean": total / count, "rms": math.sqrt(squares / count)}
