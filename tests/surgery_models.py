"""Real classes at tiny size, converted: what the tests of the module form start from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify import frontend, surgery
from moeify.ir.program import Program
from moeify.ir.recipe import Recipe
from moeify.pipeline.default import FIND
from moeify.pipeline.runner import run

D, F, VOCABULARY = 16, 40, 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": F, "num_attention_heads": 2}
NO_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Encoder(nn.Module):
    """torch's own encoder, whose fast path reads the weights of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, F, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class LstmLm(nn.Module):
    """A language model with an FFN between its LSTMs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.below = nn.LSTM(D, D, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Dropout(0.1), nn.Linear(F, D))
        self.above = nn.LSTM(D, D, batch_first=True)
        self.head = nn.Linear(D, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.above(self.ffn(self.below(self.embed(ids))[0]))[0])


class Ffn(nn.Module):
    """A residual block in one of the shapes that user code has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "raw":
            self.a, self.b = nn.Parameter(torch.randn(D, F)), nn.Parameter(torch.randn(F, D))
        elif kind == "custom":  # owned, with an activation that has parameters
            self.net = nn.Sequential(nn.Linear(D, F), nn.PReLU(), nn.Dropout(0.1), nn.Linear(F, D))
        else:
            layer: Any = functools.partial(nn.Conv2d, kernel_size=1) if kind == "convolution" else nn.Linear
            self.up, self.act = layer(D, 2 * F if kind == "fused" else F), nn.PReLU() if kind == "prelu" else nn.SiLU()
            self.down = layer(F, D)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "raw":
            return x + torch.relu(x @ self.a) @ self.b
        if self.kind == "custom":
            return x + self.net(x)
        if self.kind == "fused":
            gate, up = self.up(x).chunk(2, dim=-1)
            return x + self.down(self.act(gate) * up)
        return x + self.down(self.act(self.up(x)))


def layers(kind: str) -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), Ffn(kind)) if kind != "convolution" else nn.Sequential(Ffn(kind))


def transformers_model(name: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    return cls(cls.config_class(**config))


def _ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


Made = tuple[nn.Module, dict[str, Tensor]]
TWO = {"num_hidden_layers": 2}
_T5 = {"vocab_size": VOCABULARY, "d_model": D, "d_ff": F, "d_kv": 8, "num_layers": 1, "num_heads": 2}
_WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": D,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
    **NO_SPECIAL,
}
_OPT = {"vocab_size": VOCABULARY, "hidden_size": D, "ffn_dim": F, "num_attention_heads": 2, "word_embed_proj_dim": D}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": D, "n_inner": F, "n_layer": 2, "n_head": 2, **NO_SPECIAL}
_VIT = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_CONVNEXT = {"hidden_sizes": [8, D], "depths": [1, 1], "num_stages": 2, "image_size": 16}

MODELS: dict[str, Callable[[], Made]] = {
    "llama": lambda: (transformers_model("LlamaForCausalLM", SMALL | TWO | NO_SPECIAL), {"input_ids": _ids()}),
    "bert": lambda: (transformers_model("BertModel", SMALL | TWO), {"input_ids": _ids()}),
    "gpt2": lambda: (transformers_model("GPT2LMHeadModel", _GPT2), {"input_ids": _ids()}),
    "t5": lambda: (
        transformers_model("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"} | NO_SPECIAL),
        {"input_ids": _ids(), "decoder_input_ids": _ids()},
    ),
    "opt": lambda: (transformers_model("OPTForCausalLM", _OPT | TWO | NO_SPECIAL), {"input_ids": _ids()}),
    "albert": lambda: (
        transformers_model("AlbertModel", SMALL | {"num_hidden_layers": 3, "embedding_size": 8} | NO_SPECIAL),
        {"input_ids": _ids()},
    ),
    "vit": lambda: (transformers_model("ViTModel", _VIT | TWO), {"pixel_values": torch.randn(2, 3, 8, 8)}),
    "convnext": lambda: (transformers_model("ConvNextModel", _CONVNEXT), {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "phi3": lambda: (
        transformers_model("Phi3ForCausalLM", SMALL | TWO | NO_SPECIAL | {"num_key_value_heads": 2}),
        {"input_ids": _ids()},
    ),
    "whisper": lambda: (
        transformers_model("WhisperForConditionalGeneration", _WHISPER),
        {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _ids()},
    ),
    "encoder": lambda: (Encoder(), {"x": torch.randn(2, 5, D)}),
    "lstm": lambda: (LstmLm(), {"ids": _ids()}),
    "custom": lambda: (layers("custom"), {"input": torch.randn(2, 5, D)}),
    "prelu": lambda: (layers("prelu"), {"input": torch.randn(2, 5, D)}),
    "fused": lambda: (layers("fused"), {"input": torch.randn(2, 5, D)}),
    "convolution": lambda: (layers("convolution"), {"input": torch.randn(2, D, 3, 4)}),
}


@dataclass
class Case:
    """A dense model, its converted copy, and the program between the two as find-ffn leaves it."""

    dense: nn.Module
    moe: nn.Module
    inputs: dict[str, Tensor]
    program: Program

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.moe)


@functools.cache
def case(name: str) -> Case:
    """Made once; a test that changes the converted model takes ``case(name).copy()``."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return converted(model, inputs)


def converted(model: nn.Module, inputs: dict[str, Tensor], **recipe: Any) -> Case:
    program = found(model.eval(), inputs, **recipe)
    return Case(model, surgery.apply(model, program, in_place=False), inputs, program)


def found(model: nn.Module, inputs: dict[str, Tensor], **recipe: Any) -> Program:
    program = frontend.capture(model, inputs)
    program.recipe = Recipe(**{"experts": 4, **recipe})
    return run(program, FIND)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]
