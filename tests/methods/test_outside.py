"""Methods of other packages: found by an entry point, when their name is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field

import holdfast.plugins
from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.methods import EWC, METHODS, method_named
from holdfast.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Outside(Method):
    """A method that holdfast does not know."""

    name: ClassVar[str] = "outside"

    amount: Annotated[float, Field(gt=0)] = 2.0

    def after_step(self, view: View) -> None:
        view.state.numbers["amount"] = self.amount


class Point:
    """An entry point, as `importlib.metadata` gives it."""

    def __init__(self, name: str, loads: Any, package: str | None = "theirs") -> None:
        self.name, self.value, self._loads = name, f"{package}.module:Thing", loads
        self.dist = None if package is None else SimpleNamespace(name=package)

    def load(self) -> Any:
        if isinstance(self._loads, Exception):
            raise self._loads
        return self._loads


Install = Callable[..., list[dict[str, str]]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Packages with some entry points; returns the questions that are asked of them."""
    asked: list[dict[str, str]] = []

    def installed(*points: Point) -> list[dict[str, str]]:
        def entry_points(**which: str) -> list[Point]:
            asked.append(which)
            assert which["group"] == "holdfast.methods"
            return [p for p in points if which.get("name", p.name) == p.name]

        monkeypatch.setattr(holdfast.plugins, "entry_points", entry_points)
        return asked

    return installed


def test_packages_are_asked_only_for_an_unknown_name(install: Install) -> None:
    asked = install(Point("outside", Outside), Point("ewc", Outside))
    assert method_named("ewc") is EWC  # nobody can take the place of our own
    assert not asked
    assert method_named("outside") is Outside
    assert asked == [{"group": "holdfast.methods", "name": "outside"}]
    assert "outside" not in METHODS


def test_a_recipe_file_loads_and_saves(install: Install, tmp_path: Path) -> None:
    install(Point("outside", Outside))
    path = tmp_path / "mine.yaml"
    path.write_text("methods:\n  ewc:\n  outside: {amount: 3.5}\n")
    recipe = Recipe.load(path)
    assert recipe.methods == (EWC(), Outside(amount=3.5))
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    with pytest.raises(Refused, match=r"unknown key 'outside\.amuont'; did you mean 'amount'\?"):
        Recipe.from_dict({"methods": {"outside": {"amuont": 1}}})


def test_two_packages_of_one_name_are_refused_by_their_names(install: Install) -> None:
    install(Point("outside", Outside, "theirs"), Point("outside", Outside, "others"))
    with pytest.raises(Refused, match=r"two packages have a method 'outside': theirs, others"):
        method_named("outside")


@pytest.mark.parametrize(
    "wrong",
    [
        object,
        Outside(),  # an instance
        type("Renamed", (Outside,), {"name": "else"}),  # files would not find it again
        lambda: Outside,
    ],
)
def test_what_is_no_method_of_this_name_is_refused(wrong: Any, install: Install) -> None:
    install(Point("outside", wrong, None))
    with pytest.raises(Refused, match=r"Thing.* is no method called 'outside'.*holdfast\.Method"):
        method_named("outside")


@pytest.mark.parametrize("error", [ImportError("no module x"), AttributeError("no Thing")])
def test_what_cannot_be_loaded_is_refused_by_its_package(
    error: Exception, install: Install
) -> None:
    install(Point("outside", error))
    with pytest.raises(Refused, match=rf"Thing of theirs cannot be loaded: {error}"):
        method_named("outside")


def test_an_unknown_name_is_told_the_nearest_one_of_all(install: Install) -> None:
    install(Point("outside", Outside))
    with pytest.raises(Refused, match=r"no method 'outsied'; did you mean 'outside'\?"):
        method_named("outsied")
    with pytest.raises(Refused, match=r"did you mean 'replay'\?"):
        method_named("repaly")


def test_a_real_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By importlib.metadata itself, from a folder as pip lays it out."""
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[holdfast.methods]\ncalm = theirs_calm:Calm\n")
    (tmp_path / "theirs_calm.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from holdfast import Method\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Calm(Method):\n"
        "    name: ClassVar[str] = 'calm'\n"
    )
    with pytest.raises(Refused, match="no method 'calm'"):
        method_named("calm")
    monkeypatch.syspath_prepend(tmp_path)
    assert method_named("calm").__module__ == "theirs_calm"
    assert Recipe.from_dict({"methods": {"calm": None}}).methods[0].to_dict() == {}
