"""Attention against torch's: heads, groups, masks, sizes that fill no tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tvm import relax

from moeify.backends.tvm.cpu.attention import attention
from moeify.backends.tvm.machine import Tile
from tests.tvm_dense import compiled, module, sizes, this_machine

LENGTHS = [(1, 1), (7, 7), (1, 19), (13, 5), (16, 32)]
MASKS: dict[str, Any] = {
    "none": None,
    "pad": (("b", 1, 1, "l"), torch.bool),
    "bool": (("b", 1, "s", "l"), torch.bool),
    "float": ((1, 1, "s", "l"), torch.float32),
    "flat": (("s", "l"), torch.float32),
}


def check(
    heads: int, groups: int, depth: int, width: int, mask: str, *, causal: bool, swapped: bool, tile: Tile
) -> None:
    named = dict(zip("bsl", sizes("bsl"), strict=True))
    types = [
        ((named["b"], n, h, d) if swapped else (named["b"], h, n, d), "float32")
        for h, n, d in ((heads, named["s"], depth), (groups, named["l"], depth), (groups, named["l"], width))
    ]
    if MASKS[mask]:
        shape, dtype = MASKS[mask]
        types.append((tuple(named.get(size, size) for size in shape), str(dtype).removeprefix("torch.")))

    def emit(e: Any, *inputs: Any) -> Any:
        q, k, v = (e.emit(relax.op.permute_dims(x, [0, 2, 1, 3])) if swapped else x for x in inputs[:3])
        return attention(e, q, k, v, inputs[3] if len(inputs) > 3 else None, causal, depth**-0.5)

    run = compiled(emit, types, on=this_machine(tile))
    for s, length in LENGTHS:
        q, k = torch.randn(2, heads, s, depth), torch.randn(2, groups, length, depth)
        v = torch.randn(2, groups, length, width)
        given = [x.transpose(1, 2).contiguous() for x in (q, k, v)] if swapped else [q, k, v]
        bias = None
        if MASKS[mask]:
            shape, dtype = MASKS[mask]
            full = [{"b": 2, "s": s, "l": length}.get(size, size) for size in shape]
            bias = torch.rand(full) > 0.3 if dtype == torch.bool else torch.randn(full)
            given.append(bias)
        expected = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=heads != groups)
        torch.testing.assert_close(run(*given), expected)


@pytest.mark.parametrize("mask", list(MASKS))
def test_masks(mask: str) -> None:
    check(2, 2, 8, 8, mask, causal=False, swapped=mask == "pad", tile=Tile(6, 16))


@pytest.mark.parametrize("tile", [Tile(6, 16), Tile(12, 32)], ids=str)
def test_causal_with_groups_and_odd_sizes(tile: Tile) -> None:
    check(6, 2, 9, 21, "none", causal=True, swapped=True, tile=tile)


def test_a_query_that_sees_no_key_is_zero_as_in_torch() -> None:
    b, s = sizes("bs")
    types = [((b, 2, s, 8), "float32")] * 3 + [((b, 1, 1, s), "bool")]
    run = compiled(lambda e, q, k, v, m: attention(e, q, k, v, m, False, 1.0), types)
    q = torch.randn(2, 2, 5, 8)
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 5).contiguous()
    found = run(q, q, q, mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, mask, scale=1.0))
    assert not found[1].any()


def test_transposes_of_heads_are_read_through_and_scores_are_never_whole() -> None:
    b, s = sizes("bs")
    types = [((b, s, 2, 8), "float32")] * 3

    def emit(e: Any, *inputs: Any) -> Any:
        q, k, v = (e.emit(relax.op.permute_dims(x, [0, 2, 1, 3])) for x in inputs)
        return e.emit(relax.op.permute_dims(attention(e, q, k, v, None, False, 1.0), [0, 2, 1, 3]))

    mod, _ = module(emit, types)
    from moeify.backends.tvm.cpu.pipeline import to_kernels

    names = {v.name_hint for v in to_kernels(mod, this_machine()).get_global_vars()}
    assert names == {"main", "attention_keys_2xnx8_s", "attention_2xnx8_2xnx8_scale1p0_sss"}


def test_what_is_declined() -> None:
    b, s = sizes("bs")
    seen: list[Any] = []

    def emit(e: Any, q: Any, m: Any) -> Any:
        seen.append(attention(e, q, q, q, m, False, 1.0))
        return q

    module(emit, [((b, 2, s, 8), "float16"), ((s, s), "bool")])
    module(emit, [((b, 2, s, 8), "float32"), ((s, s), "int64")])
    module(emit, [((b, 2, s, 8), "float32"), ((s, 7), "bool")])
    assert seen == [None, None, None]
