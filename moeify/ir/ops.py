"""The dialect ``moe.*``: the operators ``torch.ops.moeify.*``. Importing this file defines them; a ``.pt2`` that holds
one of them needs it imported first.

Letters: T tokens, D model width, F hidden width, E experts, K chosen per token, R = T * K rows (token copies), I and O
the inner and outer width of one grouped linear. Gated means ``h = act(gate) * up``.

| operator | meaning | gradients |
|---|---|---|
| ``ffn`` | one dense FFN over ``[..., D]`` | plain ATen inside |
| ``permute`` | token copies sorted by expert (stable), counts, and ``order[r] = t * K + k`` of sorted row r | x |
| ``unpermute`` | weighted sum of the copies back to tokens | rows, weights |
| ``grouped_linear`` | each expert's rows times its own matrix | rows, weight, bias |
| ``grouped_outer``, ``grouped_sum`` | the weight and bias gradients of ``grouped_linear`` | none |
| ``experts`` | the experts' FFN over sorted rows | rows, all weights |
| ``dispatch_ffn`` | permute + experts + unpermute in one | x, weights, all expert weights |
| ``transpose_groups`` | rows sorted by (a, b) into rows sorted by (b, a) | rows |
| ``pad_groups``, ``unpad_groups`` | each expert's rows in a buffer of one size, and back | rows |
| ``local_counts`` | the rows that all ranks sent to each of this rank's experts | none |
| ``all_to_all_rows``, ``all_to_all_even`` | rows that change ranks, see ``ops_exchange`` | x |
| ``jitter_like`` | router noise in training; ones otherwise | none |
| ``normal_like``, ``gumbel_like``, ``uniform_like`` | router noise in training; zeros otherwise | none |
| ``balanced_assignment`` | a balanced choice among scores in training; the highest otherwise | none |
| ``sinkhorn`` | a balanced plan of scores in training; the scores otherwise | none |

The experts that ``permute`` and ``dispatch_ffn`` read are numbers from 0 to E. The number E is no expert: such a slot
is sorted last, is in no count and costs no product; its row is zero, and so is what it adds to its token. Routers that
give a token fewer than K experts put it there (see ``no_expert``).

On the CPU an operator runs one GEMM per expert that has rows. On CUDA it runs ``torch.nn.functional.grouped_mm`` where
dtype and device allow (see ``kernels_grouped``) and the same loop elsewhere; neither has been run on a GPU. Each
operator checks its arguments in eager mode only: ValueError for shapes and dtypes, IndexError for experts out of
range, UnknownName for activations. Backward formulas are written out, in ATen and these operators, so that AOT
autograd traces through them; double backward is not supported.
"""

from __future__ import annotations

from moeify.ir import ops_autocast, ops_balance, ops_exchange, ops_experts, ops_ffn, ops_groups, ops_permute, ops_random
from moeify.ir.ops_library import NAMES

__all__ = [
    "NAMES",
    "ops_autocast",
    "ops_balance",
    "ops_exchange",
    "ops_experts",
    "ops_ffn",
    "ops_groups",
    "ops_permute",
    "ops_random",
]
