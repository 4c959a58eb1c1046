"""Converted models on a GPU: every router gives the CPU's outputs and trains, and ``moeify train`` learns there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.topk import TopK
from moeify.training.router_facts import facts, top_k_of
from tests.gpu import GPU, needs_gpu, relative

pytestmark = needs_gpu

VOCABULARY, WIDTH = 64, 32


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Language(nn.Module):
    """Scores of the next token from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)))


def converted(router: str, form: str) -> nn.Module:
    torch.manual_seed(0)
    spec = ROUTERS.parse(router)
    method = "split-random" if isinstance(spec, TopK) else "copy"  # ``topk`` and its kin are for splits
    recipe = moeify.Recipe(method=method, experts=4, top_k=min(top_k_of(spec), 4), router=router)
    return moeify.convert(Language(), recipe, inputs=["ids=int64[batch=4,seq=8]"], form=form)


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router(router: str, form: str) -> None:
    model = converted(router, form)
    model.eval()
    with torch.no_grad():
        expected = model(ids())
    model.to(GPU)
    with torch.no_grad():
        assert relative(model(ids().to(GPU)), expected) < 1e-5  # float32, sums in another order
    model.train()
    moeify.observe(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scores = model(ids().to(GPU))
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), ids().to(GPU).flatten())
    names = facts(router).losses
    if names:
        loss = loss + moeify.losses(model, names, reward=torch.randn(ids().numel(), device=GPU)).total
    loss.backward()
    optimizer.step()
    moeify.after_step(model)
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert all(one.isfinite().all() for one in gradients.values())
    assert any(".up" in name and one.any() for name, one in gradients.items())
    with torch.no_grad():
        after = model(ids().to(GPU))
    assert after.isfinite().all()
    assert not torch.equal(after, scores)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_autocast_and_half_precision(form: str) -> None:
    """bfloat16 takes the grouped GEMM; float16 the loop. A token whose two best experts are nearly equal may change
    expert, so that what is compared is copies of one expert."""
    model = converted("softmax-topk", form).eval()
    with torch.no_grad():
        expected = model(ids())
        model.to(GPU)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cuda", dtype):
                assert relative(model(ids().to(GPU)).float(), expected) < 8 * torch.finfo(dtype).eps
        if form == "module":  # a graph has the types it was captured with
            halved = model.to(torch.bfloat16)(ids().to(GPU)).float()
            assert relative(halved, expected) < 8 * torch.finfo(torch.bfloat16).eps


def test_a_dense_model_on_the_gpu_is_converted_there() -> None:
    torch.manual_seed(0)
    dense = Language().to(GPU).eval()
    given = ids().to(GPU)
    with torch.no_grad():
        expected = dense(given)
        model = moeify.convert(dense, moeify.Recipe(experts=4, top_k=2), inputs=(given,), form="module").eval()
        assert {one.device.type for one in model.parameters()} == {"cuda"}
        assert relative(model(given), expected) < 1e-5


@pytest.mark.parametrize("amp", [False, True])
def test_moeify_train(tmp_path: Path, amp: bool) -> None:
    """The next token is three times this one and one: the loss of chance is 4.2."""
    torch.manual_seed(0)
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(Language().eval(), (ids(),), dynamic_shapes=sizes), tmp_path / "dense.pt2")
    recipe = moeify.Recipe(experts=4, top_k=2, router_losses=("switch", "z"))
    moeify.convert_file(tmp_path / "dense.pt2", tmp_path / "moe.pt2", recipe)
    chain = [torch.randint(VOCABULARY, (64, 1))]
    for _ in range(15):
        chain.append((3 * chain[-1] + 1) % VOCABULARY)
    data = {"ids": torch.cat(chain, 1)}
    report = moeify.train(tmp_path / "moe.pt2", data, tmp_path / "out.pt2", steps=150, lr=1e-2, amp=amp)
    assert report.device == "cuda"
    before, after = report.held_out
    assert before.loss is not None
    assert after.loss is not None
    assert before.loss > 3.5
    assert after.loss < 1.0
    assert relative(moeify.load(tmp_path / "out.pt2")(data["ids"][:4]), report.module(data["ids"][:4].to(GPU))) < 1e-4
