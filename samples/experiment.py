"""What the experiments share: their options, figures over seeds, and tables on the screen, in Markdown and as JSON."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

_WIDTH = 140  # of the tables, also where the output is a file


def options(
    description: str, data: str = "a text file; without it Austen's novels, see austen.py"
) -> argparse.ArgumentParser:
    """The flags that every experiment has; ``data`` says what --data is."""
    summary = description.strip().split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="PATH", help=data)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how often all of it is repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first of them; they count up by one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where the models are trained")
    parser.add_argument(
        "--small", action="store_true", help="tiny models, a few steps and one seed: shows that it runs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all seeds")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, a .png or .svg")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    return parser


def prepare(settings: argparse.Namespace) -> None:
    """What torch is to do: TF32 where there is such a thing; one thread for models that are too small for more."""
    torch.set_float32_matmul_precision("high")
    if settings.small:
        torch.set_num_threads(1)


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[list[str]]

    def show(self, markdown: bool) -> None:
        if markdown:
            for cells in (self.columns, ["---"] * len(self.columns), *self.rows):
                print(f"| {' | '.join(cells)} |")
            return
        table = RichTable(title=self.title, title_justify="left")
        for column in self.columns:
            table.add_column(column)
        for row in self.rows:
            table.add_row(*row)
        Console(width=_WIDTH).print(table)


def over_seeds(values: Sequence[float], digits: int = 4) -> str:
    """``mean (standard deviation)``; the value alone where there is one seed."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ({stdev(values):.{digits}f})" if len(values) > 1 else text


def seeds(settings: argparse.Namespace) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


def finish(settings: argparse.Namespace, table: Table, runs: Any, draw: Callable[[Any, Path], None]) -> None:
    """What every experiment does with its runs: shows the table, writes the figures, draws them. Runs are plain data,
    or have a ``to_dict``.
    """
    table.show(settings.markdown)
    if settings.json:
        write_json(settings.json, settings, runs)
    if settings.plot:
        draw(runs, settings.plot)


def write_plot(path: Path, figure: Any) -> None:
    """A matplotlib Figure; whole or not at all."""
    staged = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(staged, dpi=110)
    staged.rename(path)


def write_json(path: Path, settings: argparse.Namespace, runs: Any) -> None:
    """The settings, where it ran, and the figures; whole or not at all."""
    device = torch.cuda.get_device_name() if settings.device.startswith("cuda") else platform.processor()
    said = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "device": device},
        "runs": runs,
    }
    staged = path.with_name(f"{path.name}.partial")
    staged.write_text(json.dumps(said, indent=1, default=lambda one: one.to_dict()))
    staged.rename(path)
