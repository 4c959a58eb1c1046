"""Module form: the same function as the dense model and as graph form, in the user's own class."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moeify import surgery
from moeify.errors import NotDivisible, Refused, UsageError
from moeify.nn.moe import MoE
from moeify.pipeline.default import REWRITE
from moeify.pipeline.runner import run
from moeify.surgery.layers import Enter, Owned
from moeify.surgery.slot import Leave, Slot
from tests.surgery_models import MODELS, D, Encoder, case, converted, found, layers, output

KIND: dict[str, type] = {
    **dict.fromkeys(("llama", "gpt2", "t5", "vit", "phi3", "lstm", "custom"), Owned),
    **dict.fromkeys(
        ("bert", "opt", "albert", "convnext", "whisper", "encoder", "prelu", "fused", "convolution"), Enter
    ),
}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_keeps_the_function_and_equals_graph_form(name: str) -> None:
    made = case(name)
    program = run(made.program.clone(), REWRITE)
    program.materialise()
    expected = output(made.dense, made.inputs)
    close(output(made.moe, made.inputs), expected)
    # One expert set per block, of the expected kind, in the user's own class.
    layers = [module for module in made.moe.modules() if isinstance(module, MoE)]
    assert [type(layer) for layer in layers] == [KIND[name]] * len(made.program.converted())
    assert type(made.moe) is type(made.dense)
    # The names and values of graph form.
    graph, module = program.graph_module.state_dict(), made.moe.state_dict()
    new = set(module) - set(made.dense.state_dict())
    assert new
    assert new == {name for name in graph if ".experts." in name or ".router." in name}
    assert all(torch.equal(graph[name], module[name]) for name in new)
    replaced = {ref.parameter for block in made.program.converted() for ref in block.weights.values()}
    assert not replaced & set(module)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_takes_over_computed_values(name: str) -> None:
    made = case(name)
    program = run(made.program.clone(), REWRITE)
    program.materialise()
    moe = surgery.apply(made.dense, program, in_place=False)
    shared = f"{program.converted()[0].anchor}.experts.up"
    assert moe.get_parameter(shared).data_ptr() == program.parameter(shared).data_ptr()
    assert torch.equal(output(moe, made.inputs), output(made.moe, made.inputs))


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "granular", "experts": 8},
        {"method": "drop{ratio=0.25}"},
        {"method": "noise"},
        {"shared": 1, "shared_gate": True},
        {"router": "switch", "top_k": 1},
        {"router": "noisy-topk"},
        {"router": "hash"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_every_recipe_equals_graph_form(name: str, recipe: dict[str, Any]) -> None:
    made = case(name)
    program = made.program.clone()
    program.recipe = type(program.recipe)(**{"experts": 4, **recipe})
    moe = surgery.apply(made.dense, program, in_place=False)
    run(program, REWRITE)
    program.materialise()
    graph, module = program.graph_module.state_dict(), moe.state_dict()
    new = {name for name in graph if any(f".{part}" in name for part in ("experts.", "router.", "shared", "output_b"))}
    assert new <= set(module)
    assert all(torch.equal(graph[name], module[name]) for name in new)
    expected = program.run(*made.program.example)
    expected = next(iter(expected.values())) if isinstance(expected, dict) else expected
    close(output(moe, dict(zip(made.inputs, made.program.example))), expected)


@pytest.mark.parametrize("name", ["llama", "bert", "custom", "encoder"])
def test_copies_and_pickles(name: str) -> None:
    made = case(name)
    expected = output(made.moe, made.inputs)
    for twin in (copy.deepcopy(made.moe), pickle.loads(pickle.dumps(made.moe))):
        assert torch.equal(output(twin, made.inputs), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(output(twin, made.inputs), expected)
    assert torch.equal(output(made.moe, made.inputs), expected)


@pytest.mark.parametrize("name", ["gpt2", "bert", "custom", "lstm"])
def test_trains(name: str) -> None:
    made = case(name)
    model = made.copy().train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        result = model(**made.inputs)
        value = result if isinstance(result, torch.Tensor) else result[0]
        loss = (value - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        for path, layer in model.named_modules():
            if isinstance(layer, MoE):
                for leaf, parameter in layer.named_parameters():
                    assert parameter.grad is not None, f"{path}.{leaf}"
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["gpt2", "bert", "custom", "lstm"])
def test_drops_out_in_training_only(name: str) -> None:
    made = case(name)
    model = made.copy()
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    x = torch.randn(3, layer.d_model)
    if isinstance(layer, Owned):  # BERT's own dropouts are outside of its block
        layer.train()
        assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(output(model, made.inputs), output(made.moe, made.inputs))


def test_copies_mode_dtype_and_requires_grad() -> None:
    model = layers("silu").double()
    program = found(model.eval(), {"input": torch.randn(2, 5, D, dtype=torch.float64)})
    model.get_submodule("1").requires_grad_(False)
    model.train()
    moe = surgery.apply(model, program)
    assert moe is model
    (layer,) = [module for module in model.modules() if isinstance(module, Enter)]
    assert layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.weight.dtype == torch.float64
    assert layer.weight.shape == (40, D)
    assert layer.bias is not None
    assert (layer.in_features, layer.out_features) == (D, 40)


def test_encoder_fast_path_is_off() -> None:
    """In eval mode without gradients torch's encoder would read the replaced weights."""
    made = case("encoder")
    assert isinstance(made.moe, Encoder)
    assert not made.moe.encoder.use_nested_tensor
    moe = made.copy()
    expected = output(moe, made.inputs)
    with torch.no_grad():
        next(m for m in moe.modules() if isinstance(m, Enter)).experts.down.zero_()
    assert not torch.equal(output(moe, made.inputs), expected)


def _checkpointed(forward: Any, reentrant: bool, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return checkpoint(lambda value: forward(value, *args, **kwargs), hidden, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    made = case("bert")
    plain, checkpointed = made.copy().train(), made.copy().train()
    for block in checkpointed.encoder.layer:  # type: ignore[union-attr]
        block.forward = functools.partial(_checkpointed, block.forward, reentrant)
    grads = []
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(**made.inputs)[0].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_nothing_stays_parked() -> None:
    made = case("bert")
    output(made.moe, made.inputs)
    slots = [module.slot for module in made.moe.modules() if isinstance(module, Leave)]
    assert slots
    assert all(slot.value is None for slot in slots)


@pytest.mark.parametrize("name", ["llama", "bert", "prelu"])
def test_compiles_and_exports(name: str) -> None:
    made = case(name)
    expected = output(made.moe, made.inputs)
    torch._dynamo.reset()
    compiled: Any = torch.compile(made.copy(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, made.inputs), expected)
    plain = {"llama": {"return_dict": False, "use_cache": False}, "bert": {"return_dict": False}}.get(name, {})
    exported = torch.export.export(made.copy(), (), {**made.inputs, **plain}, strict=False)
    with torch.no_grad():
        result = exported.module()(**made.inputs, **plain)
    torch.testing.assert_close(result if isinstance(result, torch.Tensor) else result[0], expected)


def test_shared_modules_become_one_mixture() -> None:
    made = case("albert")
    (layer,) = [module for module in made.moe.modules() if isinstance(module, Enter)]
    calls: list[int] = []
    with layer.register_forward_hook(lambda *_: calls.append(1)):
        output(made.moe, made.inputs)
    assert len(calls) == 3


def test_hooks_of_an_owner_go_on_firing() -> None:
    model, inputs = MODELS["lstm"]()
    program = found(model.eval(), inputs)
    fired: list[torch.Size] = []
    model.get_submodule("ffn").register_forward_hook(lambda module, args, result: fired.append(result.shape))
    surgery.apply(model, program)
    output(model, inputs)
    assert fired == [torch.Size([2, 7, D])]


def test_raw_parameters_are_refused() -> None:
    model = layers("raw")
    program = found(model.eval(), {"input": torch.randn(2, 5, D)})
    before = dict(model.named_parameters())
    with pytest.raises(Refused) as caught:
        surgery.apply(model, program)
    assert str(caught.value) == (
        "the model's own code reads the weights of this block: there is no submodule to replace\n"
        "  at: 1\n"
        "  hint: use the graph form: moeify.convert(model, form='graph')"
    )
    assert dict(model.named_parameters()) == before


def test_nothing_is_changed_when_a_method_refuses() -> None:
    made = case("bert")
    program = made.program.clone()
    program.recipe = type(program.recipe)(method="granular", experts=6, top_k=3)
    model = copy.deepcopy(made.dense)
    with pytest.raises(NotDivisible):
        surgery.apply(model, program)
    assert not any(isinstance(module, MoE) for module in model.modules())


def test_converts_once() -> None:
    made = case("bert")
    with pytest.raises(UsageError) as caught:
        surgery.apply(made.moe, made.program)
    assert str(caught.value) == "this BertModel has been converted already\n  hint: convert the dense model"


def test_hash_router_wants_ids() -> None:
    made = case("gpt2")
    moe = converted(copy.deepcopy(made.dense), made.inputs, router="hash").moe
    close(output(moe, made.inputs), output(made.dense, made.inputs))
    embeds = moe.get_input_embeddings().weight[made.inputs["input_ids"]].detach()  # type: ignore[operator]
    with pytest.raises(Refused) as caught:
        moe(inputs_embeds=embeds)
    assert str(caught.value) == (
        "the hash router needs token ids, and the embedding has read none in this call\n"
        "  at: transformer.h.0.mlp\n"
        "  hint: call the model with token ids, not with embeddings"
    )
    twin = pickle.loads(pickle.dumps(moe))
    assert torch.equal(output(twin, made.inputs), output(moe, made.inputs))


def test_slot_refuses_a_wrong_order() -> None:
    slot = Slot()
    with pytest.raises(Refused) as caught:
        slot.fetch("layer.0")
    assert str(caught.value) == (
        "the down layer of a converted block is called without its up layer\n"
        "  at: layer.0\n"
        "  hint: use the graph form: moeify.convert(model, form='graph')"
    )
    with torch.no_grad():
        slot.park(torch.zeros(1))
    with pytest.raises(Refused, match=r"^the two layers of a converted block run under different gradient modes"):
        slot.fetch("layer.0")


def test_owner_refuses_other_arguments() -> None:
    moe = case("lstm").moe
    with pytest.raises(Refused) as caught:
        moe.ffn(torch.zeros(1, D), torch.zeros(1, D))  # type: ignore[operator]
    assert str(caught.value) == (
        "the converted block is called with 2 arguments instead of one tensor\n"
        "  at: ffn\n"
        "  hint: use the graph form: moeify.convert(model, form='graph')"
    )
