"""Which blocks the select pass marks, what it logs, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from moeify.errors import BadRecipe, MoeifyError, NoBlocks
from moeify.ir.block import Block, WeightRef
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.passes.select import Select
from moeify.pipeline.base import Log


def block(path: str, rows: str = "token", reason: str | None = None) -> Block:
    weight = WeightRef("w", (4, 4))
    return Block(path, f"{path}.ffn", [], weight, weight, rows=rows, reason=reason)


SAMPLE = "one row per example"


def program(blocks: list[Block] | None = None, **recipe) -> Program:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    made = Program(fx.GraphModule(torch.nn.Module(), graph), (), ())
    made.blocks = [block(f"layer.{i}") for i in range(6)] if blocks is None else blocks
    made.recipe = Recipe(**recipe)
    return made


def chosen(made: Program) -> tuple[list[str], list[str]]:
    log = Log()
    Select().apply(made, log)
    assert set(made.selected) == {b.anchor for b in made.blocks}
    return [b.path for b in made.converted()], log.lines


def refusal(kind: type[MoeifyError], made: Program) -> str:
    with pytest.raises(kind) as error:
        Select().apply(made, Log())
    return str(error.value)


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("every:1", [0, 1, 2, 3, 4, 5]),
        ("every:2", [1, 3, 5]),
        ("every:4", [3]),
        ("first:2", [0, 1]),
        ("last:6", [0, 1, 2, 3, 4, 5]),
        ("last:1", [5]),
        ("layer.[024]", [0, 2, 4]),
        ("layer.5, layer.1", [1, 5]),
        ("*", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_selection(blocks, numbers):
    paths, lines = chosen(_six(blocks))
    assert paths == [f"layer.{i}" for i in numbers]
    assert lines[-1] == f"{len(numbers)} of 6 blocks selected by {blocks}"


def _six(blocks: str) -> Program:
    made = program()
    made.recipe = Recipe(blocks=blocks)
    return made


def test_a_block_with_a_reason_is_no_candidate():
    made = program([block("a"), block("head", "sample", SAMPLE), block("b")])
    made.recipe = Recipe(blocks="every:2")
    paths, lines = chosen(made)
    assert paths == ["b"]
    assert lines == ["a: not among every:2", "head: one row per example", "1 of 3 blocks selected by every:2"]


def test_include_makes_it_one():
    made = program([block("a"), block("head", "sample", SAMPLE), block("mix", "channel", "mixes")], include=("sample",))
    assert chosen(made)[0] == ["a", "head"]


def test_include_does_not_help_a_block_with_another_reason():
    made = program([block("a"), block("b", "token", "its weight is computed")], include=("sample", "channel"))
    assert chosen(made)[0] == ["a"]


def test_include_refuses_a_kind_that_does_not_exist():
    text = refusal(BadRecipe, program(include=("image",)))
    assert text == "include names 'image'\n  hint: choose among sample, channel"


def test_refuses_a_glob_that_matches_nothing():
    made = program([block(f"layer.{i}") for i in range(14)])
    made.recipe = Recipe(blocks="layer.1,decoder.*")
    assert refusal(NoBlocks, made) == (
        "'decoder.*' matches no block\n  hint: the blocks are layer.0, layer.1, layer.2, layer.3, layer.4, layer.5, "
        "layer.6, layer.7, layer.8, layer.9, layer.10, layer.11 and 2 more"
    )


def test_refuses_a_glob_that_matches_only_blocks_with_a_reason():
    made = program([block("a"), block("head", "sample", SAMPLE)])
    made.recipe = Recipe(blocks="head")
    assert refusal(NoBlocks, made) == (
        "'head' matches no block that may be rewritten: one row per example\n  at: head\n"
        "  hint: --include sample selects it nevertheless"
    )


@pytest.mark.parametrize("blocks", ["last:20", "first:7", "every:7"])
def test_refuses_to_count_past_the_blocks(blocks):
    assert refusal(NoBlocks, _six(blocks)) == (
        f"{blocks} asks for more blocks than there are, 6\n"
        "  hint: the blocks are layer.0, layer.1, layer.2, layer.3, layer.4, layer.5"
    )


def test_refuses_an_override_for_no_block():
    made = program([block("a"), block("b")], overrides=(("a", {"experts": 4}), ("c.*", {"experts": 4})))
    assert refusal(NoBlocks, made) == "the override 'c.*' matches no block\n  hint: the blocks are a, b"


@pytest.mark.parametrize("blocks", ["every:0", "first:x", "last:-1", "last:"])
def test_refuses_a_count_that_is_none(blocks):
    word = blocks.partition(":")[0]
    assert refusal(BadRecipe, _six(blocks)) == (
        f"blocks is '{blocks}': {word}: wants a whole number of at least 1\n  hint: write {word}:2"
    )


@pytest.mark.parametrize("blocks", [[], [block("head", "sample", SAMPLE)]])
def test_leaves_a_model_without_candidates_alone(blocks):
    paths, lines = chosen(program(blocks))
    assert paths == []
    assert lines[-1] == f"0 of {len(blocks)} blocks selected by all"
