"""``moeify.losses`` and ``moeify.after_step``: both forms, loading, several calls, checkpointing, clear errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify import surgery
from moeify.errors import BadRecipe, Refused, UnknownName, UsageError
from moeify.nn.losses.switch import switch
from moeify.nn.moe import MoE
from moeify.nn.routers import ROUTERS
from moeify.training.blocks import unwrapped
from moeify.training.watch import find, watch_of
from tests.routed_models import D, Stack, converted, tokens

LOSSES = ("switch", "z{weight=0.1}")


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return converted(router_losses=LOSSES)


@pytest.fixture(scope="module")
def graph() -> nn.Module:
    return converted("graph", router_losses=LOSSES)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the router losses alone, after a forward pass on the same tokens."""
    model.zero_grad()
    model(tokens())
    moeify.losses(model).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_both_forms_give_the_same_losses_and_gradients(module: nn.Module, graph: nn.Module) -> None:
    mine, its = gradients(module), gradients(graph)
    assert "blocks.0.up.router.weight" in mine
    for name, gradient in its.items():
        torch.testing.assert_close(gradient, mine[name])
    found = [moeify.losses(model) for model in (module, graph)]
    for one in found:
        assert list(one) == ["switch", "z"]
        assert list(one.blocks) == ["blocks.0", "blocks.1"]
        torch.testing.assert_close(one.total, one["switch"] + one["z"])
        torch.testing.assert_close(one["z"], sum(block["z"] for block in one.blocks.values()))
    torch.testing.assert_close(found[0].total, found[1].total)


def test_the_recipe_weighs_the_losses(module: nn.Module) -> None:
    module(tokens())
    (call, _) = watch_of(module).calls
    expected = 0.01 * switch(call.values["probabilities"], call.values["experts"])
    torch.testing.assert_close(moeify.losses(module).blocks["blocks.0"]["switch"], expected)
    with pytest.raises(KeyError):
        moeify.losses(module)["gshard"]


def test_losses_can_be_named_in_the_call(module: nn.Module) -> None:
    module(tokens())
    assert list(moeify.losses(module, ["importance", "gshard"])) == ["importance", "gshard"]
    assert list(moeify.losses(module, "importance")) == ["importance"]
    with pytest.raises(UnknownName):
        moeify.losses(module, "importanse")


def test_a_loaded_folder_knows_its_losses(tmp_path: Path, module: nn.Module) -> None:
    """A file does too: test_routing.py."""
    surgery.save(module, tmp_path / "folder", factory="tests.routed_models:Stack")
    again = moeify.load(tmp_path / "folder", allow=["tests.routed_models"]).train()
    torch.testing.assert_close(gradients(again), gradients(module))


def test_several_calls_of_a_block_are_one() -> None:
    """As if the tokens of all calls had come in one."""
    model = converted(order=(0, 0), router_losses=("switch",))
    model(tokens())
    calls = watch_of(model).calls
    together = [torch.cat([call.values[name] for call in calls]) for name in ("probabilities", "experts")]
    torch.testing.assert_close(moeify.losses(model).total, 0.01 * switch(*together))
    assert len(calls) == 2


def test_checkpointed_layers_count_once(module: nn.Module) -> None:
    plain = gradients(module)
    module.saves_memory = False
    try:
        saving = gradients(module)
        assert len(watch_of(module).calls) == 2
        module.saves_memory = True
        module(tokens().requires_grad_())
        with pytest.raises(UsageError, match="use_reentrant=False"):
            moeify.losses(module)
    finally:
        module.saves_memory = None
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_only_the_last_training_pass_is_kept(form: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(form)
    model(tokens(batch=4))
    model(tokens())
    kept = watch_of(model).calls
    assert [len(call.values["experts"]) for call in kept] == [15, 15]
    with torch.no_grad():
        model(tokens(batch=2))
    model.eval()(tokens(batch=2))
    model.train()
    assert watch_of(model).calls == kept
    moeify.losses(model)
    if form == "module":
        for _ in range(2):  # a layer alone, which no hook of the whole model sees
            model.blocks[0](tokens())
            moeify.losses(model)
            assert len(watch_of(model).calls) == 1


def test_masks_leave_padding_out(module: nn.Module) -> None:
    mask = torch.ones(3, 5)
    mask[2, 1:] = 0
    module(tokens())
    masked = moeify.losses(module, mask=mask)
    (call, _) = watch_of(module).calls
    on = mask.flatten().bool()
    expected = 0.01 * switch(call.values["probabilities"][on], call.values["experts"][on])
    torch.testing.assert_close(masked.blocks["blocks.0"]["switch"], expected)
    one = moeify.losses(module, mask={"blocks.0": mask})
    torch.testing.assert_close(one.blocks["blocks.0"], masked.blocks["blocks.0"])
    torch.testing.assert_close(one.blocks["blocks.1"], moeify.losses(module).blocks["blocks.1"])
    assert float(moeify.losses(module, mask=torch.zeros(1)).total.detach()) == 0.0
    with pytest.raises(UsageError, match=r"the mask is of 4 tokens, and the block's router saw 15\n  at: blocks.0"):
        moeify.losses(module, mask=torch.ones(4))


def test_copies_and_pickles_hold_no_values(module: nn.Module) -> None:
    module(tokens())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        watch = find(twin)
        assert watch is not None
        assert watch is not find(module)
        assert not watch.calls
        twin(tokens())
        torch.testing.assert_close(moeify.losses(twin).total, moeify.losses(module).total)


def test_the_load_loss_needs_noise(module: nn.Module) -> None:
    module(tokens())
    with pytest.raises(Refused) as error:
        moeify.losses(module, "load")
    assert str(error.value) == (
        "the load loss needs the clean and deviation of a router, and softmax-topk has none\n  at: blocks.0\n"
        "  hint: the noisy-topk router has noise"
    )
    noisy = converted("graph", router="noisy-topk{init-std=0.1}", router_losses=("load", "importance"))
    assert gradients(noisy)["blocks.0.up.router.noise_weight"].abs().sum() > 0


def test_a_model_of_ones_own_with_moe_layers() -> None:
    """No conversion, so no recipe: observed when it is asked for."""
    router = ROUTERS.parse("rl").build(D, 4, 1, dtype=torch.float32)
    router.reset(torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(D, D), MoE(D, D, 12, 4, router))
    with pytest.raises(UsageError, match=r"not observed\n  hint: call moeify.observe"):
        moeify.losses(model, "z")
    moeify.observe(model)
    with pytest.raises(UsageError, match="no router has run"):
        moeify.losses(model, "z")
    model(tokens()[0])
    with pytest.raises(UsageError, match="needs a reward for each token\n  at: 1\n"):
        moeify.losses(model, "reinforce")
    moeify.losses(model, "reinforce", reward=torch.linspace(-1, 2, 5)).total.backward()
    assert router.weight.grad.abs().sum() > 0
    assert router.baseline_bias.grad.abs().sum() > 0
    with pytest.raises(UsageError, match="no router loss is named"):
        moeify.losses(model)


def test_a_model_without_routers() -> None:
    for ask in (moeify.losses, moeify.after_step):
        with pytest.raises(UsageError, match="the model has no routers"):
            ask(Stack())
    with pytest.raises(UsageError, match="no mixtures"):
        moeify.observe(Stack())


@pytest.mark.parametrize("form", ["module", "graph"])
def test_after_step_moves_biases_against_the_loads(form: str) -> None:
    model = converted(form, router="sigmoid-bias{gamma=0.25}")
    bias = dict(model.named_buffers())["blocks.0.up.router.bias"]
    with pytest.raises(UsageError, match="no router has run"):
        moeify.after_step(model)
    model(tokens())
    experts = watch_of(model).calls[0].values["experts"]
    moeify.after_step(model, mask=torch.tensor([1, 1, 0]).repeat_interleave(5))
    load = torch.bincount(experts[:10].flatten(), minlength=4).float()
    assert torch.equal(bias, 0.25 * torch.sign(load.mean() - load))
    assert bias.any()


def test_after_step_adapts_the_coefficient_of_l1() -> None:
    model = converted(router="relu", router_losses=("l1{active=1,start=0.5,rate=2}",))
    values = []
    for _ in range(3):
        model(tokens())
        values.append(float(moeify.losses(model).total.detach()))
        moeify.after_step(model)
    first, second, third = values
    assert (second / first, third / second) in ((2, 2), (0.5, 0.5), (2, 0.5), (0.5, 2))


def test_after_step_leaves_a_model_alone_that_has_nothing_to_update(module: nn.Module) -> None:
    before = copy.deepcopy(module.state_dict())
    moeify.after_step(module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    moeify.after_step(converted())  # not observed either


def test_wrappers_are_looked_through(module: nn.Module) -> None:
    wrapped = torch.compile(nn.DataParallel(module), backend="eager")
    assert unwrapped(wrapped) is module


def test_a_recipe_names_losses_that_exist() -> None:
    with pytest.raises(UnknownName, match="no router loss named 'swich'"):
        converted(router_losses=("swich",))
    with pytest.raises(BadRecipe, match="router-losses is 'z': it must be a list of texts"):
        moeify.Recipe(router_losses="z")  # type: ignore[arg-type]
    recipe = moeify.Recipe(router_losses=["z"], overrides=(("a", {"router_losses": ["switch"]}),))  # type: ignore[arg-type]
    assert moeify.Recipe.from_dict(recipe.to_dict()).for_block("a").router_losses == ("switch",)
