"""The checkpoint folder: what comes back, what a bad folder says, and that nothing is left half-written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify import surgery
from moeify.ir.report import Report
from moeify.surgery import shards
from tests.surgery_models import MODELS, Encoder, LstmLm, case, converted, layers, output

FACTORIES: dict[str, Any] = {"encoder": Encoder, "lstm": LstmLm}


def factory_of(name: str) -> Any:
    return FACTORIES.get(name) or (lambda: layers(name)) if not _is_transformers(name) else None


def _is_transformers(name: str) -> bool:
    return hasattr(case(name).dense, "config")


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    made = case(name)
    surgery.save(made.moe, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out", factory=factory_of(name))
    assert type(loaded) is type(made.dense)
    assert not any(module.training for module in loaded.modules())
    for tensors in ("named_parameters", "named_buffers"):
        before = dict(getattr(made.moe, tensors)(remove_duplicate=False))
        after = dict(getattr(loaded, tensors)(remove_duplicate=False))
        assert list(before) == list(after)
        for key, value in before.items():
            assert torch.equal(value, after[key]), key
            assert (value.dtype, value.requires_grad) == (after[key].dtype, after[key].requires_grad), key
    assert list(loaded.state_dict()) == list(made.moe.state_dict())
    assert torch.equal(output(loaded, made.inputs), output(made.moe, made.inputs))
    # Loading needs no weights and keeps ties; saving again gives the same files.
    assert len(list(loaded.parameters())) == len(list(made.moe.parameters()))
    surgery.save(loaded, tmp_path / "again", factory=None)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize(
    "recipe", [{"router": "hash"}, {"method": "granular", "shared": 1, "shared_gate": True}], ids=str
)
def test_other_recipes_come_back(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = case("gpt2")
    moe = converted(copy.deepcopy(made.dense), made.inputs, **recipe).moe
    surgery.save(moe, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert torch.equal(output(loaded, made.inputs), output(moe, made.inputs))


def test_generation_config_and_report_come_back(tmp_path: Path) -> None:
    moe: Any = case("llama").copy()
    moe.generation_config.max_new_tokens = 3
    moe.moeify_report = Report(model="LlamaForCausalLM", verified=True)
    surgery.save(moe, tmp_path / "out")
    loaded: Any = surgery.load(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.moeify_report == moe.moeify_report
    assert loaded.config._attn_implementation == moe.config._attn_implementation


def test_mixed_dtypes_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    moe = case("encoder").copy().to(torch.bfloat16)
    moe.get_parameter("encoder.layers.0.norm1.weight").requires_grad_(False)
    surgery.save(moe, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out", factory=Encoder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["encoder.layers.0.norm1.weight"]


def test_shards_have_a_size(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(5)}
    index = shards.write(tensors, tmp_path, "moeify", limit=40)
    assert index == {
        "t0": "moeify-00001-of-00003.safetensors",
        "t1": "moeify-00001-of-00003.safetensors",
        "t2": "moeify-00002-of-00003.safetensors",
        "t3": "moeify-00002-of-00003.safetensors",
        "t4": "moeify-00003-of-00003.safetensors",
    }
    read = {name: value for file in sorted(set(index.values())) for name, value in shards.read(tmp_path / file)}
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_loading_makes_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    surgery.save(case("llama").moe, tmp_path / "out")

    def forbidden(self: Any, read: Any) -> None:
        raise AssertionError("computed a weight")

    monkeypatch.setattr("moeify.ir.weights.WeightRecipe.materialise", forbidden)
    real: list[torch.Size] = []
    normal = torch.Tensor.normal_

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.device.type != "meta":
            real.append(self.shape)
        return normal(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", watched)
    surgery.load(tmp_path / "out")
    assert not real
