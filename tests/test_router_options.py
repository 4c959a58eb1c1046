"""What the routers of test_router_definitions say of themselves, and the options and recipes they refuse."""

from __future__ import annotations

import pytest

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.errors import BadOption, BadRecipe
from moeify.nn.routers import ROUTERS
from tests.test_routers import E, build


@pytest.mark.parametrize(
    ("text", "top_k", "sum_to_one", "one", "leaves_out"),
    [
        ("sigma", 2, False, False, True),
        ("sigma{init-std=0,scale=2}", 8, False, True, False),
        ("sigmoid-bias", 2, True, False, True),
        ("sigmoid-bias{scale=2}", 2, False, False, True),
        ("top-p", 8, True, False, True),
        ("top-p{weight=one}", 8, False, True, True),
        ("dynamic-k", 8, False, True, True),
        ("relu", 8, False, False, True),
        ("soft", 8, True, False, False),
        ("hierarchical", 2, True, False, True),
        ("hierarchical{renormalise=false}", 2, False, False, True),
        ("gshard", 2, False, False, True),
        ("gshard{capacity-factor=0}", 2, True, False, True),
        ("base", 1, False, False, True),
        ("sinkhorn", 1, False, False, True),
        ("expert-choice", 2, False, False, True),
        ("random{inference=average}", 2, True, False, False),
        ("rl", 1, True, True, True),
    ],
)
def test_what_the_compiler_is_told(text, top_k, sum_to_one, one, leaves_out):
    spec = ROUTERS.parse(text)
    assert (spec.gates_sum_to_one, spec.gates_are_one(top_k)) == (sum_to_one, one)
    assert spec.leaves_out(top_k, E) == leaves_out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top-p{p=0}", "top-p.p is 0.0: it must be above 0 and at most 1"),
        ("top-p{weight=two}", "top-p.weight is 'two'\n  hint: choose one of share, probability, one"),
        ("dynamic-k{tau=2}", "dynamic-k.tau is 2.0: it must be between 0 and 1"),
        (
            "dynamic-k{init=classify}",
            "dynamic-k.init is 'classify', which fits an order of experts and not their sizes\n  hint: use regress",
        ),
        ("cosine{width=0}", "cosine.width is 0: it must be at least 1"),
        ("cosine{tau=0.001}", "cosine.tau is 0.001: it must be finite and at least 0.01"),
        ("cosine{init-std=0}", "cosine.init-std is 0.0: it must be finite and above 0"),
        ("sinkhorn{iterations=0}", "sinkhorn.iterations is 0: it must be at least 1"),
        ("random{inference=none}", "random.inference is 'none'\n  hint: choose one of fixed, average"),
        (
            "sigmoid-bias{groups=2,top-groups=3}",
            (
                "sigmoid-bias.top-groups is 3 and there are 2 groups\n"
                "  hint: it must be at least 1 and at most their number"
            ),
        ),
    ],
)
def test_options_out_of_range(text, message):
    with pytest.raises(BadOption) as error:
        ROUTERS.parse(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "top_k", "repeat", "message"),
    [
        ("soft", 2, 1, "the soft router chooses all 8 experts per token, not 2\n  hint: --top-k 8"),
        ("gshard", 1, 1, "the gshard router chooses two experts per token, not 1\n  hint: --top-k 2"),
        ("base", 2, 1, "the base router chooses one expert per token, not 2\n  hint: --top-k 1"),
        ("sigmoid-bias{groups=3}", 2, 1, "8 experts do not stand in 3 equal groups"),
        ("sigmoid-bias{groups=4}", 3, 1, "1 groups have 2 experts, and a token is to choose 3"),
        ("sigmoid-bias{groups=4}", 2, 4, "groups of 2 experts cut copies of 4 shards"),
        (
            "hierarchical{top-groups=2}",
            3,
            1,
            (
                "2 groups of 4 experts cannot give 3 experts, as many from each\n"
                "  hint: --top-k must be a multiple of 2 and at most 8"
            ),
        ),
        ("hierarchical{top-groups=2}", 2, 2, "1 of the 4 experts of a group cut copies of 2 shards"),
        (
            "top-p",
            4,
            2,
            (
                "the top-p router may choose some shards of a granular copy without the others\n"
                "  hint: use softmax-topk, or another method"
            ),
        ),
    ],
)
def test_recipes_that_do_not_fit(text, top_k, repeat, message):
    with pytest.raises(BadRecipe) as error:
        build(text, top_k, repeat=repeat)
    assert str(error.value) == message
