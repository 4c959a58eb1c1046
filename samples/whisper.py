"""Whisper, speech to text (tiny random config): encoder and decoder blocks converted in the model's own class."""

from __future__ import annotations

import warnings

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import moeify


def build() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=512, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=16, max_source_positions=50,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def main() -> None:
    model = build()
    speech = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(1))
    before = model.generate(input_features=speech, max_new_tokens=12, do_sample=False)
    model = moeify.convert(model, experts=4, top_k=2)
    for block in model.moeify_report.blocks:
        print(f"{block.path}: {block.activation}, {block.experts} experts, relative error {block.relative_error:.1e}")
    after = model.generate(input_features=speech, max_new_tokens=12, do_sample=False)
    print(f"transcript tokens before: {before[0].tolist()}")
    print(f"transcript tokens after:  {after[0].tolist()}")
    if not torch.equal(before, after):
        raise SystemExit("the transcript changed")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
