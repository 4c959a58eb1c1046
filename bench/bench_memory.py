"""convert's peak memory over dense + MoE bytes. Bar: 1.15 for all-MiniLM-L6-v2 and for SmolLM2 (4 experts, every
second block).

Each model is converted by convert_file in a fresh process, from a folder on disk to a .pt2 on disk. The peak is the
growth of the resident set over what the process held after converting a tiny model of the same class.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"minilm": {"experts": 8}, "smollm2": {"experts": 4, "blocks": "every:2"}}


def resident() -> int:
    """Bytes in memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS: this benchmark needs Linux")


def child(name: str, folder: str) -> None:
    from moeify import Recipe, convert_file

    warm_up(Path(folder))
    before = resident()
    output = Path(folder) / "out.pt2"
    report = convert_file(Path(folder) / "model", output, Recipe(**MODELS[name]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    dense, sparse = report.parameters_before * 4, report.parameters_after * 4
    print(json.dumps({"model": name, "dense": dense, "moe": sparse, "peak": peak - before,
                      "ratio": round((peak - before) / (dense + sparse), 3)}))  # fmt: skip


def warm_up(folder: Path) -> None:
    """Convert a tiny model of the same class: the code that transformers and torch.export import for it is not the
    conversion's memory.
    """
    import transformers

    from moeify import Recipe, convert_file

    config = transformers.AutoConfig.from_pretrained(folder / "model")
    config.update({"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0})
    getattr(transformers, config.architectures[0])(config).save_pretrained(folder / "tiny")
    convert_file(folder / "tiny", folder / "tiny.pt2", Recipe(experts=2, top_k=1))


def prepare(name: str, folder: Path) -> None:
    """A Hugging Face folder of the model in float32."""
    sys.path.insert(0, str(ROOT / "samples"))
    import pretrained
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if name == "minilm":
        (folder / "model").symlink_to(pretrained.minilm())
        return
    path = pretrained.smollm2()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model read from GGUF calls itself quantised and refuses save_pretrained.
    (folder / "model").mkdir()
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    (folder / "model" / "config.json").write_text(json.dumps(config))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "prepare", name, folder], check=True)
            done = subprocess.run(
                [sys.executable, __file__, "child", name, folder], check=True, capture_output=True, text=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="peak memory of convert", title_justify="left")
    for column in ("model", "dense MB", "MoE MB", "peak MB", "peak / (dense + MoE)"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["model"], *(f"{row[k] / 1e6:.0f}" for k in ("dense", "moe", "peak")), str(row["ratio"]))
    Console().print(table)
    held = all(row["ratio"] <= 1.15 for row in rows)
    print(f"bar (at most 1.15): {'held' if held else 'MISSED'}")
    sys.exit(not held)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["prepare"]:
        prepare(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
