"""Recipes side by side on the same tasks and seeds: each run is a sequence of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import Refused
from holdfast.experiments.engines import Engine, carry_out
from holdfast.experiments.engines.local import Local
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
    engine: Engine | None = None,
    progress: bool = True,
    reference: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    tests: Mapping[str, Mapping[str, str]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Record]:
    """Every recipe with every seed; finished runs are only read, killed ones are resumed.

    recipes: a label → the recipe and the settings in which it differs (`{"lr": 5e-5}`). Runs are
    kept in `out/<label>/seed-<n>`. workers > 1 runs that many processes of one thread each; another
    engine carries them out elsewhere, see `holdfast.experiments.engines`. Several calls at once, on
    one machine or several that share `out`, divide the runs among them.
    reference, lm_eval, tests, protocol: as of `run_sequence`. Returns the records by label, then by
    seed.
    """
    chosen: Engine = engine or Local(workers)
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
    return carry_out(run_sequence, jobs, chosen, where=out, progress=progress)
