"""What a converted transformers model must still do: generate, and be trained by Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify import surgery
from moeify.errors import Refused
from tests.surgery_models import VOCABULARY, case, output

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "beam", "static-cache"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
def test_generates_the_same_tokens(name: str, how: dict[str, Any]) -> None:
    made = case(name)
    mask = torch.ones_like(made.inputs["input_ids"])
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, **how}
    dense, moe = (m.generate(**made.inputs, **options) for m in (made.dense, made.copy()))  # type: ignore[operator]
    assert dense.shape == (2, 15)
    assert torch.equal(dense, moe)


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    made = case("llama")
    ids = torch.randint(3, VOCABULARY, (8, 6))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(model: Any, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, logging_strategy="no", seed=0, learning_rate=1e-3, dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=data)

    whole = made.copy()
    trainer(whole, 4).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert {"moeify.json", "optimizer.pt"} <= {file.name for file in checkpoint.iterdir()}
    resumed = surgery.load(checkpoint)
    trainer(resumed, 4).train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(output(whole.eval(), made.inputs), output(made.moe, made.inputs))


def test_save_pretrained_writes_our_folder(tmp_path: Path) -> None:
    made = case("llama")
    made.dense.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "notes.txt").write_text("mine")
    for model in (made.moe, made.copy()):
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        assert {file.name for file in tmp_path.iterdir()} == {
            "moeify.json",
            "dense_config.json",
            "moeify-00001-of-00001.safetensors",
            "moeify-buffers-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "notes.txt",
        }
    assert torch.equal(output(surgery.load(tmp_path), made.inputs), output(made.moe, made.inputs))


@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_from_pretrained_fails_on_our_folder(tmp_path: Path, how: str) -> None:
    made = case("llama")
    if how == "save":
        surgery.save(made.moe, tmp_path)
    else:
        made.moe.save_pretrained(tmp_path)  # type: ignore[operator]
    for cls in (transformers.AutoModel, transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        with pytest.raises((OSError, ValueError, TypeError)):
            cls.from_pretrained(tmp_path)
    # Even for someone who brings the configuration along.
    config = transformers.LlamaConfig.from_dict(json.loads((tmp_path / "dense_config.json").read_text()))
    with pytest.raises((OSError, TypeError)):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)


def test_a_part_cannot_be_saved(tmp_path: Path) -> None:
    moe = case("llama").copy()
    with pytest.raises(Refused) as caught:
        moe.model.save_pretrained(tmp_path / "part")  # type: ignore[union-attr, operator]
    assert str(caught.value) == (
        "only the whole converted model can be saved, not a part of it\n"
        "  at: model\n"
        "  hint: call save_pretrained of the model that was converted"
    )
    assert not (tmp_path / "part").exists()


def test_push_to_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        case("llama").moe.save_pretrained(tmp_path / "x", push_to_hub=True)  # type: ignore[operator]
    assert str(caught.value) == (
        "push_to_hub would upload files that from_pretrained cannot read\n  hint: upload the folder yourself"
    )
