"""An activation without a name as a module over rows, reading the model's own parameters."""

from __future__ import annotations

import torch
from torch import fx, nn

from moeify.errors import Refused
from moeify.ir.modes import set_training


class Region(nn.Module):
    """Called with (u_RF) or (u_RF, g_RF), gives h_RF.

    The parameters it reads stay where the model has them, under their own names, and are shared by all experts;
    tensors that the model does not have (constants of the capture) become buffers that state_dict leaves out.
    """

    def __init__(self, region: fx.GraphModule) -> None:
        super().__init__()
        self.body, self.names = _lift(region)
        self.constants = {name: tensor_at(region, name).detach().clone() for name in self.names}
        # Pairs inside a list: nn.Module registers neither, so the parameters get no second name.
        self.reads: list[tuple[nn.Module, str]] = []
        self.train(False)

    def bind(self, model: nn.Module) -> None:
        """Find the tensors in the model that this module has become a part of."""
        constants, self.constants = self.constants, {}
        for number, name in enumerate(self.names):
            if has_tensor(model, name):
                path, _, leaf = name.rpartition(".")
                self.reads.append((model.get_submodule(path), leaf))
            else:
                self.register_buffer(f"constant_{number}", constants[name], persistent=False)
                self.reads.append((self, f"constant_{number}"))

    def forward(self, *rows: torch.Tensor) -> torch.Tensor:
        return self.body(*rows, *[getattr(module, leaf) for module, leaf in self.reads])

    def train(self, mode: bool = True) -> Region:
        """Flip the dropout of the captured graph as well."""
        if mode != self.body.training:
            set_training(self.body, mode)
        super().train(mode)
        return self


def reads(region: fx.GraphModule) -> list[str]:
    """The names of the tensors it reads."""
    return sorted({str(node.target) for node in region.graph.find_nodes(op="get_attr")})


def keep(old: nn.Module, new: nn.Module, names: list[str], where: str) -> None:
    """Register tensors of ``old`` on ``new`` under the same relative names: a replaced module takes its parameters
    with it.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = new
        for part in filter(None, path.split(".")):
            if part not in owner._modules:
                _check_free(owner, part, where)
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None
            owner = child
        source = old.get_submodule(path)
        _check_free(owner, leaf, where)
        if leaf in source._parameters:
            owner.register_parameter(leaf, source._parameters[leaf])
        else:
            owner.register_buffer(leaf, source._buffers[leaf], leaf not in source._non_persistent_buffers_set)


def has_tensor(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    return leaf in owner._parameters or leaf in owner._buffers


def tensor_at(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter, buffer or plain tensor attribute by its full name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _check_free(owner: nn.Module, name: str, where: str) -> None:
    if hasattr(owner, name):
        raise Refused(
            f"the activation's {name!r} has the name of a part of the new layer",
            where=where,
            hint="use the graph form: moeify.convert(model, form='graph')",
        )


def _lift(region: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """The graph with its tensors as further arguments, and their names in order."""
    graph = fx.Graph()
    names = reads(region)
    made: dict[fx.Node, fx.Node] = {}
    for node in region.graph.find_nodes(op="placeholder"):
        made[node] = graph.placeholder(node.name)
    lifted = {name: graph.placeholder(f"read_{number}") for number, name in enumerate(names)}
    for node in region.graph.nodes:
        if node.op == "get_attr":
            made[node] = lifted[str(node.target)]
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], made.__getitem__))
        elif node.op != "placeholder":
            made[node] = graph.node_copy(node, made.__getitem__)
    body = fx.GraphModule(nn.Module(), graph)
    body.training = True  # Region.train(False) comes next and looks at it
    return body, names
