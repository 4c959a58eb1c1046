"""What routers do, counted: ``moeify.routing`` on routings made by hand, and ``moeify inspect --routing``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.cli.main import main
from moeify.errors import UsageError
from moeify.nn.moe import MoE
from moeify.nn.routers.router import Router
from tests.routed_models import D


class ByHand(Router):
    """Chooses what it is told, of 4 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = 4, 1
        self.choice: tuple[Tensor, Tensor]

    def forward(self, x_TD: Tensor, token_ids_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        experts_TK, weights_TK = self.choice
        self.observe(experts=experts_TK, weights=weights_TK)
        return experts_TK, weights_TK


class Two(nn.Sequential):
    """Two mixtures whose routers are told what to choose."""

    def __init__(self) -> None:
        super().__init__(*(MoE(D, D, 4, 4, ByHand()) for _ in range(2)))

    def run(self, *experts: list[list[int]], weights: list[list[float]] | None = None) -> None:
        """One forward pass; ``experts`` are those of each mixture."""
        for mixture, chosen in zip(self, experts):
            rows = torch.tensor(chosen)
            values = torch.ones(rows.shape) if weights is None else torch.tensor(weights)
            mixture.router.choice = (rows, values)
        self(torch.zeros(len(experts[0]), D))


@pytest.fixture
def model() -> Two:
    return Two()


def test_loads(model: Two) -> None:
    """Token 2 has a slot without an expert, and one that was dropped."""
    with moeify.routing(model) as seen:
        model.run([[0, 1], [0, 4], [0, 1]], [[3, 2]] * 3, weights=[[0.5, 0.5], [0.7, 0.0], [0.0, 1.0]])
    first, second = seen.report().blocks
    assert (first.path, first.tokens) == ("0", 3)
    assert first.load == pytest.approx([0.6, 0.4, 0, 0])
    assert first.entropy == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.4)) / math.log(4))
    assert first.cv == pytest.approx(math.sqrt((1.4**2 + 0.6**2 + 2) / 4))
    assert first.peak == pytest.approx(2.4)
    assert first.experts_per_token == pytest.approx(5 / 3)
    assert first.dropped == pytest.approx(1 / 5)
    assert second.load == [0, 0, 0.5, 0.5]
    assert first.label_information is None


def test_agreement_is_about_which_tokens_are_together(model: Two) -> None:
    with moeify.routing(model) as seen:
        model.run([[0], [0], [1], [1]], [[3], [3], [2], [2]])
    assert seen.report().agreement == [[1, pytest.approx(1)], [pytest.approx(1), 1]]
    with moeify.routing(model) as seen:
        model.run([[0], [0], [1], [1]], [[0], [1], [0], [1]])
    assert seen.report().agreement[0][1] == pytest.approx(0, abs=1e-12)
    with moeify.routing(model) as seen:  # H = log 2 each; I = log 2 - H(1/4)
        model.run([[0]] * 4 + [[1]] * 4, [[0]] * 3 + [[1]] * 4 + [[0]])
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert seen.report().agreement[1][0] == pytest.approx(1 - quarter / math.log(2))
    with moeify.routing(model) as seen:
        model.run([[0], [0]], [[1], [2]])
    assert seen.report().agreement == [[0, 0], [0, 1]]


def test_the_expert_of_a_token_is_that_of_the_largest_weight(model: Two) -> None:
    with moeify.routing(model) as seen:
        model.run([[0, 1], [0, 1]], [[2, 3], [3, 2]], weights=[[0.2, 0.8], [0.9, 0.1]])
    assert seen.report().agreement[0][1] == pytest.approx(0)  # 1, 0 and 3, 3


def test_labels_and_masks(model: Two) -> None:
    """The last token is padding, the one before has no label."""
    with moeify.routing(model) as seen:
        seen.next(mask=torch.tensor([[1, 1, 1, 1, 1, 0]]), labels=torch.tensor([[7, 7, 2, 2, -1, 2]]))
        model.run([[0], [0], [1], [1], [1], [0]], [[0], [1], [0], [1], [0], [0]])
        model.run([[0], [2]], [[0], [0]])  # without labels
    first, second = seen.report().blocks
    assert (first.label_information, second.label_information) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert first.tokens == 7
    with moeify.routing(model) as seen:
        seen.next(labels=torch.zeros(3, dtype=torch.int64))
        with pytest.raises(UsageError, match="the labels are of 3 tokens, and the block's router saw 1"):
            model.run([[0]], [[0]])


def test_nothing_is_left_behind_and_something_must_have_run(model: Two) -> None:
    with moeify.routing(model) as seen:
        pass
    assert all(mixture.router.observer is None for mixture in model)
    with pytest.raises(UsageError, match="run the model inside"):
        seen.report()


def test_figures_go_to_a_writer(model: Two) -> None:
    class Writer:
        def __init__(self) -> None:
            self.said: dict[str, float] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            assert global_step == 12
            self.said[tag] = scalar_value

    with moeify.routing(model) as seen:
        model.run([[0], [1]], [[1], [1]])
    writer = Writer()
    seen.report().write(writer, 12)
    assert writer.said["routing/0/entropy"] == pytest.approx(0.5)
    assert writer.said["routing/1/load/1"] == 1.0
    assert {tag.split("/", 2)[2] for tag in writer.said} == {
        "entropy", "cv", "peak", "experts_per_token", "dropped", *(f"load/{i}" for i in range(4)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of two layers, converted with router losses in its recipe, and inputs beside it."""
    folder = tmp_path_factory.mktemp("routing")
    torch.manual_seed(0)
    torch.save(nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 12, batch_first=True), 2), folder / "dense.pt")
    recipe = moeify.Recipe(experts=4, router_losses=("switch", "z{weight=0.1}"))
    inputs = ["src=float32[batch=3,seq=5,8]"]
    moeify.convert_file(folder / "dense.pt", folder / "moe.pt2", recipe, inputs=inputs)
    torch.save({"src": torch.randn(9, 5, D)}, folder / "data.pt")
    return folder / "moe.pt2"


def test_inspect_shows_what_the_routers_do(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "loads.png"
    command = ["inspect", str(file), "--routing", str(file.parent / "data.pt")]
    assert main([*command, "--json", "--plot", str(plot)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert plot.read_bytes().startswith(b"\x89PNG")
    model = moeify.load(file)
    with moeify.routing(model) as seen, torch.no_grad():
        model(torch.load(file.parent / "data.pt")["src"])
    expected = seen.report().to_dict()
    assert [block["path"] for block in said["blocks"]] == ["layers.0", "layers.1"]
    for mine, its in zip(said["blocks"], expected["blocks"], strict=True):
        assert mine["tokens"] == 45
        assert mine["load"] == pytest.approx(its["load"])
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "layers.1  45" in shown
    assert f"{expected['agreement'][0][1]:.2f} on average between a block and the next" in shown.replace("\n", " ")


def test_plot_goes_with_routing(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(file), "--plot", "x.png"]) == 2
    assert "add --routing DATA" in capsys.readouterr().err


def test_a_loaded_file_knows_its_losses(file: Path) -> None:
    model = moeify.load(file).train()
    with moeify.routing(model) as seen:  # beside what training keeps
        model(torch.randn(2, 5, D))
    assert seen.report().blocks[0].tokens == 10
    assert list(moeify.losses(model).blocks["layers.0"]) == ["switch", "z"]


def test_losses_are_listed_and_set_by_flags(capsys: pytest.CaptureFixture) -> None:
    from moeify.cli.flags import recipe
    from moeify.nn.losses import LOSSES

    assert main(["losses", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)["losses"]] == list(LOSSES)
    made = recipe(None, ["a.*:router-losses=switch{weight=1e+3}+z,experts=4"], [], router_losses=("z",))
    assert made.router_losses == ("z",)
    assert made.for_block("a.b").router_losses == ("switch{weight=1e+3}", "z")
