"""Vision and speech models of transformers, from tiny configs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.architectures.kinds import Architecture, Blocks, floats, ids
from tests.architectures.language import hf

_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
_WAV = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


def pixels(size: int = 16) -> dict[str, Tensor]:
    return floats(2, 3, size, size, name="pixel_values")


def _audio() -> dict[str, Tensor]:
    return floats(2, 400, name="input_values")


def _vit(
    name: str, cls: str, config: str, path: str, act: str = "gelu", held_out: bool = False, **more: Any
) -> Architecture:
    return Architecture(
        name, hf(cls, config, **{**_VIT, **more}), pixels, (Blocks(path, 2, act, 32),), held_out=held_out
    )


VISION = (
    _vit("ViT", "ViTForImageClassification", "ViTConfig", "vit.*layer*.?*"),
    _vit("DeiT", "DeiTModel", "DeiTConfig", "*layer*.?*"),
    _vit("CLIP vision", "CLIPVisionModel", "CLIPVisionConfig", "*encoder.layers.?.mlp", "quick_gelu"),
    _vit("BEiT", "BeitModel", "BeitConfig", "*layer*.?*", held_out=True),
    _vit("Data2Vec vision", "Data2VecVisionModel", "Data2VecVisionConfig", "*layer*.?*", held_out=True),
    Architecture(
        "CLIP text",
        hf(
            "CLIPTextModel",
            "CLIPTextConfig",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=64,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        ids,
        (Blocks("*encoder.layers.?.mlp", 2, "quick_gelu", 32),),
    ),
    Architecture(
        "SigLIP vision (pooling head over samples)",
        hf("SiglipVisionModel", "SiglipVisionConfig", **_VIT),
        pixels,
        (
            Blocks("*encoder.layers.?.mlp", 2, "gelu_tanh", 32),
            Blocks("*head.mlp", 1, "gelu_tanh", 32, rows="sample"),
        ),
        held_out=True,
    ),
    Architecture(
        "Swin",
        hf(
            "SwinModel",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            mlp_ratio=2.0,
        ),
        lambda: pixels(32),
        (Blocks("*.blocks.0*", 1, "gelu", 16), Blocks("*.blocks.0*", 1, "gelu", 32)),
    ),
    Architecture(
        "ConvNeXt",
        hf("ConvNextModel", "ConvNextConfig", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32),
        lambda: pixels(32),
        (Blocks("encoder.stages.0.layers.0", 1, "gelu", 32), Blocks("encoder.stages.1.layers.0", 1, "gelu", 64)),
    ),
    Architecture(
        "ConvNeXt V2 (global response norm inside)",
        hf("ConvNextV2Model", "ConvNextV2Config", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32),
        lambda: pixels(32),
        refused=(("encoder.stages.0.layers.0", "linalg_vector_norm works along a row axis"),),
    ),
    Architecture(
        "SegFormer (depthwise convolution inside)",
        hf(
            "SegformerModel",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        lambda: pixels(32),
        refused=(("*mlp*", "a convolution (conv2d) stands between the linear layers"),),
    ),
    Architecture(
        "MobileViT",
        hf(
            "MobileViTModel",
            "MobileViTConfig",
            image_size=64,
            hidden_sizes=[8, 12, 16],
            neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16],
            num_attention_heads=2,
            mlp_ratio=2.0,
        ),
        lambda: pixels(64),
        (
            Blocks("*", 2, "silu", 16),
            Blocks("*", 4, "silu", 24),
            Blocks("*", 3, "silu", 32),
        ),
        fixed=True,
    ),
    Architecture(
        "DINOv2",
        hf(
            "Dinov2Model",
            "Dinov2Config",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=16,
            patch_size=8,
        ),
        pixels,
        (Blocks("*layer*.?.mlp", 2, "gelu", 32),),
    ),
    Architecture(
        "DINOv2 (SwiGLU)",
        hf(
            "Dinov2Model",
            "Dinov2Config",
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=16,
            patch_size=8,
            use_swiglu_ffn=True,
        ),
        pixels,
        (Blocks("*layer*.?.mlp", 2, "silu", 24, gated=True),),
    ),
    Architecture(
        "VideoMAE",
        hf("VideoMAEModel", "VideoMAEConfig", **_VIT, num_frames=2, tubelet_size=2),
        lambda: floats(2, 2, 3, 16, 16, name="pixel_values"),
        (Blocks("encoder.layer.?", 2, "gelu", 32),),
        held_out=True,
    ),
    Architecture(
        "Conditional DETR-like: YOLOS",
        hf("YolosModel", "YolosConfig", **{**_VIT, "image_size": [16, 16]}, num_detection_tokens=4),
        pixels,
        (Blocks("*layer*.?*", 2, "gelu", 32),),
        held_out=True,
    ),
)

SPEECH = (
    Architecture(
        "Wav2Vec2",
        hf("Wav2Vec2Model", "Wav2Vec2Config", **_WAV),
        _audio,
        (Blocks("encoder.layers.?.feed_forward", 2, "gelu", 32),),
    ),
    Architecture(
        "HuBERT",
        hf("HubertModel", "HubertConfig", **_WAV),
        _audio,
        (Blocks("encoder.layers.?.feed_forward", 2, "gelu", 32),),
    ),
    Architecture(
        "Data2Vec audio",
        hf("Data2VecAudioModel", "Data2VecAudioConfig", **{**_WAV, "num_conv_pos_embeddings": 2}),
        _audio,
        (Blocks("encoder.layers.?.feed_forward", 2, "gelu", 32),),
        held_out=True,
    ),
    Architecture(
        "Whisper",
        hf(
            "WhisperModel",
            "WhisperConfig",
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=64,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=1,
        ),
        lambda: floats(2, 8, 32, name="input_features") | ids(name="decoder_input_ids"),
        (Blocks("?????er.layers.?", 4, "gelu", 32),),
    ),
)

SERIES = (
    Architecture(
        "PatchTST",
        hf(
            "PatchTSTModel",
            "PatchTSTConfig",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        lambda: floats(2, 16, 2, name="past_values"),
        (Blocks("encoder.layers.?*", 2, "gelu", 32),),
        held_out=True,
        fixed=True,
    ),
)

ALL = (*VISION, *SPEECH, *SERIES)
