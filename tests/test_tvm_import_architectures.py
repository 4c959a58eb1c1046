"""Architectures, converted, in TVM: other sizes than the example's, against the Program. All of them:
``python -m tests.tvm_architectures``.
"""

from __future__ import annotations

import pytest

from moeify.backends.tvm.cpu import reference
from tests.architectures import ARCHITECTURES
from tests.tvm_architectures import compiled, error, grown, program_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and torch.export warn about themselves

CLOSE = 5e-6  # two layers of float32 in another order, and the runtime's own tanh and erf
NAMES = [
    "Llama",  # rotary embedding, a mask of positions
    "LSTM language model",
    "BitNet (norm over the hidden width)",  # an activation without a name
]


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_program(name):
    made = program_of(ARCHITECTURES[name])
    run = compiled(made, reference.TABLE, plain=True)
    for inputs in (made.example, grown(made)):
        assert error(made, run, inputs) < CLOSE
