"""What a sequence goes on from: a run that is finished, or a model that others trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from holdfast.errors import Refused
from holdfast.experiments.ranks import first
from holdfast.experiments.record import Record
from holdfast.experiments.runs import CONFIG, RECORD, config_in, disagreement
from holdfast.experiments.settings import SIZES
from holdfast.files import no_archive
from holdfast.recipe import Recipe
from holdfast.tasks import Task, load_task, slug
from holdfast.tasks.kinds import kind_named
from holdfast.tasks.program import parted, trusted
from holdfast.tasks.spec import parse
from holdfast.training.manifest import MANIFEST, damage, identity, listed

if TYPE_CHECKING:
    from holdfast.experiments.learner import Learner


class FromRun:
    """A finished run: its encoder, its heads, what its methods remember, its scores.

    Its tasks' rows are read again from where the record says they lie, as they were chosen there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = Record.load(folder)
        if self.record.status != "done":
            raise Refused("is not finished", where=str(folder), remedy="let its command go on")
        try:
            config = config_in(folder)
            self.model, self.seed = str(config["model"]), int(config["seed"])
            self.recipe, self.settings = dict(config["recipe"]), dict(config["settings"])
            wrong = disagreement(config, self.record)
        except (ValueError, KeyError, TypeError):  # of them Refused
            raise Refused(f"{CONFIG} is missing or damaged", where=str(folder),
                          remedy="run its command again") from None  # fmt: skip
        if wrong is not None:
            raise Refused(wrong, where=str(folder / CONFIG), remedy="run its command again")
        for task in self.record.tasks:
            if lacking := {"source", "hash", "metric", "labels"} - {*task}:
                raise Refused(f"damaged record: a task without {', '.join(sorted(lacking))}",
                              where=str(folder), remedy="run its command again")  # fmt: skip
            if slug(task["name"]) != task["name"]:  # it is part of paths
                raise Refused("damaged record: a task's name is not a plain name",
                              where=str(folder), remedy="run its command again")  # fmt: skip
            task.setdefault("chosen", {"seed": self.seed} | self._sizes())
        self.size = len(self.record.tasks)
        self.last = self.home(self.size - 1)
        if wrong := damage(self.last) if self.last.is_dir() else "is gone":
            raise Refused(wrong, where=str(self.last), remedy="run its command again")
        self.source = str(self.last)
        self.mark = identity(self.last)

    def home(self, place: int) -> Path:
        """The folder of a task, where there is one."""
        return self.folder / "tasks" / f"{place + 1}-{self.record.names[place]}"

    def _sizes(self) -> dict[str, Any]:
        return {name: self.settings[name] for name in SIZES if name in self.settings}

    def tasks(
        self, *, without_rows: bool = False, seed: int = 0, sizes: Mapping[str, Any] | None = None
    ) -> list[Task]:
        """The tasks of the run, as it chose them; without rows, only what is known of them."""
        return [_absent(t) if without_rows else again(t) for t in self.record.tasks]

    def begin(self, learner: Learner) -> None:
        """Put the last task's folder in place, remembered by the recipe's methods."""
        from holdfast.experiments import serving
        from holdfast.training.checkpoints import saved_with

        before = {k: v for k, v in self.recipe.items() if k in ("peft", "lora")}
        other = Recipe.from_dict(before).peft != learner.recipe.peft
        if other or not saved_with(self.last, learner.recipe.methods):
            learner.remember(serving.models_in(self.last)[1])
            learner.keep(self.size - 1)
            return

        def link() -> None:
            home = learner.home(self.size - 1)
            home.mkdir(parents=True, exist_ok=True)
            serving.link_files(self.last, home, [*listed(self.last), MANIFEST])

        first(link)


class FromModel:
    """A Hugging Face model in use: the one task that it learned elsewhere is `old_task`.

    Of a classifier the classes must be the labels of its configuration, and its own head is the
    task's. Of a language model it may be running text: methods hold what they read of it.
    """

    record, seed = None, 0
    settings: Mapping[str, Any] = {}
    recipe: Mapping[str, Any] | None = None

    def __init__(self, folder: Path, old_task: str | Path) -> None:
        self.source, self.model, self.folder = str(folder), str(folder), folder
        self.old_task = old_task

    def tasks(
        self, *, without_rows: bool = False, seed: int = 0, sizes: Mapping[str, Any] | None = None
    ) -> list[Task]:
        """The old task, of which so many rows (`SIZES`) are drawn by `seed`."""
        return [self.named(load_task(self.old_task, seed=seed, **sizes or {}))]

    def named(self, task: Task) -> Task:
        """The task with its label ids in the order of the model's head, if it has one."""
        kind: Any = kind_named(task.kind)
        if not kind.HEADS:
            try:
                kind.check(self.source, max_length=1)
            except Refused as refusal:
                if not task.running:
                    raise
                raise Refused(f"{refusal.what}: running text has no labels for its head",
                              where=self.source,
                              remedy="name rows that it was trained on") from None  # fmt: skip
            return task
        config = kind.load_config(self.source)
        if not kind.has_head(config):
            raise Refused("has no classification head", where=self.source,
                          remedy="name a model that was trained on the old task")  # fmt: skip
        size = 1 if task.labels is None else len(task.labels)
        if config.num_labels != size:
            raise Refused(f"its head has {config.num_labels} outputs, {task.name} needs {size}",
                          where=self.source)  # fmt: skip
        if task.labels is None:
            return task
        names = tuple(str(config.id2label[i]) for i in range(size))
        if set(names) == set(task.labels):
            return task.renumbered(names)
        numbers = [str(i) for i in range(size)]
        if names == tuple(f"LABEL_{i}" for i in numbers) and set(task.labels) == set(numbers):
            return task.renumbered(numbers)
        unknown = sorted(set(task.labels) - set(names))
        raise Refused(f"labels {', '.join(unknown)} are not of its head ({', '.join(names)})",
                      where=self.source, remedy="name rows and id2label in its config.json alike",
                      )  # fmt: skip

    @property
    def mark(self) -> str | None:
        """Its weights, by hash."""
        from holdfast.tasks.kinds.pretrained import source_hash

        return source_hash(self.source)

    def begin(self, learner: Learner) -> None:
        """Remember the old task, and score it as it is."""
        from holdfast.experiments.sequence import describe

        learner.remember([learner.kind.open_saved(self.source, describe(learner.tasks[0]))])
        learner.note(0, steps=0, skipped=0)


Origin = FromRun | FromModel


def origin_of(folder: Path, old_task: str | Path | None) -> Origin:
    """What lies in `folder`; `Refused` if it is neither."""
    no_archive(folder)
    if (folder / RECORD).is_file():
        if old_task is not None:
            raise Refused("is a run, which knows its tasks", where=str(folder),
                          remedy="leave out --old-task")  # fmt: skip
        return FromRun(folder)
    if not (folder / "config.json").is_file():
        raise Refused("is neither a run nor a saved model", where=str(folder),
                      remedy="name the folder of a run (the one with record.json)")  # fmt: skip
    if old_task is None:
        raise Refused("is a model, not a run", where=str(folder),
                      remedy="add --old-task FILE, rows of what it was trained on")  # fmt: skip
    return FromModel(folder, old_task)


class Beginning(NamedTuple):
    """What the tasks asked for come after: a pre-trained model, or an origin."""

    origin: Origin | None
    model: str
    recipe: Recipe
    seed: int
    settings: dict[str, Any]


def beginning(
    model: str | Path | None,
    from_run: str | Path | None,
    old_task: str | Path | None,
    *,
    recipe: Recipe | str | None,
    seed: int | None,
    settings: Mapping[str, Any],
) -> Beginning:
    """A model by name, or what lies in `from_run`: recipe, seed and settings that are not asked for
    are a run's own."""
    if not isinstance(model, str | Path | None):
        raise Refused(f"must be a name, not a {type(model).__name__}", where="--model",
                      remedy="save it, and name its folder")  # fmt: skip
    if from_run is None:
        if model is None or old_task is not None:
            raise Refused("no model" if model is None else "--old-task needs it", where="--from",
                          remedy="name a run or a saved model")  # fmt: skip
        chosen = Recipe.named("plain" if recipe is None else recipe)
        return Beginning(None, str(model), chosen, 0 if seed is None else seed, dict(settings))
    if model is not None:
        raise Refused("comes with its own model", where="--from", remedy="leave out --model")
    found = origin_of(Path(from_run), old_task)
    own = found.recipe if recipe is None else None
    named = "default" if recipe is None else recipe
    chosen = Recipe.named(named) if own is None else Recipe.from_dict(own)
    return Beginning(found, found.model, chosen, found.seed if seed is None else seed,
                     {**found.settings, **settings})  # fmt: skip


def again(told: Mapping[str, Any]) -> Task:
    """A task as the record describes it; `Refused` where its rows are gone or changed."""
    remedy = "bring its rows back, or say --without-old-rows: it will not be tested again"
    asked = parse(told["source"])  # what would be read, whatever kind the record tells
    if asked.kind == "module" and not trusted(parted(asked.place)[0]):
        raise Refused("its Python file would be run, and was not named", where=told["source"],
                      remedy="look at it, then say --trust-code")  # fmt: skip
    try:
        task = load_task(told["source"], **told["chosen"])
    except Refused as refusal:
        where = f"{told['name']} ({refusal.where})"
        raise Refused(f"its rows cannot be read again ({refusal.what})", where=where,
                      remedy=remedy) from None  # fmt: skip
    if set(told["labels"] or ()) == set(task.labels or ()):  # a classifier's order may be its own
        task = task.renumbered(told["labels"] or ())
    if task.hash != told["hash"]:
        raise Refused("its rows changed since it was learned",
                      where=f"{told['name']} ({told['source']})", remedy=remedy)  # fmt: skip
    return task


def _absent(told: Mapping[str, Any]) -> Task:
    labels = None if told["labels"] is None else tuple(told["labels"])
    task = Task(name=told["name"], labels=labels, metric=told["metric"], train=(), selection=(),
                evaluation=(), source=told["source"],
                kind=told.get("kind", "classification"))  # fmt: skip
    # It is the same task, though its rows are gone.
    vars(task).update(hash=told["hash"], pairs=told.get("pairs", False))
    return task
