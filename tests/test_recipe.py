"""Recipes in files, the presets, and what a recipe refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, METHODS, Replay
from holdfast.network.rates import Rates
from holdfast.recipe import PRESETS, Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(name: str, tmp_path: Path) -> None:
    recipe = Recipe.named(name)
    path = tmp_path / "recipe.yaml"
    recipe.save(path)
    again = Recipe.load(path)
    assert again == recipe and again.name == name
    assert Recipe.named(path) == recipe


def test_every_method_has_a_preset() -> None:
    used = {m.name for make in PRESETS.values() for m in make().methods}
    assert used == METHODS.keys()


def test_a_file_in_words(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(
        "name: mine\nrates: bertcl\nmax_grad_norm: 1\n"
        "methods:\n  dps: {drop: 0.4, stage: 20, modules: ['*.query.weight']}\n  ewc:\n"
    )
    expected = Recipe(
        rates=Rates.bertcl(),
        methods=[DPS(drop=0.4, stage=20, modules=("*.query.weight",)), EWC()],
        max_grad_norm=1,
        name="mine",
    )
    assert Recipe.named(path) == expected
    assert [m.name for m in Recipe.load(path).methods] == ["dps", "ewc"]  # order is kept


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"method": {}}, r"unknown key 'method'; did you mean 'methods'\?"),
        ({"methods": {"dsp": {}}}, r"no method 'dsp'; did you mean 'dps'\?"),
        ({"methods": {"dps": {"dorp": 0.1}}}, r"unknown key 'dps.dorp'; did you mean 'drop'\?"),
        ({"methods": {"dps": {"drop": 2}}}, r"^r\.yaml: dps\.drop: .*not 2"),
        ({"methods": {"dps": {"modules": "*.weight"}}}, r"list too: \['\*\.weight'\]"),
        ({"methods": {"dps": [0.3]}}, "settings of dps must be a mapping"),
        ({"methods": ["dps"]}, "methods must map"),
        ({"rates": 3}, "rates must be"),
        ({"rates": "bertlc"}, r"^r\.yaml: .*'bertcl'"),
        ({"kind": "rates"}, "not a recipe"),
        ({"schema": 2}, "not a recipe of schema 1"),
        ({"max_grad_norm": "1"}, r"^r\.yaml: recipe\.max_grad_norm: must be above 0, not '1'"),
    ],
)
def test_mistakes_in_files_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Refused, match=complaint):
        Recipe.from_dict(values, where="r.yaml")


def test_a_file_without_a_name_is_called_like_the_file(tmp_path: Path) -> None:
    """Two such files stand beside each other in one table."""
    for name in ("gentle", "hard"):
        (tmp_path / f"{name}.yaml").write_text("methods: {ewc: {}}\n")
        assert Recipe.named(tmp_path / f"{name}.yaml").name == name
    assert Recipe.from_dict({}).name == "custom"


def test_a_name_too_long_for_a_file_is_only_an_unknown_name() -> None:
    with pytest.raises(Refused, match="no recipe called"):
        Recipe.named("x" * 300)


@pytest.mark.parametrize("norm", [0, -1.0, math.nan, math.inf, True, "1"])
def test_impossible_norms_are_refused(norm: Any) -> None:
    with pytest.raises(Refused, match="max_grad_norm"):
        Recipe(max_grad_norm=norm)


def test_a_method_stands_once_and_is_a_method() -> None:
    with pytest.raises(Refused, match="ewc stands twice"):
        Recipe(methods=[EWC(), Replay(), EWC(strength=2.0)])
    for wrong in ("dps", DPS):
        with pytest.raises(Refused, match="is no method"):
            Recipe(methods=[wrong])  # type: ignore[list-item]


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(Refused, match=r"called 'bertlc', nor a \.yaml file; .*'bertcl'"):
        Recipe.named("bertlc")
    with pytest.raises(Refused, match="missing"):
        Recipe.named("missing.yaml")


def test_the_name_of_an_adapter_is_told_how_to_write_it() -> None:
    pytest.importorskip("peft")
    with pytest.raises(Refused, match=r"called 'ia3', nor .*; write one with peft: \{type: ia3\}"):
        Recipe.named("ia3")


def test_equal_recipes_do_not_share_state() -> None:
    recipe = Recipe(methods=[DPS(mix=True)])
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one = recipe.bind(model, torch.optim.SGD(model.parameters(), lr=1.0), total_steps=3)
    two = recipe.unbound()
    assert one.states["dps"].weights and not two.states["dps"].weights


def test_seeds_decide_what_methods_draw() -> None:
    recipe = Recipe(methods=[DPS(mix=True), Replay()])
    one, again, other = (recipe.unbound(seed=seed).randomness for seed in (1, 1, 2))
    assert torch.equal(one, again)
    different = [*one, *other]  # the bound's own, and each method's
    assert len({state.numpy().tobytes() for state in different}) == len(different) == 6
