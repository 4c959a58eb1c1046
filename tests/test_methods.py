"""Every method: its numbers against the dense block, its statistics, its refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import BadOption, BadRecipe, NotDivisible, Refused
from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan
from moeify.ir.block import Block, WeightRef
from moeify.ir.recipe import BlockRecipe
from tests import programs

D, WIDTH, T = 6, 16, 5


def block(*, gated: bool = True, width: int = WIDTH) -> Block:
    """A dense block; up is stored transposed, as GPT-2 does."""
    return Block(
        path="encoder.layer.3",
        anchor="encoder.layer.3",
        calls=[],
        up=WeightRef("up", (width, D), (("t",),)),
        gate=WeightRef("gate", (width, D)) if gated else None,
        down=WeightRef("down", (D, width)),
        up_bias=WeightRef("up_bias", (width,)),
        gate_bias=WeightRef("gate_bias", (width,)) if gated else None,
        down_bias=WeightRef("down_bias", (D,)),
        activation="silu",
    )


def dense(width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (D, width), "gate": (width, D), "down": (D, width), "up_bias": (width,), "gate_bias": (width,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in {**shapes, "down_bias": (D,)}.items()}


def values(plan: ExpertPlan, weights: dict[str, Tensor], part: str = "weights") -> dict[str, Tensor]:
    return {role: recipe.materialise(weights.__getitem__) for role, recipe in getattr(plan, part).items()}


def ffn(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    up = F.linear(x, w["up"], w.get("up_bias"))
    hidden = F.silu(F.linear(x, w["gate"], w.get("gate_bias"))) * up if "gate" in w else F.silu(up)
    return F.linear(hidden, w["down"], w.get("down_bias"))


def canonical(b: Block, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {role: ref.read(weights[ref.parameter]) for role, ref in b.weights.items()}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("shared", "shared_gate"), [(0, False), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("method", "top_k"), [("copy", 2), ("granular", 2), ("granular{shards=2}", 4)])
def test_exact_methods_keep_the_function(method, top_k, shared, shared_gate, gated):
    b, weights = block(gated=gated), dense()
    recipe = BlockRecipe(method, 8, top_k, shared=shared, shared_gate=shared_gate)
    plan = METHODS.parse(method).plan(b, recipe, 0, torch.float32)
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    stacked = values(plan, weights)
    outputs = [ffn(x, {role: w[e] for role, w in stacked.items()}) for e in range(8)]
    # Any gates that are equal within one copy and sum to 1: here copies 0 and 1, 0.3 and 0.7.
    repeat = plan.router_repeat
    copies = top_k // repeat
    gates = {0: 1.0} if copies == 1 else {0: 0.3, 1: 0.7}
    y = sum(g / repeat * outputs[j * repeat + s] for j, g in gates.items() for s in range(repeat))
    if shared:
        assert plan.shared["up"].shape == (shared * WIDTH, D)
        y = y + ffn(x, values(plan, weights, "shared")) * (0.5 if shared_gate else 1.0)
    if plan.output_bias is not None:
        y = y + plan.output_bias.materialise(weights.__getitem__)
    torch.testing.assert_close(y, ffn(x, canonical(b, weights)))


@pytest.mark.parametrize("method", ["copy", "granular", "noise", "drop"])
def test_names_shapes_and_dtypes(method):
    plan = METHODS.parse(method).plan(block(), BlockRecipe(method, shared=1), 0, torch.bfloat16)
    assert plan.num_experts == 8
    wide = plan.d_expert
    assert wide == (WIDTH // 2 if method == "granular" else WIDTH)
    shapes = {role: recipe.shape for role, recipe in plan.weights.items()}
    expected = {"up": (8, wide, D), "gate": (8, wide, D), "down": (8, D, wide), "up_bias": (8, wide),
                "gate_bias": (8, wide), "down_bias": (8, D)}  # fmt: skip
    if method == "granular":
        del expected["down_bias"]
        assert plan.output_bias is not None
        assert plan.output_bias.name == "encoder.layer.3.output_bias"
    assert shapes == expected
    assert plan.weights["up"].name == "encoder.layer.3.experts.up"
    assert plan.shared["down"].name == "encoder.layer.3.shared.down"
    for recipe in (*plan.weights.values(), *plan.shared.values()):
        value = recipe.materialise({k: v.bfloat16() for k, v in dense().items()}.__getitem__)
        assert value.dtype == torch.bfloat16


def test_granular_puts_shard_s_of_copy_j_at_j_times_g_plus_s():
    weights = dense()
    plan = METHODS.parse("granular{shards=4}").plan(block(), BlockRecipe(top_k=4), 0, torch.float32)
    stacked, w = values(plan, weights), canonical(block(), weights)
    for j in range(2):
        for s in range(4):
            rows = slice(4 * s, 4 * s + 4)
            assert torch.equal(stacked["up"][4 * j + s], w["up"][rows])
            assert torch.equal(stacked["gate_bias"][4 * j + s], w["gate_bias"][rows])
            assert torch.equal(stacked["down"][4 * j + s], 4 * w["down"][:, rows])
    assert plan.router_repeat == 4


def test_one_expert_does_not_share_memory_with_the_dense_weight():
    weights = dense()
    for method in ("copy", "granular", "noise", "drop"):
        plan = METHODS.parse(method).plan(block(), BlockRecipe(method, 1, 1), 0, torch.float32)
        pointers = {v.untyped_storage().data_ptr() for v in weights.values()}
        made = [*values(plan, weights).values()]
        if plan.output_bias is not None:
            made.append(plan.output_bias.materialise(weights.__getitem__))
        assert all(v.untyped_storage().data_ptr() not in pointers for v in made)


def test_noise_has_its_deviation_on_its_fraction_of_the_entries():
    b, weights = block(width=4096), dense(4096)
    plan = METHODS.parse("noise{std=0.1,fraction=0.25}").plan(b, BlockRecipe(), 0, torch.float32)
    stacked, w = values(plan, weights), canonical(b, weights)
    for role in ("up", "gate", "down"):
        change = stacked[role] - w[role]
        touched = change != 0
        assert abs(touched.float().mean().item() - 0.25) < 0.01
        assert abs(change[touched].std().item() - 0.1) < 0.002
        assert not torch.equal(change[0], change[1])
    for role in ("up_bias", "gate_bias", "down_bias"):
        assert torch.equal(stacked[role], w[role].expand(8, -1))


def test_drop_redraws_the_same_units_everywhere_with_their_own_statistics():
    b, weights = block(width=4096), dense(4096)
    weights["gate"] = weights["gate"] * 3 + 1
    plan = METHODS.parse("drop{ratio=0.25}").plan(b, BlockRecipe(), 0, torch.float32)
    stacked, w = values(plan, weights), canonical(b, weights)
    sets = []
    for e in range(8):
        up, gate = ((stacked[r][e] != w[r]).all(1) for r in ("up", "gate"))
        down = (stacked["down"][e] != w["down"]).all(0)
        bias = stacked["up_bias"][e] != w["up_bias"]
        assert torch.equal(up, gate)
        assert torch.equal(up, down)
        assert torch.equal(up, bias)
        assert up.sum() == 1024
        assert torch.equal(stacked["up"][e][~up], w["up"][~up])
        fresh = stacked["gate"][e][gate]
        assert abs(fresh.mean().item() - 1) < 0.15
        assert abs(fresh.std().item() - 3) < 0.15
        sets.append(up)
    assert not torch.equal(sets[0], sets[1])
    assert torch.equal(stacked["down_bias"], w["down_bias"].expand(8, -1))


@pytest.mark.parametrize("method", ["noise", "drop"])
def test_random_values_depend_on_seed_and_name_and_not_on_the_order(method):
    def make(seed: int, backwards: bool) -> dict[str, Tensor]:
        recipes = METHODS.parse(method).plan(block(), BlockRecipe(), seed, torch.float32).weights
        order = list(recipes)[:: -1 if backwards else 1]
        return {role: recipes[role].materialise(dense().__getitem__) for role in order}

    first, backwards, other = make(0, False), make(0, True), make(1, False)
    assert all(torch.equal(first[role], backwards[role]) for role in first)
    assert not torch.equal(first["up"], other["up"])


@pytest.mark.parametrize(
    ("width", "method", "experts", "top_k", "kind", "text"),
    [
        (1536, "granular", 20, 10, NotDivisible,
         "a hidden width of 1536 does not split into 10 equal shards\n  at: encoder.layer.3\n  hint: choose 2"),
        (1536, "granular", 40, 20, NotDivisible,
         ("a hidden width of 1536 does not split into 20 equal shards\n  at: encoder.layer.3\n"
         "  hint: choose one of 2, 4")),
        (16, "granular", 6, 3, NotDivisible,
         ("a hidden width of 16 does not split into 3 equal shards\n  at: encoder.layer.3\n"
         "  hint: choose 2 for --top-k")),
        (16, "granular", 9, 3, NotDivisible,
         ("a hidden width of 16 does not split into 3 equal shards\n  at: encoder.layer.3\n"
         "  hint: use --method copy")),
        (16, "granular{shards=4}", 8, 2, BadRecipe,
         "top-k 2 is not a multiple of the 4 shards of granular\n  at: encoder.layer.3\n  hint: choose 2"),
        (16, "granular", 9, 2, BadRecipe,
         ("experts 9 is not a multiple of the 2 shards of granular\n  at: encoder.layer.3\n"
         "  hint: choose a multiple of 2 for --experts")),
        (16, "granular{shards=-1}", 8, 2, BadRecipe,
         "granular cuts a block into -1 shards: it must be at least 1\n  at: encoder.layer.3"),
    ],
)  # fmt: skip
def test_granular_refuses_numbers_that_do_not_divide(width, method, experts, top_k, kind, text):
    with pytest.raises(kind) as error:
        METHODS.parse(method).plan(block(width=width), BlockRecipe(method, experts, top_k), 0, torch.float32)
    assert str(error.value) == text


def test_granular_refuses_a_norm_over_the_hidden_width():
    made = programs.custom(pointwise=False)
    with pytest.raises(Refused) as error:
        METHODS.parse("granular").plan(made.blocks[0], made.recipe, 0, torch.float32)
    assert str(error.value) == (
        "the hidden value is normalised over its whole width: it cannot be cut into shards\n"
        "  at: layers.0\n  hint: use --method copy"
    )


def test_granular_refuses_an_activation_with_a_parameter_over_the_hidden_width():
    made = programs.custom(pointwise=False)
    made.blocks[0].region_is_pointwise = True  # as a PReLU with one slope per channel
    with pytest.raises(Refused) as error:
        METHODS.parse("granular").plan(made.blocks[0], made.recipe, 0, torch.float32)
    assert str(error.value) == (
        "the activation reads a tensor over the hidden width, layers.0.act.weight: it cannot be cut into shards\n"
        "  at: layers.0\n  hint: use --method copy"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise{std=-1}", "noise.std is -1.0: it must be a finite number of at least 0"),
        ("noise{std=nan}", "noise.std is nan: it must be a finite number of at least 0"),
        ("noise{fraction=2}", "noise.fraction is 2.0: it must be between 0 and 1"),
        ("drop{ratio=1.5}", "drop.ratio is 1.5: it must be between 0 and 1"),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(BadOption) as error:
        METHODS.parse(text)
    assert str(error.value) == message


def test_the_text_of_a_method_parses_back():
    for text in ("copy", "granular{shards=4}", "noise{std=0.1}", "drop{ratio=0.25}"):
        assert str(METHODS.parse(text)) == text
