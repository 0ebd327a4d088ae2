"""Protocols: sequences of tasks, their rows and settings, as others published them, by one name.

A protocol is a YAML file, in `protocols/` here or a user's own, that `Protocol` describes; what a
task's word stands for is said in it or in `tasks.yaml`. docs/protocols.md has the format.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holdfast.errors import Refused, nearest
from holdfast.files import read_yaml
from holdfast.tasks import hub
from holdfast.tasks.spec import parse, with_options

HOME = Path(__file__).parent / "protocols"
KNOWN = Path(__file__).parent / "tasks.yaml"
# What was published -> our setting of it.
HEADS = {"task-incremental": "task", "domain-incremental": "shared", "class-incremental": "shared"}

Word = Annotated[str, Field(pattern=r"^[a-z0-9_][a-z0-9_-]{0,40}$")]  # part of paths
Line = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StandIn(_Strict):
    """Other rows than those that were meant, and what differs."""

    folder: Line
    differs: Line


class Place(_Strict):
    """Where the rows of a task are."""

    spec: Line | None = None  # as `holdfast.load_task` takes it; most are ids on the Hub
    folder: Line | None = None  # its folder (or file) in --data, with options after a `?`
    stand_in: StandIn | None = None  # where that folder is not there


class Cited(_Strict):
    """What others report: the average of all tasks at the end, in percent, by method."""

    source: Line
    model: Line
    averages: Annotated[dict[str, float], Field(min_length=1)]
    sequence: Word | None = None  # which of the protocol's; None: its only one


class Protocol(_Strict):
    """A protocol as its file says it."""

    about: Line
    source: Line
    sequences: Annotated[dict[Word, Annotated[list[Word], Field(min_length=1)]],
                         Field(min_length=1)]  # fmt: skip
    scenario: Literal["task-incremental", "domain-incremental", "class-incremental"] | None = None
    tasks: dict[Word, Place] = {}  # those that are not in tasks.yaml, or other there
    # Tasks that are only tested on: label learned -> answer there, where it is called otherwise.
    tests: dict[Word, dict[str, str]] = {}
    per_class: Annotated[int, Field(gt=0)] | None = None  # training rows of each class, at most
    metric: Line | dict[Word, Line] | None = None  # of every task, or by task
    settings: dict[str, Any] = {}  # of `Settings`, whose defaults the rest keeps
    differs: list[Line] = []  # what is other here than what was published, whatever the rows
    cited: list[Cited] = []
    caveats: list[Line] = []  # why the cited figures may not compare

    @classmethod
    def named(cls, word: str) -> Protocol:
        """The protocol of a name, or in a YAML file; `Refused` if it is none."""
        path = HOME / f"{word}.yaml" if word in names() else Path(word)
        if path.suffix not in (".yaml", ".yml"):
            raise Refused(f"no protocol {word!r}", where="--protocol",
                          remedy=f"{nearest(word, names())} (or a YAML file)")  # fmt: skip
        found: Protocol = _read(cls, read_yaml(path), str(path))
        known, where = {*found.tasks, *places()}, str(path)
        for task in (*(t for order in found.sequences.values() for t in order), *found.tests):
            if task not in known:
                raise Refused(f"no task {task!r}", where=where, remedy=nearest(task, [*known]))
        for name, order in found.sequences.items():
            if twice := sorted({task for task in order if order.count(task) > 1}):
                raise Refused(f"{twice[0]} twice in {name}", where=where)
        for cited in found.cited:
            if (cited.sequence or next(iter(found.sequences))) not in found.sequences:
                raise Refused(f"no sequence {cited.sequence!r}", where=where,
                              remedy=nearest(str(cited.sequence), [*found.sequences]))  # fmt: skip
            if cited.sequence is None and len(found.sequences) > 1:
                raise Refused(f"{cited.source}: of which sequence?", where=where,
                              remedy="add `sequence: …`")  # fmt: skip
        if "head" in found.settings:
            raise Refused("the head is what the scenario says", where=where,
                          remedy="say scenario: class-incremental")  # fmt: skip
        if found.cited and not found.caveats:
            raise Refused("cited figures without caveats", where=where,
                          remedy="say why they may not compare")  # fmt: skip
        return found

    def plan(
        self, name: str, given: Mapping[str, Any], *, data: Path | None = None,
        only_served: bool = False,
    ) -> Plan:  # fmt: skip
        """What is to be run: a spec for each task that is there.

        given: settings of the user's own, which win. data: where the tasks' folders are; None: what
        `Place.spec` says. `Refused` names the tasks that are nowhere, unless `only_served`.
        """
        if data is not None and not data.is_dir():
            raise Refused("no such folder", where=f"--data {data}")
        every = dict.fromkeys([*(t for o in self.sequences.values() for t in o), *self.tests])
        specs, differs, missing = dict[str, str](), [*self.differs], list[str]()
        why: Refused | None = None  # of the first that is missing
        for task in every:
            try:
                spec, other = _served(self._place(task), data)
            except Refused as refusal:
                missing, why = [*missing, task], why or refusal
                continue
            differs += [f"{task}: {other}"] if other else []
            metric = self.metric.get(task) if isinstance(self.metric, dict) else self.metric
            most = None if "train_size" in given else self.per_class
            more = {"metric": metric, "per_class": most, "name": task}
            specs[task] = with_options(spec, **{k: str(v) for k, v in more.items() if v})
            if most and parse(specs[task]).options.per_class is None:
                differs.append(f"{task}: all training rows; per_class is not for its kind of task")
        sequences = {s: [specs[t] for t in o if t in specs] for s, o in self.sequences.items()}
        sequences = {name: order for name, order in sequences.items() if order}
        if missing and not (only_served and sequences):
            remedies = [] if data else ["name a folder that holds their folders by --data"]
            remedies += ["--only-served runs the rest"] if sequences else []
            said = f" ({why.what})" if why and data is None else ""
            raise Refused(f"not to be had: {', '.join(map(self._folder, missing))}{said}",
                          where=f"--data {data}" if data else f"--protocol {name}",
                          remedy=", or ".join(remedies) or None)  # fmt: skip
        usual = dict(self.settings)
        if self.scenario is not None and max(map(len, sequences.values())) > 1:
            usual["head"] = HEADS[self.scenario]
        if self.per_class is not None and "train_size" in given:
            differs.append(f"train_size {given['train_size']} was asked for; the protocol has "
                           f"per_class {self.per_class}")  # fmt: skip
        differs += [f"{key} {value} was asked for; the protocol has {key} {usual[key]}"
                    for key, value in given.items() if usual.get(key, value) != value]  # fmt: skip
        told = {"name": name, "about": self.about, "source": self.source, "differs": differs,
                "left_out": missing, "caveats": self.caveats}  # fmt: skip
        tests = {specs[t]: answers for t, answers in self.tests.items() if t in specs}
        return Plan(self, sequences, tests, {**usual, **given}, told)

    def _place(self, task: str) -> Place:
        return self.tasks[task] if task in self.tasks else places()[task]

    def _folder(self, task: str) -> str:
        """A task with the folder that it would be in, if that has another name."""
        folder = str(self._place(task).folder or task).partition("?")[0]
        return task if folder == task else f"{task} (folder {folder})"


@dataclass(frozen=True)
class Plan:
    """A protocol with the rows that there are."""

    protocol: Protocol
    sequences: dict[str, list[str]]  # name -> specs
    tests: dict[str, dict[str, str]]  # spec -> label learned -> answer there
    settings: dict[str, Any]
    told: dict[str, Any]  # what a record keeps of it, but for what is of one sequence

    def of(self, sequence: str) -> dict[str, Any]:
        """What the record of a run of that sequence keeps; figures only of the same tasks."""
        whole = len(self.sequences[sequence]) == len(self.protocol.sequences[sequence])
        cited = [c.model_dump(exclude={"sequence"}) for c in self.protocol.cited
                 if whole and c.sequence in (None, sequence)]  # fmt: skip
        return {**self.told, "sequence": sequence, "cited": cited}

    def folder(self, sequence: str) -> str:
        """Where its runs are below --out: of several, each has a folder."""
        return sequence if len(self.protocol.sequences) > 1 else ""


def names() -> list[str]:
    """The protocols that come with holdfast."""
    return sorted(path.stem for path in HOME.glob("*.yaml"))


@functools.cache
def places() -> dict[str, Place]:
    """The tasks that any protocol may name."""
    return {name: _read(Place, told, f"{KNOWN.name}: {name}")
            for name, told in read_yaml(KNOWN).items()}  # fmt: skip


def _served(place: Place, data: Path | None) -> tuple[str, str | None]:
    """The spec of rows that are there, and what differs in them; `Refused` if there are none."""
    if data is None:
        if place.spec is None:
            raise Refused("only in folders")
        _check_there(place.spec)
        return place.spec, None
    for found, differs in ((place.folder, None),
                           *((s.folder, s.differs) for s in [place.stand_in] if s)):  # fmt: skip
        if found is not None and (data / found.partition("?")[0]).exists():
            return str(data / found), differs
    raise Refused("no such folder")


def _check_there(spec: str) -> None:
    """Refuse a path that does not exist, and an id for which the Hub gives nothing."""
    asked = parse(spec)
    if asked.kind == "hub":
        hub.load(asked.place, asked.options)
    elif asked.kind in ("folder", "file", "text") and not Path(asked.place).exists():
        raise Refused("no such file", where=spec)


def _read(cls: Any, values: Any, where: str) -> Any:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = sorted({*cls.model_fields, *Place.model_fields, *Cited.model_fields})
            what, remedy = f"unknown key {at!r}", nearest(str(first["loc"][-1]), known)
        elif first["type"] == "missing":
            what, remedy = f"missing key {at!r}", f"add `{at}: …`"
        else:
            what, remedy = f"{at}: {first['msg']}, not {str(first['input'])[:100]!r}", None
        raise Refused(what, where=where, remedy=remedy) from None
