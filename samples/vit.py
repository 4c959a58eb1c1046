"""A Vision Transformer (random weights, ViT-S/16 shape at 6 layers): granular experts in the last four layers, one
always-on expert.

Shows the Python API on images, per-block overrides, and a few training steps of the result.
"""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

import moeify
from moeify import Recipe


def build() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=64,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def main() -> None:
    model = build()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.eval()(images).logits
    recipe = Recipe(
        method="granular{shards=2}",
        experts=8,
        top_k=2,
        blocks="last:4",
        overrides=(("*.5*", {"method": "copy", "shared": 1}),),
    )
    model = moeify.convert(model, recipe, inputs={"pixel_values": images})
    for block in model.moeify_report.blocks:
        if not block.converted:
            print(f"{block.path}: left dense, {block.reason}")
            continue
        size = f"{block.experts} x {block.d_expert}"
        print(f"{block.path}: {block.method}, {size}, relative error {block.relative_error:.1e}")
    with torch.no_grad():
        after = model.eval()(images).logits
    print(f"logits moved by at most {(after - before).abs().max():.1e}")
    if not torch.allclose(after, before, atol=1e-5):
        raise SystemExit("the logits changed")

    labels = torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    losses = []
    for _ in range(5):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("five training steps:", " ".join(f"{loss:.3f}" for loss in losses))
    if not losses[-1] < losses[0]:
        raise SystemExit("training did not lower the loss")


if __name__ == "__main__":
    main()
