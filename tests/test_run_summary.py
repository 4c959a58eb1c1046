"""What a run on ranks shows while it runs: its bar, its lines, and the silence of all ranks but the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moeify.cli import progress
from moeify.cli.run_summary import Watch
from moeify.distributed.training import Trained


@dataclass
class Ranks:
    rank: int = 0
    size: int = 2


@dataclass
class Bars:
    """Notes what a bar is told."""

    stages: list[tuple[str, int | None]] = field(default_factory=list)
    done: int = 0
    lines: list[str] = field(default_factory=list)
    open: bool = False

    def __enter__(self) -> Bars:
        self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False

    def stage(self, text: str, total: int | None = None) -> None:
        self.stages.append((text, total))

    def advance(self, n: int = 1) -> None:
        self.done += n

    def aside(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    made = Bars()
    monkeypatch.setattr(progress, "Bars", lambda: made)
    return made


def trained(watch: Watch, first: int, last: int, saved: tuple[int, ...] = (), stopped: str | None = None) -> Trained:
    """Steps after ``first``, as the training loop tells them."""
    made = Trained(first)
    for step in range(first + 1, last + 1):
        made.losses.append(1.0 / step)
        made.norms.append(0.5)
        made.seconds.append(0.25)
        if step in saved:
            made.saved = Path(f"step-{step:08d}")
        if step == last:
            made.stopped = stopped
        watch.step(made)
    return made


def test_batches(bars: Bars) -> None:
    with Watch(Ranks(), 3, None) as watch:
        assert bars.open
        for _ in range(3):
            watch.batch()
    assert (bars.stages, bars.done, bars.lines, bars.open) == ([("2 ranks", 3)], 3, [], False)


def test_every_step_of_a_short_run_is_a_line(bars: Bars) -> None:
    with Watch(Ranks(size=1), 3, None) as watch:
        trained(watch, 0, 3, saved=(2,))
    assert bars.stages == [("1 rank", 3)]
    assert bars.done == 3
    assert bars.lines == [
        "step      1  loss 1.0000  gradients 0.5  0.25 s",
        "step      2  loss 0.5000  gradients 0.5  0.25 s  saved step-00000002",
        "step      3  loss 0.3333  gradients 0.5  0.25 s",
    ]


def test_a_long_run_has_few_lines(bars: Bars) -> None:
    with Watch(Ranks(), 1000, None) as watch:
        trained(watch, 0, 1000)
    assert bars.done == 1000
    assert [int(line.split()[1]) for line in bars.lines] == [1, *range(50, 1001, 50)]


def test_a_run_that_goes_on_has_its_bar_where_it_stopped(bars: Bars) -> None:
    with Watch(Ranks(), 100, None) as watch:
        trained(watch, 40, 42, stopped="SIGTERM")
    assert bars.done == 42
    assert [int(line.split()[1]) for line in bars.lines] == [41, 42]


def test_the_other_ranks_are_silent(bars: Bars, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(Ranks(rank=1), 2, None) as watch:
        watch.batch()
        watch.trained(trained(watch, 0, 2), 8)
    assert (bars.stages, bars.lines, capsys.readouterr().out) == ([], [], "")


def test_json_has_no_lines(bars: Bars, capsys: pytest.CaptureFixture[str]) -> None:
    answer: dict[str, Any] = {}
    with Watch(Ranks(), 2, answer) as watch:
        watch.trained(trained(watch, 0, 2), 8)
    assert (bars.done, bars.lines, capsys.readouterr().out) == (2, [], "")
    assert (answer["losses"], answer["tokens_per_second"], answer["first_step"]) == ([1.0, 0.5], 32.0, 1)
