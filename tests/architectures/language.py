"""Language models of transformers, from tiny configs."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.architectures.kinds import Architecture, Blocks, ids

NAMES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}
SHORT = {"max_position_embeddings": 32}
NO_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def hf(cls: str, config: str, **options: Any) -> Any:
    """A function that builds ``cls`` from ``config`` with options."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        return getattr(transformers, cls)(made)

    return build


def encoder_decoder() -> dict:
    return ids() | ids(length=6, name="decoder_input_ids")


_DECODER = {**NAMES, **SHORT, **NO_TOKENS}
_ATTENTION = "an attention output projection"
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    **NO_TOKENS,
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64}


def _bert_like(name: str, cls: str, config: str, path: str, held_out: bool = False, **extra: Any) -> Architecture:
    return Architecture(
        name,
        hf(cls, config, **{**_DECODER, **extra}),
        ids,
        (Blocks(path, 2, "gelu", 32),),
        held_out=held_out,
    )


def _gated(name: str, cls: str, config: str, act: str = "silu", held_out: bool = False, **extra: Any) -> Architecture:
    return Architecture(
        name,
        hf(cls, config, **{**_DECODER, "num_key_value_heads": 1, **extra}),
        ids,
        (Blocks("model.layers.?.mlp", 2, act, 32, gated=True),),
        (("lm_head", "an output head"),),
        held_out=held_out,
    )


ENCODERS = (
    _bert_like("BERT", "BertModel", "BertConfig", "encoder.layer.?"),
    Architecture(
        "BERT for sequence classification",
        hf("BertForSequenceClassification", "BertConfig", **_DECODER),
        ids,
        (Blocks("bert.encoder.layer.?", 2, "gelu", 32),),
        (("*", "an output head"), ("*attention.output.dense", _ATTENTION)),
    ),
    Architecture(
        "BERT masked LM",
        hf("BertForMaskedLM", "BertConfig", **_DECODER),
        ids,
        (Blocks("bert.encoder.layer.?", 2, "gelu", 32),),
        (("cls.predictions*", "an output head"),),
    ),
    _bert_like("RoBERTa", "RobertaModel", "RobertaConfig", "encoder.layer.?"),
    Architecture(
        "ALBERT",
        hf("AlbertModel", "AlbertConfig", **_DECODER, embedding_size=8),
        ids,
        (Blocks("encoder.albert_layer_groups.0.albert_layers.0", 1, "gelu_tanh", 32, calls=2),),
    ),
    Architecture(
        "DistilBERT",
        hf(
            "DistilBertModel",
            "DistilBertConfig",
            dim=16,
            hidden_dim=32,
            n_heads=2,
            n_layers=2,
            vocab_size=64,
            **SHORT,
        ),
        ids,
        (Blocks("transformer.layer.?.ffn", 2, "gelu", 32),),
    ),
    _bert_like("ELECTRA", "ElectraModel", "ElectraConfig", "encoder.layer.?", embedding_size=8),
    _bert_like("DeBERTa-v2", "DebertaV2Model", "DebertaV2Config", "encoder.layer.?"),
    _bert_like("MPNet", "MPNetModel", "MPNetConfig", "encoder.layer.?"),
    _bert_like("LayoutLM", "LayoutLMModel", "LayoutLMConfig", "encoder.layer.?", held_out=True),
    _bert_like("ESM", "EsmModel", "EsmConfig", "encoder.layer.?", held_out=True),
    _bert_like("ERNIE", "ErnieModel", "ErnieConfig", "encoder.layer.?", held_out=True),
    _bert_like("CamemBERT", "CamembertModel", "CamembertConfig", "encoder.layer.?", held_out=True),
    _bert_like("I-BERT (float)", "IBertModel", "IBertConfig", "encoder.layer.?", held_out=True),
    _bert_like("RemBERT", "RemBertModel", "RemBertConfig", "encoder.layer.?", held_out=True, input_embedding_size=8),
)

DECODERS = (
    Architecture(
        "GPT-2",
        hf("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_head=2, n_layer=2, vocab_size=64, n_positions=32, **NO_TOKENS),
        ids,
        (Blocks("transformer.h.?.mlp", 2, "gelu_tanh", 64),),
        (("lm_head", "an output head"), ("*attn.c_proj", _ATTENTION)),
    ),
    Architecture(
        "GPT-NeoX (parallel)",
        hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_DECODER),
        ids,
        (Blocks("gpt_neox.layers.?.mlp", 2, "gelu", 32),),
    ),
    Architecture(
        "GPT-J (parallel)",
        hf(
            "GPTJForCausalLM",
            "GPTJConfig",
            n_embd=16,
            n_head=2,
            n_layer=2,
            vocab_size=64,
            n_positions=32,
            rotary_dim=4,
            **NO_TOKENS,
        ),
        ids,
        (Blocks("transformer.h.?.mlp", 2, "gelu_tanh", 64),),
    ),
    Architecture(
        "GPT-Neo",
        hf(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            hidden_size=16,
            num_heads=2,
            num_layers=2,
            vocab_size=64,
            intermediate_size=32,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            **SHORT,
            **NO_TOKENS,
        ),
        ids,
        (Blocks("transformer.h.?.mlp", 2, "gelu_tanh", 32),),
    ),
    Architecture(
        "OPT",
        hf(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            word_embed_proj_dim=16,
            **SHORT,
            **NO_TOKENS,
        ),
        ids,
        (Blocks("model.decoder.layers.?", 2, "relu", 32),),
    ),
    Architecture(
        "Bloom",
        hf("BloomForCausalLM", "BloomConfig", hidden_size=16, n_head=2, n_layer=2, vocab_size=64, **NO_TOKENS),
        ids,
        (Blocks("transformer.h.?.mlp", 2, "gelu_tanh", 64),),
    ),
    Architecture(
        "Falcon (parallel)",
        hf(
            "FalconForCausalLM",
            "FalconConfig",
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=64,
            **NO_TOKENS,
        ),
        ids,
        (Blocks("transformer.h.?.mlp", 2, "gelu", 64),),
    ),
    _gated("Llama", "LlamaForCausalLM", "LlamaConfig"),
    _gated("Mistral", "MistralForCausalLM", "MistralConfig"),
    _gated("Qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
    _gated("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", head_dim=8),
    _gated("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", "gelu_tanh", head_dim=8),
    _gated("Phi-3 (fused gate_up)", "Phi3ForCausalLM", "Phi3Config"),
    _gated("StableLM", "StableLmForCausalLM", "StableLmConfig"),
    _gated("Cohere (parallel)", "CohereForCausalLM", "CohereConfig"),
    _gated("OLMo", "OlmoForCausalLM", "OlmoConfig"),
    _gated("OLMo 2", "Olmo2ForCausalLM", "Olmo2Config", held_out=True),
    _gated("Granite", "GraniteForCausalLM", "GraniteConfig", held_out=True),
    _gated("Gemma", "GemmaForCausalLM", "GemmaConfig", "gelu_tanh", held_out=True, head_dim=8),
    _gated("GLM-4 (fused gate_up)", "Glm4ForCausalLM", "Glm4Config", held_out=True, head_dim=8),
    _gated("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config", held_out=True),
    _gated("Helium", "HeliumForCausalLM", "HeliumConfig", held_out=True, head_dim=8),
    Architecture(
        "Phi (parallel)",
        hf("PhiForCausalLM", "PhiConfig", **_DECODER),
        ids,
        (Blocks("model.layers.?.mlp", 2, "gelu_tanh", 32),),
    ),
    Architecture(
        "MPT",
        hf("MptForCausalLM", "MptConfig", d_model=16, n_heads=2, n_layers=2, max_seq_len=32, vocab_size=64),
        ids,
        (Blocks("transformer.blocks.?.ffn", 2, "gelu", 64),),
    ),
    Architecture(
        "BitNet (norm over the hidden width)",
        hf("BitNetForCausalLM", "BitNetConfig", **{**_DECODER, "num_key_value_heads": 1}),
        ids,
        (Blocks("model.layers.?.mlp", 2, "custom", 32, gated=True),),
    ),
    Architecture(
        "Nemotron (squared ReLU)",
        hf("NemotronForCausalLM", "NemotronConfig", **{**_DECODER, "num_key_value_heads": 1}),
        ids,
        (Blocks("model.layers.?.mlp", 2, "relu2", 32),),
        held_out=True,
    ),
    Architecture(
        "Starcoder2",
        hf("Starcoder2ForCausalLM", "Starcoder2Config", **{**_DECODER, "num_key_value_heads": 1}),
        ids,
        (Blocks("model.layers.?.mlp", 2, "gelu_tanh", 32),),
        held_out=True,
    ),
    Architecture(
        "Persimmon (squared ReLU)",
        hf("PersimmonForCausalLM", "PersimmonConfig", **_DECODER),
        ids,
        (Blocks("model.layers.?.mlp", 2, "relu2", 32),),
        held_out=True,
    ),
    Architecture(
        "CodeGen",
        hf(
            "CodeGenForCausalLM",
            "CodeGenConfig",
            n_embd=16,
            n_head=4,
            n_layer=2,
            vocab_size=64,
            n_positions=32,
            rotary_dim=4,
            n_ctx=32,
            **NO_TOKENS,
        ),
        ids,
        (Blocks("transformer.h.?.mlp", 2, "gelu_tanh", 64),),
        held_out=True,
    ),
    Architecture(
        "BioGPT",
        hf("BioGptForCausalLM", "BioGptConfig", **_DECODER),
        ids,
        (Blocks("biogpt.layers.?", 2, "gelu", 32),),
        held_out=True,
    ),
    Architecture(
        "XGLM",
        hf(
            "XGLMForCausalLM",
            "XGLMConfig",
            d_model=16,
            ffn_dim=32,
            num_layers=2,
            attention_heads=2,
            vocab_size=64,
            **SHORT,
            **NO_TOKENS,
        ),
        ids,
        (Blocks("model.layers.?", 2, "gelu", 32),),
        held_out=True,
    ),
    Architecture(
        "Mamba (no feed-forward block)",
        hf(
            "MambaForCausalLM",
            "MambaConfig",
            hidden_size=16,
            num_hidden_layers=2,
            vocab_size=64,
            state_size=4,
            **NO_TOKENS,
        ),
        ids,
        held_out=True,
        fixed=True,
    ),
    Architecture(
        "RWKV (channel mixing)",
        hf(
            "RwkvForCausalLM",
            "RwkvConfig",
            hidden_size=16,
            num_hidden_layers=2,
            vocab_size=64,
            attention_hidden_size=16,
            intermediate_size=32,
            context_length=32,
            rescale_every=0,
            **NO_TOKENS,
        ),
        ids,
        (Blocks("rwkv.blocks.?.feed_forward", 2, "relu2", 32),),
        held_out=True,
        fixed=True,
    ),
)

SEQUENCE_TO_SEQUENCE = (
    Architecture(
        "T5",
        hf("T5ForConditionalGeneration", "T5Config", **_T5, feed_forward_proj="relu"),
        encoder_decoder,
        (Blocks("*.DenseReluDense", 4, "relu", 32),),
    ),
    Architecture(
        "T5 v1.1 (gated)",
        hf("T5ForConditionalGeneration", "T5Config", **_T5, feed_forward_proj="gated-gelu"),
        encoder_decoder,
        (Blocks("*.DenseReluDense", 4, "gelu_tanh", 32, gated=True),),
    ),
    Architecture(
        "BART", hf("BartModel", "BartConfig", **_BART), encoder_decoder, (Blocks("?????er.layers.?", 4, "gelu", 32),)
    ),
    Architecture(
        "Pegasus",
        hf("PegasusModel", "PegasusConfig", **_BART),
        encoder_decoder,
        (Blocks("?????er.layers.?", 4, "gelu", 32),),
    ),
    Architecture(
        "Marian",
        hf("MarianModel", "MarianConfig", **_BART, decoder_start_token_id=0),
        encoder_decoder,
        (Blocks("?????er.layers.?", 4, "gelu", 32),),
    ),
    Architecture(
        "XLNet",
        hf("XLNetModel", "XLNetConfig", d_model=16, n_head=2, n_layer=2, d_inner=32, vocab_size=64),
        ids,
        (Blocks("layer.?.ff", 2, "gelu", 32),),
        held_out=True,
    ),
    Architecture(
        "Funnel",
        hf(
            "FunnelModel",
            "FunnelConfig",
            d_model=16,
            n_head=2,
            d_head=8,
            d_inner=32,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            vocab_size=64,
        ),
        ids,
        (Blocks("*.ffn", 3, "gelu_tanh", 32),),
        held_out=True,
        fixed=True,
    ),
    Architecture(
        "Nystromformer",
        hf("NystromformerModel", "NystromformerConfig", **_DECODER, segment_means_seq_len=8, num_landmarks=8),
        ids,
        (Blocks("encoder.layer.?", 2, "gelu_tanh", 32),),
        held_out=True,
        fixed=True,
    ),
    Architecture(
        "mBART",
        hf("MBartModel", "MBartConfig", **_BART),
        encoder_decoder,
        (Blocks("?????er.layers.?", 4, "gelu", 32),),
        held_out=True,
    ),
    Architecture(
        "UMT5 (gated)",
        hf("UMT5ForConditionalGeneration", "UMT5Config", **_T5, feed_forward_proj="gated-gelu"),
        encoder_decoder,
        (Blocks("*.DenseReluDense", 4, "gelu_tanh", 32, gated=True),),
        held_out=True,
    ),
)

ALL = (*ENCODERS, *DECODERS, *SEQUENCE_TO_SEQUENCE)
