"""What ``moeify train`` shows while it runs and in the end."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from moeify.cli import label_summary
from moeify.cli.figures import count, table
from moeify.cli.output import Screen
from moeify.cli.progress import Bars
from moeify.cli.run_summary import number, step_line

if TYPE_CHECKING:
    from moeify.api.train_heldout import HeldOut
    from moeify.api.train_report import TrainReport
    from moeify.distributed.training import Trained

_COLUMN = 13
_CLASSES = 20  # that are named


class Watch:
    """A bar, and a line now and then."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self.bars = Bars()
        self._steps = steps
        self._quiet = quiet

    def __enter__(self) -> Watch:
        self.bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.__exit__(kind, error, trace)

    def step(self, made: Trained) -> None:
        self.bars.advance(made.steps if len(made.losses) == 1 else 1)  # a run that goes on has some behind it
        line = step_line(made, self._steps)
        if line is not None and not self._quiet:
            self.bars.aside(line)

    def measured(self, found: HeldOut) -> None:
        if not self._quiet:
            self.bars.aside(f"step {found.step:>6}  held out: {_figures(found)}")


def show(screen: Screen, report: TrainReport) -> None:
    run = report.run
    title = f"{report.model}: {len(run.losses)} steps on {report.examples} examples in {report.seconds:.1f} s"
    screen.line()
    screen.line(title, "bold")
    screen.line()
    if len(report.held_out) > 1:
        _held_out(screen, report)
        screen.line()
    if run.stopped:
        _say(screen, "stopped", f"by {run.stopped} after step {run.steps}; --resume goes on", "bold")
    _say(screen, "loss", f"{number(run.losses[0])} to {number(run.losses[-1])} ({report.loss_is})")
    for name, values in run.router_losses.items():
        _say(screen, f"{name} loss", f"{values[0]:.4g} to {values[-1]:.4g}")
    if run.consistency:
        _say(screen, "consistency", f"{run.consistency[0]:.4g} to {run.consistency[-1]:.4g} nats between two passes")
    if report.classes:
        _say(screen, "classes", f"{', '.join(report.classes[:_CLASSES])}{' ...' if report.classes[_CLASSES:] else ''}")
    _say(screen, "trained", f"{count(report.trained_parameters)} of {count(report.parameters)} parameters")
    if report.routing is not None:
        blocks = report.routing.blocks
        said = []
        for name in ("entropy", "cv", "peak"):
            values = [getattr(one, name) for one in blocks]
            said.append(f"{_NAMES[name]} {min(values):.2f} to {max(values):.2f}")
        _say(screen, "loads", f"{', '.join(said)} in {len(blocks)} blocks")
        told = label_summary.with_labels(blocks)
        if told:
            _say(screen, "labels", label_summary.in_a_line(told))
    tokens = f", {report.tokens_per_step / report.seconds_per_step:.0f} tokens/s" if report.tokens_per_step else ""
    _say(screen, "speed", f"{report.seconds_per_step:.2f} s per step{tokens}, on {report.device}")
    for note in report.notes:
        _say(screen, "note", note)
    if run.saved is not None:
        _say(screen, "checkpoint", str(run.saved))
    for path in filter(None, (report.output, report.plot)):
        _say(screen, "wrote", path, "bold")


_NAMES = {"entropy": "entropy", "cv": "cv", "peak": "max/mean"}


def _say(screen: Screen, head: str, text: str, style: str | None = None) -> None:
    screen.paragraph(head, text, column=_COLUMN, style=style)


def _held_out(screen: Screen, report: TrainReport) -> None:
    """What it was before, and what it is."""
    first, last = report.held_out[0], report.held_out[-1]
    before, after = dict(_pairs(first)), dict(_pairs(last))
    rows = [(name, before[name], after[name]) for name in before]
    heads = ("held out", f"after {first.step} steps", f"after {last.step}")
    for place, line in enumerate(table(heads, rows, screen.width)):
        screen.line(line, "bold" if place == 0 else None)


def _figures(found: HeldOut) -> str:
    return "  ".join(f"{name} {value}" for name, value in _pairs(found))


def _pairs(found: HeldOut) -> list[tuple[str, str]]:
    """Figures by name. Where several outputs are compared with the teacher's, each says which it is."""
    pairs = []
    if found.loss is not None and found.perplexity is None:
        pairs.append(("loss", f"{found.loss:.4f}"))
    if found.perplexity is not None:
        pairs.append(("perplexity", f"{found.perplexity:.3f}"))
    if found.accuracy is not None:
        pairs.append(("accuracy", f"{found.accuracy:.2%}"))
    for one in found.against_teacher:
        of = f" of {one.name}" if len(found.against_teacher) > 1 else ""
        if one.perplexity_ratio is not None:
            pairs.append((f"perplexity / teacher's{of}", f"{one.perplexity_ratio:.4f}"))
        if one.divergence is not None:
            pairs.append((f"KL to the teacher{of}", f"{one.divergence:.4g}"))
        if one.agreement is not None:
            pairs.append((f"agreement{of}", f"{one.agreement:.2%}"))
        if one.cosine is not None:
            pairs.append((f"cosine to the teacher{of}", f"{one.cosine:.4f}"))
        if one.divergence is None:
            pairs.append((f"rms error{of}", f"{one.rms_error:.3g}"))
    return pairs
