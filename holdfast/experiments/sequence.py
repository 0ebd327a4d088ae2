"""Tasks learned one after another by one encoder, each tested after every task learned."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import Refused, tell_once
from holdfast.experiments.elsewhere import Elsewhere
from holdfast.experiments.memory import HALVED, within_memory
from holdfast.experiments.origin import FromRun, Origin, beginning
from holdfast.experiments.ranks import follows, join, ranks, wait
from holdfast.experiments.record import Record, commit, now, versions
from holdfast.experiments.runs import (
    FINAL,
    RECORD,
    WEIGHTS,
    check_disk,
    check_held,
    digest,
    open_run,
    setting_of,
)
from holdfast.experiments.scenario import scenario_of
from holdfast.experiments.settings import Settings
from holdfast.network.rates import Rates
from holdfast.recipe import HEADS, Recipe
from holdfast.tasks import Task, load_task
from holdfast.tasks.kinds import kind_of, one_kind
from holdfast.tasks.program import trust
from holdfast.tasks.scores import constant_score
from holdfast.tasks.spec import in_order

if TYPE_CHECKING:
    from holdfast.experiments.loggers import Loggers
    from holdfast.experiments.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a comparison asks of one of its runs.

    first: the run of the first task alone, trained once for all recipes that do nothing in it, from
    which a run that is not begun goes on; its scores are those of one that is trained by itself.
    scored: the rows that scores are of. notes: further keys of the record.
    """

    first: Path | None = None
    scored: Sequence[str] = ("evaluation", "selection")
    notes: Mapping[str, Any] = field(default_factory=dict)


def run_sequence(
    model: str | None,
    tasks: Sequence[str | Path],
    recipe: Recipe | str | None = None,
    *,
    seed: int | None = None,
    out: str | Path | None = None,
    from_run: str | Path | None = None,
    old_task: str | Path | None = None,
    without_old_rows: bool = False,
    reference: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    report_to: Sequence[str] = (),
    tests: Mapping[str, Mapping[str, str]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    label: str | None = None,
    progress: bool = True,
    command: Sequence[str] | None = None,
    arm: Arm | None = None,
    **settings: Any,
) -> Record:
    """Learn `tasks` in order and test every task learned so far after each.

    model: `minilm`, a saved model's folder or a Hub id. recipe: a `Recipe`, or the name of a
    preset or file (`plain`). out: the run's folder (default: runs/ and a hash of the
    configuration); a killed run resumes there from its last finished task or checkpoint, one with
    fewer tasks goes on, and a finished one is only read. label: the run's name in a progress bar.
    settings: see `Settings`.

    from_run: a finished run's folder, in place of `model`: its tasks come first, are learned
    already, and are tested again after each new one; recipe, seed and settings are its own unless
    given. Without `without_old_rows` their rows must be where they were, unchanged. Or a saved
    model, with `old_task`: rows of what it was trained on, so that methods can protect it; of a
    language model also running text (.txt).
    reference: running text by which general ability is measured before the first task and after
    each, see `holdfast.experiments.probe`; lm_eval: names of tasks of that package, run beside it.
    report_to: loggers of Transformers (`tensorboard`, …), which get the sequence as one run.
    arm: what `compare` asks of its runs.
    tests: tasks that are only tested on after each task, see `holdfast.experiments.elsewhere`.
    protocol: what the record keeps of the protocol that the run is part of.

    All input is checked, and `Refused` raised, before any weights are loaded.
    """
    join()
    tasks = in_order(tasks)
    if not isinstance(out, str | Path | None) or out == "":
        raise Refused(f"names no folder: {out!r}", where="--out", remedy="as runs/first")
    trust([*tasks, model])
    if without_old_rows and from_run is None:
        raise Refused("--without-old-rows needs it", where="--from", remedy="name a run")
    origin, model, chosen, seed, settings = beginning(
        model, from_run, old_task, recipe=recipe, seed=seed, settings=settings
    )
    if settings.get("bf16") == "auto" and out is not None:  # a run keeps what it began with
        settings["bf16"] = setting_of(out, "bf16", "auto")
    plan = Settings.from_dict(settings)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**20:
        raise Refused(f"must be a whole number from 0 to 2^20, not {seed!r}", where="--seed")
    old = origin.tasks(without_rows=without_old_rows, seed=seed, sizes=plan.sizes) if origin else []
    loaded = load_tasks(tasks, seed=seed, plan=plan, old=old)
    for task in loaded:
        for line in task.warnings:
            tell_once(f"{task.name}: {line}")
        if plan.warmup >= (steps := plan.total(len(task.train))):
            tell_once(f"{task.name}: its {steps} steps all lie in the warm-up of {plan.warmup}: "
                      f"the learning rate stays below {plan.lr:g}")  # fmt: skip
    if len(loaded) == 1 and (idle := chosen.idle_alone()):
        tell_once(idle)
    asked = {"reference": reference, "harness": lm_eval} if reference or lm_eval else {}
    away = Elsewhere(tests, loaded, head=plan.head, evaluation_size=plan.evaluation_size
                     ) if tests else None  # fmt: skip
    job = Job(model=model, recipe=chosen, seed=seed, command=list(command or ()) or _called(),
              bar=(label or "") if progress and not follows() else None, origin=origin, probe=asked,
              elsewhere=away, protocol=protocol, report_to=() if follows() else tuple(report_to),
              arm=arm or Arm())  # fmt: skip
    return job.run(loaded, plan, None if out is None else Path(out))


def _called() -> list[str] | None:
    """The words of this process; None in a notebook, whose kernel's repeat nothing."""
    return None if Path(sys.argv[0]).name == "ipykernel_launcher.py" else list(sys.argv)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a sequence has in common with the runs of its tasks alone."""

    model: str
    recipe: Recipe
    seed: int
    command: list[str] | None
    bar: str | None
    place: int = 0  # of the first task in its sequence: seeds are those it has there
    origin: Origin | None = None  # of the first tasks
    probe: Mapping[str, Any] = field(default_factory=dict)  # what is measured of general ability
    report_to: tuple[str, ...] = ()  # the loggers
    elsewhere: Elsewhere | None = None  # what it is tested on too
    protocol: Mapping[str, Any] | None = None
    arm: Arm = Arm()

    def run(self, tasks: list[Task], plan: Settings, folder: Path | None) -> Record:
        """Learn what a folder's record does not hold yet."""
        from holdfast.experiments.loggers import Loggers  # these load transformers: late
        from holdfast.experiments.mix import check_mix
        from holdfast.tasks.kinds.generation import check_running
        from holdfast.tasks.kinds.heads import headed
        from holdfast.tasks.kinds.pretrained import files_hash, locate

        if plan.batch_size % ranks():
            raise Refused(f"{plan.batch_size} rows cannot be shared by {ranks()} processes alike",
                          where="--batch-size", remedy=f"take a multiple of {ranks()}")  # fmt: skip
        loggers = Loggers(self.report_to)
        told = [describe(task) for task in tasks]
        kind = headed(kind_of(tasks), plan.head, tasks)
        scenario = scenario_of(told, own_heads=kind.HEADS)
        check_head(plan, self.recipe, self.origin, scenario)
        config = {
            "model": self.model,
            "tasks": [[t.name, t.hash] for t in tasks],  # in order: a mapping would lose it
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "settings": plan.to_dict(),
        }
        if self.place:
            config["place"] = self.place
        if self.origin is not None:
            config["from"] = self.origin.mark
        if self.arm.scored != Arm.scored:
            config["scored"] = list(self.arm.scored)  # so that no other run goes on from it
        source = locate(self.model) if self.origin is None else self.origin.source
        base = source
        if (plan.alone or self.probe) and self.origin is not None:
            base = locate(self.model)  # tasks alone begin there: refused now, not after the others
        try:
            kind.check(source, max_length=plan.max_length)
        except Refused as why:  # the name that was given, not where it lies
            named = self.model if why.where == source else why.where
            raise Refused(why.what, where=named, remedy=why.remedy) from None
        for task in tasks:
            check_running(source, task)
        if plan.mix is not None:
            config["mix"] = check_mix(plan.mix, kind_of(tasks), source)
        if (files := files_hash(source)) is not None:
            config[WEIGHTS] = files
        folder = Path("runs") / digest(config) if folder is None else folder
        probe = None
        if self.probe:
            from holdfast.experiments.probe import Probe

            probe = Probe(base, kind_of(tasks), max_length=plan.max_length, **self.probe)
        check_disk(folder, _bytes_needed(source, len(tasks)))
        with open_run(folder, config, together=True):
            path = folder / RECORD
            shared, first = self.arm.first, None
            # One that others deleted meanwhile is trained here, to the same scores.
            if shared and (shared / RECORD).is_file() and not path.is_file():
                first = FromRun(shared)
            record = Record.load(path) if path.is_file() else self._fresh(tasks, plan, first)
            wait()  # all have read it
            record.set_tasks(told)
            record.scenario = scenario
            record.settings["out"] = str(folder)  # it may have been moved
            before = record.to_dict()
            if probe is not None:
                probe.begin(record)
            if self.protocol is not None:
                record.extra["protocol"] = dict(self.protocol)
            record.recipe = self.recipe.to_dict()  # which may have been renamed
            record.settings["alone"] = plan.alone or record.settings.get("alone", False)
            record.extra.update(self.arm.notes)
            last = folder / "tasks" / f"{len(tasks)}-{tasks[-1].name}"
            if record.status != "done":
                began = first or self.origin
                self._learn(source, tasks, plan, folder, record, probe, loggers, began)
            elif last.is_dir() and not (folder / FINAL).is_dir() and not follows():
                from holdfast.experiments.serving import finish

                finish(last, folder)
            for place, task in enumerate(tasks[1:] if plan.alone else (), 1):
                if record.alone.get(task.name) is None and task.train:
                    home = folder / "alone" / task.name
                    alone = replace(self, place=place, origin=None, probe={}, elsewhere=None,
                                    report_to=(), arm=Arm())  # fmt: skip
                    by_itself = alone.run([task], replace(plan, alone=False), home)
                    record.alone[task.name] = by_itself.scores[0][0]
            record.status = "done"
            if record.to_dict() != before:
                check_held(folder)
                record.save(path)
            return record

    def _fresh(self, tasks: list[Task], plan: Settings, first: FromRun | None) -> Record:
        from holdfast.tasks.kinds.pretrained import MINILM

        if began := first or (self.origin if isinstance(self.origin, FromRun) else None):
            record = began.record
            record.settings = {**record.settings, **plan.to_dict()}
            record.command, record.commit = self.command, commit(Path(__file__).parent)
            record.seed, record.created = self.seed, now()
            for key in ("protocol", "first", "tuned", "serves", *[HALVED] * (first is None)):
                record.extra.pop(key, None)  # they are of that run alone
            if first is None:
                record.versions, record.rates = versions(), None  # they are this recipe's
            else:
                record.tasks = [describe(tasks[0])]
                told = {"folder": str(first.folder), "seconds": record.seconds[0]}
                record.extra["first"] = told
        else:
            record = Record(
                tasks=[describe(t) for t in tasks],
                kind="sequence" if len(tasks) > 1 else "train",
                settings={**plan.to_dict(), "model": self.model, "optimizer": "adamw_torch_fused"},
                seed=self.seed,
                command=self.command,
                commit=commit(Path(__file__).parent),
                exposure=MINILM["exposure"] if self.model == "minilm" else None,
                status="running",
            )
        if self.origin is not None:
            record.extra["from"] = str(self.origin.folder)
            # The recipes of the tasks before, which a report tells from those of this one.
            record.extra["began"] = [*record.extra.get("began", []), self.origin.recipe]
        if len(tasks) == 1 and (idle := self.recipe.idle_alone()):
            record.warn(idle)
        if "prototype" in plan.head:
            record.warn("No step was taken: the head is made of class means of the encoder as it "
                        "was.")  # fmt: skip
        if plan.head == "levi":
            record.warn("The encoder was not trained: each task has an ensemble of its own on it.")
        return record

    def _learn(
        self, source: str, tasks: list[Task], plan: Settings, folder: Path, record: Record,
        probe: Probe | None, loggers: Loggers, begun: Origin | None,
    ) -> None:  # fmt: skip
        from holdfast.experiments.learner import Learner

        def begin(learner: Learner) -> None:
            assert begun is not None
            started = time.monotonic()
            begun.begin(learner)
            if begun is not self.origin:  # methods read the first task, as they do at its end
                spent = time.monotonic() - started
                record.seconds[0] = round((record.seconds[0] or 0.0) + spent, 3)

        def learn(plan: Settings) -> None:
            learner = Learner(folder, source, tasks, self.recipe, plan, self.seed, record,
                              bar=self.bar, place=self.place, scored=self.arm.scored,
                              probes=[p for p in (probe, self.elsewhere) if p],
                              also=[loggers] if self.report_to else [],
                              begin=None if begun is None else begin)  # fmt: skip
            with loggers.over(learner):
                for index in range(len(record.seconds), len(tasks)):
                    try:
                        learner.learn(index)
                    except Refused as refusal:  # training diverged, or a disk is full
                        record.warn(f"{tasks[index].name} was not learned: {refusal}")
                        with suppress(Refused):
                            check_held(folder)
                            record.save(folder / RECORD)
                        raise
                    check_held(folder)
                    record.save(folder / RECORD)
                    loggers.tell()
            learner.finish()

        within_memory(learn, plan, record, folder)


def check_head(plan: Settings, recipe: Recipe, origin: Origin | None, scenario: str | None) -> None:
    """Refuse what a choice of head does not go with."""
    where = f"--head {plan.head}"
    if "prototype" in plan.head and recipe.to_dict() != Recipe(name=recipe.name).to_dict():
        raise Refused(f"trains nothing, and the recipe {recipe.name} would not be at work",
                      where=where, remedy="--recipe plain")  # fmt: skip
    moving = [m.name for m in recipe.methods
              if m.needs_old_task or m.changes_weights or m.defines("prepare")
              or m.group == "subnetwork"]  # fmt: skip
    moving += [name for name in ("peft", *HEADS) if getattr(recipe, name)]
    moving += ["rates"] * (recipe.rates != Rates.flat())
    if plan.head == "levi" and moving:
        raise Refused(f"leaves the encoder as it is, and recipe {recipe.name} has parts for one "
                      f"that learns ({', '.join(moving)})", where=where,
                      remedy="--recipe plain")  # fmt: skip
    if plan.alone and scenario == "class-incremental":
        raise Refused("a task alone has other labels than the head: its score is no measure",
                      where="--alone", remedy="leave it out")  # fmt: skip
    if origin is None:
        return
    was = origin.settings.get("head", "task")
    size = len(origin.record.tasks) if origin.record is not None else 1
    # A single task's head is the same, shared or not; prototypes and ensembles are other models.
    if plan.head != was and (size > 1 or not {plan.head, was} <= {"task", "shared"}):
        raise Refused(f"what it goes on from was learned with --head {was}", where=where,
                      remedy=f"--head {was}, or begin anew")  # fmt: skip


def load_tasks(
    specs: Sequence[str | Path], *, seed: int, plan: Settings, old: Sequence[Task] = ()
) -> list[Task]:
    """Every task, checked, after the `old` ones; two of one name are refused."""
    if not specs:
        raise Refused("no tasks", where="--tasks", remedy="name a folder, a file or builtin:NAME")
    loaded = [*old, *(load_task(spec, seed=seed, **plan.sizes) for spec in specs)]
    one_kind(loaded)
    names = [t.name for t in loaded]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"two tasks are called {name!r}", where="--tasks",
                          remedy="give one another name: FILE?name=other")  # fmt: skip
    return loaded


def describe(task: Task) -> dict[str, Any]:
    """What a record holds about a task; constant: the score of one answer for all its rows."""
    labels = [row.label for row in task.evaluation]
    classes = None if task.labels is None else len(task.labels)
    return {
        "name": task.name,
        "kind": task.kind,
        "metric": task.metric,
        "labels": None if task.labels is None else list(task.labels),
        "rows": task.rows,
        "classes": task.classes,
        "constant": constant_score(task.metric, labels, classes) if labels else None,
        "hash": task.hash,
        "evaluation_hash": task.evaluation_hash,
        "pairs": task.pairs,
        "source": task.source,
        "synthetic": task.synthetic,
        "warnings": list(task.warnings),
    }


def _bytes_needed(source: str, tasks: int) -> int:
    """A checkpoint per task with its method state, and three of training, with moments."""
    weights = Path(source) / "model.safetensors"
    size = weights.stat().st_size if weights.is_file() else 500_000_000
    return size * (3 * tasks + 3 * 3)
