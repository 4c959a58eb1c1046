"""SmolLM2-135M, 4 experts in each of its 30 blocks, to ONNX: peak memory, and next tokens on real text.

Bars: the peak of ``export_file`` is at most the Program's bytes + 1.3 x those of the ONNX file; the greedy
continuations by ONNX Runtime and by the Program are equal. The peak is the growth of the resident set over what the
process held after exporting a tiny model of the same class.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.bench_memory import ROOT, prepare, resident

BAR = 1.3
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "def fibonacci(n):\n"]
STEPS = 8


def convert(folder: Path) -> None:
    import transformers

    from moeify import Recipe, convert_file

    prepare("smollm2", folder)
    convert_file(folder / "model", folder / "moe.pt2", Recipe(experts=4))
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    config.update({"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 64})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0})
    getattr(transformers, config.architectures[0])(config).save_pretrained(folder / "tiny")
    convert_file(folder / "tiny", folder / "tiny.pt2", Recipe(experts=2, top_k=1))


def export(folder: Path) -> None:
    from moeify import export_file

    export_file(folder / "tiny.pt2", folder / "tiny.onnx")
    before = resident()
    report = export_file(folder / "moe.pt2", folder / "moe.onnx")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    program = (folder / "moe.pt2").stat().st_size
    print(json.dumps({"peak": peak, "program": program, "onnx": report.bytes, "seconds": round(report.seconds, 1),
                      "max_relative_error": report.max_relative_error,
                      "over_file": round((peak - program) / report.bytes, 3)}))  # fmt: skip


def generate(folder: Path) -> None:
    """Greedy continuations by both. No key-value cache: the whole text is run again for every token."""
    import torch
    from transformers import AutoTokenizer

    import moeify
    from moeify.backends.onnxruntime.session import Session

    sys.path.insert(0, str(ROOT / "samples"))
    import pretrained

    path = pretrained.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    session, program = Session(folder / "moe.onnx"), moeify.load(folder / "moe.pt2")
    same, texts = True, []
    for prompt in PROMPTS:
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        grown = []
        for run in (lambda *inputs: session.run(list(inputs))[0], lambda *inputs: _logits(program(*inputs))):
            ids = start
            for _ in range(STEPS):
                inputs = [ids if name == "input_ids" else torch.ones_like(ids) for name in session.input_names]
                with torch.no_grad():
                    ids = torch.cat([ids, run(*inputs)[:, -1:].argmax(-1)], 1)
            grown.append(ids)
        same &= torch.equal(*grown)
        texts.append(tokenizer.decode(grown[0][0]))
    print(json.dumps({"next_tokens_equal": same, "texts": texts}))


def _logits(output: object) -> object:
    return output["logits"] if isinstance(output, dict) else output


def main() -> int:
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("convert", "export", "generate"):
            done = subprocess.run(
                [sys.executable, "-m", "bench.bench_export", stage, folder], check=True, capture_output=True, text=True
            )
            result |= json.loads(done.stdout.splitlines()[-1]) if stage != "convert" else {}
    held = bool(result["next_tokens_equal"]) and float(str(result["over_file"])) <= BAR
    result |= {"bar": BAR, "held": held}
    if "--json" in sys.argv:
        print(json.dumps(result))
        return 0 if held else 1
    for text in result["texts"]:  # type: ignore[attr-defined]
        print(f"  {text!r}")
    megabytes = {name: f"{int(str(result[name])) / 1e6:.0f} MB" for name in ("peak", "program", "onnx")}
    print(f"program {megabytes['program']}, ONNX {megabytes['onnx']}, peak of export {megabytes['peak']}")
    print(f"(peak - program) / ONNX = {result['over_file']} (bar {BAR})")
    print(f"next tokens equal: {result['next_tokens_equal']}")
    print("held" if held else "MISSED")
    return 0 if held else 1


if __name__ == "__main__":
    stages = {"convert": convert, "export": export, "generate": generate}
    if sys.argv[1:2] and sys.argv[1] in stages:
        stages[sys.argv[1]](Path(sys.argv[2]))
    else:
        sys.exit(main())
