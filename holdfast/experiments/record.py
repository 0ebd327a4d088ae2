"""Everything about one run, as JSON: enough to draw its report and to repeat it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.errors import Refused
from holdfast.experiments import metrics
from holdfast.experiments.intact import REPEAT, check
from holdfast.experiments.metrics import Cell
from holdfast.experiments.ranks import follows
from holdfast.experiments.scenario import SCENARIOS, scenario_of
from holdfast.files import (
    SEAL,
    check_seal,
    no_archive,
    parse_json,
    read_plain,
    sealed,
    write_text_atomic,
)

SCHEMA = 1
LARGEST = 256 << 20  # bytes of a file; one of a hundred tasks has a few million
KINDS = ("sequence", "train")
STATUSES = ("done", "running")
PACKAGES = ("holdfast", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy",
            "scipy")  # fmt: skip


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python, holdfast and the packages below it, without importing any of them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: str | Path = ".") -> str | None:
    """The commit of holdfast itself that is checked out in `folder`, `+changes` if files differ.

    None where `folder` is in no repository, or in one that holdfast is merely installed in.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve().parents[1] / "__init__.py"))
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@dataclass(kw_only=True)
class Record:
    """One run: a sequence of tasks (`kind="sequence"`) or a single task (`kind="train"`).

    `scores[i][j]` is the evaluation score on task j after learning task i, None where it was not
    measured; by default it is all None. The metrics are computed from it whenever they are read,
    and stored in the file for other readers.

    Example:
        >>> tasks = [{"name": "trec6"}, {"name": "snli"}]
        >>> record = Record(tasks=tasks, scores=[[0.95, None], [0.75, 0.80]])
        >>> round(record.forgetting, 2), round(record.new_plus_old, 2)
        (0.2, 1.55)
    """

    tasks: list[dict[str, Any]]  # as `describe` in `sequence` makes them
    scores: list[list[Cell]] = field(default_factory=list)  # T x T, evaluation rows
    kind: str = "sequence"
    scenario: str | None = None  # one of SCENARIOS; None for a single task
    holdfast: str = field(default_factory=lambda: versions().get("holdfast", "not installed"))
    created: str = field(default_factory=now)
    model: dict[str, Any] = field(default_factory=dict)  # name, architecture, parameters, layers, …
    selection_scores: list[list[Cell]] | None = None  # T x T, selection rows
    before_end: dict[str, list[Cell]] = field(default_factory=dict)  # task name -> scores (T,) just
    # before methods changed weights at its end (merging), evaluation rows
    head_first: dict[str, dict[str, Any]] = field(default_factory=dict)  # task name -> fit, …
    alone: dict[str, Cell] = field(default_factory=dict)  # task name -> score trained alone
    general: dict[str, Any] = field(default_factory=dict)  # reference; base, after: by measure
    movement: dict[str, dict[str, Any]] = field(default_factory=dict)  # task name -> parts, …
    history: list[dict[str, Any]] = field(default_factory=list)  # learning, step, scores (T,), …
    recipe: dict[str, Any] = field(default_factory=dict)  # name, and what its YAML says
    rates: dict[str, Any] | None = None  # order, multiplier, depth, parameters: (parts,) each
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=versions)  # and device, precision, threads
    commit: str | None = None
    command: list[str] | None = None
    seconds: list[Cell] = field(default_factory=list)  # (T,) of each finished task
    elapsed: float = 0.0  # seconds on the task that is being learned, over all processes
    steps: list[int | None] = field(default_factory=list)  # (T,)
    skipped_steps: list[int | None] = field(default_factory=list)  # (T,)
    methods_state: dict[str, Any] = field(default_factory=dict)  # name -> bytes, bytes_per_weight
    status: str = "done"
    exposure: str | None = None  # what the model saw in pre-training, as far as its card says
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a newer holdfast, kept

    def __post_init__(self) -> None:
        size = len(self.tasks)
        if not self.scores:
            self.scores = [[None] * size for _ in range(size)]
        for scores in (self.scores, self.selection_scores):
            if scores is not None and len(metrics.square(scores)) != size:
                raise ValueError(f"a matrix of {len(scores)} rows for {size} tasks")
        if self.scenario is None:  # of before there was a choice
            text = self.tasks[0].get("kind") == "generation"
            self.scenario = scenario_of(self.tasks, own_heads=not text)
        scenarios = (None, *SCENARIOS)
        for known, value in ((KINDS, self.kind), (STATUSES, self.status),
                             (scenarios, self.scenario)):  # fmt: skip
            if value not in known:
                raise ValueError(f"{value!r} is not one of {', '.join(map(str, known))}")

    @property
    def names(self) -> list[str]:
        """The tasks in the order they were learned."""
        return [str(task["name"]) for task in self.tasks]

    @property
    def metrics(self) -> dict[str, Cell]:
        """Every metric of `holdfast.experiments.metrics` by name, None where not measured."""
        return metrics.summary(self.scores, [self.alone.get(name) for name in self.names])

    forgetting = property(lambda self: self.metrics["forgetting"])
    backward_transfer = property(lambda self: self.metrics["backward_transfer"])
    forward_transfer = property(lambda self: self.metrics["forward_transfer"])
    average = property(lambda self: self.metrics["average"])
    plasticity = property(lambda self: self.metrics["plasticity"])
    new_plus_old = property(lambda self: self.metrics["new_plus_old"])

    def warn(self, line: str) -> None:
        """Note what a reader must know of this run, once."""
        if line not in self.warnings:
            self.warnings.append(line)

    def set_tasks(self, tasks: Sequence[dict[str, Any]]) -> None:
        """Go on with these tasks, which begin with those that were learned."""
        learned, size = len(self.seconds), len(tasks)
        if [(t["name"], t["hash"]) for t in tasks] == [
            (t["name"], t.get("hash")) for t in self.tasks
        ]:
            return
        self.forget_from(learned)
        self.tasks = [*self.tasks[:learned], *tasks[learned:]]
        more: list[Cell] = [None] * (size - learned)
        for matrix in (self.scores, self.selection_scores):
            if matrix is not None:
                matrix[:] = [[*row[:learned], *more] for row in matrix[:learned]]
                matrix += [[None] * size for _ in more]
        for row in (*self.before_end.values(), *(h.get("scores") for h in self.history)):
            if row is not None:
                row[:] = [*row[:learned], *more]
        self.kind = "sequence" if size > 1 else "train"
        self.status = "running" if size > learned else self.status

    def forget_from(self, index: int) -> None:
        """Drop what was measured of a task and those after it: they will be learned again."""
        for matrix in (self.scores, self.selection_scores or []):
            matrix[index:] = [[None] * len(self.tasks) for _ in matrix[index:]]
        for values in (self.seconds, self.steps, self.skipped_steps):
            del values[index:]
        after: dict[str, Any] = self.general.get("after", {})
        for name in self.names[index:]:
            for kept in (self.before_end, self.head_first, self.movement, after):
                kept.pop(name, None)
        self.history = [h for h in self.history if h["learning"] < index]
        self.elapsed = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values in the file's order: no NaN, no credentials."""
        body = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        extra = body.pop("extra")
        body["command"] = None if self.command is None else without_secrets(self.command)
        layout = {"schema": SCHEMA, "kind": body.pop("kind"), **body}
        layout["metrics"] = self.metrics
        return _plain({**extra, **layout})

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], *, where: str | None = None) -> Record:
        """The record of a parsed file; Refused if it is not one, or not as it was written.

        The metrics are computed anew.
        """
        if not isinstance(body, Mapping) or "schema" not in body:
            raise Refused("not a holdfast record", where=where, remedy="pass a record.json")
        if body["schema"] != SCHEMA:
            raise Refused(
                f"record schema {body['schema']!r}, this holdfast reads {SCHEMA}",
                where=where,
                remedy=f"use the holdfast that wrote it ({body.get('holdfast', 'unknown')})",
            )
        try:
            check_seal(body, where=where)
            plain = _plain(body)
        except RecursionError as error:
            raise Refused("nested too deeply", where=where, remedy=REPEAT) from error
        known = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        ours = known | {"schema", "metrics", SEAL}
        given = {key: value for key, value in plain.items() if key in known}
        given["extra"] = {key: value for key, value in plain.items() if key not in ours}
        try:
            check(given, where)
            return cls(**given)
        except Refused:
            raise
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise Refused(f"damaged record: {error}", where=where, remedy=REPEAT) from error

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record, or the `record.json` of a run folder."""
        no_archive(path)
        path = Path(path) / "record.json" if Path(path).is_dir() else Path(path)
        try:
            body = parse_json(read_plain(path, LARGEST))
        except FileNotFoundError:
            raise Refused("no such file", where=str(path), remedy="pass a record.json") from None
        except OSError as error:
            raise Refused(f"cannot be read ({error.strerror})", where=str(path)) from error
        except (ValueError, RecursionError) as error:
            raise Refused(f"not JSON: {error}", where=str(path), remedy=REPEAT) from error
        return cls.from_dict(body, where=str(path))

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all; of processes that share a run the first does."""
        if follows():
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(sealed(self.to_dict()), **STRICT) + "\n")


STRICT: dict[str, Any] = {"ensure_ascii": False, "indent": 1, "allow_nan": False}


_SECRET = (
    r"(?:(?:[\w-]*[_-])?(?:secret|passwd|password|pwd|credential|(?:api|access|private)[_-]?key)s?"
    r"|(?:(?:[\w-]*[_-])?(?:hub|hf|auth|access|api|bearer|session)[_-])?token)"
)
_SECRET_NAME = re.compile(rf"{_SECRET}\Z", re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"--?{_SECRET}(?P<value>=.*)?\Z", re.IGNORECASE | re.DOTALL)
# up to the last @ of the authority, or, for a password with a slash in it, of the word
_USER = re.compile(r"://[^\s/]{0,512}@|://[^\s/:@]{0,256}:(?!\d{1,5}(?:/|\Z))\S{0,512}@")
_QUERY = re.compile(
    r"(?i)([?&;][\w.-]{0,64}(?:token|secret|passw|pwd|key|sig|signature|credential|auth)"
    r"[\w.-]{0,64}=)[^&;#\s\"']+"
)
_TOKEN = re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")


def scrub(text: str) -> str:
    """`text` without URL credentials, secret query values and well-known access tokens (S11).

    Example:
        >>> scrub("postgresql://ann:pw@db/x?sslkey=1&user=ann")
        'postgresql://***@db/x?sslkey=***&user=ann'
    """
    if "://" in text or "=" in text:
        text = _QUERY.sub(r"\1***", _USER.sub("://***@", text))
    return _TOKEN.sub("***", text)


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line without the values of `--password`, `--hub-token=…` and the like."""
    words: list[str] = []
    hide = False
    for word in map(str, command):
        flag = _SECRET_FLAG.match(word)
        if hide and not word.startswith("--"):
            words.append("***")
        elif flag and flag["value"]:
            words.append(word.split("=", 1)[0] + "=***")
        else:
            words.append(scrub(word))
        hide = flag is not None and not flag["value"]
    return words


def _plain(value: Any) -> Any:
    """JSON values only: numpy scalars and arrays, tuples and paths become plain, NaN is null."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):  # most of a record
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        # a lone surrogate cannot be written as UTF-8
        return scrub(str(value)).encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_plain(str(key)): _hidden(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value))
    if hasattr(value, "tolist"):  # a numpy scalar or array
        return _plain(value.tolist())
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def _hidden(key: object, value: Any) -> Any:
    secret = isinstance(value, str) and value and _SECRET_NAME.match(str(key))
    return "***" if secret else _plain(value)
