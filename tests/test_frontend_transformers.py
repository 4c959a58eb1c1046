"""Models of transformers are captured: their inputs, their attention, and weights on the meta device."""

import warnings

import pytest
import torch

from moeify.errors import NotExportable
from moeify.frontend import capture


def transformer(cls, config, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, cls)(getattr(transformers, config)(**options))


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": 97}
TRANSFORMERS = {
    "BertModel": (
        "BertConfig", TEXT, ["input_ids=int64[batch, seq]", "attention_mask=int64[batch, seq]"], [0.1],
    ),
    "GPT2LMHeadModel": (
        "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0},
        ["input_ids=int64[batch, seq]", "attention_mask=int64[batch, seq]"], [0.1],
    ),
    "LlamaForCausalLM": (
        "LlamaConfig", {**TEXT, "num_key_value_heads": 1},
        ["input_ids=int64[batch, seq]", "attention_mask=int64[batch, seq]"], [0.0],
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 97,
         "decoder_start_token_id": 0},
        ["input_ids=int64[batch, seq]", "attention_mask=int64[batch, seq]",
         "decoder_input_ids=int64[batch, decoder_seq]"],
        [0.1, 0.1, 0.1],
    ),
    "WhisperModel": (
        "WhisperConfig",
        {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 97,
            "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        },
        ["input_features=float32[batch, 8, 32]", "decoder_input_ids=int64[batch, decoder_seq]"], [0.0, 0.0, 0.0],
    ),
    "ViTForImageClassification": (
        "ViTConfig", {**SIZES, "image_size": 32, "patch_size": 8}, ["pixel_values=float32[batch, 3, 32, 32]"], [0.0],
    ),
    "SwinModel": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        ["pixel_values=float32[batch, 3, 32, 32]"], [0.0, 0.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_models(name):
    config, options, inputs, dropout = TRANSFORMERS[name]
    model = transformer(name, config, **options)
    program = capture(model)
    assert [str(spec) for spec in program.inputs] == inputs
    assert program.provenance["capture_error"] <= 1e-6
    assert program.provenance["attention_dropout"] == dropout
    assert "forward" not in model.__dict__
    state = dict(model.state_dict())
    parameters = dict(program.graph_module.named_parameters())
    assert parameters
    assert all(parameters[k].data_ptr() == state[k].data_ptr() for k in parameters)
    assert not any("higher_order" in str(n.target) for n in program.graph.nodes)
    output = program.graph_module(*program.example)
    assert isinstance(output, dict)
    assert "past_key_values" not in output


def test_a_transformers_model_on_meta():
    with torch.device("meta"):
        model = transformer("LlamaForCausalLM", "LlamaConfig", **TEXT)
    program = capture(model)
    devices = {str(node.kwargs["device"]) for node in program.graph.nodes if "device" in node.kwargs}
    assert devices == {"cpu"}


def test_eager_attention_is_the_fallback():
    model = transformer("BertModel", "BertConfig", **TEXT)
    from moeify.frontend import hf_attention
    from moeify.frontend.hf_attention import with_attention_fallback

    assert hf_attention
    seen, notes = [], []

    def attempt():
        seen.append(model.config._attn_implementation)
        if seen[-1] != "eager":
            raise NotExportable("no sdpa here")
        return "captured"

    assert with_attention_fallback(model, attempt, notes) == "captured"
    assert seen == ["sdpa", "eager"]
    assert model.config._attn_implementation == "sdpa"
    assert notes == ["captured with eager attention: sdpa does not export (no sdpa here)"]
