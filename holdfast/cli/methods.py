"""`holdfast methods`: the methods and recipes there are, or one method whole."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from dataclasses import MISSING, fields
from importlib import resources
from typing import TYPE_CHECKING, Any, get_type_hints

from holdfast.cli.options import show

if TYPE_CHECKING:
    from holdfast.engine.method import Method

ABOUT = "list methods and recipes, or show one with its settings"
EXAMPLE = "holdfast methods ewc"
RESUMES = False
SHARE = "share below 1, or whole number > 0"
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TYPES = {"boolean": "true, false", "integer": "whole number", "string": "text", "null": "null"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a method, to show it whole, or a recipe, as a file"
    )


def run(chosen: argparse.Namespace) -> None:
    if chosen.name is None:
        every()
    else:
        from holdfast.files import dump_yaml
        from holdfast.methods import METHODS, method_named
        from holdfast.recipe import PRESETS

        if chosen.name in PRESETS.keys() - METHODS:
            print(dump_yaml(PRESETS[chosen.name]().to_dict()), end="")
        else:
            one(method_named(chosen.name))


def every() -> None:
    """The table of methods by group, and that of recipes."""
    from rich.table import Table

    from holdfast.engine.method import GROUPS
    from holdfast.methods import METHODS
    from holdfast.recipe import PRESETS

    measured = costs()["steps"]
    methods = Table("method", "what it does", "for", "a step costs", "a step", "bytes per weight",
                    title="methods, each a recipe too",
                    caption="holdfast methods NAME shows one whole")  # fmt: skip
    methods.columns[0].no_wrap = methods.columns[4].no_wrap = True
    for group in GROUPS:
        mine = {name: kind for name, kind in METHODS.items() if kind.group == group}
        if mine:
            methods.add_row(f"[bold]{group}")
        for name, kind in mine.items():
            ratio = f"× {measured[name]['mean']:.2f}" if name in measured else "–"
            held, *more = re.split(r" ?[(;:]", kind.bytes_per_weight, maxsplit=1)
            methods.add_row(name, kind.summary, kind.use, kind.cost, ratio, held + " …" * len(more))
        methods.add_section()
    recipes = Table("recipe", "head first", "rates", "methods", title="recipes")
    for name, make in PRESETS.items():
        if name in METHODS:
            continue
        recipe = make()
        settings = "; ".join(_differing(m) for m in recipe.methods)
        first = "–" if recipe.head_first is None else "yes"
        recipes.add_row(name, first, recipe.rates.name, settings or "–")
    show(methods)
    show(recipes)


def one(kind: type[Method]) -> None:
    """All that a method says of itself."""
    from pydantic import TypeAdapter
    from rich.table import Table

    from holdfast.config import Share

    run, measured = costs(), "–"
    if kind.name in run["steps"]:
        r = run["steps"][kind.name]
        measured = (f"× {r['mean']:.3f} of plain, median {r['median']:.3f} [{r['low']:.3f}, "
                    f"{r['high']:.3f}]: {run['model']}, {run['tokens']} tokens, batch "
                    f"{run['batch']}, {run['machine']}")  # fmt: skip
    print(f"{kind.name}: {kind.summary}")
    for word, said in (
        ("group", kind.group), ("for", kind.use), ("a step costs", kind.cost),
        ("measured", measured), ("bytes a weight", kind.bytes_per_weight), ("paper", kind.paper),
    ):  # fmt: skip
        print(f"  {word:<14}  {said}")
    for text in (sys.modules[kind.__module__].__doc__, kind.__doc__):
        print(f"\n{inspect.cleandoc(text or '')}")
    hints = get_type_hints(kind, include_extras=True)
    settings = Table("setting", "default", "takes", "searched")
    for field in fields(kind):
        low, high, log = kind.ranges.get(field.name, (None, None, False))
        searched = "–" if low is None else f"{low:g} … {high:g}{', log' if log else ''}"
        plain = field.default
        default = "needed" if plain is MISSING else json.dumps(plain, ensure_ascii=False)
        hint = hints[field.name]
        takes = SHARE if hint == Share else _takes(TypeAdapter(hint).json_schema())
        settings.add_row(field.name, default, takes, searched)
    print()
    show(settings)


def costs() -> dict[str, Any]:
    """What `benchmarks/step_overhead.py --costs` measured: steps by method, as ratios to plain's.

    The mean is told: what a method does in every n-th step only is in it.
    """
    file = resources.files("holdfast.methods") / "costs.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _takes(schema: dict[str, Any]) -> str:
    """The values that a field takes, of its JSON schema."""
    bounds = ", ".join(f"{sign} {schema[key]:g}" for key, sign in SIGNS.items() if key in schema)
    if "anyOf" in schema:
        said = " or ".join(dict.fromkeys(map(_takes, schema["anyOf"])))
    elif "enum" in schema or "const" in schema:
        said = ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    elif schema.get("type") == "array":
        said = f"list of {_takes(schema.get('items', {}))}"
    else:
        kind = schema.get("type", "any")
        said = TYPES.get(kind, kind)
    return f"{said} {bounds}".strip()


def _differing(method: Any) -> str:
    """A method's name with the settings in which it differs from its defaults."""
    plain = type(method)().to_dict()
    own = [f"{k}={v}" for k, v in method.to_dict().items() if plain[k] != v]
    return f"{method.name}({', '.join(own)})"
