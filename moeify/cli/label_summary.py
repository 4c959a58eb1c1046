"""What experts tell of the labels of their tokens, on the screen: figures by block, and a heat map of one block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeify.cli.figures import table
from moeify.cli.heat import heat_row
from moeify.cli.output import Screen

if TYPE_CHECKING:
    from moeify.training.routing_report import BlockRouting

_MAPPED = 32  # labels that are shown one by one


def show(screen: Screen, blocks: Sequence[BlockRouting], classes: Sequence[str]) -> None:
    """Nothing where no block has labels; ``classes`` are their names, if they have any."""
    told = with_labels(blocks)
    if not told:
        return
    header = ("block", "mutual information", "by chance", "of the label's entropy")
    rows = [
        (
            block.path or "(the model)",
            f"{block.mutual_information:.3f}",
            f"{block.mutual_information_by_chance:.3f}",
            f"{block.label_information:.1%}",
        )
        for block in told
    ]
    for number, line in enumerate(table(header, rows, screen.width)):
        screen.line(line, "bold" if number == 0 else None)
    screen.line()
    block = clearest(told)
    if block.label_loads is None or len(block.label_loads) > _MAPPED:
        return
    screen.line(f"  experts by label in {block.path or '(the model)'}, which tells most", "bold")
    called = {label: classes[label] if classes else str(label) for label in block.label_loads}
    column = max(map(len, called.values())) + 4
    for label, loads in block.label_loads.items():
        for cells in heat_row(f"  {called[label]}", loads, column):
            screen.line(cells)
    screen.line()


def with_labels(blocks: Sequence[BlockRouting]) -> list[BlockRouting]:
    return [block for block in blocks if block.mutual_information is not None]


def clearest(told: Sequence[BlockRouting]) -> BlockRouting:
    """The block whose experts tell most of the labels, beyond chance; of blocks that have labels."""
    return max(told, key=lambda block: (block.mutual_information or 0.0) - (block.mutual_information_by_chance or 0.0))


def in_a_line(told: Sequence[BlockRouting]) -> str:
    """Of blocks that have labels."""
    values = [block.mutual_information or 0.0 for block in told]
    chance = max(block.mutual_information_by_chance or 0.0 for block in told)
    return f"experts tell {min(values):.3f} to {max(values):.3f} nats of them, {chance:.3f} by chance"
