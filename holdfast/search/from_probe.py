"""Rates by one short probe of a task, see `balance`, and by what confirms it.

A probe, and each run that confirms its rates, is a training of the new task as a sequence makes it,
from what the old tasks left, but for its length; nothing of it is kept.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from holdfast import __version__
from holdfast.config import count
from holdfast.engine.bound import Bound
from holdfast.errors import Refused
from holdfast.experiments.learner import Learner
from holdfast.experiments.loaded import Loaded
from holdfast.experiments.origin import FromRun, Origin, beginning
from holdfast.experiments.ranks import check_alone
from holdfast.experiments.record import Record, commit, versions
from holdfast.experiments.runs import open_run
from holdfast.experiments.sequence import describe, load_tasks, run_sequence
from holdfast.experiments.settings import Settings
from holdfast.experiments.tuning import AROUND
from holdfast.methods.common.importance import diagonal_fisher
from holdfast.network.parts import Parts, parts
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.search.balance import (
    base_rate,
    benefit_and_harm,
    harm_of,
    mean_gradient,
    moved,
    multipliers,
    places,
)
from holdfast.search.result import RATES, RECIPE
from holdfast.search.space import check_flat
from holdfast.tasks import Task
from holdfast.tasks.kinds import kind_of
from holdfast.tasks.kinds.pretrained import device

BATCH = 32  # rows of a pass
TENTH = 10  # of the new task's steps a probe takes at most one
TINY = 1e-12  # nats: less is taken for this much
NEAR = 1.25  # times the harm that is aimed at, above or below: not corrected further
OLD = "old"  # the run of the old tasks, in the folder of the rates


class Watch(TrainerCallback):
    """Measures around a short training of a sequence's last task.

    scores: of all tasks on selection rows, at its end. total: the steps of the whole task.
    """

    scores: list[float]
    total: int
    parts: Parts

    def __init__(self, learner: Learner, rows: int, *, fully: bool) -> None:
        self.learner, self.rows, self.fully = learner, rows, fully
        self.last = len(learner.tasks) - 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        bound = self._bound()
        self.start = {name: w.detach().clone() for name, w in bound.weights.items()}
        if self.fully:
            with _full_precision(self.learner.models):
                self.gradient = mean_gradient(
                    functools.partial(bound.forward, training=False),
                    self._batches(self.last, "train"), bound.weights, bound.models[bound.task],
                )  # fmt: skip
                self.fisher = self._fisher(bound)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        bound, old = self._bound(), self.learner.tasks[: self.last]
        self.steps = state.global_step
        self.update = {n: w.detach() - self.start[n] for n, w in bound.weights.items()}
        self.part_of = dict(bound.part_of)
        with _full_precision(self.learner.models), torch.no_grad():
            far = [self._moved(bound, index) for index in range(len(old))]
        self.kl = max(fmean(far), TINY)
        del self.start

    def _bound(self) -> Bound:
        assert self.learner.bound is not None  # that of the old tasks, now at work on the last
        return self.learner.bound

    def _draws(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.learner.seed)

    def _fisher(self, bound: Bound) -> dict[str, Tensor]:
        """The mean over old tasks of their Fisher information, of what they share."""
        total: dict[str, Tensor] = {}
        for index, task in enumerate(self.learner.tasks[: self.last]):
            found = diagonal_fisher(
                functools.partial(bound.forward, task=task.name, training=False),
                self._batches(index, "train"), bound.shared, modules=bound.owners,
                model=bound.models[task.name],
                generator=self._draws(),
            )  # fmt: skip
            for name, f in found.items():
                total[name] = total[name] + f / self.last if name in total else f / self.last
        return total

    def _moved(self, bound: Bound, index: int) -> float:
        """The mean KL of a task's answers on selection rows, since the training began."""
        name, found = self.learner.tasks[index].name, list[Tensor]()
        for batch in self._batches(index, "selection"):
            before, now = (
                bound.forward(batch, task=name, training=False, weights=weights).logits
                for weights in (self.start, None)
            )
            found.append(moved(before, now, batch, bound.models[name]))
        return float(torch.cat(found).mean())

    def _batches(self, index: int, split: str) -> Iterator[Any]:
        """A task's rows in batches, up to `rows` of them, in an order drawn from the seed."""
        rows = self.learner.rows(index, split)
        order = torch.randperm(len(rows), generator=self._draws()).tolist()
        for chosen in torch.tensor(order[: self.rows]).split(BATCH):
            yield self.learner.collate([rows[i] for i in chosen.tolist()]).to(device())


@contextlib.contextmanager
def _full_precision(models: Sequence[nn.Module]) -> Iterator[None]:
    """Without Accelerate's autocast around the models' forward pass."""
    kept = [(m, m.__dict__.pop("forward", None)) for m in models]
    try:
        yield
    finally:
        for model, forward in kept:
            if forward is not None:
                model.forward = forward


@dataclass
class Short:
    """Short trainings of the last of some tasks; an origin has learned the others."""

    origin: Origin
    tasks: list[Task]
    recipe: Recipe
    plan: Settings
    seed: int
    share: float | int  # of the last task's steps
    rows: int
    home: Path

    def __post_init__(self) -> None:
        self.loaded = Loaded(self.origin.source, kind_of(self.tasks))

    def train(self, *, lr: float, rates: Rates, fully: bool = False) -> Watch:
        """Train at these rates; returns what was measured around it."""
        last, watches = len(self.tasks) - 1, list[Watch]()

        def watching(learner: Learner, index: int) -> list[TrainerCallback]:
            watches.append(Watch(learner, self.rows, fully=fully))
            return [*watches]

        with (
            tempfile.TemporaryDirectory(prefix=".probe-", dir=self.home) as folder,
            open_run(Path(folder), {"probe": self.tasks[last].name}) as place,
        ):
            learner = Learner(
                place, self.origin.source, self.tasks, replace(self.recipe, rates=rates), self.plan,
                self.seed, self._record(), loaded=self.loaded, callbacks=watching,
                scored=("selection",), keeps=lambda _, index: index < last, begin=self.origin.begin,
            )  # fmt: skip
            found = len(learner.rows(last, "train"))
            short = (short_of(self.plan, found, self.share) - 0.5) / self.plan.steps(found)
            learner.plan = replace(self.plan, lr=lr, epochs=short, save_steps=0)
            learner.learn(last)
        (watch,), scores = watches, learner.record.selection_scores
        watch.scores = [score or 0.0 for score in (scores or [])[last]]
        watch.total = self.plan.total(found)
        watch.parts = parts(learner.models[last], self.recipe.parts)
        return watch

    def _record(self) -> Record:
        told = [describe(task) for task in self.tasks]
        if isinstance(self.origin, FromRun):
            record = copy.deepcopy(self.origin.record)
        else:
            record = Record(tasks=told, settings={"model": self.origin.model}, status="running")
        record.set_tasks(told)
        return record


def short_of(plan: Settings, rows: int, share: float | int) -> int:
    """The steps of a probe of such a task: at most a tenth."""
    total = plan.total(rows)
    steps = count(share, total, what="a probe of", least=0)
    if not 1 <= steps <= total // TENTH:
        raise Refused(f"{steps} of {total} steps", where="--from-probe",
                      remedy=f"1 to {total // TENTH}, a tenth of the task")  # fmt: skip
    return steps


def rates_from_probe(
    model: str | None,
    tasks: Sequence[str | Path],
    recipe: Recipe | str | None = None,
    *,
    out: str | Path,
    share: float | int = 0.1,
    tolerance: float = 0.05,
    confirm: int = 1,
    rows: int = 512,
    most: int = 10,
    from_run: str | Path | None = None,
    old_task: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Rates:
    """Rates for the last of `tasks` by one probe; writes `rates.yaml` and `recipe.yaml` in `out`.

    The other tasks are old: they are learned first, in `out/old`, a run that goes on where it was
    stopped and from which `run_sequence(from_run=…)` learns the new task. With `from_run` (a run,
    or a saved model and its `old_task`) there is only the new one.

    share: of the new task's steps that the probe takes, or their number; a tenth at most.
    tolerance: τ > 0, the harm that is aimed at by the new task's end, in nats a row of an old task.
    confirm: 0 to 3 runs that correct the base rate. rows: of each task that are read. most:
    multipliers. recipe: what the rates are for (`plain`, or the run's own), at flat rates. All
    input is checked, and `Refused` raised, before any training. What was measured is the rates'
    `provenance`; the base rate is their `geometric_mean_rate`.
    """
    check_alone()
    for name, value, least, top in (("--confirm", confirm, 0, 3), ("--rows", rows, 1, 10**6),
                                   ("--parts", most, 3, 102)):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= top:
            raise Refused(
                f"must be a whole number from {least} to {top}, not {value!r}", where=name
            )
    if not 0 < tolerance < math.inf:
        raise Refused(f"must be above 0, not {tolerance}", where="--tolerance")
    if (len(tasks) < 2) if from_run is None else (len(tasks) != 1):
        wanted = "the old ones and the new one" if from_run is None else "the new one alone"
        raise Refused(f"{len(tasks)} tasks", where="--tasks", remedy=f"name {wanted}")
    home = Path(out)
    origin, model, chosen, seed, settings = beginning(
        model, from_run, old_task, recipe=recipe, seed=seed, settings=settings
    )
    plan = Settings.from_dict(settings | {"alone": False})
    _check(chosen, plan)
    every = _tasks(origin, tasks, seed, plan)
    short_of(plan, len(every[-1].train), share)
    spent: dict[str, Any] = {"old": 0, "probe": 0, "of": 0, "confirm": []}
    if origin is None:
        record = run_sequence(model, tasks[:-1], chosen, seed=seed, out=home / OLD,
                              label="old tasks", progress=progress, **settings)  # fmt: skip
        origin, spent["old"] = FromRun(home / OLD), sum(n or 0 for n in record.steps)
        every = _tasks(origin, tasks[-1:], seed, plan)
    home.mkdir(parents=True, exist_ok=True)
    short = Short(origin, every, chosen, plan, seed, share, rows, home)
    probe = short.train(lr=plan.lr, rates=Rates.flat(), fully=True)
    spent |= {"probe": probe.steps, "of": probe.total}
    at, names, layers = places(probe.parts, most)
    group_of = {name: at[part] for name, part in probe.part_of.items()}
    found = benefit_and_harm(probe.update, probe.gradient, probe.fisher, group_of, names)
    curve = multipliers(found, weights={names[k] for k in at.values()})
    times, (low, high) = probe.total / probe.steps, [plan.lr * factor for factor in AROUND]
    scale = probe.kl / harm_of(found, [1.0] * len(found))
    rate = base_rate(found, curve, lr=plan.lr, times=times, tolerance=tolerance, scale=scale)
    rate, runs = min(max(rate, low), high), list[dict[str, float]]()

    def rates(**more: Any) -> Rates:
        return Rates.from_list(curve, layers=layers, name="from probe", geometric_mean_rate=rate,
                               **more)  # fmt: skip

    for _ in range(confirm):
        run, aimed = short.train(lr=rate, rates=rates()), tolerance / times
        spent["confirm"].append(run.steps)
        predicted = scale * (rate / plan.lr) ** 2 * harm_of(found, curve)
        runs.append({"rate": rate, "predicted": predicted, "aimed": aimed, "measured": run.kl,
                     "new": run.scores[-1], "old": fmean(run.scores[:-1])})  # fmt: skip
        better = min(max(rate * math.sqrt(aimed / run.kl), low), high)
        if better == rate or aimed / NEAR <= run.kl <= aimed * NEAR:
            break
        rate = better
    told = {
        "source": f"holdfast rates {__version__}",
        "formula": "multipliers b/h: b = -g_new u, h = u F_old u / 2",
        "fisher": "diagonal; labels sampled from the model, of others than class logits the rows'",
        "model": origin.model,
        "tasks": [{k: t[k] for k in ("name", "source", "metric", "hash")}
                  for t in map(describe, every)],
        "probe": {"rate": plan.lr, "kl": probe.kl, "scale": scale, "new": probe.scores[-1],
                  "old": fmean(probe.scores[:-1])},
        "parts": [{"part": m.part, "benefit": m.benefit, "harm": m.harm} for m in found],
        "tolerance": tolerance,
        "bounded": rate in (low, high),
        "confirmed": runs,
        "steps": spent,
        "rows": rows,
        "seed": seed,
        "settings": plan.to_dict(),
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
    }  # fmt: skip
    made = rates(provenance=told)
    made.save(home / RATES)
    replace(chosen, rates=made, name="from probe").save(home / RECIPE)
    return made


def _check(recipe: Recipe, plan: Settings) -> None:
    """Refuse what a probe cannot measure."""
    check_flat(recipe.rates, "found")
    if recipe.peft:
        raise Refused("trains adapters, which no old task has used", where="--recipe",
                      remedy="take one without peft")  # fmt: skip
    if plan.head != "task":
        raise Refused(f"--head {plan.head} was asked for, and rates are for one head each",
                      where="--from")  # fmt: skip


def _tasks(
    origin: Origin | None, specs: Sequence[str | Path], seed: int, plan: Settings
) -> list[Task]:
    """The old tasks of an origin, then those named here; all with selection rows."""
    old = origin.tasks(seed=seed, sizes=plan.sizes) if origin else []
    found = load_tasks(specs, seed=seed, plan=plan, old=old)
    for task in found:
        if not task.selection:
            raise Refused("no selection rows to measure on", where=task.name,
                          remedy="raise --selection")  # fmt: skip
    return found
