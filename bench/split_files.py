"""Writes what the commands of README and docs/SPLITTING.md read: three real models and the texts of ``split_data.py``.

| file | what |
|---|---|
| minilm/, smollm2/ | Hugging Face folders with their tokenizers |
| nanoguard.pt, prompt_guard.py | a checkpoint and the factory of its module |
| fit.txt, train.txt, emma.txt | novels to fit to, to train on, to test on |
| guard-fit.safetensors, guard-test.safetensors | prompts as tokens, padded to 72 |

``python -m bench.split_files [FOLDER]`` (default out/split)
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from bench.bench_memory import prepare
from bench.bench_split_nanoguard import tokens
from bench.split_data import ROOT, fit_text, test_text, train_text

TEXTS = {"fit.txt": fit_text, "train.txt": train_text, "emma.txt": test_text}


def write(folder: Path) -> list[Path]:
    """What was written; a model that is there already stays."""
    import pretrained

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in TEXTS.items():
        (folder / name).write_text(text())
    for part in ("fit", "test"):
        save_file(
            {name: value.contiguous() for name, value in tokens(part).items()}, folder / f"guard-{part}.safetensors"
        )
    shutil.copy(pretrained.nanoguard(), folder / "nanoguard.pt")
    for module in ("prompt_guard.py", "pretrained.py"):
        shutil.copy(ROOT / "samples" / module, folder)
    for name, make in MODELS.items():
        if not (folder / name).exists():
            parts = folder / f"{name}.part"  # it has its name when it is whole
            shutil.rmtree(parts, ignore_errors=True)
            make(parts)
            parts.rename(folder / name)
    return sorted(folder.iterdir())


def _minilm(folder: Path) -> None:
    import pretrained

    shutil.copytree(pretrained.minilm(), folder)


def _smollm2(folder: Path) -> None:
    """Unpacked from its GGUF file."""
    import pretrained
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
        prepare("smollm2", Path(parts))
        path = pretrained.smollm2()
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(Path(parts, "model"))
        Path(parts, "model").rename(folder)


MODELS = {"minilm": _minilm, "smollm2": _smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "out" / "split")
    for path in write(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
