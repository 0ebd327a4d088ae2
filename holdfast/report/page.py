"""Numbers -> one HTML file that opens anywhere: no network, nothing to install.

Its only script sorts tables. It is named by its hash in the page's policy, so that no other runs,
and without it the page says the same.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import holdfast
from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.experiments.statistics import Difference, Spread
from holdfast.files import dump_yaml, write_text_atomic
from holdfast.report.canvas import Picture
from holdfast.report.draw import comparing, within
from holdfast.report.facts import GroupFacts, PooledFacts, comparisons, pool
from holdfast.report.general import meaning
from holdfast.report.sections import Section, section
from holdfast.report.sentences import scenario_sentence
from holdfast.report.verdict import cost
from holdfast.report.words import DASH, amount, clean, number, points, short, size, spread_text

# every metric a record stores, with its sign, for a reader who knows none of them
MEANINGS = {
    "forgetting": "best earlier score − score at the end, mean over old tasks; positive is worse",
    "backward_transfer": "score at the end − score just after learning; negative is forgetting",
    "forward_transfer": "just-learned score − the same task trained alone; positive is better",
    "average": "mean over all tasks at the end",
    "plasticity": "mean of each task just after it was learned",
    "new_plus_old": "last task + mean of the earlier ones, at the end",
}
TEMPLATES = Path(__file__).parent / "templates"


def find_records(paths: Iterable[str | Path]) -> list[Record]:
    """Records from files, and from every `record.json` below folders; links are not followed.

    Skips records of tasks trained alone for a sequence, as its own record has their scores, and
    those of a comparison's tuning runs and shared first tasks, unless only these are asked for.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(
                p for p in _named_records(path) if not (p.is_symlink() or _of_a_sequence(p, path))
            )
            if not below:
                raise Refused("no record.json in it", where=str(path), remedy="pass a run's folder")
            found += below
        else:
            found.append(path)
    unique = {path.resolve(): path for path in found}
    records = [Record.load(path) for path in unique.values()]
    return [record for record in records if "serves" not in record.extra] or records


def _named_records(folder: Path) -> Iterator[Path]:
    """Every `record.json` below a folder; `Refused` where a folder in it cannot be read."""

    def stop(error: OSError) -> None:  # `rglob` would leave its runs out without a word
        raise Refused(error.strerror or str(error), where=str(error.filename),
                      remedy="name the folders of the runs that you may read")  # fmt: skip

    for home, _, files in os.walk(folder, onerror=stop):
        if "record.json" in files:
            yield Path(home, "record.json")


def _of_a_sequence(record: Path, asked: Path) -> bool:
    """Whether `record` is `RUN/alone/TASK/record.json` of a run that was asked for with it."""
    *above, alone, _, _ = ["", "", *record.relative_to(asked).parts]
    return alone == "alone" and asked.joinpath(*above, "record.json").is_file()


def write_report(records: Sequence[Record], path: str | Path, title: str | None = None) -> Path:
    """Write the report of one run, or of recipes over seeds, as one self-contained page.

    Pictures come first, then the tables, the warnings, and how to repeat each run. Records that
    learned other tasks, in another scenario, or from another model get a section of their own.
    """
    page = render(records, title)
    write_text_atomic(check_page(path), page)
    return Path(path)


def check_page(path: str | Path) -> Path:
    """Where a page may be written: nothing is there, or another page; never a record or data."""
    target = Path(path)
    if target.is_dir():
        raise Refused("is a folder", where=str(path), remedy="name a file, such as report.html")
    if target.is_file():
        with target.open("rb") as file:
            begin = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if begin and not begin.startswith((b"<!doctype html", b"<html")):
            raise Refused("is no page, and would be lost", where=str(path),
                          remedy="choose another --out")  # fmt: skip
    return target


def pictures(records: Sequence[Record]) -> list[Picture]:
    """The page's pictures, the most telling first; `display(*pictures(records))` in a notebook."""
    return [p for study in comparisons(records) for p in (*comparing(study), *within(study))]


def render(records: Sequence[Record], title: str | None = None) -> str:
    """The page as text."""
    if not records:
        raise Refused("no records to report", remedy="pass a record.json or a folder of runs")
    sections = [section(study) for study in comparisons(records)]
    return environment().get_template("report.html.j2").render(
        title=clean(title) if title else _title(sections),
        sections=sections,
        runs=sum(len(section.study.runs) for section in sections),
        pooled=pool([section.study for section in sections]),
        meanings=MEANINGS,
        version=holdfast.__version__,
        written=max(clean(record.created) for record in records),
    )  # fmt: skip


def _title(sections: list[Section]) -> str:
    if len(sections) > 1:
        return f"{len(sections)} experiments"
    return " → ".join(short(task.name) for task in sections[0].study.tasks)


def environment() -> Any:
    """The templates with their filters; everything is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((TEMPLATES / name).read_text("utf-8") for name in ("style.css", "sort.js"))
    environment.globals.update(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'",
    )
    environment.filters.update(
        score=number,
        signed=lambda value: number(value, sign=True),
        points=points,
        percent=lambda s: spread_text(Spread(*(v and 100 * v for v in s)), digits=1),
        spread=spread_text,
        signed_spread=lambda spread: spread_text(spread, sign=True),
        gap=_gap,
        value=_value,
        count=amount,
        short=short,
        size=size,
        cost=cost,
        shared=_shared,
        meaning=meaning,
        scenario=scenario_sentence,
        rows=_layout,
        command=_command,
        yaml=_yaml,
    )
    return environment


def _hash(text: str) -> str:
    """What a policy calls a style or a script by."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _shared(settings: dict[str, Any], group: GroupFacts) -> dict[str, Any]:
    """The settings that all runs of a group have in common."""
    others = [run.body["settings"] for run in group.runs[1:]]
    return {k: v for k, v in settings.items() if all(o.get(k) == v for o in others)}


def _gap(gap: Difference | PooledFacts | None) -> str:
    if gap is None or gap.mean is None:
        return DASH
    text = number(gap.mean, sign=True)
    if gap.low is None:
        return text
    return f"{text} [{number(gap.low, sign=True)}, {number(gap.high, sign=True)}]"


def _value(value: object) -> str:
    """Anything from a record's settings or versions, on one line."""
    if value is None or value in ("", [], {}):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{clean(key)}: {_value(item)}" for key, item in value.items())
    return clean(value)


def _command(words: object) -> str:
    if not isinstance(words, list) or not words:
        return DASH
    return shlex.join(clean(word) for word in words)


def _yaml(recipe: dict[str, Any]) -> str:
    """The recipe as its file says it; control characters stay escaped."""
    return dump_yaml(recipe).rstrip() if recipe else DASH


def _layout(pictures: Sequence[Picture]) -> list[tuple[str, Picture]]:
    """A CSS class for each picture: panels take a row, others half; a left-over one takes a row."""
    classes: list[str] = []
    for i, picture in enumerate(pictures):
        wide = len(picture.panels) > 1
        second = not wide and classes[-1:] == ["first"]
        last = i + 1 == len(pictures) or len(pictures[i + 1].panels) > 1
        classes.append("wide" if wide else "second" if second else "alone" if last else "first")
    return list(zip(classes, pictures, strict=True))
