"""SmolLM2-135M-Instruct, a real causal language model: 30 SwiGLU blocks, every second one into 4 experts, in the
model's own class.

``moeify.convert`` replaces the blocks inside the transformers model, so ``generate()`` goes on working, and must give
the same tokens as before.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from pretrained import OUT, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeify

PROMPTS = ("What is the capital of France?", "Name three things a cat likes.")


def replies(model: torch.nn.Module, tokenizer: object, length: int) -> list[str]:
    """Greedy answers to the prompts."""
    texts = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        generated = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        texts.append(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=24, help="new tokens per prompt")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--blocks", default="every:2")
    options = parser.parse_args()
    path = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    before = replies(model, tokenizer, options.length)

    start = time.perf_counter()
    model = moeify.convert(model, experts=options.experts, top_k=2, blocks=options.blocks)
    report = model.moeify_report
    found, converted = len(report.blocks), sum(block.converted for block in report.blocks)
    print(f"{type(model).__name__}: {found} blocks found, {converted} converted in {time.perf_counter() - start:.1f} s")
    print(f"parameters {report.parameters_before / 1e6:.1f}M -> {report.parameters_after / 1e6:.1f}M")
    print(f"largest relative error {report.max_relative_error:.1e}")

    after = replies(model, tokenizer, options.length)
    for prompt, old, new in zip(PROMPTS, before, after):
        print(f"\n> {prompt}\n{new}")
        if old != new:
            raise SystemExit(f"generation changed; the dense model said:\n{old}")
    print("\ngeneration unchanged")
    OUT.mkdir(exist_ok=True)
    model.save_pretrained(OUT / "smollm2-moe")
    print(f"saved to {OUT / 'smollm2-moe'}; open it with moeify.load")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
