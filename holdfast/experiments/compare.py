"""Recipes side by side on the same tasks and seeds, on equal terms.

Each run is a sequence of its own. Of one seed all begin with the same weights, heads and rows in
the same order. A first task in which several recipes do nothing is trained once for all of them,
and with a budget every recipe, plain fine-tuning among them, has the same number of tuning runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.errors import Busy, OutOfMemory, Refused, TrainingDiverged, tell_once
from holdfast.experiments import lease, tuning
from holdfast.experiments.engines import Engine, carry_out
from holdfast.experiments.engines.local import Local
from holdfast.experiments.ranks import check_alone
from holdfast.experiments.record import Record
from holdfast.experiments.runs import (
    CONFIG,
    RECORD,
    WEIGHTS,
    config_in,
    digest,
    drop_weights,
    ended,
    how_diverged,
    note_diverged,
)
from holdfast.experiments.sequence import Arm, run_sequence
from holdfast.experiments.settings import SIZES, Settings
from holdfast.recipe import Recipe
from holdfast.tasks.spec import in_order
from holdfast.tasks.task import slug

FIRST, TUNING = "first", "tuning"  # folders beside those of the recipes
AGAIN = "-again"  # ends the folder of a run that repeats another
CONTROL = "plain"
BESIDE: dict[str, Any] = {"reference": None, "lm_eval": (), "tests": None}  # nothing is measured

Arguments = dict[str, Any]  # of `run_sequence`
Recipes = Mapping[str, tuple[Recipe, Mapping[str, Any]]]
Seen = dict[tuple[Any, ...], tuple[str, Path]]  # what runs were made of, and the first that was


def compare(
    model: str,
    tasks: Sequence[str | Path],
    recipes: Recipes,
    *,
    seeds: Sequence[int],
    out: str | Path,
    workers: int = 1,
    engine: Engine | None = None,
    progress: bool = True,
    reference: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    report_to: Sequence[str] = (),
    tests: Mapping[str, Mapping[str, str]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    budget: int | None = None,
    rates: Sequence[float] | None = None,
    repeat: bool = False,
    **settings: Any,
) -> list[Record]:
    """Every recipe with every seed; finished runs are only read, killed ones are resumed.

    recipes: a label → the recipe and the settings in which it differs (`{"lr": 5e-5}`). Runs are
    kept in `out/<label>/seed-<n>`. workers > 1 runs that many processes of one thread each; another
    engine carries them out elsewhere, see `holdfast.experiments.engines`. Several calls at once, on
    one machine or several that share `out`, divide the runs among them.
    reference, lm_eval, report_to, tests, protocol: as of `run_sequence`. Returns the records by
    label, then by seed.

    budget: tuning runs for each recipe, and for plain fine-tuning, which joins them: over the rate
    and the ranges that the recipe's methods declare, see `holdfast.experiments.tuning`. The best on
    selection rows is trained anew with `seeds`. rates: the lowest and the highest rate to try
    (a tenth of `lr`, 2.5 times `lr`).

    repeat: the first seed of every recipe runs twice, from its first task on, in `seed-<n>-again`:
    what scores move by when nothing is changed, see `statistics.repeats`.
    """
    check_alone()
    tasks = in_order(tasks)
    if not isinstance(recipes, Mapping) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in recipes.values()
    ):
        raise Refused("must map labels to a recipe and its settings", where="--recipes",
                      remedy='{"ewc": (Recipe.named("ewc"), {})}')  # fmt: skip
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        raise Refused(f"must be a list, not {seeds!r}", where="--seeds", remedy="seeds=[0, 1, 2]")
    chosen: Engine = engine or Local(workers)
    if not seeds or len(set(seeds)) != len(seeds):
        raise Refused(f"seeds must differ, and be some: {list(seeds)}", where="--seeds")
    out, recipes = Path(out), dict(recipes)
    if budget is not None:
        tuning.check_budget(budget, seeds)
        recipes = {CONTROL: (Recipe.named(CONTROL), {}), **recipes}
        if replace(recipes[CONTROL][0], name=CONTROL) != Recipe.named(CONTROL):
            raise Refused(f"{CONTROL} is the control, and this one is not plain", where="--recipes",
                          remedy="give the recipe another name")  # fmt: skip
    elif rates is not None:
        raise Refused("are those of tuning runs", where="--rates", remedy="add --budget N")
    folders = {label: out / slug(label) for label in recipes}
    if len(set(folders.values())) != len(folders):
        raise Refused(f"labels that name one folder: {sorted(recipes)}", where="--recipes")
    if taken := {FIRST, TUNING} & {folder.name for folder in folders.values()}:
        raise Refused(f"{min(taken)} is a folder of the comparison's own", where="--recipes",
                      remedy="give the recipe another name")  # fmt: skip
    if "auto" in (settings.get("bf16"), *(own.get("bf16") for _, own in recipes.values())):
        raise Refused("auto would differ between machines, and runs that are compared may not",
                      where="--bf16", remedy="say --bf16 or leave it out")  # fmt: skip
    for _, own in recipes.values():  # refuse bad settings before any run, not after some
        Settings.from_dict({**settings, **own})

    def job(label: str, recipe: Recipe, own: Mapping[str, Any], seed: int,
            again: str = "") -> Arguments:  # fmt: skip
        return {"model": model, "tasks": list(tasks), "recipe": recipe, "seed": seed,
                "out": folders[label] / f"seed-{seed}{again}",
                "label": f"{label} · seed {seed}{again}",
                "progress": progress, "reference": reference, "lm_eval": lm_eval,
                "report_to": report_to, "tests": tests, "protocol": protocol,
                **settings, **own}  # fmt: skip

    seen: Seen = {}
    do = partial(_done, engine=chosen, where=out, progress=progress, seen=seen)
    arms: dict[str, Arm] = {}
    if budget is not None:
        usual, below = Settings.from_dict(settings).lr, out / TUNING
        around, trials = tuning.rates_around(usual, rates), list[Arguments]()
        plans = {
            label: tuning.Tuning.of(recipe, label, rate=own.get("lr", usual), rates=around,
                                    budget=budget)
            for label, (recipe, own) in recipes.items()
        }  # fmt: skip
        for label, plan in plans.items():
            for i, values in enumerate(plan.values):
                own = {**recipes[label][1], "lr": values[tuning.RATE], "alone": False}
                place = {"out": below / slug(label) / str(i),
                         "label": f"{label} · tuning {i + 1} of {budget}",
                         "arm": Arm(scored=("selection",), notes={"serves": TUNING})}  # fmt: skip
                trials.append(job(label, plan.at(i), own, tuning.SEED) | BESIDE | place)
        found = iter(do(_tried, trials, below))
        _delete(below / FIRST)
        for label, plan in plans.items():
            told = plan.told([next(found) for _ in plan.values])
            best, own = told["chosen"], recipes[label][1]
            recipes[label] = plan.at(best), {**own, "lr": plan.values[best][tuning.RATE]}
            arms[label] = Arm(notes={"tuned": told})
    for line in _same(recipes, settings):
        tell_once(line)
    finals = [
        job(label, recipe, own, seed, again) | {"arm": arms.get(label, Arm())}
        for label, (recipe, own) in recipes.items()
        for seed, again in [*((seed, "") for seed in seeds), *[(seeds[0], AGAIN)] * repeat]
    ]
    records = do(_ran, finals, out)
    if failed := [each for each in records if isinstance(each, OutOfMemory)]:
        raise failed[0]
    for record, made in zip(records, finals, strict=True):
        for task in record.tasks:
            what = f"evaluation rows of {task['name']}", record.settings.get("evaluation_size")
            if rows := task.get("evaluation_hash"):
                _check_alike(seen, what, rows, Path(made["out"]))
    return records


def _same(recipes: Recipes, settings: Mapping[str, Any]) -> list[str]:
    """A line for each set of labels that stand for one configuration."""
    alike: dict[str, list[str]] = {}
    for label, (recipe, own) in recipes.items():
        plan = Settings.from_dict({**settings, **own})
        key = digest({"recipe": recipe.to_dict(), "settings": plan.to_dict()})
        alike.setdefault(key, []).append(label)
    return [f"{' and '.join(labels)} are one configuration: their runs are the same"
            for labels in alike.values() if len(labels) > 1]  # fmt: skip


# --- carrying out ---------------------------------------------------------------------------------


def _done(
    what: Callable[..., Any], jobs: list[Arguments], folder: Path, *,
    engine: Engine, where: Path, progress: bool, seen: Seen,
) -> list[Any]:  # fmt: skip
    """`what` of each job, after the first tasks that several of them share, kept in `folder`."""
    firsts, jobs = _shared(jobs, folder / FIRST)
    carry_out(what, firsts, engine, where=where, progress=progress)
    found = carry_out(what, jobs, engine, where=where, progress=progress)
    for made in (Path(job["out"]) for job in (*firsts, *jobs)):
        if not (made / CONFIG).is_file():  # what it goes on from diverged, or was deleted by others
            continue
        config = config_in(made)
        sizes = [config["settings"].get(name) for name in SIZES]
        for name, rows in config["tasks"]:
            _check_alike(seen, (f"rows of {name}", config["seed"], *sizes), rows, made)
        if WEIGHTS in config:
            _check_alike(seen, (WEIGHTS,), config[WEIGHTS], made)
    return found


def _check_alike(seen: Seen, what: tuple[Any, ...], made_of: str, folder: Path) -> None:
    """Refuse a run that was made of something else than one before it: it changed meanwhile.

    Each run reads rows and model anew, maybe hours after the first. what: in words, and how chosen.
    """
    before, first = seen.setdefault(what, (made_of, folder))
    if before != made_of:
        raise Refused(f"{what[0]}: others than {first} had; they changed meanwhile",
                      where=str(folder),
                      remedy="delete the runs of before or of after the change, and run the same "
                      "command with what the others had")  # fmt: skip


def _ran(**job: Any) -> Record | OutOfMemory:
    """A run's record; why, where memory does not suffice: the others go on before it is told."""
    try:
        return run_sequence(**job)
    except OutOfMemory as refusal:
        return refusal


def _tried(**job: Any) -> float | None:
    """A tuning run's score on selection rows, its weights deleted; None if it diverged."""
    folder, first = Path(job["out"]), job["arm"].first
    try:
        for run in (folder, *([first] if first else [])):
            if (said := how_diverged(run)) is not None:
                raise TrainingDiverged(said)
        score = tuning.quality(run_sequence(**job))
    except TrainingDiverged as refusal:
        note_diverged(folder, refusal)
        return None
    if folder.parent.parent.name != FIRST:
        drop_weights(folder)
    return score


# --- first tasks that are shared ------------------------------------------------------------------


def _shared(jobs: Sequence[Arguments], folder: Path) -> tuple[list[Arguments], list[Arguments]]:
    """The first tasks that several jobs, not begun, would train alike, and the jobs that go on
    from them."""
    firsts = [_first(job, folder) for job in jobs]
    wanted = [first["out"] for first in firsts if first is not None]
    kept: dict[Path, Arguments] = {}
    made = []
    for job, first in zip(jobs, firsts, strict=True):
        if first is None or (wanted.count(first["out"]) == 1 and not ended(first["out"])):
            made.append(job)
            continue
        kept[first["out"]] = first
        made.append(job | {"arm": replace(job["arm"], first=first["out"])})
    return list(kept.values()), made


def _delete(folder: Path) -> None:
    """Delete shared first tasks, but for those that another comparison in `out` is training."""
    for run in folder.glob("*/*"):
        with suppress(Busy):
            lease.check_free(run)
            shutil.rmtree(run.parent, ignore_errors=True)


def busy_at_first(recipe: Recipe, plan: Settings) -> str | None:
    """What of a recipe and settings is at work in the first task, in words; None for nothing.

    Where other rows are mixed in or the head is not the task's own, what goes on is not the same by
    construction.
    """
    busy = [m.name for m in recipe.methods if not m.idle_at_first or m.defines("prepare")]
    busy += [name for name, it in (("peft", recipe.peft), ("--mix", plan.mix)) if it]
    return ", ".join(busy + [f"--head {plan.head}"] * (plan.head != "task")) or None


def _first(job: Arguments, folder: Path) -> Arguments | None:
    """The job of its first task alone; None where its recipe acts in it, or it is begun.

    Nor where more is measured beside it: what goes on is then not the same by construction.
    """
    recipe: Recipe = job["recipe"]
    known = {f.name for f in fields(Settings)}
    plan = Settings.from_dict({k: v for k, v in job.items() if k in known})
    busy = busy_at_first(recipe, plan) or any(job[name] for name in BESIDE)
    begun = (Path(job["out"]) / RECORD).is_file() or how_diverged(Path(job["out"])) is not None
    whole = Path(job["out"]).name.endswith(AGAIN)
    if len(job["tasks"]) < 2 or busy or begun or whole:
        return None
    plain = replace(recipe, methods=(), name="first task")
    key = digest({"recipe": plain.to_dict(), "settings": plan.to_dict()})
    return job | {"tasks": job["tasks"][:1], "recipe": plain, "alone": False,
                  "out": folder / key / f"seed-{job['seed']}",
                  "label": f"first task · seed {job['seed']}",
                  "arm": Arm(scored=job["arm"].scored, notes={"serves": FIRST})}  # fmt: skip
