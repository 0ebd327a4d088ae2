"""Which records are of the same tasks, network, recipe and configuration: what may be pooled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from holdfast.experiments.record import Record
from holdfast.experiments.settings import SIZES, defaults
from holdfast.report.words import clean

# settings in which runs of one configuration may differ
PER_RUN = frozenset(
    {"seed", "data_seed", "output", "output_dir", "out", "device", "resume", "alone", "save_steps"}
)


def study_key(record: Record) -> str:
    """Equal for runs that stand in one table."""
    # Training and selection rows differ by seed; what is compared is scored on the same rows.
    tasks = [
        [task["name"], task.get("evaluation_hash", task.get("hash")), task.get("metric")]
        for task in record.tasks
    ]
    return json.dumps([*_network(record.model), tasks], default=str)


def rows_of(record: Record) -> list[Any]:
    """The hash of all rows of each task: equal for runs of one seed that asked for as many."""
    return [task.get("hash") for task in record.tasks]


def other_rows(records: Sequence[Record]) -> list[str]:
    """A line for each seed of which runs learned other rows, as where files were changed."""
    first: dict[str, Record] = {}
    found: dict[int | None, dict[str, None]] = {}
    for record in records:
        asked = json.dumps([record.seed, [record.settings.get(key) for key in SIZES]], default=str)
        pairs = zip(record.names, rows_of(first.setdefault(asked, record)), rows_of(record),
                    strict=True)  # fmt: skip
        differ = {name: None for name, one, two in pairs if one and two and one != two}
        if differ and record.seed is not None:
            found.setdefault(record.seed, {}).update(differ)
    return [f"Seed {seed}: runs learned other rows of {', '.join(map(clean, names))}. They differ "
            "in more than the recipe." for seed, names in found.items()]  # fmt: skip


def _network(model: dict[str, Any]) -> list[Any]:
    """Which network it is: files by their hash, one from the Hub by its commit."""
    return [model.get(key) for key in ("name", "hash", "revision")]


def configuration(settings: dict[str, Any]) -> dict[str, Any]:
    """What runs are compared by; a setting that came later than a run has its default."""
    known = {**defaults(), **settings}
    return {key: value for key, value in known.items() if key not in PER_RUN}


def before(record: Record) -> list[Any]:
    """The recipes that learned tasks before a run went on from there, if they were not its own.

    With its own it ends as one that learned all of them. None: of a model, or not known.
    """
    known = "began" in record.extra or "from" not in record.extra
    told = record.extra.get("began", []) if known else [None]
    recipes = told if isinstance(told, list) else [None]
    return [] if all(nameless(each) == nameless(record.recipe) for each in recipes) else recipes


def nameless(recipe: Any) -> Any:
    """A recipe but for what it is called."""
    return {k: v for k, v in recipe.items() if k != "name"} if isinstance(recipe, dict) else None


def family(record: Record) -> str:
    """What settings of one recipe have in common: all but its name, its rate and its strengths."""
    recipe = _without_strengths(record.recipe)
    settings = {key: v for key, v in configuration(record.settings).items() if key != "lr"}
    return json.dumps([recipe, settings, before(record)], sort_keys=True, default=str)


def _without_strengths(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe but for its name and the numbers of its methods."""

    def without_numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [without_numbers(item) for item in value]
        return None if isinstance(value, int | float) and not isinstance(value, bool) else value

    plain: dict[str, Any] = nameless(recipe)
    return plain | {key: without_numbers(plain.get(key) or None) for key in ("methods", "peft")}


def kin(record: Record) -> str:
    """What a recipe of several sequences has in common: its label alone may be another's too.

    Strengths that a budget chose, and rates that were searched or probed, are each sequence's own.
    """
    tuned, rates = "tuned" in record.extra, record.recipe.get("rates")
    recipe = _without_strengths(record.recipe) if tuned else nameless(record.recipe)
    if tuned or (isinstance(rates, dict) and rates.get("provenance")):
        recipe = recipe | {"rates": None}
    told = [_network(record.model), recipe, before(record)]
    return json.dumps(told, sort_keys=True, default=str)
