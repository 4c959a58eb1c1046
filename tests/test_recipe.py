from __future__ import annotations

import pytest

from moeify.errors import BadRecipe, UnreadableFile
from moeify.ir.recipe import Recipe


def test_overrides_apply_by_glob_and_the_last_wins() -> None:
    recipe = Recipe(experts=8, overrides=(("layer.*", {"experts": 4}), ("layer.1", {"experts": 16, "top_k": 1})))
    assert recipe.for_block("layer.0").experts == 4
    assert (recipe.for_block("layer.1").experts, recipe.for_block("layer.1").top_k) == (16, 1)
    assert recipe.for_block("head").experts == 8


def test_dict_and_toml_round_trip(tmp_path) -> None:
    recipe = Recipe(method="drop{ratio=0.25}", blocks="every:2", seed=3, overrides=(("a.*", {"top_k": 1}),))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "r.toml"
    path.write_text(
        'method = "drop{ratio=0.25}"\nblocks = "every:2"\nseed = 3\n[[override]]\nblocks = "a.*"\ntop_k = 1\n'
    )
    assert Recipe.from_toml(path) == recipe


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"experts": 4, "top_k": 5},
            "top-k 5 is larger than the number of experts, 4\n  hint: choose --top-k between 1 and 4",
        ),
        ({"experts": 0}, "experts is 0: it must be a whole number of at least 1"),
        ({"top_k": True}, "top-k is True: it must be a whole number of at least 1"),
        ({"shared": -1}, "shared is -1: it must be a whole number of at least 0"),
        (
            {"shared_gate": True},
            "shared-gate gates the shared experts, and there are none\n  hint: add --shared 1",
        ),
    ],
)
def test_contradictions(fields, text) -> None:
    with pytest.raises(BadRecipe) as error:
        Recipe(**fields)
    assert str(error.value) == text


def test_override_is_checked_when_the_recipe_is_made() -> None:
    with pytest.raises(BadRecipe) as error:
        Recipe(experts=8, top_k=4, overrides=(("x", {"experts": 2}),))
    assert error.value.what == "top-k 4 is larger than the number of experts, 2"


def test_unknown_field_in_a_file(tmp_path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("expert = 4\n")
    with pytest.raises(BadRecipe) as error:
        Recipe.from_toml(path)
    assert error.value.what == "the recipe has no field 'expert'"


def test_broken_toml_is_unreadable(tmp_path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("experts = = 4\n")
    with pytest.raises(UnreadableFile):
        Recipe.from_toml(path)


def test_dashes_are_read_in_overrides_too(tmp_path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('top-k = 4\n[[override]]\nblocks = "a"\ntop-k = 1\n')
    assert Recipe.from_toml(path) == Recipe(top_k=4, overrides=(("a", {"top_k": 1}),))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("method = 5", "method is 5: it must be a text"),
        ("router = true", "router is True: it must be a text"),
        ("blocks = 3", "blocks is 3: it must be a text"),
        ('seed = "x"', "seed is 'x': it must be a whole number"),
        ("shared = 1\nshared_gate = 1", "shared-gate is 1: it must be true or false"),
        ('include = "sample"', "include is 'sample': it must be a list of texts"),
        ("include = [1]", "include is (1,): it must be a list of texts"),
        ("include = 1", "include is 1: it must be a list of texts"),
        ("override = 3", "override is 3: it must be a list of tables"),
        ('[override]\nblocks = "a"', "override is {'blocks': 'a'}: it must be a list of tables"),
        ("[[override]]\nblocks = 3", "blocks of an override is 3: it must be a text"),
        ('[[override]]\nblocks = "a"\nmethod = 3', "method is 3: it must be a text"),
    ],
)
def test_values_of_the_wrong_type(tmp_path, text: str, what: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(BadRecipe) as error:
        Recipe.from_toml(path)
    assert error.value.what == what
