"""Router losses in transformers' Trainer: the same weights as a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

import moeify
from moeify.training.watch import find

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

RATE, STEPS = 0.5, 2


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    dense = transformers.GPT2LMHeadModel(config)
    recipe = moeify.Recipe(experts=4, router="sigmoid-bias{gamma=0.125}", router_losses=("switch{weight=1}", "z"))
    inputs = [f"{name}=int64[batch=2,seq=6]" for name in ("input_ids", "attention_mask")]
    return moeify.convert(dense, recipe, inputs=inputs)


def examples() -> list[dict[str, torch.Tensor]]:
    """Eight, of 6 tokens and padding. The first token has no label: Trainer would count it, though nothing gives it."""
    ids = torch.randint(1, 32, (8, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < 6).long()
    labels = ids.where(mask.bool() & (torch.arange(8) > 0), -100)
    return [{"input_ids": a, "attention_mask": mask, "labels": b} for a, b in zip(ids, labels)]


def test_it_is_a_plain_loop_with_accumulated_gradients(tmp_path: Path) -> None:
    from moeify.training.trainer import WithRouterLosses

    class Trainer(WithRouterLosses, transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    trained = model()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=RATE, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(trained, arguments, train_dataset=examples(), eval_dataset=examples()[:2])
    trainer.train()
    assert list(trainer.last_router_losses) == ["switch", "z"]
    assert trainer.evaluate()["eval_loss"] > 0

    plain = model().train()
    optimizer = torch.optim.SGD(plain.parameters(), RATE)
    for step in range(STEPS):
        for part in range(2):
            first = 4 * step + 2 * part
            batch = {k: torch.stack([one[k] for one in examples()[first : first + 2]]) for k in examples()[0]}
            loss = plain(**batch).loss + moeify.losses(plain, mask=batch["attention_mask"]).total
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        moeify.after_step(plain)
    mine, its = trained.state_dict(), plain.state_dict()
    assert its["transformer.h.0.mlp.router.bias"].any()
    torch.testing.assert_close(mine, its)


def test_accelerate_is_a_plain_loop_too() -> None:
    """The wrapped model is looked through, the model's own watch is used."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    mine = model()
    prepared, optimizer = accelerator.prepare(mine, torch.optim.SGD(mine.parameters(), RATE))
    batch = {k: torch.stack([one[k] for one in examples()[:2]]) for k in examples()[0]}
    prepared.train()
    loss = prepared(**batch).loss + moeify.losses(prepared, mask=batch["attention_mask"]).total
    accelerator.backward(loss)
    optimizer.step()
    moeify.after_step(prepared)
    assert find(prepared) is find(mine)
    assert mine.state_dict()["transformer.h.0.mlp.router.bias"].any()
