"""What routers saw and chose: the same in module form, a fresh graph and one from a file; nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moeify
from moeify.errors import Refused, UsageError
from moeify.nn.observation import observing

D, F = 8, 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, D)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


# Noise; a capacity; token ids and no scores; values that the graph does not have.
ROUTERS = {"noisy-topk{init-std=0.3}": 2, "switch{capacity-factor=0.5}": 1, "hash": 2, "rl": 2}


@pytest.fixture(scope="module")
def dense() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def converted(dense: Model, router: str, form: str) -> nn.Module:
    recipe = moeify.Recipe(experts=4, top_k=ROUTERS[router], router=router)
    return moeify.convert(copy.deepcopy(dense), recipe, inputs=(torch.randint(30, (2, 5)),), form=form)


def seen_of(model: nn.Module, train: bool) -> list:
    model.train(train)
    ids = torch.randint(30, (3, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    with observing(model) as seen:
        y = model(ids)
    torch.manual_seed(5)
    assert torch.equal(model(ids), y)  # as without an observer
    return seen.calls


@pytest.fixture(scope="module", params=ROUTERS)
def forms(request, dense, tmp_path_factory) -> tuple[str, dict[str, nn.Module]]:
    made = {form: converted(dense, request.param, form) for form in ("module", "graph")}
    if request.param == "rl":
        folder = tmp_path_factory.mktemp("observed")
        torch.save(dense, folder / "dense.pt")
        recipe = moeify.Recipe(experts=4, top_k=2, router="rl")
        moeify.convert_file(
            folder / "dense.pt", folder / "moe.pt2", recipe, inputs=["ids=int64[batch=2,seq=5]{below=30}"],
            allow=["tests.test_observation"],
        )  # fmt: skip
        made["file"] = moeify.load(folder / "moe.pt2")
    return request.param, made


@pytest.mark.parametrize("train", [False, True])
def test_all_forms_see_the_same(forms, train):
    _, made = forms
    found = {form: seen_of(model, train) for form, model in made.items()}
    for calls in found.values():
        assert [call.block.partition(".up")[0] for call in calls] == ["layers.0", "layers.1"]
    for form, calls in found.items():
        for call, twin in zip(calls, found["module"], strict=True):
            assert call.values.keys() == twin.values.keys(), form
            for name, value in call.values.items():
                torch.testing.assert_close(value, twin.values[name])
                assert value.requires_grad == twin.values[name].requires_grad


def test_gradients_of_observed_values_reach_the_router(forms):
    router, made = forms
    if router == "hash":
        return
    for form, model in made.items():
        model.zero_grad()
        loss = sum(call.values["logits"].square().sum() for call in seen_of(model, True))
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if name.endswith("router.weight")}
        assert len(grads) == 2
        assert all(grad is not None and grad.any() for grad in grads.values()), form


def test_nothing_stays_behind(forms):
    _, made = forms
    for model in made.values():
        model.eval()
        before = str(model.graph) if isinstance(model, torch.fx.GraphModule) else None
        modules = [name for name, _ in model.named_modules()]
        seen_of(model, False)
        assert modules == [name for name, _ in model.named_modules()]
        assert before is None or str(model.graph) == before
        assert all(getattr(m, "observer", None) is None for m in model.modules())


def test_values_stay_until_they_are_cleared(dense):
    model = converted(dense, "rl", "module")
    with observing(model) as seen:
        model(torch.zeros(1, 2, dtype=torch.int64))
        model(torch.zeros(1, 2, dtype=torch.int64))
        assert len(seen.calls) == 4
        seen.calls.clear()
        model(torch.zeros(1, 2, dtype=torch.int64))
    assert len(seen.calls) == 2


@pytest.mark.parametrize("form", ["module", "graph"])
def test_refuses_a_second_observer(dense, form):
    model = converted(dense, "rl", form)
    with observing(model), pytest.raises(UsageError) as error, observing(model):
        pass
    assert str(error.value) == "the model is being observed already"


def test_refuses_what_has_no_mixtures(dense):
    with pytest.raises(UsageError) as error, observing(dense):
        pass
    assert str(error.value) == (
        "there are no mixtures to observe\n  hint: give what moeify.convert or moeify.load returned"
    )


def test_refuses_a_graph_whose_router_is_another(dense):
    model = converted(dense, "rl", "graph")
    for node in model.graph.nodes:
        if "sort" in str(node.target):
            node.update_kwarg("descending", True)
            node.target = torch.ops.aten.argsort.stable
            break
    with pytest.raises(Refused) as error, observing(model):
        pass
    assert "where the router has aten.sort.stable" in str(error.value)
    assert "at: layers.0" in str(error.value)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_a_copy_is_observed_on_its_own(dense, form):
    """As EMA and best-so-far copies are made. The rl router has parameters that only its loss reads."""
    recipe = moeify.Recipe(experts=4, top_k=2, router="rl", router_losses=("switch", "reinforce"))
    model = moeify.convert(copy.deepcopy(dense), recipe, inputs=(torch.randint(30, (2, 5)),), form=form)
    twin = copy.deepcopy(model.train())
    assert twin.training
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert twin.moeify_report.recipe == model.moeify_report.recipe
    ids = torch.randint(30, (3, 4))
    twin(ids)
    found = moeify.losses(twin, reward=torch.ones(12))
    found.total.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(UsageError, match="no router has run since"):
        moeify.losses(model)
