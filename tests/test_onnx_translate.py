"""ATen operators of our own translation: the numbers of torch, where torch.onnx fails or ONNX Runtime does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.backends.exporting import export
from moeify.backends.onnxruntime.neutral import to_onnx
from moeify.ir.program import InputSpec, Program
from tests.onnx_mixtures import arrays, proto, session

AUTO = torch.export.Dim.AUTO


def program(model: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]]) -> Program:
    shapes = tuple(dict.fromkeys(dynamic.get(name, {}), AUTO) for name in inputs)
    exported = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
    specs = tuple(
        InputSpec(name, x.dtype, tuple(dynamic.get(name, {}).get(i, n) for i, n in enumerate(x.shape)))
        for name, x in inputs.items()
    )
    return Program(exported.module(check_guards=False), specs, tuple(inputs.values()))  # type: ignore[arg-type]


def check(model: nn.Module, inputs: dict[str, Tensor], dynamic: dict[str, dict[int, str]], *others: dict) -> None:
    """Each output of the model, a dict, for inputs of the example's sizes and others."""
    made = program(model, inputs, dynamic)
    running = session(proto(to_onnx(export(made), made.inputs)))
    for given in (inputs, *others):
        expected = model(*given.values())
        results = running.run(None, arrays(given))
        for name, value in zip((value.name for value in running.get_outputs()), results, strict=True):
            # sums of a few products, in another order
            torch.testing.assert_close(torch.from_numpy(value), expected[name], rtol=2e-6, atol=2e-6, msg=name)


class Orders(nn.Module):
    def forward(self, x: Tensor, ints: Tensor) -> dict[str, Tensor]:
        line, edges = ints.flatten(), ints[0].sort().values
        half = x.bfloat16()
        return {
            "sort": x.round().sort(dim=0, stable=True)[1],
            "sort_down": x.round().sort(stable=True, descending=True)[1],
            "sort_middle": x.round().unsqueeze(2).sort(dim=-2, stable=True)[0],
            "argsort": line.argsort(stable=True),
            "of_bfloat16": half.sort(stable=True)[0].float(),
            "of_bool": (x > 0).sort(stable=True)[1],
            "argmax": x.round().argmax(-1),
            "argmax_first": x.round().argmax(0, keepdim=True),
            "argmax_flat": x.round().argmax(),
            "argmax_flat_kept": x.round().argmax(keepdim=True),
            "argmax_of_bool": (x > 0).to(torch.int8).argmax(1),
            "left": torch.searchsorted(edges, ints),
            "right": torch.searchsorted(edges, ints, right=True),
            "side": torch.searchsorted(edges, ints, side="right", out_int32=True),
            "rows": torch.searchsorted(x.sort(-1).values, x.round()),
            "sorter": torch.searchsorted(x, x.flip(1), sorter=x.argsort(-1)),
            "bucketize": torch.bucketize(x, torch.tensor([-1.0, 0.0, 0.5])),
        }


def _orders(rows: int, columns: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "x": torch.randn(rows, columns, generator=generator) * 2,
        "ints": torch.randint(4, (rows, columns), generator=generator),
    }


def test_orders():
    sizes = {0: "rows", 1: "columns"}
    check(Orders(), _orders(4, 7), {"x": sizes, "ints": sizes}, _orders(9, 30), _orders(1, 2))


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"argmax": x.argmax(1), "kept": x.argmax(-1, keepdim=True), "sorted": x.sort(dim=0, stable=True)[1]}


def test_orders_of_no_rows():
    check(Nothing(), {"x": torch.randn(3, 5)}, {"x": {0: "rows"}}, {"x": torch.randn(0, 5)})


class Attentions(nn.Module):
    """Queries [B, 4, L, D]; keys and values [B, 4, S, D]; masks of every shape that broadcasts to the scores."""

    def forward(self, q: Tensor, k: Tensor, padding: Tensor, bias: Tensor) -> dict[str, Tensor]:
        attend = F.scaled_dot_product_attention
        return {
            "plain": attend(q, k, k + 1, scale=0.3),
            "causal": attend(q, q, q, is_causal=True),
            "padded": attend(q, k, k, padding[:, None, None, :]),
            "padding_as_bias": attend(q, k, k, padding[:, None, None, :].float()),
            "of_queries": attend(q, k, k, bias[:, :, :1]),
            "biased": attend(q, k, k, bias),
            "bias_of_heads": attend(q, k, k, bias[0]),
            "one_head": attend(q, k[:, :1], k[:, :1]),
            "grouped": attend(q, k[:, :2], k[:, :2], enable_gqa=True),
            "three": attend(q[:, 0], k[:, 0], k[:, 0], padding[:, None, :]),
            "two": attend(q[0, 0], k[0, 0], k[0, 0]),
            "values_wider": attend(q, k, torch.cat([k, k], -1)),
        }


def _attentions(B: int, L: int, S: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(L)
    padding = torch.rand(B, S, generator=generator) < 0.7
    padding[-1] = False  # nothing to attend to
    return {
        "q": torch.randn(B, 4, L, 8, generator=generator),
        "k": torch.randn(B, 4, S, 8, generator=generator),
        "padding": padding,
        "bias": torch.randn(B, 4, L, S, generator=generator),
    }


@pytest.mark.filterwarnings("ignore")
def test_attention():
    sizes = {
        "q": {0: "B", 2: "L"},
        "k": {0: "B", 2: "S"},
        "padding": {0: "B", 1: "S"},
        "bias": {0: "B", 2: "L", 3: "S"},
    }
    check(Attentions(), _attentions(3, 5, 6), sizes, _attentions(4, 9, 3), _attentions(2, 2, 2))
