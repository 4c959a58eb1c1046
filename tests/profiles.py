"""Profiles for the small Programs of ``tests.programs``, computed here in the plainest way."""

from __future__ import annotations

import torch

from moeify.ir.block import Block
from moeify.ir.hidden import hidden
from moeify.ir.profile import BlockProfile, Profile
from moeify.ir.program import Program

TOP = 5


def profiled(program: Program, *, rows: int = 64, top: int = TOP, gradients: bool = True) -> Program:
    """The program, with statistics of its blocks on random rows."""
    blocks = {block.anchor: statistics(block, program.parameter, rows, top, gradients) for block in program.converted()}
    program.profile = Profile(blocks, [program.example], top, {"source": "random rows"})
    return program


def statistics(block: Block, read, rows: int = 64, top: int = TOP, gradients: bool = True) -> BlockProfile:
    inputs_ND = torch.randn(rows, block.d_model, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        h_NF = hidden(block, read, inputs_ND)
    size_NF = h_NF.abs()
    fires_NF = torch.zeros_like(h_NF).scatter_(1, size_NF.topk(top, 1).indices, 1)
    importance_F = torch.rand(block.d_ff, generator=torch.Generator().manual_seed(8)) if gradients else None
    return BlockProfile(
        tokens=rows,
        mean_F=h_NF.mean(0),
        mean_abs_F=size_NF.mean(0),
        mean_square_F=h_NF.square().mean(0),
        active_F=(h_NF != 0).float().mean(0),
        firing_F=fires_NF.mean(0),
        importance_F=importance_F,
        inputs_ND=inputs_ND,
    )
