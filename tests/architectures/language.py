"""Encoders and encoder-decoders of transformers, from tiny configs, and what their like shares."""

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


DECODER = {**NAMES, **SHORT, **NO_TOKENS}
ATTENTION_OUTPUT = "an attention output projection"
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


def bert_like(name: str, cls: str, config: str, path: str, held_out: bool = False, **extra: Any) -> Architecture:
    return Architecture(
        name,
        hf(cls, config, **{**DECODER, **extra}),
        ids,
        (Blocks(path, 2, "gelu", 32),),
        held_out=held_out,
    )


def gated_decoder(
    name: str, cls: str, config: str, act: str = "silu", held_out: bool = False, **extra: Any
) -> Architecture:
    return Architecture(
        name,
        hf(cls, config, **{**DECODER, "num_key_value_heads": 1, **extra}),
        ids,
        (Blocks("model.layers.?.mlp", 2, act, 32, gated=True),),
        (("lm_head", "an output head"),),
        held_out=held_out,
    )


ENCODERS = (
    bert_like("BERT", "BertModel", "BertConfig", "encoder.layer.?"),
    Architecture(
        "BERT for sequence classification",
        hf("BertForSequenceClassification", "BertConfig", **DECODER),
        ids,
        (Blocks("bert.encoder.layer.?", 2, "gelu", 32),),
        (("*", "an output head"), ("*attention.output.dense", ATTENTION_OUTPUT)),
    ),
    Architecture(
        "BERT masked LM",
        hf("BertForMaskedLM", "BertConfig", **DECODER),
        ids,
        (Blocks("bert.encoder.layer.?", 2, "gelu", 32),),
        (("cls.predictions*", "an output head"),),
    ),
    bert_like("RoBERTa", "RobertaModel", "RobertaConfig", "encoder.layer.?"),
    Architecture(
        "ALBERT",
        hf("AlbertModel", "AlbertConfig", **DECODER, embedding_size=8),
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
    bert_like("ELECTRA", "ElectraModel", "ElectraConfig", "encoder.layer.?", embedding_size=8),
    bert_like("DeBERTa-v2", "DebertaV2Model", "DebertaV2Config", "encoder.layer.?"),
    bert_like("MPNet", "MPNetModel", "MPNetConfig", "encoder.layer.?"),
    bert_like("LayoutLM", "LayoutLMModel", "LayoutLMConfig", "encoder.layer.?", held_out=True),
    bert_like("ESM", "EsmModel", "EsmConfig", "encoder.layer.?", held_out=True),
    bert_like("ERNIE", "ErnieModel", "ErnieConfig", "encoder.layer.?", held_out=True),
    bert_like("CamemBERT", "CamembertModel", "CamembertConfig", "encoder.layer.?", held_out=True),
    bert_like("I-BERT (float)", "IBertModel", "IBertConfig", "encoder.layer.?", held_out=True),
    bert_like("RemBERT", "RemBertModel", "RemBertConfig", "encoder.layer.?", held_out=True, input_embedding_size=8),
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
        hf("NystromformerModel", "NystromformerConfig", **DECODER, segment_means_seq_len=8, num_landmarks=8),
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

ALL = (*ENCODERS, *SEQUENCE_TO_SEQUENCE)
