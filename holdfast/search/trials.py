"""What a search tried, as a file: the one definition, reader and writer of `trials.csv`.

A study is one search: one model, one pair of tasks, one shift. Its file has one line per trial::

    number,state,old,new,old_after,reward,steps,study,lr.embeddings,lr.point.1,…,lr.head

Scores are on selection rows: `old` on task one after learning it, `new` on task two after learning
it, `old_after` on task one then; `reward` = new + old_after. Rates are absolute, not multipliers.
The same as JSON, for logs made elsewhere: `{"trials": [{"old": …, "new": …, "old_after": …,
"lr": […]}]}`. docs/combine.md describes both.

The published logs (BERTcL) were appended to by several runs, so that trials of one shift entered
the average of another; a file with rows of two studies is therefore refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.errors import Refused, nearest
from holdfast.files import LARGEST, only_keys, write_text_atomic
from holdfast.tasks.files import label, must_exist, parse_json
from holdfast.tasks.table import shown

NAME, FACTS = "trials.csv", "search.json"  # the latter holds the SHA-256 of the former
COLUMNS = ("number", "state", "old", "new", "old_after", "reward", "steps", "study")
IDENTITY = ("study", "model", "tasks", "shift")  # equal in all rows; all but study optional
OPTIONAL = ("layers", *IDENTITY[1:])
RATE, EXTRA = "lr.", "extra."  # prefixes of rate columns, and of columns that are not read back,
CONTROL = "extra.control"  # but for this one: a control's label, empty for a searched trial
STATES = ("complete", "pruned", "fail", "running", "waiting")  # Optuna's, in lower case
MAX_PARTS = 500
MAX_TRIALS = 50_000
SAME = 1e-6  # a reward may differ by this much from new + old_after, which may have been rounded

_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf)", re.I)
_FORMULA = "=+-@|%'＝＋－＠"  # a spreadsheet runs text that begins with one of these


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial. Scores are None where they were not measured."""

    number: int
    lr: tuple[float, ...]  # (parts,) learning rates: embeddings, points, head
    new: float | None = None
    old_after: float | None = None
    old: float | None = None
    state: str = "complete"
    steps: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # written, never read back

    @property
    def reward(self) -> float | None:
        """new + old_after (BERTcL); None unless both were measured."""
        known = self.new is not None and self.old_after is not None
        return self.new + self.old_after if known else None  # type: ignore[operator]

    @property
    def left_out(self) -> str | None:
        """Why it does not enter a fusion; None if it does."""
        if self.state != "complete":
            return self.state
        reward = self.reward
        finite = reward is not None and math.isfinite(reward)
        return None if finite and (self.old is None or math.isfinite(self.old)) else "no score"


@dataclass(frozen=True, kw_only=True)
class ReadStudy:
    """The trials of one search, and the file they came from."""

    source: str
    sha256: str  # of the file's bytes
    study: str | None  # what the file calls it
    layers: int | None  # of the network that was searched, if the file says
    trials: tuple[Trial, ...]  # those with a score, at least one
    left_out: Mapping[str, int] = field(hash=False)  # why -> how many

    @property
    def parts(self) -> int:
        return len(self.trials[0].lr)


def part_names(count: int) -> list[str]:
    """[embeddings, point.1, …, head]: the parts that a trial's `count` rates belong to."""
    return ["embeddings", *(f"point.{j}" for j in range(1, count - 1)), "head"]


# --- writing ----------------------------------------------------------------------------------


def write_trials(
    path: str | Path, trials: Sequence[Trial], *, study: str, layers: int | None = None
) -> None:
    """Write a study's trials as `trials.csv`, whole or not at all.

    `study` names model, tasks and shift, or is a hash of them. `Trial.extra` becomes columns
    `extra.NAME`. Refused: a study that could not be read back, trials of different parts.
    """
    where = str(path)
    if not study.strip() or not _safe(study):
        raise Refused(f"study {shown(study)} is empty, unprintable, long or a formula", where=where,
                      remedy="begin it with a letter or digit")  # fmt: skip
    counts = {len(trial.lr) for trial in trials}
    if len(counts) > 1:
        raise Refused(f"trials of {sorted(counts)} rates in one study", where=where)
    parts = part_names(counts.pop()) if counts else []
    extra = list(dict.fromkeys(key for trial in trials for key in trial.extra))
    header = [*COLUMNS, *(RATE + part for part in parts)]
    header += ["layers"] * (layers is not None) + [EXTRA + key for key in extra]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for trial in trials:
        if trial.state not in STATES:
            raise Refused(f"state {shown(trial.state)}", where=where,
                          remedy=nearest(trial.state, STATES))  # fmt: skip
        cells = [trial.number, trial.state, trial.old, trial.new, trial.old_after, trial.reward,
                 trial.steps, study, *trial.lr]  # fmt: skip
        cells += [layers] * (layers is not None) + [trial.extra.get(key) for key in extra]
        writer.writerow([_cell(value) for value in cells])
    write_text_atomic(path, out.getvalue())


def _safe(text: str) -> bool:
    return text.isprintable() and len(text) <= 300 and not text.lstrip().startswith(tuple(_FORMULA))


def _cell(value: Any) -> str:
    """Empty for None; text that a spreadsheet would run gets a leading quote."""
    if value is None:
        return ""
    text = repr(float(value)) if isinstance(value, float) else str(value)
    return text if _NUMBER.fullmatch(text) or _safe(text) else "'" + text


# --- reading ----------------------------------------------------------------------------------


def read_study(path: str | Path) -> ReadStudy:
    """The study in a folder (its `trials.csv`), a `.csv` or a `.json` file.

    Refused, with file and line: rows of two studies; a trial's number twice; a rate that is not
    finite and above 0; a reward that is not new + old_after; unknown columns other than `extra.…`;
    text for a number; no trial with a score, or none but controls.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / NAME).exists():
            raise Refused(f"no {NAME} in it", where=label(path),
                          remedy="name the folder of a search, or a file")  # fmt: skip
        path = path / NAME
    where = label(path)
    kind = path.suffix.lower()
    if kind not in _READERS:
        raise Refused("neither .csv nor .json", where=where, remedy=f"name a {NAME} or JSON file")
    data = _bytes(must_exist(path), where)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8 text (byte {error.start})", where=where) from None
    rows = _READERS[kind](text, where)
    if len(rows) > MAX_TRIALS:
        raise Refused(f"{len(rows):,} trials, more than {MAX_TRIALS:,}", where=where)
    return _study(rows, where, hashlib.sha256(data).hexdigest())


def _bytes(path: Path, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise Refused(error.strerror or str(error), where=where) from None
    if len(data) > LARGEST:
        raise Refused(f"larger than {LARGEST >> 20} MiB", where=where)
    return data


Rows = list[tuple[str, dict[str, Any]]]  # (line 2 | trials[0], values by column, `lr` a list)


def _csv(text: str, where: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start, found = 1, []
    try:
        header = next(reader, [])
        parts = _header(header, where)
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise Refused(f"{len(cells)} cells where the header has {len(header)}",
                              where=f"{where}, line {start}")  # fmt: skip
            if cells:
                row = dict(zip(header, cells, strict=True))
                values = {k: row.get(k) or None for k in (*COLUMNS, *OPTIONAL, CONTROL)}
                values |= {k: _read(v) for k, v in values.items() if k not in (*IDENTITY, CONTROL)}
                lr = [_read(row[RATE + part]) for part in parts]
                found.append((f"line {start}", values | {"lr": lr}))
            start = reader.line_num + 1
    except csv.Error as error:
        raise Refused(f"not proper CSV ({error})", where=f"{where}, line {start}") from None
    return found


def _read(cell: str | None) -> Any:
    """A cell as the number it spells, or as it is."""
    if cell is None or not _NUMBER.fullmatch(cell.strip()):
        return cell
    return int(cell) if re.fullmatch(r"[0-9]{1,15}", cell) else float(cell)


def _header(header: list[str], where: str) -> list[str]:
    """The parts whose rates a header lists, after checking all its columns."""
    where = f"{where}, line 1"
    rates = [name for name in header if name.startswith(RATE)]
    parts = part_names(max(len(rates), 3))
    known = [*COLUMNS, *(RATE + part for part in parts)]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise Refused(f"column {shown(twice[0])} stands twice", where=where)
    for name in header:
        if name not in (*known, *OPTIONAL) and not name.startswith(EXTRA):
            near = nearest(name, [*known, *OPTIONAL])
            near = near if near.startswith("did you mean") else "leave it out,"
            raise Refused(f"unknown column {shown(name)}", where=where,
                          remedy=f"{near} or call it {shown(EXTRA + name)}")  # fmt: skip
    for name in known:
        if name not in header:
            raise Refused(f"no column {name!r}", where=where)
    if rates != [RATE + part for part in parts]:
        raise Refused("the rates are out of order", where=where,
                      remedy="embeddings, point.1, …, head")  # fmt: skip
    return parts


def _json(text: str, where: str) -> Rows:
    data = parse_json(text, where)
    if not isinstance(data, dict):
        raise Refused("not a JSON object", where=where, remedy='as {"trials": […]}')
    shared = ("layers", *IDENTITY)
    only_keys(data, ("trials", *shared), required=("trials",), where=where)
    if not isinstance(data["trials"], list):
        raise Refused("'trials' is no list", where=where)
    found = []
    for i, trial in enumerate(data["trials"]):
        line = f"trials[{i}]"
        if not isinstance(trial, dict):
            raise Refused(f"{shown(trial)} is no object", where=f"{where}, {line}")
        plain = {key: value for key, value in trial.items() if not key.startswith(EXTRA)}
        only_keys(plain, (*COLUMNS, *OPTIONAL, "lr"), required=("new", "old_after", "lr"),
                  where=f"{where}, {line}")  # fmt: skip
        if not isinstance(plain["lr"], list):
            raise Refused(f"lr {shown(plain['lr'])} is no list", where=f"{where}, {line}")
        usual = {"number": i, "state": "complete"} | {key: data.get(key) for key in shared}
        found.append((line, usual | plain | {CONTROL: trial.get(CONTROL)}))
    return found


_READERS: dict[str, Callable[[str, str], Rows]] = {".csv": _csv, ".json": _json}


def _study(rows: Rows, where: str, sha256: str) -> ReadStudy:
    for key in ("layers", *IDENTITY):
        _one(key, rows, where)
    trials: list[Trial] = []
    places: dict[int, str] = {}
    for line, row in rows:
        at = f"{where}, {line}"
        trial = _trial(row, at)
        if trial.number in places:
            raise Refused(f"trial {trial.number} stands in {places[trial.number]} already",
                          where=at, remedy="a file holds one run; split it")  # fmt: skip
        places[trial.number] = line
        if trials and len(trial.lr) != len(trials[0].lr):
            raise Refused(f"{len(trial.lr)} rates, the trials before have {len(trials[0].lr)}",
                          where=at)  # fmt: skip
        trials.append(trial)
    left_out = dict(Counter(t.left_out for t in trials if t.left_out is not None))
    kept = tuple(trial for trial in trials if trial.left_out is None)
    if not kept:
        counts = ", ".join(f"{count} {why}" for why, count in left_out.items())
        raise Refused(f"no trial with a score ({counts or 'no trial at all'})", where=where)
    marks = [row.get(CONTROL) for (_, row), t in zip(rows, trials, strict=True) if not t.left_out]
    if all(marks):
        raise Refused(f"of its trials only controls were finished ({len(kept)}), no searched one",
                      where=where,
                      remedy="let the search run on: controls are no result of it")  # fmt: skip
    study, layers = rows[0][1].get("study"), _whole(rows[0][1].get("layers"), where, "layers", 1)
    return ReadStudy(source=where, sha256=sha256, study=study, layers=layers, trials=kept,
                 left_out=left_out)  # fmt: skip


def _one(key: str, rows: Rows, where: str) -> None:
    """Refuse a file whose rows differ in `key`, which must be the same for all of them."""
    lines: dict[Any, list[str]] = {}
    for line, row in rows:
        value = row.get(key)
        if key != "layers" and not (value is None or isinstance(value, str)):
            raise Refused(f"{key} {shown(value)} is not text", where=f"{where}, {line}")
        if isinstance(value, str) and not (value.isprintable() and len(value) <= 300):
            raise Refused(f"{key} {shown(value)} cannot be printed", where=f"{where}, {line}")
        try:
            lines.setdefault(value, []).append(line)
        except TypeError:
            raise Refused(f"{key} {shown(value)}", where=f"{where}, {line}") from None
    if len(lines) > 1:
        told = "; ".join(f"{'none' if value is None else shown(value)} ({_told(places)})"
                         for value, places in list(lines.items())[:4])  # fmt: skip
        raise Refused(
            f"rows that differ in {key}: {told}{'; …' if len(lines) > 4 else ''}", where=where,
            remedy="a file holds one study; split it, so that no trial counts for another",
        )  # fmt: skip


def _told(places: list[str]) -> str:
    """The places of rows in words, consecutive lines as first–last."""
    numbers = [int(re.sub(r"\D", "", place)) for place in places]
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs[:5])
    word = "trials" if places[0].startswith("trials") else "lines" if len(numbers) > 1 else "line"
    return f"{word} {text}{', …' if len(runs) > 5 else ''}"


def _trial(row: Mapping[str, Any], at: str) -> Trial:
    state = row["state"]
    if state not in STATES:
        remedy = nearest(state, STATES) if isinstance(state, str) else None
        raise Refused(f"state {shown(state)}", where=at, remedy=remedy)
    old, new, after, said = (
        _score(row.get(key), at, key) for key in ("old", "new", "old_after", "reward")
    )
    rates = row["lr"]
    if not 3 <= len(rates) <= MAX_PARTS:
        raise Refused(f"{len(rates)} rates", where=at,
                      remedy=f"3 to {MAX_PARTS}: embeddings, points, head")  # fmt: skip
    number = _whole(row["number"], at, "number", 0)
    if number is None:
        raise Refused("no number", where=at)
    steps = _whole(row.get("steps"), at, "steps", 0)
    unchecked = (math.nan,) * len(rates)  # of no use where a trial does not count
    trial = Trial(number=number, state=state, steps=steps, lr=unchecked, old=old, new=new,
                  old_after=after)  # fmt: skip
    if trial.left_out is None:
        known = trial.reward
        if said is not None and known is not None and not abs(said - known) <= SAME:
            raise Refused(f"reward {said:g} is not new + old_after, {known:g}", where=at)
        names = part_names(len(rates))
        lr = tuple(_rate(v, f"{at}, {RATE}{p}") for v, p in zip(rates, names, strict=True))
        return replace(trial, lr=lr)
    return trial


def _score(value: Any, at: str, name: str) -> float | None:
    """A number, perhaps not finite; None where there is none."""
    return None if value is None else _float(value, f"{at}, {name}")


def _rate(value: Any, at: str) -> float:
    rate = _float(value, at)
    if not (math.isfinite(rate) and rate > 0):
        raise Refused(f"rate {shown(value)} is not finite and above 0", where=at,
                      remedy="its logarithm is averaged; leave the trial out")  # fmt: skip
    return rate


def _float(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{shown(value)} is not a number", where=at)
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _whole(value: Any, at: str, name: str, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise Refused(f"{name} {shown(value)} is no whole number from {least} on", where=at)
    return value
