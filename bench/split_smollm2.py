"""Recipes that split the 30 blocks of SmolLM2, by name and share of the hidden units that are active."""

from __future__ import annotations

from moeify import Recipe

PARTS = 16  # of 96 hidden units
# Active parts of each block; 16 leaves it dense. From the expected loss of each block at each share: half the mean
# squared product of the block's error and the gradient of the log-likelihood of labels drawn from the model.
_ALLOCATED = {
    "1/2": [16, 16, 16, 10, 6, 6, 6, 8, 10, 8, 10, 10, 6, 4, 4, 4, 4, 4, 4, 6, 8, 6, 8, 10, 8, 8, 10, 6, 8, 10],
    "3/4": [16, 16, 16, 16, 16, 8, 14, 14, 14, 14, 14, 16, 12, 8, 8, 6, 8, 6, 8, 10, 10, 10, 10, 10, 14, 12, 14, 14, 12,
            14],
}  # fmt: skip


def _fields(active: int) -> dict[str, int]:
    """All but one of the active parts are shared, and a token chooses the last one among the rest."""
    return {"shared": active - 1, "experts": PARTS - active + 1, "top_k": 1}


def _energy(active: int) -> Recipe:
    return Recipe(method="split-energy", **_fields(active))


def _allocated(shares: list[int]) -> Recipe:
    split = {f"model.layers.{i}.mlp": active for i, active in enumerate(shares) if active < PARTS}
    return Recipe(
        method="split-energy",
        blocks=",".join(split),
        overrides=tuple((path, _fields(active)) for path, active in split.items()),
    )


def _cmoe(shared: int) -> Recipe:
    return Recipe(
        method="carve{compensate=false}",
        router="topk{score=neuron,init=analytic,representatives=1}",
        experts=8 - shared,
        shared=shared,
        top_k=shared,
        repair=False,
    )


RECIPES = {
    ("cmoe", "3/4"): _cmoe(3),
    ("uniform", "3/4"): _energy(12),
    ("allocated", "3/4"): _allocated(_ALLOCATED["3/4"]),
    ("cmoe", "1/2"): _cmoe(2),
    ("uniform", "1/2"): _energy(8),
    ("allocated", "1/2"): _allocated(_ALLOCATED["1/2"]),
}
