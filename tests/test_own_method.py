"""The method of examples/own_method.py: what docs/own_method.md tells others to test of theirs."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import holdfast.plugins
from holdfast.engine.head_first import HeadFirst
from holdfast.engine.method import HOOKS, Method
from holdfast.recipe import Recipe
from holdfast.testing import MethodContract
from holdfast.testing.toy import ToyTraining

ROOT = Path(__file__).parents[1]


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("own_method", ROOT / "examples/own_method.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_method"] = module  # where its annotations are looked up
    spec.loader.exec_module(module)
    return module


example = _example()
HoldHead = example.HoldHead


class TestHoldHead(MethodContract):
    @pytest.fixture(params=[HoldHead(), HoldHead(strength=0.0), HoldHead(strength=3.0)], ids=repr)
    def method(self, request: pytest.FixtureRequest) -> Method:
        method: Method = request.param
        return method


def test_it_pulls_the_head_back_and_nothing_else() -> None:
    """λ (w − w₀), with w₀ of this task, not of the one before."""
    toy = ToyTraining(HoldHead(strength=3.0))
    for task in ("one", "two"):
        toy.begin(task)
        start = {n: w.detach().clone() for n, w in toy.bound.weights.items()}
        toy.learn(0, 4)
        for w in toy.bound.weights.values():
            w.grad = torch.zeros_like(w)
        bound = toy.bound
        with torch.no_grad():
            bound.methods[0].penalty_grad_(bound.views["hold_head"])
        for name, w in bound.weights.items():
            expected = 3.0 * (w.detach() - start[name]) * name.startswith(f"{task}/")
            assert w.grad is not None
            torch.testing.assert_close(w.grad, expected)
            assert name not in bound.shared or not torch.equal(w, start[name])
        toy.end()


def test_it_holds_the_head_at_its_first_fit() -> None:
    first = HeadFirst()
    free, _ = example.moved(Recipe(head_first=first))
    held, _ = example.moved(Recipe(head_first=first, methods=[HoldHead(strength=10.0)]))
    assert held < 0.5 * free


def test_the_class_on_the_page_is_that_of_the_example() -> None:
    """With the imports that stand there."""
    page = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)
    assert code is not None
    named: dict[str, Any] = {"__name__": "own_method"}
    exec(code[1], named)
    theirs, ours = named["HoldHead"], HoldHead
    for attribute in ("name", "summary", "paper", "bytes_per_weight"):
        assert getattr(theirs, attribute) == getattr(ours, attribute)
    first = HeadFirst()
    assert example.moved(named["recipe"], steps=9) == example.moved(
        Recipe(head_first=first, methods=[HoldHead(strength=0.3)]), steps=9
    )


def test_the_page_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point as it stands there leads to a method, and every hook is named."""
    page = (ROOT / "docs" / "own_method.md").read_text(encoding="utf-8")
    assert not [hook for hook in HOOKS if f"`{hook}" not in page]
    found = re.search(r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "(\w+):(\w+)"', page)
    assert found is not None
    group, name, module, attribute = found.groups()
    assert (group, module) == (holdfast.methods.GROUP, "own_method")
    point = SimpleNamespace(
        name=name, value=f"{module}:{attribute}", dist=None,
        load=lambda: getattr(example, attribute),
    )  # fmt: skip
    monkeypatch.setattr(holdfast.plugins, "entry_points", lambda **_: [point])
    text = re.search(r"```yaml\n(.*?)```", page, re.S)
    assert text is not None
    import yaml

    recipe = Recipe.from_dict(yaml.safe_load(text[1]))
    assert isinstance(recipe.methods[0], HoldHead) and recipe.head_first is not None
