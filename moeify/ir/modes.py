"""Train and eval mode of a captured graph: the flags that torch.export froze, flipped in place.

A capture in eval mode keeps ``aten.dropout(x, p, False)`` and its kin as nodes, so training is a matter of flags. What
Python code does in training only (drop path, layer drop) was never captured and does not come back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from moeify.ir import devices

# Operator (without overload) -> name of its training flag. moeify's own are named, as their library may not be loaded.
FLAGS: dict[str, str] = {
    "aten::dropout": "train",
    "aten::dropout_": "train",
    "aten::feature_dropout": "train",
    "aten::feature_dropout_": "train",
    "aten::alpha_dropout": "train",
    "aten::alpha_dropout_": "train",
    "aten::feature_alpha_dropout": "train",
    "aten::feature_alpha_dropout_": "train",
    "aten::native_dropout": "train",
    "aten::rrelu": "training",
    "aten::rrelu_": "training",
    "aten::batch_norm": "training",
    "aten::_batch_norm_impl_index": "training",
    "aten::native_batch_norm": "training",
    "aten::instance_norm": "use_input_stats",
    "aten::lstm": "train",
    "aten::gru": "train",
    "aten::rnn_tanh": "train",
    "aten::rnn_relu": "train",
    "moeify::ffn": "train",
    "moeify::jitter_like": "train",
    "moeify::normal_like": "train",
    "moeify::gumbel_like": "train",
    "moeify::uniform_like": "train",
    "moeify::balanced_assignment": "train",
    "moeify::sinkhorn": "train",
}
SDPA = "aten::scaled_dot_product_attention"
_RECURRENT = ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu")
# These follow their running statistics; without any they use the batch in both modes and are left alone.
_NEED_RUNNING_STATS = (
    "aten::batch_norm",
    "aten::_batch_norm_impl_index",
    "aten::native_batch_norm",
    "aten::instance_norm",
)


def set_training(graph_module: fx.GraphModule, training: bool, attention_dropout: Sequence[float] = ()) -> None:
    """Flip the training flag of every operator that has one, then recompile.

    ``attention_dropout`` holds ``dropout_p`` of the scaled_dot_product_attention nodes in graph order, as
    ``Program.provenance["attention_dropout"]`` does; it is used in training and is 0 in eval. Without it
    attention has no dropout.
    """
    attention = [node for node in graph_module.graph.nodes if _name(node) == SDPA]
    if attention_dropout and len(attention_dropout) != len(attention):
        raise ValueError(f"{len(attention_dropout)} attention dropouts for {len(attention)} attention nodes")
    probabilities = list(attention_dropout) or [0.0] * len(attention)
    for node, probability in zip(attention, probabilities):
        _set(node, "dropout_p", probability if training else 0.0)
    for node in graph_module.graph.nodes:
        flag = FLAGS.get(_name(node))
        if flag is not None and not _has_no_running_stats(node):
            _set(node, flag, training)
    graph_module.recompile()


def drop_dropout(graph_module: fx.GraphModule) -> None:
    """Set the probability of every dropout to 0, for good, that of recurrent layers too. Attention's is given to
    ``set_training`` each time.
    """
    for node in graph_module.graph.nodes:
        name = _name(node)
        if name in FLAGS and ("dropout" in name or name in _RECURRENT):
            _set(node, "dropout" if name in _RECURRENT else "p", 0.0)
    graph_module.recompile()


def is_training(graph_module: fx.GraphModule) -> bool:
    """Whether some operator's training flag is on."""
    return any(
        (flag := FLAGS.get(_name(node))) is not None and not _has_no_running_stats(node) and _get(node, flag) is True
        for node in graph_module.graph.nodes
    )


def attention_probabilities(graph_module: fx.GraphModule) -> list[float]:
    """``dropout_p`` of the scaled_dot_product_attention nodes as they stand, in graph order."""
    return [float(_get(node, "dropout_p") or 0.0) for node in graph_module.graph.nodes if _name(node) == SDPA]


class TrainableGraph(fx.GraphModule):
    """A captured graph with a train() and eval() that work; parameter names are the user's. Starts in eval
    mode.

    ``attention_dropout`` is what set_training takes. Parameters, buffers and graph are shared with ``root``,
    which must not be used afterwards. Moved to another device, it makes what the graph itself makes there too.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        class_name: str = "",
        *,
        attention_dropout: Sequence[float] = (),
    ) -> None:
        super().__init__(root, graph, class_name or type(self).__name__)
        self._keep_unread(root)
        self.attention_dropout = tuple(attention_dropout)
        self.train(False)

    def _keep_unread(self, root: nn.Module) -> None:
        """fx takes over what the graph reads; a router may have parameters that only a loss reads."""
        mine = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        for name, parameter in root.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            if name not in mine and ".router." in name and parameter.device.type != "meta":
                self.get_submodule(owner).register_parameter(leaf, parameter)

    def _apply(self, fn: Any, recurse: bool = True) -> TrainableGraph:
        super()._apply(fn, recurse)
        devices.follow(self)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableGraph:
        """fx copies what the graph reads; hooks, what was set on the module and parameters that only a loss reads are
        its user's, as with any module."""
        made = cast(TrainableGraph, super().__deepcopy__(memo))
        whole = nn.Module()
        whole.__dict__ = copy.deepcopy(self.__dict__, memo)  # no second copy: fx has left this one in the memo
        made._keep_unread(whole)
        for name, value in vars(whole).items():
            if name not in vars(made) or name.startswith(("_forward", "_backward")):
                made.__dict__[name] = value
        return made.train(self.training)

    def train(self, mode: bool = True) -> TrainableGraph:
        """Flip the flags of the graph; see set_training."""
        for module in self.modules():
            module.training = mode
        set_training(self, mode, self.attention_dropout)
        return self

    def eval(self) -> TrainableGraph:
        return self.train(False)

    def drop_dropout(self) -> None:
        """Without dropout in training, from now on."""
        drop_dropout(self)
        self.attention_dropout = ()


def _name(node: fx.Node) -> str:
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def _has_no_running_stats(node: fx.Node) -> bool:
    return _name(node) in _NEED_RUNNING_STATS and _get(node, "running_mean") is None


def _position(node: fx.Node, argument: str) -> int:
    assert isinstance(node.target, torch._ops.OpOverload)
    return next(i for i, a in enumerate(node.target._schema.arguments) if a.name == argument)


def _get(node: fx.Node, argument: str) -> Any:
    if argument in node.kwargs:
        return node.kwargs[argument]
    position = _position(node, argument)
    return node.args[position] if position < len(node.args) else None


def _set(node: fx.Node, argument: str, value: Any) -> None:
    position = _position(node, argument)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(argument, value)
