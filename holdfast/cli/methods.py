"""`holdfast methods`: the methods and recipes there are."""

from __future__ import annotations

import argparse
from typing import Any

from holdfast.cli.options import show

ABOUT = "list methods and recipes"
EXAMPLE = "holdfast methods"
RESUMES = False


def options(_: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(_: argparse.Namespace) -> None:
    from rich.table import Table

    from holdfast.methods import METHODS
    from holdfast.recipe import PRESETS

    methods = Table("method", "what it does", "paper", "bytes per weight", title="methods")
    for name, method in METHODS.items():
        methods.add_row(name, method.summary, method.paper, method.bytes_per_weight)
    recipes = Table("recipe", "head first", "rates", "methods", title="recipes")
    for name, make in PRESETS.items():
        recipe = make()
        settings = "; ".join(_differing(m) for m in recipe.methods)
        first = "–" if recipe.head_first is None else "yes"
        recipes.add_row(name, first, recipe.rates.name, settings or "–")
    show(methods)
    show(recipes)


def _differing(method: Any) -> str:
    """A method's name with the settings in which it differs from its defaults."""
    plain = type(method)().to_dict()
    own = [f"{k}={v}" for k, v in method.to_dict().items() if plain[k] != v]
    return f"{method.name}({', '.join(own)})"
