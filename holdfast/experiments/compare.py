"""Recipes side by side on the same tasks and seeds: each run is a sequence of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from holdfast.errors import Refused
from holdfast.experiments.processes import check_workers, spread
from holdfast.experiments.record import Record
from holdfast.experiments.sequence import run_sequence
from holdfast.experiments.settings import Settings
from holdfast.recipe import Recipe
from holdfast.tasks.task import slug


def compare(
    model: str,
    tasks: Sequence[str | Path],
    recipes: Mapping[str, tuple[Recipe, Mapping[str, Any]]],
    *,
    seeds: Sequence[int],
    out: str | Path,
    workers: int = 1,
    progress: bool = True,
    reference: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    tests: Mapping[str, Mapping[str, str]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Record]:
    """Every recipe with every seed; finished runs are only read, killed ones are resumed.

    recipes: a label → the recipe and the settings in which it differs (`{"lr": 5e-5}`). Runs are
    kept in `out/<label>/seed-<n>`. workers > 1 runs that many processes of one thread each.
    reference, lm_eval, tests, protocol: as of `run_sequence`. Returns the records by label, then by
    seed.
    """
    check_workers(workers)
    if not seeds or len(set(seeds)) != len(seeds):
        raise Refused(f"seeds must differ, and be some: {list(seeds)}", where="--seeds")
    folders = {label: Path(out) / slug(label) for label in recipes}
    if len(set(folders.values())) != len(folders):
        raise Refused(f"labels that name one folder: {sorted(recipes)}", where="--recipes")
    jobs = [
        {
            "model": model,
            "tasks": list(tasks),
            "recipe": recipe,
            "seed": seed,
            "out": folders[label] / f"seed-{seed}",
            "label": f"{label} · seed {seed}",
            "progress": progress,
            "reference": reference,
            "lm_eval": lm_eval,
            "tests": tests,
            "protocol": protocol,
            **settings,
            **own,
        }
        for label, (recipe, own) in recipes.items()
        for seed in seeds
    ]
    for _, own in recipes.values():  # refuse bad settings before any run, not after some
        Settings.from_dict({**settings, **own})
    if workers == 1:
        return [run_sequence(**job) for job in jobs]
    records: dict[int, Record] = {}
    made = spread([partial(run_sequence, **job) for job in jobs], workers, where=str(out))
    with closing(made), tqdm(total=len(jobs), unit="run", disable=not progress) as bar:
        for number, record in made:
            records[number] = record
            bar.set_postfix_str(jobs[number]["label"], refresh=False)
            bar.update()
    return [records[i] for i in range(len(jobs))]
