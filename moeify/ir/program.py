"""A Program: an fx graph over ATen and ``moe.*`` operators, its inputs, the blocks found in it, and what was done to
it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from moeify.ir.block import Block, NearMiss
from moeify.ir.profile import Profile
from moeify.ir.recipe import Recipe
from moeify.ir.weights import WeightRecipe


@dataclass(frozen=True)
class InputSpec:
    """One tensor input. ``shape`` holds an int for a fixed size and a name for a dynamic dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}={str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class HistoryEntry:
    """What one pass did: its pipeline text, the lines it logged, and the seconds it took."""

    text: str
    lines: tuple[str, ...]
    seconds: float


@dataclass
class Program:
    """The unit every pass and backend takes.

    ``graph_module`` is the unlifted form of a torch.export capture (``ExportedProgram.module(check_guards=False)``):
    parameters are get_attr nodes with the names of the user's state_dict. ``example`` are tensors for the
    placeholders in order. ``pending`` holds the recipes of parameters that are still on the meta device;
    ``materialise`` computes them.
    """

    graph_module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    example: tuple[torch.Tensor, ...]
    blocks: list[Block] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    selected: dict[str, bool] = field(default_factory=dict)  # Block.anchor -> is to be converted; see the select pass
    recipe: Recipe = field(default_factory=Recipe)
    pending: dict[str, WeightRecipe] = field(default_factory=dict)
    history: list[HistoryEntry] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)  # source file, digest, versions, capture mode and notes
    profile: Profile | None = None  # what the user's data say about the blocks, where they were run
    plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # see experts.planning
    fakes: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # see ir.emit

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def block(self, anchor: str) -> Block:
        return next(block for block in self.blocks if block.anchor == anchor)

    def converted(self) -> list[Block]:
        """The selected blocks in graph order."""
        return [block for block in self.blocks if self.selected.get(block.anchor)]

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter or buffer by its full name."""
        owner, _, leaf = name.rpartition(".")
        return getattr(self.graph_module.get_submodule(owner), leaf)

    def set_parameter(self, name: str, value: torch.Tensor, requires_grad: bool = True) -> None:
        """Add or replace a parameter; modules on the way to it are made when they are missing."""
        module: nn.Module = self.graph_module
        *owners, leaf = name.split(".")
        for part in owners:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if hasattr(module, leaf):
            delattr(module, leaf)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=requires_grad and value.is_floating_point()))

    def set_buffer(self, name: str, value: torch.Tensor) -> None:
        """Add or replace a buffer (saved with the state_dict, not trained)."""
        self.set_parameter(name, value, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        module = self.graph_module.get_submodule(owner)
        delattr(module, leaf)
        module.register_buffer(leaf, value)

    def add_recipe(self, recipe: WeightRecipe, requires_grad: bool = True) -> None:
        """A new parameter on the meta device whose value ``materialise`` will compute."""
        self.pending[recipe.name] = recipe
        self.set_parameter(recipe.name, torch.empty(recipe.shape, dtype=recipe.dtype, device="meta"), requires_grad)

    def materialise(self, done: Callable[[str], None] | None = None) -> None:
        """Compute every pending parameter, one at a time, in order; ``done`` hears of each.

        A dense parameter is dropped when the last recipe that reads it is done and the graph no longer reads it, so
        the peak is the dense and the new weights once.
        """
        readers = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        left: dict[str, int] = {}
        for recipe in self.pending.values():
            for name in {ref.parameter for ref in recipe.sources}:
                left[name] = left.get(name, 0) + 1
        for name, recipe in list(self.pending.items()):
            self.set_parameter(name, recipe.materialise(self.parameter), self.parameter(name).requires_grad)
            del self.pending[name]
            for source in {ref.parameter for ref in recipe.sources}:
                left[source] -= 1
                if not left[source] and source not in readers:
                    self.drop_parameter(source)
            if done is not None:
                done(name)

    def drop_parameter(self, name: str) -> None:
        owner, _, leaf = name.rpartition(".")
        delattr(self.graph_module.get_submodule(owner), leaf)

    def run(self, *args: torch.Tensor) -> Any:
        """Run in eager PyTorch, without gradients; pending parameters are computed first."""
        if self.pending:
            self.materialise()
        with torch.no_grad():
            return self.graph_module(*args)

    def clone(self) -> Program:
        """A Program with its own graph that shares this one's parameters."""
        twin = copy.copy(self)
        shared = [*self.graph_module.parameters(), *self.graph_module.buffers()]
        twin.graph_module = copy.deepcopy(self.graph_module, memo={id(t): t for t in shared})
        for name in ("blocks", "near_misses", "history"):
            setattr(twin, name, list(getattr(self, name)))
        for name in ("selected", "pending", "provenance", "plans"):
            setattr(twin, name, dict(getattr(self, name)))
        return twin


def flat(output: Any) -> list[torch.Tensor]:
    """The tensors of an output in pytree order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def example_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
