"""Pickles: torch.nn loads, everything else is refused by name, and nothing in a file is ever executed."""

import builtins
import collections
import os
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

from moeify.errors import UnreadableFile, UnsafePickle
from moeify.frontend import load


def save(thing, path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(thing, path, **options)
    return path


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class SneakyLinear(nn.Linear):
    """An nn.Module that calls a function when it is unpickled."""

    canary = ""

    def __reduce__(self):
        return os.system, (f"touch {type(self).canary}",)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    SneakyLinear.canary = str(path)
    yield path
    assert not path.exists(), "the file was executed"


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4)),
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, activation=nn.functional.gelu, batch_first=True),
            1,
            enable_nested_tensor=False,
        ),
        nn.TransformerEncoderLayer(8, 2, 16, activation=torch.relu, batch_first=True),
        nn.LSTM(4, 4, 2, dropout=0.1),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_module_of_torch_nn_loads(module, tmp_path):
    path = save(module.train(), tmp_path / "model.pt")
    loaded = load(path)
    assert loaded.kind == "pickle"
    assert str(loaded.module) == str(module)
    assert not loaded.module.training
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value)


def payloads(canary):
    touch = f"touch {canary}"
    return {
        "os.system": Runs(os.system, touch),
        "builtins.eval": Runs(builtins.eval, f"__import__('os').system('{touch}')"),
        "builtins.exec": Runs(builtins.exec, f"import os; os.system('{touch}')"),
        "module subclass": SneakyLinear(2, 2),
        "in a state_dict": collections.OrderedDict(weight=torch.zeros(2), bias=Runs(os.system, touch)),
        "in a module": nn.Sequential(SneakyLinear(2, 2)),
        "getattr": Runs(getattr, torch.Tensor, "__class__"),
    }


@pytest.mark.parametrize("name", payloads(""))
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_malicious_pickles_are_refused(name, new, canary, tmp_path):
    path = save(payloads(canary)[name], tmp_path / "evil.pt", _use_new_zipfile_serialization=new)
    with pytest.raises((UnsafePickle, UnreadableFile)) as error:
        load(path, factory="builtins:object")
    assert error.value.exit_code == 3
    if name in ("os.system", "builtins.eval") and new:
        thing = f"{os.system.__module__}.system" if name == "os.system" else name
        assert str(error.value) == (
            f"{path} holds {thing}, which is not a class of torch.nn; nothing was executed\n"
            f"  hint: if you trust that module: --allow {thing.rpartition('.')[0]}"
        )


def test_plain_pickles_are_refused(canary, tmp_path):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(Runs(os.system, f"touch {canary}")))
    with pytest.raises((UnsafePickle, UnreadableFile)):
        load(path)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A package of the user's own with a class, and os.system imported into it."""
    package = tmp_path / "site" / "owned"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text(
        "from os import system\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.l = nn.Linear(3, 3)\n"
        "    def forward(self, x):\n        return self.l(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield "owned.net"
    for name in ("owned.net", "owned"):
        sys.modules.pop(name, None)


def test_an_allowed_module_may_lie_in_the_current_folder(user_module, tmp_path, monkeypatch):
    import importlib

    path = save(importlib.import_module(user_module).Net(), tmp_path / "model.pt")
    for name in ("owned.net", "owned"):
        sys.modules.pop(name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path / "site"))])
    monkeypatch.chdir(tmp_path / "site")
    assert type(load(path, allow=["owned.net"]).module).__name__ == "Net"


def test_the_users_own_class_needs_allow(user_module, tmp_path):
    import importlib

    path = save(importlib.import_module(user_module).Net(), tmp_path / "model.pt")
    with pytest.raises(UnsafePickle) as error:
        load(path)
    assert str(error.value) == (
        f"{path} holds owned.net.Net, which is not a class of torch.nn; nothing was executed\n"
        "  hint: if you trust that module: --allow owned.net"
    )
    assert type(load(path, allow=["owned.net"]).module).__name__ == "Net"
    assert type(load(path, allow=["owned"]).module).__name__ == "Net"
    with pytest.raises(UnsafePickle):
        load(path, allow=["own"])


class NamedGlobal:
    """Pickles as a call of a global that the writer names freely."""

    def __init__(self, module, name, *args):
        self.module, self.name, self.args = module, name, args


def raw_pickle(path, module, name, argument):
    """A torch.save archive whose pickle calls ``module.name(argument)``."""
    import zipfile

    body = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + len(argument).to_bytes(4, "little")
    body += argument.encode() + b"\x85R."
    with zipfile.ZipFile(save({"a": torch.zeros(1)}, path)) as source:
        records = {n: source.read(n) for n in source.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for n, content in records.items():
            archive.writestr(n, body if n.endswith("/data.pkl") else content)
    return path


@pytest.mark.parametrize("name", ["system", "nn.functional.os.system"])
def test_what_an_allowed_module_only_imports_stays_refused(name, user_module, canary, tmp_path):
    path = raw_pickle(tmp_path / "evil.pt", user_module, name, f"touch {canary}")
    with pytest.raises((UnsafePickle, UnreadableFile)):
        load(path, allow=[user_module])
    path = raw_pickle(tmp_path / "evil.pt", os.system.__module__, "system", f"touch {canary}")
    with pytest.raises(UnsafePickle):
        load(path, allow=[user_module])


def test_graph_modules_are_never_allowed(canary, tmp_path):
    path = save(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), tmp_path / "graph.pt")
    with pytest.raises(UnsafePickle) as error:
        load(path, allow=["torch", "torch.fx", "torch.fx.graph_module"])
    assert str(error.value) == (
        f"{path} holds torch.fx._symbolic_trace.Tracer, which runs source text from the file; "
        "nothing was executed\n"
        "  hint: save the model with torch.export.save, or its state_dict and use --factory"
    )


def test_an_old_module_pickle_says_what_to_do(tmp_path):
    path = save(nn.Linear(2, 2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnreadableFile) as error:
        load(path)
    assert str(error.value) == (
        f"{path} holds a whole module in the format of torch 1.5 and older, which cannot be read safely\n"
        "  hint: load it where it comes from and save it again with torch.save, or save its state_dict"
    )


def test_a_pickle_that_is_no_model(tmp_path):
    path = save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UnreadableFile) as error:
        load(path)
    assert str(error.value) == (
        f"{path} holds a list, neither a module nor a state_dict\n"
        "  hint: save model.state_dict() or the model itself with torch.save"
    )
