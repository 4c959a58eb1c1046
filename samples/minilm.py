"""all-MiniLM-L6-v2, a real sentence encoder, into 8 experts per layer, 2 active; its similarities must not move."""

from __future__ import annotations

import os
import warnings

import torch
from pretrained import OUT, minilm
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

import moeify
from moeify.cli.main import main as moeify_command

PAIRS = [
    ("A man is playing a guitar on stage.", "Someone performs music with a guitar."),
    ("A man is playing a guitar on stage.", "The stock market fell sharply on Monday."),
    ("How do I reset my password?", "I forgot my login and cannot get in."),
    ("How do I reset my password?", "The recipe needs two cups of flour."),
    ("The cat sleeps on the warm windowsill.", "A kitten naps in the sun."),
    ("The cat sleeps on the warm windowsill.", "Parliament debates the new budget."),
]


def embed(model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the last hidden states over the real tokens, normalised: what the model's card prescribes."""
    with torch.no_grad():
        hidden = model(tokens["input_ids"], tokens["attention_mask"])["last_hidden_state"]
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    folder, output = OUT / "all-MiniLM-L6-v2", OUT / "minilm-moe.pt2"
    if not folder.exists():
        folder.unlink(missing_ok=True)  # a link into an environment that is gone
        folder.symlink_to(minilm())
    console = Console()
    shown = [os.path.relpath(path) for path in (folder, output)]
    arguments = ["convert", shown[0], "--experts", "8", "--top-k", "2", "-o", shown[1]]
    console.print(f"$ moeify {' '.join(arguments)}\n", style="bold", soft_wrap=True)
    code = moeify_command(arguments)
    if code:
        raise SystemExit(code)

    dense = AutoModel.from_pretrained(folder).eval()
    sparse = moeify.load(output)
    sentences = [sentence for pair in PAIRS for sentence in pair]
    tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    before, after = embed(dense, tokens), embed(sparse, tokens)
    table = Table(title="cosine similarity of sentence pairs", title_justify="left", box=None, show_edge=False)
    for column in ("dense", "MoE", "moved by"):
        table.add_column(column, justify="right")
    table.add_column("sentences")
    worst = 0.0
    for i, (first, second) in enumerate(PAIRS):
        old, new = (float(e[2 * i] @ e[2 * i + 1]) for e in (before, after))
        worst = max(worst, abs(old - new))
        table.add_row(f"{old:.4f}", f"{new:.4f}", f"{abs(old - new):.0e}", f"{first}\n{second}")
    console.print()
    console.print(table)
    if worst > 1e-5:
        raise SystemExit(f"similarities moved by {worst:.1e}")
    console.print(f"\nsimilarities unchanged: the largest difference is {worst:.0e}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
