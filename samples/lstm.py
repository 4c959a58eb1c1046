"""An LSTM language model with a feed-forward layer between its LSTMs: where the first sparsely-gated mixture of
experts stood (Shazeer et al. 2017, arXiv 1701.06538). Converted with their noisy top-k router, as a graph, and
trained a few steps.
"""

from __future__ import annotations

import torch
from pretrained import OUT
from torch import nn

import moeify

VOCABULARY, WIDTH = 512, 128


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.second = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.first(self.embedding(tokens))
        x = self.dropout(torch.sigmoid(self.down(torch.relu(self.up(x)))))
        x, _ = self.second(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    dense = LanguageModel().eval()
    # Bigram text: every token is followed by one of two others, so there is something to learn.
    chain = torch.stack([torch.randperm(VOCABULARY), torch.randperm(VOCABULARY)])
    tokens = torch.empty(8, 33, dtype=torch.int64)
    tokens[:, 0] = torch.randint(0, VOCABULARY, (8,))
    for t in range(1, 33):
        tokens[:, t] = chain[torch.randint(0, 2, (8,)), tokens[:, t - 1]]
    x, y = tokens[:, :-1], tokens[:, 1:]

    sparse = moeify.convert(dense, experts=8, top_k=2, router="noisy-topk", inputs={"tokens": x}, form="graph")
    block = sparse.moeify_report.blocks[0]
    print(f"{block.path or 'the model'}: {block.activation}, {block.experts} experts")
    print(f"relative error of the block {block.relative_error:.1e}")
    with torch.no_grad():
        print(f"outputs moved by at most {(sparse(x) - dense(x)).abs().max():.1e}")

    optimizer = torch.optim.Adam(sparse.parameters(), lr=3e-3)
    sparse.train()
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(sparse(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"20 training steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if not losses[-1] < losses[0]:
        raise SystemExit("training did not lower the loss")
    OUT.mkdir(exist_ok=True)
    torch.save(sparse.state_dict(), OUT / "lstm-moe-state.pt")


if __name__ == "__main__":
    main()
