"""Numbers -> one HTML file that opens anywhere: no network, no script, nothing to install."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import holdfast
from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.experiments.statistics import Difference, Spread
from holdfast.files import dump_yaml, write_text_atomic
from holdfast.report.canvas import Picture
from holdfast.report.facts import Comparison, comparisons
from holdfast.report.general import general, meaning
from holdfast.report.protocol import ProtocolFacts, elsewhere, protocol_of
from holdfast.report.sentences import noise_note, scenario_sentence, study_sentences
from holdfast.report.words import DASH, clean, number, points, short, spread_text

# every metric a record stores, with its sign, for a reader who knows none of them
MEANINGS = {
    "forgetting": "best earlier score − score at the end, mean over old tasks; positive is worse",
    "backward_transfer": "score at the end − score just after learning; negative is forgetting",
    "forward_transfer": "just-learned score − the same task trained alone; positive is better",
    "average": "mean over all tasks at the end",
    "plasticity": "mean of each task just after it was learned",
    "new_plus_old": "last task + mean of the earlier ones, at the end",
}


@dataclass(frozen=True)
class Section:
    """One comparison with its pictures, as the template reads it."""

    study: Comparison
    pictures: list[Picture]
    exposures: list[str]
    synthetic: list[str]
    general: dict[str, dict[str, list[Spread]]]  # recipe -> measure -> before, after each task
    protocol: ProtocolFacts | None
    elsewhere: dict[str, dict[str, dict[str, Spread]]]  # recipe -> task learned -> task tested


def find_records(paths: Iterable[str | Path]) -> list[Record]:
    """Records from files, and from every `record.json` below folders; links are not followed.

    Skips records of tasks trained alone for a sequence, as its own record has their scores.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(
                p for p in path.rglob("record.json")
                if not (p.is_symlink() or _of_a_sequence(p, path))
            )  # fmt: skip
            if not below:
                raise Refused("no record.json in it", where=str(path), remedy="pass a run's folder")
            found += below
        else:
            found.append(path)
    unique = {path.resolve(): path for path in found}
    return [Record.load(path) for path in unique.values()]


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
    target = Path(path)
    if target.is_dir():
        raise Refused("is a folder", where=str(path), remedy="name a file, such as report.html")
    write_text_atomic(target, page)
    return target


def render(records: Sequence[Record], title: str | None = None) -> str:
    """The page as text."""
    if not records:
        raise Refused("no records to report", remedy="pass a record.json or a folder of runs")
    from holdfast.report.draw import pictures

    sections = [
        Section(
            study=study,
            pictures=pictures(study),
            exposures=_unique(run.body["exposure"] for run in study.runs),
            synthetic=[task.name for task in study.tasks if task.synthetic],
            general={g.label: found for g in study.groups if (found := general(g.runs))},
            protocol=protocol_of(study),
            elsewhere={g.label: away for g in study.groups if (away := elsewhere(g.runs))},
        )
        for study in comparisons(records)
    ]
    return environment().get_template("report.html.j2").render(
        title=clean(title) if title else _title(sections),
        sections=sections,
        runs=sum(len(section.study.runs) for section in sections),
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

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
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
        count=_count,
        short=short,
        noise_note=noise_note,
        meaning=meaning,
        sentences=study_sentences,
        scenario=scenario_sentence,
        rows=_layout,
        command=_command,
        yaml=_yaml,
    )
    return environment


def _gap(gap: Difference | None) -> str:
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


def _count(value: float | int | None) -> str:
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


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


def _unique(texts: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(clean(text) for text in texts if text))
