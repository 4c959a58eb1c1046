"""What a run on ranks shows: the first rank speaks, the others are silent."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moeify.cli.output import Screen

if TYPE_CHECKING:
    from moeify.distributed.runner_forward import Evaluation
    from moeify.distributed.runner_group import Ranks
    from moeify.distributed.training import Trained

Answer = dict[str, Any] | None  # what --json asks for, filled in on the first rank
_COLUMN = 13
_LINES = 20  # of the losses of a run, however long it is


class Watch:
    """Progress while it runs, figures when it is done."""

    def __init__(self, ranks: Ranks, steps: int, answer: Answer) -> None:
        self._speaks = ranks.rank == 0
        self._answer = answer
        self._ranks = ranks.size
        self._steps = steps
        self._bars: Any = None

    def __enter__(self) -> Watch:
        if self._speaks:
            from moeify.cli.progress import Bars

            self._bars = Bars().__enter__()
            self._bars.stage(f"{self._ranks} rank{'s' * (self._ranks > 1)}", total=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.__exit__(kind, error, trace)

    def batch(self) -> None:
        if self._bars is not None:
            self._bars.advance()

    def step(self, made: Trained) -> None:
        if self._bars is None:
            return
        self._bars.advance(made.steps if len(made.losses) == 1 else 1)  # a run that goes on has some behind it
        line = step_line(made, self._steps)
        if self._answer is None and line is not None:
            self._bars.aside(line)

    def trained(self, made: Trained, tokens: int) -> None:
        """``tokens`` are those of a step of all ranks."""
        if not self._speaks:
            return
        # The first step also allocates what the others find.
        seconds = statistics.median(made.seconds[1:] or made.seconds)
        facts = {
            "ranks": self._ranks,
            "first_step": made.first + 1,
            "steps": made.steps,
            "losses": made.losses,
            "router_losses": made.router_losses,
            "consistency": made.consistency,
            "gradient_norms": made.norms,
            "seconds_per_step": seconds,
            "tokens_per_second": tokens / seconds if tokens else None,
            "stopped": made.stopped,
            "checkpoint": str(made.saved) if made.saved else None,
        }
        if self._answer is not None:
            self._answer.update(facts)
            return
        screen = Screen()
        if made.stopped:
            screen.paragraph("stopped", f"by {made.stopped} after step {made.steps}", column=_COLUMN, style="bold")
        screen.paragraph("loss", f"{made.losses[0]:.4f} to {made.losses[-1]:.4f}", column=_COLUMN, style="bold")
        for name, values in made.router_losses.items():
            screen.paragraph(f"{name} loss", f"{values[0]:.4g} to {values[-1]:.4g}", column=_COLUMN)
        if made.consistency:
            text = f"{made.consistency[0]:.4g} to {made.consistency[-1]:.4g} nats between two passes"
            screen.paragraph("consistency", text, column=_COLUMN)
        rate = f", {tokens / seconds:.0f} tokens/s" if tokens else ""
        screen.paragraph("speed", f"{seconds:.2f} s per step{rate}, on {self._ranks} ranks", column=_COLUMN)
        if made.saved is not None:
            screen.paragraph("checkpoint", str(made.saved), column=_COLUMN)

    def evaluated(self, made: Evaluation, source: Path | None, outputs: Path | None) -> None:
        if not self._speaks:
            return
        if self._answer is not None:
            files = {"checkpoint": str(source) if source else None, "outputs_file": str(outputs) if outputs else None}
            self._answer.update({"ranks": self._ranks, **made.to_dict(), **files})
            return
        screen = Screen()
        if source is not None:
            screen.paragraph("checkpoint", str(source), column=_COLUMN)
        if made.loss is not None:
            screen.paragraph("loss", f"{made.loss:.6f} over {made.terms}", column=_COLUMN, style="bold")
        if made.perplexity is not None:
            screen.paragraph("perplexity", f"{made.perplexity:.4f}", column=_COLUMN, style="bold")
        for number, output in enumerate(made.outputs):
            shape = " x ".join(map(str, output["shape"]))
            text = f"{shape}, mean {output['mean']:.6g}, rms {output['rms']:.6g}"
            screen.paragraph(f"output {number}", text, column=_COLUMN)
        tokens = f", {made.tokens / made.seconds:.0f} tokens/s" if made.tokens else ""
        speed = f"{made.examples} examples in {made.seconds:.2f} s, {made.examples / made.seconds:.1f}/s{tokens}"
        screen.paragraph("speed", f"{speed}, on {self._ranks} ranks", column=_COLUMN)
        if outputs is not None:
            screen.paragraph("wrote", str(outputs), column=_COLUMN, style="bold")


def step_line(made: Trained, steps: int) -> str | None:
    """What is said of the last step, if anything is."""
    apart = max(1, steps // _LINES)
    ends = made.stopped or made.steps in (made.first + 1, steps)
    if not ends and made.steps % apart:
        return None
    saved = f"  saved {made.saved.name}" if made.saved is not None and _is(made.saved, made.steps) else ""
    return (
        f"step {made.steps:>6}  loss {number(made.losses[-1])}  gradients {made.norms[-1]:.3g}  "
        f"{made.seconds[-1]:.2f} s{saved}"
    )


def number(loss: float) -> str:
    """Four decimals, or three digits of a small one."""
    return f"{loss:.4f}" if abs(loss) >= 0.01 or not loss else f"{loss:.3g}"


def _is(saved: Path, step: int) -> bool:
    return int(saved.name.rpartition("-")[2]) == step
