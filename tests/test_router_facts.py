"""The table of routers: asked of the routers, and as it stands in docs/ROUTERS.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.router_table import tried
from moeify.cli.main import main
from moeify.nn.routers import ROUTERS
from moeify.training.router_facts import HEADER, RouterFacts, all_facts

PAGE = Path(__file__).parent.parent / "docs" / "ROUTERS.md"
BALANCE = ("switch", "gshard", "z", "importance", "l1", "similarity")


@pytest.fixture(scope="module")
def facts() -> dict[str, RouterFacts]:
    return {one.name: one for one in all_facts()}


def test_routers_say_what_they_are(facts: dict[str, RouterFacts]) -> None:
    assert list(facts) == list(ROUTERS)
    plain = facts["softmax-topk"]
    assert plain == RouterFacts("softmax-topk", "k", "sum to 1", "", "", False, ("the loss",), BALANCE)
    assert facts["noisy-topk"].random
    assert "load" in facts["noisy-topk"].losses
    assert (facts["switch"].experts, facts["gshard"].experts, facts["soft"].experts) == ("1", "2", "all")
    assert facts["top-p"].experts == "at most k"
    assert (facts["hash"].needs, facts["hash"].learns, facts["hash"].losses) == ("token ids", ("nothing",), ())
    assert facts["sigmoid-bias"].learns == ("the loss", "after_step")
    assert facts["rl"].learns == ("reinforce",)
    assert facts["topk"].weights == "1 each"
    assert facts["expert-choice"].mixes_tokens == "always"


def test_the_page_is_current(facts: dict[str, RouterFacts]) -> None:
    """Its first columns; those of the backends are tried by ``python -m bench.router_table``, which writes it."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[0][: len(HEADER)] == list(HEADER)
    stand = [tuple(cell.strip() for cell in row[: len(HEADER)]) for row in rows[2:]]
    assert stand == [one.cells() for one in facts.values()]


def test_the_table_is_a_listing(facts: dict[str, RouterFacts], capsys: pytest.CaptureFixture) -> None:
    assert main(["routers", "--table", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["routers"]
    assert [one["name"] for one in said] == list(facts)
    assert said[0]["losses"] == list(BALANCE)
    assert main(["routers", "--table"]) == 0
    assert "learns from" in capsys.readouterr().out


def test_experts_that_are_constants_are_exported(tmp_path: Path) -> None:
    """A soft router's choice where the number of tokens is fixed: constants that no node of the file makes."""
    assert tried("soft", tmp_path)[0] == "yes"
