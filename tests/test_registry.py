from __future__ import annotations

import pytest

from moeify.errors import BadOption, UnknownName
from moeify.experts import METHODS
from moeify.nn.routers import ROUTERS
from moeify.pipeline import PASSES
from moeify.registry import render


@pytest.mark.parametrize("registry", [METHODS, ROUTERS, PASSES], ids=lambda r: r.kind)
def test_every_entry_names_itself_and_its_text_parses_back(registry) -> None:
    for name in registry:
        thing = registry.parse(name)
        assert thing.name == name
        assert render(thing) == name
        assert registry.parse(render(thing)) == thing


def test_options_parse_and_render() -> None:
    drop = METHODS.parse("drop{ratio=0.25}")
    assert drop.ratio == 0.25
    assert str(drop) == "drop{ratio=0.25}"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName) as error:
        METHODS.parse("granulr")
    assert str(error.value) == "there is no method named 'granulr'\n  hint: did you mean 'granular'?"


def test_unknown_name_lists_the_choices_when_nothing_is_near() -> None:
    with pytest.raises(UnknownName) as error:
        METHODS.parse("zzz")
    names = "carve, copy, drop, granular, noise, split-coactivation, split-energy, split-importance, split-kmeans, "
    assert str(error.value) == f"there is no method named 'zzz'\n  hint: choose one of {names}split-random"


def test_unknown_option() -> None:
    with pytest.raises(BadOption) as error:
        METHODS.parse("drop{ration=0.5}")
    assert str(error.value) == "drop has no option 'ration'\n  hint: its options: ratio"


def test_option_of_the_wrong_type() -> None:
    with pytest.raises(BadOption) as error:
        METHODS.parse("drop{ratio=half}")
    assert str(error.value) == "drop.ratio wants float, not 'half'"


def test_text_that_is_no_name() -> None:
    with pytest.raises(BadOption) as error:
        METHODS.parse("drop{ratio=0.5")
    assert str(error.value) == "cannot read the method 'drop{ratio=0.5'\n  hint: write name or name{option=value,...}"
