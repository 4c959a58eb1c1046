"""Routers whose experts take so many tokens and no more, compiled by TVM: which tokens are left out is decided by ranks
among all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moeify
from moeify.backends.tvm import load
from moeify.backends.tvm.backend import Tvm
from moeify.ir.recipe import Recipe
from tests.test_tvm_export import encoder


@pytest.mark.parametrize(("router", "top_k"), [("switch", 1), ("gshard", 2)])
def test_the_same_tokens_are_left_out(router: str, top_k: int, tmp_path: Path) -> None:
    torch.save(encoder(), tmp_path / "dense.pt")
    ids = torch.randint(40, (3, 11), generator=torch.Generator().manual_seed(0))
    results = {}
    for factor in (0.0, 0.5):
        spec = f"{router}{{capacity_factor={factor},init_std=1}}"
        recipe = Recipe(experts=4, top_k=top_k, router=spec, method="drop")
        moeify.convert_file(tmp_path / "dense.pt", tmp_path / f"{factor}.pt2", recipe)
        with torch.no_grad():
            results[factor] = moeify.load(tmp_path / f"{factor}.pt2")(ids)
    assert not torch.allclose(results[0.0], results[0.5], rtol=1e-2, atol=1e-2), "no token was left out"
    moeify.export_file(tmp_path / "0.5.pt2", tmp_path / "out", Tvm())
    torch.testing.assert_close(load(tmp_path / "out").run([ids])[0], results[0.5], rtol=1e-4, atol=1e-5)
