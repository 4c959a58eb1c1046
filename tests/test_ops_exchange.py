"""The operators of an exchange: numbers against loops, opcheck, both paths, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import moeify.ir.ops  # noqa: F401  (defines torch.ops.moeify)
from moeify.distributed.threads import run_ranks
from moeify.errors import GroupMismatch, UnboundRole
from moeify.ir import ops_groups, roles

moe = torch.ops.moeify
D = 4
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


class Mirror:
    """A group of one rank."""

    rank, size = 0, 1

    def all_to_all(self, x, out_splits, in_splits, where):
        return x.clone()

    def all_reduce(self, x, where):
        return x


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COUNTS = torch.tensor([[2, 0, 3], [1, 4, 0]])


def cases(count: int) -> dict[str, tuple]:
    whole = torch.tensor([count])
    per_expert = torch.tensor([count // 2, 0, count - count // 2])
    return {
        "all_to_all_rows": (rows(count).requires_grad_(), whole, whole, count, "ep", 1, "layers.0"),
        "all_to_all_even": (rows(3).unsqueeze(0).requires_grad_(), "ep", 1, "layers.0"),
        "transpose_groups": (
            rows(count).requires_grad_(),
            torch.stack([per_expert // 2, per_expert - per_expert // 2]),
        ),
        "local_counts": (COUNTS, torch.zeros(2, 3, 3, requires_grad=True)),
        "pad_groups": (rows(count).requires_grad_(), per_expert, 3),
        "unpad_groups": (torch.stack([rows(3, i) for i in range(3)]).requires_grad_(), per_expert, count),
    }


@pytest.mark.parametrize("name", sorted(cases(2)))
@pytest.mark.parametrize("count", [10, 0])
def test_opcheck(name: str, count: int) -> None:
    with roles.only_here({"ep": Mirror()}):
        torch.library.opcheck(getattr(moe, name).default, cases(count)[name], test_utils=ALL)


def test_transpose_groups() -> None:
    x = rows(10)
    want = x[[0, 1, 5, 6, 7, 8, 9, 2, 3, 4]]
    assert torch.equal(moe.transpose_groups(x, COUNTS), want)
    assert torch.equal(ops_groups.transpose_by_index(x, COUNTS), want)
    assert torch.equal(moe.transpose_groups(want, COUNTS.t()), x)


@pytest.mark.parametrize("size", [0, 1, 3, 9])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0], [7, 0, 0]])
def test_both_paths_of_padding(counts: list[int], size: int) -> None:
    counts_E = torch.tensor(counts)
    x = rows(sum(counts))
    padded = moe.pad_groups(x, counts_E, size)
    start = 0
    for e, count in enumerate(counts):
        kept = min(count, size)
        assert torch.equal(padded[e, :kept], x[start : start + kept])
        assert not padded[e, kept:].any()
        start += count
    assert torch.equal(ops_groups.pad_by_index(x, counts_E, size), padded)
    back = moe.unpad_groups(padded, counts_E, sum(counts))
    assert torch.equal(ops_groups.unpad_by_index(padded, counts_E, sum(counts)), back)
    if size >= max(counts):
        assert torch.equal(back, x)


@pytest.mark.parametrize("name", ["transpose_groups", "pad_groups", "unpad_groups"])
def test_gradients(name: str) -> None:
    """A permutation's or a padding's transpose: <f(x), g> = <x, f'(g)>."""
    x, *rest = cases(10)[name]
    y = getattr(moe, name)(x, *rest)
    grad = torch.randn_like(y)
    (back,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close((y * grad).sum(), (x * back).sum())


def test_counts_of_a_rank_with_fewer_experts() -> None:
    assert moe.local_counts(COUNTS, torch.zeros(2, 1, 1)).tolist() == [3, 4]
    assert moe.local_counts(COUNTS, torch.zeros(0, 1, 1)).tolist() == []


def test_rows_go_to_their_ranks_and_gradients_back() -> None:
    sent = torch.tensor([[1, 2, 0], [0, 1, 3], [2, 0, 0]])  # [from, to]

    def work(groups):
        me = groups.rank
        x = (torch.arange(float(sent[me].sum())) + 10 * me).unsqueeze(1).requires_grad_()
        y = moe.all_to_all_rows(x, sent[:, me], sent[me], int(sent[:, me].sum()), "ep", 3, "layers.0")
        (y * (me + 1)).sum().backward()
        return y.detach().view(-1).tolist(), x.grad.view(-1).tolist()

    values, gradients = zip(*run_ranks(work, 3))
    assert values == ([0.0, 20.0, 21.0], [1.0, 2.0, 10.0], [11.0, 12.0, 13.0])
    assert gradients == ([1.0, 2.0, 2.0], [2.0, 3.0, 3.0, 3.0], [1.0, 1.0])


def test_refusals() -> None:
    def text(kind: type[Exception], call) -> str:
        with pytest.raises(kind) as caught:
            call()
        return str(caught.value)

    x, two = rows(3), torch.tensor([1, 2])
    assert text(UnboundRole, lambda: moe.all_to_all_even(x[:2], "ep", 2, "layers.0")).startswith(
        "the graph exchanges rows with the group 'ep', which is bound to nothing in this process\n  at: layers.0"
    )
    with roles.only_here({"ep": Mirror()}):
        assert text(GroupMismatch, lambda: moe.all_to_all_rows(x, two, two, 3, "ep", 2, "layers.0")) == (
            "this graph was made for an 'ep' group of 2 ranks, but the bound group has 1\n"
            "  at: layers.0\n"
            "  hint: start 2 ranks, or shard the program again with shard-experts{ranks=1}"
        )
    assert text(ValueError, lambda: moe.all_to_all_rows(x, two, two - 1, 3, "ep", 2, "layers.0")) == (
        "moeify::all_to_all_rows: in_splits are 2 numbers that add up to 1, expected 2 for 3 rows"
    )
    assert text(ValueError, lambda: moe.all_to_all_even(x, "ep", 2, "layers.0")) == (
        "moeify::all_to_all_even: x has shape [3, 4], expected [2, ...]"
    )
    assert text(ValueError, lambda: moe.transpose_groups(x, COUNTS)) == (
        "moeify::transpose_groups: counts add up to 10 and there are 3 rows"
    )
    assert text(ValueError, lambda: moe.local_counts(COUNTS, torch.zeros(4, 1, 1))) == (
        "moeify::local_counts: counts have shape [2, 3] and the weight holds 4 experts"
    )


def test_a_role_means_one_group_in_a_process() -> None:
    roles.bind("ep", Mirror())
    try:
        with pytest.raises(GroupMismatch) as caught:
            roles.bind("ep", Mirror())
        assert str(caught.value) == (
            "the role 'ep' is bound to another group in this process already\n"
            "  hint: bind all programs to one mesh, or call moeify.distributed.unbind() between them"
        )
    finally:
        roles.unbind()
