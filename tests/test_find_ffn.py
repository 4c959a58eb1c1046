"""find-ffn: the graph it leaves, the numbers and gradients, the blocks, the call sites, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.ir import metadata
from moeify.ir.program import Program, flat
from moeify.ir.where import module_path
from moeify.passes.find_ffn import FindFfn
from moeify.pipeline.base import Log
from moeify.pipeline.rules import ALWAYS
from tests.architectures import ARCHITECTURES, Architecture
from tests.architectures.blocks import D, H, Plain, Residual
from tests.architectures.kinds import floats

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and torch.export warn about themselves

FFN = torch.ops.moeify.ffn.default


def found(name: str) -> tuple[Program, list[str]]:
    """The program of an architecture after find-ffn, and what the pass logged."""
    program = ARCHITECTURES[name].program()
    log = Log()
    FindFfn().apply(program, log)
    return program, log.lines


def program_of(module: nn.Module, **inputs: Tensor) -> Program:
    program = Architecture("one", lambda: module, lambda: inputs).program()
    FindFfn().apply(program, Log())
    return program


def text(program: Program) -> str:
    """One line per node, without the modules."""
    return "\n".join(n.format_node() or "" for n in program.graph.nodes).replace("torch.ops.", "")


@pytest.mark.parametrize("name", ["gated", "fused, interleaved slices", "1x1 convolutions", "raw parameters, einsum"])
def test_the_graph(name: str, golden: Callable[[str, str], None]) -> None:
    program, _ = found(name)
    golden(f"find-ffn-{name.replace(', ', '-').replace(' ', '-')}", text(program))


@pytest.mark.parametrize(
    "name",
    [
        "gated, turned",
        "fused, chunk",
        "fused, interleaved slices",
        "fused, glu",
        "1x1 convolutions",
        "raw parameters, matmul",
        "convolutions of width 1 over tokens",
        "one block called three times",
        "PReLU (learnable)",
        "MLP-Mixer",
    ],
)
def test_outputs_and_gradients_stay(name: str) -> None:
    dense = ARCHITECTURES[name].program()
    rewritten, _ = found(name)
    results = []
    for program in (dense, rewritten):
        outputs = flat(program.graph_module(*program.example))
        sum(out.square().sum() for out in outputs).backward()
        grads = {n: p.grad for n, p in program.graph_module.named_parameters() if p.grad is not None}
        results.append((outputs, grads))
    (outputs, grads), (new_outputs, new_grads) = results
    assert grads.keys() == new_grads.keys()
    for a, b in zip(outputs, new_outputs):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    for key, grad in grads.items():
        # sums over tokens in another order: relative to the largest entry
        assert (grad - new_grads[key]).abs().max() <= 1e-5 * max(1.0, float(grad.abs().max())), key


def test_other_batch_and_sequence_sizes_run() -> None:
    for name in ("fused, unflatten and unbind", "rows merged to one axis", "convolutions of width 1 over tokens"):
        program, _ = found(name)
        x = torch.randn(5, 9, D)
        dense = ARCHITECTURES[name].program()
        torch.testing.assert_close(program.run(x), dense.run(x))


def test_call_sites_name_nodes_of_the_new_graph() -> None:
    for name in ("one block called three times", "1x1 convolutions", "PReLU (learnable)", "BERT"):
        program, _ = found(name)
        nodes = {node.name: node for node in program.graph.nodes}
        outputs = metadata.outputs(program.graph)
        for block in program.blocks:
            for call, site in enumerate(block.calls):
                assert site.input in nodes
                assert outputs[block.anchor, call] is nodes[site.output]
                assert all(n in nodes for n in site.nodes)
                if block.activation != "custom":
                    assert nodes[site.output].target is FFN
                    assert nodes[site.output].args[0] is nodes[site.input]


def test_new_nodes_carry_types_and_the_users_place() -> None:
    program, _ = found("GPT-2")
    for rule in ALWAYS:
        rule(program)
    ffns = [node for node in program.graph.nodes if node.target is FFN]
    assert [module_path(node) for node in ffns] == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    assert all(node.meta["stack_trace"] for node in ffns)


def test_owners_and_their_trailing_dropout() -> None:
    program, _ = found("in-place activation and dropouts")
    block = program.blocks[0]
    assert (block.owner, block.anchor) == ("blocks.0.body", "blocks.0.body")
    assert (block.hidden_dropout, block.output_dropout) == (0.2, 0.3)
    assert block.linears == ("blocks.0.body.0", "blocks.0.body.3")
    program, _ = found("BERT")
    block = program.blocks[0]
    assert (block.owner, block.anchor) == (None, "encoder.layer.0.intermediate.dense")
    assert block.linears == ("encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense")
    program, _ = found("Llama")
    assert program.blocks[0].owner == program.blocks[0].anchor == "model.layers.0.mlp"


def test_a_scale_inside_the_module_is_not_owned() -> None:
    program, _ = found("layer scale and norm after")
    assert [block.owner for block in program.blocks] == ["blocks.0.inner", "blocks.1.inner"]


def test_parameters_without_a_layer() -> None:
    program, _ = found("raw parameters, matmul")
    block = program.blocks[0]
    assert (block.anchor, block.linears) == ("blocks.0", ())
    assert block.up.steps == (("t",),)
    assert (block.d_model, block.d_ff, block.d_out) == (D, H, D)


@pytest.mark.parametrize(
    "name",
    [
        "PReLU (learnable)",
        "a norm over the hidden width",
        "fused, unknown activation",
        "fused, interleaved, unknown activation",
        "an activation without a name",
        "BitNet (norm over the hidden width)",
    ],
)
def test_a_custom_region_computes_the_hidden_value_of_rows(name: str) -> None:
    program, _ = found(name)
    nodes = {node.name: node for node in program.graph.nodes}
    for block in program.blocks:
        assert block.activation == "custom"
        assert block.region is not None
        seen: dict[str, Tensor] = {}
        _record(program, seen)
        site = block.calls[0]
        refs = {role: ref.read(program.parameter(ref.parameter)) for role, ref in block.weights.items()}
        x = seen[site.input].flatten(0, -2)
        inputs = [F.linear(x, refs[role], refs.get(f"{role}_bias")) for role in ("up", "gate") if role in refs]
        y = F.linear(block.region(*inputs), refs["down"], refs.get("down_bias"))
        torch.testing.assert_close(y.view(seen[site.output].shape), seen[site.output], rtol=2e-6, atol=2e-6)
        assert block.region_is_pointwise == ("norm" not in name)
        assert nodes[site.output].meta[metadata.KEY].role == "output"
        for key, parameter in block.region.named_parameters():
            assert program.parameter(key) is parameter


def _record(program: Program, seen: dict[str, Tensor]) -> None:
    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            result = super().run_node(node)
            if isinstance(result, Tensor):
                seen[node.name] = result
            return result

    Recorder(program.graph_module).run(*program.example)


def test_flagged_blocks_say_why() -> None:
    program, _ = found("tabular residual MLP")
    assert {b.reason for b in program.blocks} == {"one row per example: a router would send whole examples to experts"}
    program, _ = found("MLP-Mixer")
    assert [b.reason for b in program.blocks] == [
        "its features are positions (token mixing): a router would send channels to experts",
        None,
    ]


def test_the_log_names_blocks_and_near_misses() -> None:
    _, log = found("LSTM language model")
    assert log == ["(root): 8 -> 24 relu", "not a block: head: an output head: its result is the model's output"]


def test_dropout_before_the_activation_is_no_hidden_dropout() -> None:
    program = program_of(Residual(lambda: Plain(lambda u: F.gelu(F.dropout(u, 0.1, False)))), **floats(2, 6, D))
    assert {(b.activation, b.hidden_dropout) for b in program.blocks} == {("custom", 0.0)}


def test_sizes_read_inside_the_block_are_read_off_its_input() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            return x + self.down(h) * torch.ones(h.shape[0], h.shape[1], 1)

    program = program_of(Sized(), **floats(2, 6, D))
    assert len(program.blocks) == 1
    assert sum(str(n.target) == "aten.linear.default" for n in program.graph.nodes) == 0


class TwoTypes(nn.Module):
    """As T5 in half precision: the down layer stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H, dtype=torch.bfloat16), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x.bfloat16())).float())


def test_a_block_of_two_types_stays_as_it_is() -> None:
    program = program_of(nn.Sequential(TwoTypes(), Residual(lambda: Plain(F.gelu))), input=torch.randn(2, 6, D))
    assert [(miss.path, miss.reason) for miss in program.near_misses] == [
        ("0", "its weights are of more than one type, bfloat16 and float32")
    ]
    assert len(program.blocks) == sum(n.target == FFN for n in program.graph.nodes) == 2
    program.run(*program.example)


def test_the_text_is_its_name() -> None:
    assert str(FindFfn()) == "find-ffn"
