"""Router losses and updates in transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from moeify.training.losses import losses
from moeify.training.steps import after_step
from moeify.training.watch import find


class WithRouterLosses:
    """Stands before a Trainer class, for a model that ``moeify.convert`` or ``moeify.load`` returned:

        class Trainer(WithRouterLosses, transformers.Trainer): ...

    It adds the router losses of the model's recipe, or those of ``router_losses``, to the loss of each training batch,
    and calls ``moeify.after_step`` after each step of the optimizer. On several processes both are over the tokens of
    all of them. The loss that Trainer logs holds them; ``last_router_losses`` are those of the last batch by name.
    """

    router_losses: list[str] | None = None
    last_router_losses: dict[str, float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_router_losses = {}
        self.add_callback(AfterStep())  # type: ignore[attr-defined]

    def router_mask(self, inputs: dict[str, Any]) -> Tensor | None:
        """Which tokens count: the attention_mask, if the batch has one. To be overridden where blocks see other tokens
        than the mask is of, as in an encoder-decoder: a mapping from block paths to masks.
        """
        return inputs.get("attention_mask")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's own, and in training the router losses on top."""
        mask = self.router_mask(inputs)
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training and self._wanted(model):
            found = losses(model, self.router_losses, mask=mask, group=_everyone())
            self.last_router_losses = {name: float(value.detach()) for name, value in found.items()}
            loss = loss + self._scaled(found.total.to(loss.device), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _wanted(self, model: nn.Module) -> bool:
        watch = find(model)
        named = watch is not None and any(facts.losses for facts in watch.facts.values())
        return self.router_losses is not None or named

    def _scaled(self, added: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """A mean over the accumulated batches: Trainer divides by their number unless its loss is a mean already."""
        done = getattr(self, "loss_is_scaled_for_ga", None)
        if done is None:
            own = self.compute_loss_func is not None  # type: ignore[attr-defined]
            done = own or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)  # type: ignore[attr-defined]
        return added / self.current_gradient_accumulation_steps if done else added  # type: ignore[attr-defined]


class AfterStep(TrainerCallback):
    """Calls ``moeify.after_step`` after each step of the optimizer; for a Trainer with a compute_loss of its own."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after_step(kwargs["model"], group=_everyone())


def _everyone() -> Any:
    return dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
