"""The figures of what routers do: one object for the screen, for --json and for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

MOST_CLASSES = 100  # of which a report has the loads one by one


class Writer(Protocol):
    """What ``write`` needs of TensorBoard's SummaryWriter or anything like it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


@dataclass(frozen=True)
class BlockRouting:
    """One block. ``load`` is each expert's share of the slots that were chosen, before a capacity drops any;
    ``entropy`` that of the load over that of equal shares (1: equal, 0: one expert for all), ``cv`` the standard
    deviation over the mean, ``peak`` the largest over the mean. ``experts_per_token`` is the mean number chosen,
    ``dropped`` the share of chosen slots that got no weight.

    What the expert of a token tells of its label, None without labels: ``mutual_information`` in nats, at most the log
    of the number of experts or of classes; ``mutual_information_by_chance``, the mean of it were the labels dealt to
    the tokens at random, which few tokens of many classes make large; ``label_information``, the first over the entropy
    of the labels, 1 where it tells the label. ``label_loads`` has by label the share of each expert in its tokens; None
    with more than ``MOST_CLASSES`` labels.
    """

    path: str
    tokens: int
    load: list[float]
    entropy: float
    cv: float
    peak: float
    experts_per_token: float
    dropped: float
    label_information: float | None = None
    mutual_information: float | None = None
    mutual_information_by_chance: float | None = None
    label_loads: dict[int, list[float]] | None = None

    def figures(self) -> Iterator[tuple[str, float]]:
        """The single numbers, by name."""
        for name in (
            "entropy", "cv", "peak", "experts_per_token", "dropped", "label_information", "mutual_information",
            "mutual_information_by_chance",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                yield name, value


@dataclass(frozen=True)
class RoutingReport:
    """All blocks, in the order in which they ran first.

    ``agreement[i][j]`` says how well the expert of a token in block i tells its expert in block j, whatever the experts
    are called: normalised mutual information, 2 I / (H_i + H_j), from 0 (independent) to 1 (the same partition); 0
    where a block uses one expert alone, None where the blocks never saw the same number of tokens. The expert of a
    token is the one of the largest weight. Few tokens make it too large, by about (E - 1)^2 / 2T nats of I.
    """

    blocks: list[BlockRouting]
    agreement: list[list[float | None]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, writer: Writer, step: int, prefix: str = "routing") -> None:
        """``writer.add_scalar("routing/<block>/entropy", value, step)`` and so on, and the load of every expert."""
        for block in self.blocks:
            path = f"{prefix}/{block.path}" if block.path else prefix
            for name, value in block.figures():
                writer.add_scalar(f"{path}/{name}", value, step)
            for expert, share in enumerate(block.load):
                writer.add_scalar(f"{path}/load/{expert}", share, step)
