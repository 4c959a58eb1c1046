"""Fitting the split blocks of a rewritten program to the dense ones, in order, on the user's data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import Refused
from moeify.experts import METHODS
from moeify.experts.base import ExpertPlan
from moeify.experts.planning import plan_block
from moeify.fitting.figures import ROWS, Fitted, gates, rms_error, routing_of
from moeify.fitting.lockstep import Lockstep
from moeify.fitting.mixture import Mixture
from moeify.fitting.padding import mask_of_rows, masks_of
from moeify.fitting.repair import repair, unknowns
from moeify.fitting.routers import fit_router
from moeify.ir.block import Block
from moeify.ir.metadata import tag
from moeify.ir.program import Program
from moeify.ir.weights import generator_for
from moeify.nn.routers import ROUTERS
from moeify.nn.routers.topk_scores import TopKRouter
from moeify.verify.measure import in_float32

_STARTS = (torch.ops.moeify.dispatch_ffn.default, torch.ops.moeify.permute.default)
_HELD_OUT = 10  # one row of so many is measured on and not fitted to


def check(program: Program) -> None:
    """Before any work. Raises Refused where the recipe asks for a fit that cannot be made."""
    for block in program.converted():
        recipe = program.recipe.for_block(block.path)
        spec = ROUTERS.parse(recipe.router)
        if not METHODS.parse(recipe.method).splits:
            if spec.fit:
                raise Refused(
                    f"{spec} fits scores to parts of the block, and the experts of {recipe.method} are whole",
                    where=block.path,
                )
        elif _has_data(program):
            if spec.needs_token_ids:
                raise Refused(
                    f"what the {spec.name} router chooses by token ids cannot be fitted to",
                    where=block.path,
                    hint="use --router topk, or a method that needs no data and no --data",
                )
        elif spec.fit:
            raise Refused(
                f"{spec} is fitted on data, and there are none",
                where=block.path,
                hint="give data of the model's task with --data",
            )


def to_be_fitted(program: Program) -> list[Block]:
    """Blocks that are split, of which a token leaves experts out, where there are data to fit them to."""
    return [block for block in program.converted() if _has_data(program) and _leaves_out(program, block)]


def fit(program: Program, done: Callable[[], None] | None = None) -> dict[str, Fitted]:
    """Fit routers and down projections of the blocks ``to_be_fitted``, in place and in graph order; figures by anchor.

    ``program`` is rewritten, its weights computed. A block is fitted on the inputs that the converted blocks before it
    give, with all batches of the profile run side by side; a block that is called more than once on those of its first
    call, and on what its later calls would get were it still dense. The last tenth of each call's rows is measured on
    and not fitted to; rows of padding are left out. ``done`` hears of each block.

    Repaired weights are kept where they lower the error on those rows. Memory beside the program: see ``Lockstep``;
    the rows of one block's inputs, 4 D bytes a token and call; and 8 F (F + D) bytes twice for a repair.

    Raises Refused for values that are NaN.
    """
    sites = {block.anchor: block for block in to_be_fitted(program)}
    if not sites:
        return {}
    assert program.profile is not None
    plans = {anchor: plan_block(program, block) for anchor, block in sites.items()}
    figures: dict[str, Fitted] = {}
    with torch.no_grad(), in_float32(program) as module:
        calls = _inputs(module.graph, sites)
        masks = masks_of(module.graph, program.inputs)
        batches = program.profile.batches
        lockstep = Lockstep(module, batches, {anchor: plan.num_experts for anchor, plan in plans.items()})
        for anchor, nodes in calls.items():  # in graph order
            first = lockstep.run_to(nodes[0])
            later = lockstep.look_ahead(nodes[1:], sites.keys() - figures.keys())
            rows = []
            for node, values in zip(nodes, [first, *later]):
                mask = mask_of_rows(module.graph, masks, node)
                taken = [x if mask is None else x[batch[mask].flatten() != 0] for x, batch in zip(values, batches)]
                rows.append(torch.cat(taken).float())
            figures[anchor] = _Fit(program, module, sites[anchor], plans[anchor]).run(rows)
            if done is not None:
                done()
    return figures


@dataclass
class _Fit:
    """The fit of one block. ``module`` holds the weights it computes with, ``program`` those that are stored."""

    program: Program
    module: fx.GraphModule
    block: Block
    plan: ExpertPlan

    def run(self, calls: list[Tensor]) -> Fitted:
        """``calls`` are the rows of each call's input [N, D]."""
        cuts = [len(x) - math.ceil(len(x) / _HELD_OUT) for x in calls]
        fit_ND = torch.cat([x[:cut] for x, cut in zip(calls, cuts)])
        held_ND = torch.cat([x[cut:] for x, cut in zip(calls, cuts)])
        if not len(fit_ND):
            raise Refused("there are too few rows in the data to fit to", where=self.block.path)
        recipe = self.program.recipe.for_block(self.block.path)
        dense = Mixture.of(self.block, self.plan, self._read)
        spec = ROUTERS.parse(recipe.router).for_block(self.block)
        router = spec.build(self.block.d_model, self.plan.num_experts, recipe.top_k, dtype=torch.float32)
        router.load_state_dict({name: self._read(f"{self._prefix}{name}").float() for name in router.state_dict()})
        router.to(fit_ND.device).eval()
        how = spec.fit_with_data
        if how is not None:
            assert isinstance(router, TopKRouter)
            sizes = torch.cat([dense.sizes(dense.hidden(x)) for x in fit_ND.split(ROWS)])
            generator = generator_for(self.program.recipe.seed, f"{self._prefix}fit")
            fit_router(router, how, fit_ND, sizes, generator)
            for name, value in router.named_parameters():
                self._write(f"{self._prefix}{name}", value)

        def whole(h_NF: Tensor) -> Tensor:
            return dense.output(h_NF, h_NF.new_ones(len(h_NF), dense.experts))

        error, repaired, kept = rms_error(dense, router, held_ND, whole), None, False
        if not math.isfinite(error):
            raise Refused("the block's values are NaN or infinite on the data", where=self.block.path)
        if recipe.repair:
            rows = ((dense.hidden(x), gates(router, x, dense.experts)) for x in fit_ND.split(ROWS))
            mixture = repair(dense, rows, whole)
            repaired = rms_error(mixture, router, held_ND, whole)
            kept = repaired < error
            if kept:
                self._store(mixture)
        routing = routing_of(dense, router, held_ND)
        return Fitted(len(fit_ND), len(held_ND), error, repaired, kept, unknowns(dense), routing)

    @property
    def _prefix(self) -> str:
        return f"{self.block.anchor}.router."

    def _store(self, mixture: Mixture) -> None:
        plan, routed = self.plan, self.plan.num_experts * self.plan.d_expert
        down_EDW = mixture.down_DF[:, :routed].unflatten(1, (plan.num_experts, plan.d_expert)).transpose(0, 1)
        self._write(plan.weights["down"].name, down_EDW)
        if plan.shared:
            self._write(plan.shared["down"].name, mixture.down_DF[:, routed:])
        if mixture.down_bias_ED is not None:
            self._write(plan.weights["down_bias"].name, mixture.down_bias_ED)
        if mixture.output_bias_D is not None:
            assert plan.output_bias is not None
            self._write(plan.output_bias.name, mixture.output_bias_D)

    def _read(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.module.get_submodule(owner), leaf).detach()

    def _write(self, name: str, value: Tensor) -> None:
        stored = self.program.parameter(name)
        stored.data.copy_(value)
        self._read(name).copy_(stored.data)  # what comes later is fitted to the rounded weights


def _has_data(program: Program) -> bool:
    return program.profile is not None and bool(program.profile.batches)


def _leaves_out(program: Program, block: Block) -> bool:
    recipe = program.recipe.for_block(block.path)
    leaves_out = ROUTERS.parse(recipe.router).leaves_out(recipe.top_k, recipe.experts)
    return METHODS.parse(recipe.method).splits and leaves_out


def _inputs(graph: fx.Graph, anchors: dict[str, Block]) -> dict[str, list[fx.Node]]:
    """The rows [T, D] that each call of each block reads, all in graph order."""
    place = {node: position for position, node in enumerate(graph.nodes)}
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        mark = tag(node)
        if mark is not None and mark.block in anchors and node.target in _STARTS:
            found.setdefault(mark.block, []).append(node.args[0])
    # Two blocks that read the same tensor: the one whose input is there first is fitted first.
    return dict(sorted(found.items(), key=lambda item: place[item[1][0]]))
