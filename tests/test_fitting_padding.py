"""The mask of a block's rows, also where the capture does not tie its sizes to those of the token ids."""

from __future__ import annotations

import pytest
import torch
import transformers

from moeify import frontend
from moeify.fitting.collect import collect
from moeify.fitting.padding import mask_of_rows, masks_of
from moeify.pipeline.default import FIND
from moeify.pipeline.runner import run
from tests import programs


@pytest.fixture(scope="module")
def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    made = frontend.capture(transformers.BertModel(config).eval(), None)
    run(made, FIND)
    return made


def test_the_mask_of_an_encoder_is_found(bert) -> None:
    x = next(node for node in bert.graph.nodes if node.name == bert.blocks[0].calls[0].input)
    position = mask_of_rows(bert.graph, masks_of(bert.graph, bert.inputs), x)
    assert position is not None
    assert bert.inputs[position].name == "attention_mask"


def test_padding_of_an_encoder_does_not_count(bert) -> None:
    found = []
    mask = torch.ones(20, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    for filler in (0, 7):
        ids = torch.randint(50, (20, 6), generator=torch.Generator().manual_seed(0))
        (block,) = collect(bert, [(torch.where(mask != 0, ids, filler), mask)]).blocks.values()
        found.append(block)
    assert [block.tokens for block in found] == [80, 80]
    # Masked tokens are not attended to, so what stands there changes nothing.
    torch.testing.assert_close(found[0].mean_square_F, found[1].mean_square_F)


def test_without_a_mask_all_rows_count() -> None:
    made = programs.plain()
    x = next(node for node in made.graph.nodes if node.name == made.blocks[0].calls[0].input)
    assert mask_of_rows(made.graph, masks_of(made.graph, made.inputs), x) is None
