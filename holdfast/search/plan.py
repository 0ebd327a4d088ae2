"""What a search is asked to do, checked before any training, and kept in its folder.

`study.json` holds the configuration. Another process with the same one joins; a different one is
refused, naming what differs. How long to go on (`trials`), how many trials are confirmed, how many
processes and how many fresh seeds are not part of it, so that a study may be extended.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from holdfast.config import count
from holdfast.errors import Refused, nearest
from holdfast.experiments.runs import WEIGHTS
from holdfast.experiments.sequence import load_tasks
from holdfast.experiments.settings import Settings, defaults
from holdfast.files import differences, write_text_atomic
from holdfast.recipe import Recipe
from holdfast.search.objective import (
    RUNGS,
    LearnOld,
    Objective,
    Pruner,
    Rungs,
    Sampler,
    check_choice,
    evenly,
)
from holdfast.search.space import (
    INTERVALS,
    Control,
    Space,
    check_flat,
    controls,
    flat_rates,
    with_tuned,
)
from holdfast.tasks import Task
from holdfast.tasks.kinds import kind_of
from holdfast.tasks.shifts import SHIFTS, Shifted
from holdfast.tasks.splits import stratified
from holdfast.tasks.task import slug

FILE = "study.json"
SEEDS = 2**20  # as those of `run_sequence`
TRIALS = 50
POOL = 4  # rows that a shift looks at, for each training row


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole search. `make` checks it."""

    model: str
    specs: tuple[str, ...]
    shift: str
    base: Recipe
    space: Space
    flat: tuple[float, ...]
    settings: Settings
    sampler: Sampler
    pruner: Pruner
    objective: Objective
    rungs: Rungs  # of each task
    trials: int
    population: int  # of the trials, members of a population; 0: another sampler
    replicates: int
    seed: int
    fresh: int  # seeds of the final runs
    confirm: int  # of the best trials, that are trained again with further selection seeds
    confirm_seeds: int
    learn_old: LearnOld
    tasks: tuple[Task, ...] = field(repr=False)  # the two, of the search's first seed
    halves: tuple[Task, ...] = field(repr=False)  # of a shift, before a seed draws from them
    source: str = field(repr=False)  # where the model's files are
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)  # what a shift achieved

    @classmethod
    def make(
        cls,
        model: str,
        tasks: Sequence[str | Path],
        *,
        shift: str = "task",
        recipe: Recipe | str = "plain",
        tune: Sequence[str] = (),
        parts: int = 10,
        flat: Sequence[float] | None = None,
        sampler: str = "tpe",
        pruner: str | None = None,
        objective: str = "new_plus_old",
        rungs: int | None = None,
        trials: int | None = None,
        population: int | None = None,
        replicates: int = 1,
        seed: int = 0,
        fresh: int = 3,
        confirm: int = 0,
        confirm_seeds: int = 2,
        learn_old: str = "each",
        **settings: Any,
    ) -> Plan:
        """The checked plan; `Refused` names what is wrong."""
        from holdfast.experiments.compare import busy_at_first
        from holdfast.experiments.mix import check_mix
        from holdfast.search import pbt
        from holdfast.tasks.kinds.pretrained import check_length, load_config, locate

        chosen = check_choice(sampler, pruner, objective)
        members = pbt.check(sampler, population, trials=trials, tune=tune, rungs=rungs,
                            replicates=replicates != 1, confirm=confirm,
                            **{"learn-old": learn_old != "each"})  # fmt: skip
        trials = TRIALS if trials is None else trials
        for name, value, least in (
            ("--trials", trials, 1), ("--replicates", replicates, 1), ("--seeds", fresh, 3),
            ("--seed", seed, 0), ("rungs", rungs or 1, 1), ("--confirm", confirm, 0),
            ("--confirm-seeds", confirm_seeds, 2),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise Refused(f"must be a whole number from {least} on, not {value!r}", where=name)
        if seed + replicates + fresh > SEEDS:
            raise Refused(f"{seed} is too large", where="--seed", remedy=f"below {SEEDS}")
        if confirm == 1:
            raise Refused("1 trial leaves no choice", where="--confirm", remedy="2 or more, or 0")
        if learn_old not in get_args(LearnOld):
            raise Refused(f"unknown {learn_old!r}", where="--learn-old",
                          remedy=nearest(learn_old, get_args(LearnOld)))  # fmt: skip
        for name in ("lr", "alone", "head"):
            if name in settings:
                raise Refused("is no setting of a search", where=f"--{name}",
                              remedy="the base rate is searched around --flat")  # fmt: skip
        plan = Settings.from_dict({"save_steps": 0, **settings})
        base = Recipe.named(recipe)
        check_flat(base.rates, "searched")
        specs = tuple(map(str, tasks))
        wanted = 2 if shift == "task" else 1
        if shift in SHIFTS and len(specs) != wanted:
            raise Refused(f"{len(specs)} tasks for the shift {shift!r}", where="--tasks",
                          remedy=f"it takes {wanted}")  # fmt: skip
        source = locate(model)
        check_length(source, plan.max_length)
        config = load_config(source).get_text_config()
        width = getattr(config, "hidden_size", None) or 768
        rates = flat_rates(width) if flat is None else tuple(float(rate) for rate in flat)
        if not rates or any(not 0 < rate < 1 for rate in rates) or len(set(rates)) < len(rates):
            raise Refused(f"{list(rates)} are no distinct rates between 0 and 1", where="--flat")
        layers = getattr(config, "num_hidden_layers", None)
        space = Space.of(parts=parts, layers=layers, flat=rates, tune=tune)
        base = with_tuned(base, space.tuned)
        if learn_old == "once" and (busy := busy_at_first(base, plan)):
            raise Refused(f"task one is learned flat and plain for all trials, without {busy}",
                          where="--learn-old once", remedy="take --learn-old each")  # fmt: skip
        first, again = len(controls(space, base, rates)), confirm * confirm_seeds
        if members:
            trials, rungs = first + members, INTERVALS
        if trials < (least := max(first + 1, confirm) + again):
            confirming = f" and {again} confirm the best {confirm}" if again else ""
            raise Refused(f"{trials} trials, of which {first} are controls{confirming}",
                          where="--trials", remedy=f"at least {least}")  # fmt: skip
        made = load_shifted(specs, shift, seed=seed, plan=plan, source=source)
        halves = made.first, made.second
        two = halves if shift == "task" else tuple(_drawn(half, seed, plan) for half in halves)
        kind_of(two).check(source, max_length=plan.max_length)
        if members:
            pbt.check_steps(plan, two)
        if plan.mix is not None:
            check_mix(plan.mix, kind_of(two), source)
        for task in two:
            if not task.selection:
                raise Refused("no selection rows to choose by", where=task.name,
                              remedy="raise --selection")  # fmt: skip
        return cls(
            model=str(model), specs=specs, shift=shift, base=base,
            space=space, flat=tuple(sorted(rates)), settings=plan, pruner=chosen,
            sampler=sampler, objective=objective, learn_old=learn_old,  # type: ignore[arg-type]
            confirm=confirm, confirm_seeds=confirm_seeds,
            rungs=evenly(rungs) if rungs else RUNGS[chosen], trials=trials,
            population=members, replicates=replicates, seed=seed, fresh=fresh, tasks=two,
            halves=halves, source=source, facts=made.facts,
        )  # fmt: skip

    @property
    def warnings(self) -> list[str]:
        """Warnings before the first trial: about the tasks, and about points that do nothing."""
        told = [f"{task.name}: {line}" for task in self.tasks for line in task.warnings]
        points, layers = self.space.parts - 2, self.space.layers
        if layers is not None and points > 2 * layers:  # a layer lies between two points at most
            told.append(f"{points} points over {layers} layers: some reach no layer, and are "
                        f"searched for nothing (--parts {layers + 2})")  # fmt: skip
        return told

    @property
    def controls(self) -> list[Control]:
        return controls(self.space, self.base, self.flat)

    @property
    def searching(self) -> int:
        """Of `trials`, those that draw a curve or are controls.

        The others confirm the best, or are members of a population.
        """
        return self.trials - self.population - self.confirm * self.confirm_seeds

    @property
    def old_rate(self) -> float:
        """The flat rate at which task one is learned where that is done once for all trials."""
        return self.flat[len(self.flat) // 2]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the replicates of every trial: the same for all, so that they are paired."""
        return [self.seed + r for r in range(self.replicates)]

    def first(self, folder: Path, seed: int) -> Path | None:
        """The run of task one that all trials of a seed go on from; None: each learns it."""
        return folder / "first" / f"seed-{seed}" if self.learn_old == "once" else None

    @property
    def further_seeds(self) -> list[int]:
        """The selection seeds that confirm, far from all others: both may be made more."""
        return [(self.seed + SEEDS // 2 + i) % SEEDS for i in range(self.confirm_seeds)]

    @property
    def fresh_seeds(self) -> list[int]:
        """The seeds of the final runs: none that a trial has used."""
        return [self.seed + self.replicates + i for i in range(self.fresh)]

    def pair(self, seed: int) -> tuple[Task, ...]:
        """The two tasks with the training and selection rows of a seed."""
        if seed == self.seed:
            return self.tasks
        if self.shift == "task":
            again, found = (load_tasks(self.specs, seed=s, plan=self.settings)
                            for s in (self.seed, seed))  # fmt: skip
            for task, now in zip(self.tasks, again, strict=True):
                if task.hash != now.hash:  # trials were scored on other rows than this seed's
                    raise Refused("its rows changed since this process read them",
                                  where=task.source,
                                  remedy="put them back and the same command goes on, or choose "
                                  "another --out")  # fmt: skip
            return tuple(found)
        return tuple(_drawn(half, seed, self.settings) for half in self.halves)

    @property
    def identity(self) -> dict[str, Any]:
        """The configuration that two processes must share to join a study: plain JSON values."""
        from holdfast.tasks.kinds.pretrained import files_hash, source_hash

        settings = self.settings.to_dict()
        apart = ("lr", "alone", "head", "save_steps")
        settings = {k: v for k, v in settings.items() if k not in apart}
        recipe = {k: v for k, v in self.base.to_dict().items() if k != "name"}
        body = {
            "model": self.model,
            "weights": source_hash(self.source),
            "tasks": [[task.name, task.hash] for task in self.tasks],
            "shift": self.shift,
            "recipe": recipe,
            "tune": sorted(self.space.tuned),
            "parts": self.space.parts,
            "flat": list(self.flat),
            "sampler": self.sampler,
            "pruner": self.pruner,
            "rungs": list(self.rungs),
            "objective": self.objective,
            "replicates": self.replicates,
            "seed": self.seed,
            "learn_old": self.learn_old,
            "settings": settings,
        }
        if self.population:
            body["population"] = self.population
        if (files := files_hash(self.source)) is not None:  # its configuration and tokenizer too
            body[WEIGHTS] = files
        plain: dict[str, Any] = json.loads(json.dumps(body))
        return plain

    @property
    def title(self) -> str:
        """Model, tasks and shift, with a hash of them: what rows of `trials.csv` belong to."""
        key = [self.model, [[t.name, t.evaluation_hash] for t in self.tasks], self.shift]
        mark = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
        names = " > ".join(task.name for task in self.tasks)
        return f"{slug(Path(self.model).name)}: {names} ({self.shift}) {mark}"


def load_shifted(
    specs: Sequence[str], shift: str, *, seed: int, plan: Settings, source: str
) -> Shifted:
    """The two tasks of a search and what their shift achieved.

    A shift of one task is made once for a study, from up to `POOL` times the training rows asked
    for; each seed then draws from the halves, so that no evaluation row changes its task.
    """
    from holdfast.tasks.shifts import shift as shifted

    if shift == "task":
        return shifted(shift, load_tasks(specs, seed=seed, plan=plan))
    pool = replace(plan, train_size=plan.train_size and POOL * plan.train_size)
    loaded = load_tasks(specs, seed=seed, plan=pool)
    if loaded[0].kind != "classification":
        raise Refused(f"a task of {loaded[0].kind} is not parted by {shift}", where="--shift",
                      remedy="name two tasks")  # fmt: skip
    embed = _embedder(source, loaded[0], plan.max_length) if shift == "cluster" else None
    return shifted(shift, loaded, seed=seed, embed=embed)


def _drawn(half: Task, seed: int, plan: Settings) -> Task:
    """A half with the selection rows, and the training rows, of a seed."""
    rows = [*half.train, *half.selection]
    size = count(plan.selection, len(rows), what="selection")
    if size >= len(rows):
        raise Refused(f"selection {plan.selection} leaves no row to train on", where=half.name)
    chosen, rest = stratified([r.label for r in rows], size, seed=f"selection {seed}", leave=1,
                              alike=[r.plain for r in rows])  # fmt: skip
    train, warnings = [rows[i] for i in rest], list(half.warnings)
    if plan.train_size is not None:
        # A warning about the pool's size does not concern the user.
        warnings = [line for line in warnings if not line.startswith("train_size ")]
        if plan.train_size > len(train):
            warnings.append(f"train_size {plan.train_size} takes all {len(train)} training rows")
        kept, _ = stratified([r.label for r in train], plan.train_size, seed=f"train {seed}")
        train = [train[i] for i in kept]
    return replace(half, train=tuple(train), selection=tuple(rows[i] for i in chosen),
                   warnings=tuple(warnings))  # fmt: skip


def _embedder(source: str, task: Task, max_length: int) -> Any:
    from holdfast.experiments.embed import embedder
    from holdfast.tasks.kinds.classification import KIND
    from holdfast.tasks.kinds.pretrained import load_tokenizer, quiet

    quiet()
    model = KIND.load_model(source, task, seed=0)  # only its encoder is used
    return embedder(model, load_tokenizer(source), max_length=max_length)


# --- in a folder --------------------------------------------------------------------------------


def known(folder: Path, plan: Plan, storage: str) -> str | None:
    """The study's name in its storage, by `study.json`; None where there is none yet.

    storage: as `holdfast.search.storage.kept` returns it. Refused: another search.
    """
    path, mine = folder / FILE, plan.identity
    if path.is_file():
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            name, before, where = str(body["name"]), dict(body["config"]), str(body["storage"])
        except (OSError, ValueError, KeyError, TypeError):
            raise Refused(f"its {FILE} is damaged", where=str(folder),
                          remedy="choose another --out") from None  # fmt: skip
        refuse_other(before, mine, str(folder))
        refuse_other({"storage": where}, {"storage": storage}, str(folder))
        return name
    if folder.is_dir() and any((folder / "trials").glob("*")):
        raise Refused(f"holds trials and no {FILE}", where=str(folder),
                      remedy="choose another --out")  # fmt: skip
    return None


def keep(folder: Path, plan: Plan, storage: str) -> str:
    """Write `study.json`; returns the study's name.

    The name is drawn anew for every folder: leases lie in the folder, so no two folders may work
    on one study.
    """
    name = f"holdfast-{slug(folder.name)[:40]}-{secrets.token_hex(4)}"
    body = {"name": name, "storage": storage, "config": plan.identity}
    write_text_atomic(folder / FILE, json.dumps(body, indent=1))
    return name


def refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse another configuration, naming what differs; a setting that came later than `before`
    had its default there."""
    if "settings" in now and isinstance(before.get("settings", {}), Mapping):
        usual = {k: v for k, v in defaults().items() if k in now["settings"]}
        before = {**before, "settings": {**usual, **before.get("settings", {})}}
    if "learn_old" in now:
        before = {"learn_old": "each", **before}  # of before it could be chosen
    if WEIGHTS not in before or WEIGHTS not in now:  # of before they were noted, or not known
        before, now = ({k: v for k, v in of.items() if k != WEIGHTS} for of in (before, now))
    if told := ", ".join(differences(before, now)):
        raise Refused(f"holds another search ({told})", where=where, remedy="choose another --out")
