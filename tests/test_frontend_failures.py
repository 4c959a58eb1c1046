"""What cannot be captured, and what is said of it."""

import pytest
import torch
from torch import nn

from moeify.errors import NotExportable
from moeify.frontend import capture
from tests.test_frontend_capture import Net


def branch(self, x):
    y = self.l(x)
    if y.sum() > 0:
        return y
    return -y


FAILURES = {
    "a branch on values": (
        branch,
        (
            "torch.export cannot capture Net: a Python decision (if, while, int(), list()) depends on the values "
            "of a tensor, and a graph cannot take it\n  at: {file}:{line}\n"
            "  hint: write it with torch.where, torch.clamp or masks, or take the branch out of forward"
        ),
    ),
    "numpy": (
        lambda s, x: s.l(x) + torch.from_numpy(x.numpy()),
        (
            "torch.export cannot capture Net: .numpy() is not supported for tensor subclasses.\n  at: {file}:{line}\n"
            "  hint: keep the computation in torch: forward turns a tensor into a numpy array"
        ),
    ),
    "a mistake": (
        lambda s, x: s.l(x).foo(),
        (
            "torch.export cannot capture Net: AttributeError: 'FakeTensor' object has no attribute 'foo'\n"
            "  at: {file}:{line}\n"
            "  hint: does the model run on these inputs? give others with --input"
        ),
    ),
    "random in eval": (
        lambda s, x: nn.functional.dropout(s.l(x), 0.5),
        (
            "Net gives two different outputs for the same input in eval mode\n"
            "  hint: make it deterministic in eval: dropout and noise must look at self.training"
        ),
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_captured(name, capsys):
    forward, message = FAILURES[name]
    line = forward.__code__.co_firstlineno + (2 if forward is branch else 0)
    torch.manual_seed(0)
    model = Net(forward)
    with pytest.raises(NotExportable) as error:
        capture(model, (torch.randn(2, 4),))
    assert str(error.value) == message.format(file=__file__, line=line)
    assert "forward" not in model.__dict__
    assert model.training
    assert capsys.readouterr() == ("", "")
