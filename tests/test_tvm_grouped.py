"""The fused experts on the CPU: every shape, routing, tile, layout and type, against the operator in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from tvm import relax

from moeify.backends.tvm.cpu import reference
from moeify.backends.tvm.cpu.table import table
from moeify.ir.activations import TABLE as ACTIVATIONS
from tests.tvm_kernels import Block, Run, compiled, machines, routing, small_tile

# Widths that are no multiple of anything, of a tile, and smaller than one; experts without rows in all but the last.
ODD = Block(5, 19, 37, 21)
EVEN = Block(4, 32, 64, 32, activation="silu", gated=True)
TINY = Block(1, 1, 1, 1, activation="tanh", gated=True)
FLOAT32 = 2e-6  # sums of up to 64 products twice, each rounded to 2^-24, relative to the largest result


def rows(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))


def close(block: Block, run: Run, x: Tensor, experts: Tensor, weights: Tensor, tolerance: float = FLOAT32) -> None:
    (y,) = run(x, experts, weights)
    want = block.expected(x, experts, weights)
    assert y.shape == want.shape
    assert y.dtype == torch.float32
    if y.numel():
        assert float((y - want).abs().max() / want.abs().max()) < tolerance


@pytest.fixture(scope="module")
def fast() -> Run:
    return ODD.compiled(2)


@pytest.fixture(scope="module")
def slow() -> Run:
    return ODD.compiled(2, reference.TABLE)


@pytest.fixture(params=["fast", "slow"])
def odd(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    return run


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 16, 33, 100])
def test_any_number_of_tokens(odd: Run, tokens: int) -> None:
    close(ODD, odd, rows(tokens, ODD.d_model), *routing(tokens, ODD.experts, 2))


@pytest.mark.parametrize(
    "experts",
    [
        [[0, 1]] * 9,  # two experts have every row and three have none
        [[4, 4]] * 9,  # one expert, twice for each token
        [[3, 0], [3, 3], [0, 3]] * 5,
        [[4, 2], [2, 4]],
    ],
)
def test_any_routing(odd: Run, experts: list[list[int]]) -> None:
    chosen = torch.tensor(experts)
    close(ODD, odd, rows(len(experts), ODD.d_model), chosen, torch.rand(chosen.shape) - 0.5)


@pytest.mark.parametrize("expert", [-1, 5, 2**40])
def test_an_expert_out_of_range_is_an_error_and_no_access_out_of_bounds(fast: Run, expert: int) -> None:
    with pytest.raises(Exception, match=r"an expert is not one of 0\.\.4"):
        fast(rows(2, ODD.d_model), torch.tensor([[0, 1], [expert, 0]]), torch.ones(2, 2))


@pytest.mark.parametrize(("name", "block"), [*((name, ODD) for name in machines()), ("plain", EVEN)])
def test_every_tile(name: str, block: Block) -> None:
    target = machines()[name]
    run = block.compiled(3, target=target)
    for tokens in (1, target.tile.rows, 3 * target.tile.rows + 1):
        close(block, run, rows(tokens, block.d_model), *routing(tokens, block.experts, 3))


@pytest.mark.parametrize(
    ("gated", "k", "biases"),
    [
        (False, 1, []),
        (False, 2, ["up_bias"]),
        (False, 1, ["down_bias"]),
        (True, 2, []),
        (True, 1, ["gate_bias"]),
        (True, 2, ["up_bias", "down_bias"]),
        (True, 1, ["up_bias", "gate_bias", "down_bias"]),
    ],
)
def test_every_layout(gated: bool, k: int, biases: list[str]) -> None:
    block = Block(3, 10, 12, 9, "gelu_tanh", gated, biases)
    close(block, block.compiled(k, target=small_tile(2, 8)), rows(6, 10), *routing(6, 3, k))


def test_one_of_everything() -> None:
    close(TINY, TINY.compiled(1), rows(5, 1), torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))


@pytest.fixture(scope="module")
def activated() -> list[Tensor]:
    """The results of ``of(activation)`` for all of them, from one library."""
    blocks = [of(activation) for activation in ACTIVATIONS]

    def all_of_them(emitter: Any, x: Any, experts: Any, weights: Any) -> Any:
        return relax.Tuple([table()("dispatch_ffn", emitter, x, experts, weights, block.spec) for block in blocks])

    inputs = [(("T", 6), torch.float32), (("T", 1), torch.int64), (("T", 1), torch.float32)]
    return compiled(all_of_them, inputs, blocks[0].weights(), small_tile(1, 8))(*GIVEN)


def of(activation: str) -> Block:
    return Block(2, 6, 9, 6, activation, gated=True)


GIVEN = (3 * rows(20, 6), *routing(20, 2, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activated: list[Tensor], activation: str) -> None:
    y = activated[list(ACTIVATIONS).index(activation)]
    close(of(activation), lambda *_: [y], *GIVEN)


@pytest.mark.parametrize("activation", ["gelu", "mish", "softplus", "hardswish"])
def test_the_reference_has_them_too(activation: str) -> None:
    close(of(activation), of(activation).compiled(1, reference.TABLE), *GIVEN)


@pytest.mark.parametrize(
    ("dtype", "digits", "gated", "target"),
    [
        (torch.float16, 11, True, "plain"),
        (torch.float16, 11, False, "sse"),  # the hardware converts nothing here
        (torch.bfloat16, 8, False, "plain"),
        (torch.bfloat16, 8, True, "sse"),
    ],
)
def test_stored_in_half(dtype: torch.dtype, digits: int, gated: bool, target: str) -> None:
    """Exactly the block whose matrices were rounded, with sums in float32."""
    if target not in machines():
        pytest.skip("not an x86-64 machine")
    block = Block(3, 33, 20, 17, "silu", gated)
    run = block.compiled(2, target=machines()[target], dtype=dtype)
    x, (experts, weights) = rows(14, 33), routing(14, 3, 2)
    close(dataclasses.replace(block, stored=dtype), run, x, experts, weights)
    assert (run(x, experts, weights)[0] - block.expected(x, experts, weights)).abs().max() > 2.0 ** -(digits + 6)
