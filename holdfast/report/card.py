"""A record -> the model card of a folder that can be published: README.md, and `.eval_results/`.

Names in a record may come from strangers' files: whatever the template shows is escaped for
Markdown, unless it is a `Markup`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

import holdfast
from holdfast.errors import Refused
from holdfast.experiments.metrics import Cell
from holdfast.experiments.record import Record
from holdfast.experiments.runs import FINAL, RECORD
from holdfast.files import dump_yaml, write_text_atomic
from holdfast.report.facts import RunFacts, run_facts
from holdfast.report.general import general_lines
from holdfast.report.page import MEANINGS
from holdfast.report.sentences import noise_note, run_sentences, scenario_sentence
from holdfast.report.words import BIDI, DASH, clean, number
from holdfast.tasks.hub import split_id
from holdfast.tasks.task import METRICS

README, RESULTS, HUB = "README.md", ".eval_results", "hub:"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# Metrics that the Hub calls otherwise than we do.
CALLED = {"matthews": "matthews_correlation", "spearman": "spearmanr", "f1_micro": "f1",
          "f1_macro": "f1", "entity_f1": "seqeval", "rouge_l": "rouge"}  # fmt: skip
_MARKS = re.compile(r"([\\`*_\[\]<>|~&$])")
_HUB_ID = re.compile(r"(?=.{1,96}\Z)[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CONFIG = re.compile(r"[\w.-]+", re.ASCII)


def write_card(
    record: Record, folder: str | Path, *, task: str | None = None, license: str | None = None
) -> Path:
    """Write README.md and, of tasks from the Hub, `.eval_results/TASK.yaml` beside a model.

    folder: as `Served.save` wrote it, with its `task`; or, without one, a run's `final/` or the
    folder of one of its tasks, which serves all tasks learned so far. license: an id of the Hub's
    list, such as `apache-2.0`. Returns the card's path.
    """
    check_license(license)
    folder, run = Path(folder), run_facts(record)
    shown = [t for t in record.tasks if task in (None, t["name"])]
    write_text_atomic(folder / README, render(record, folder, task=task, license=license))
    for told in shown:
        if result := eval_result(run, record.names.index(told["name"])):
            (folder / RESULTS).mkdir(exist_ok=True)
            text = yaml.safe_dump([result], sort_keys=False, allow_unicode=True)
            write_text_atomic(folder / RESULTS / f"{told['name']}.yaml", text)
    return folder / README


def check_license(license: str | None) -> None:
    """Refuse what is no id of a license on the Hub."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise Refused(f"{license!r} is no id of a license", where="--license",
                      remedy="as apache-2.0")  # fmt: skip


def write_cards(records: Iterable[Record]) -> None:
    """The card of each run's `final/`, where there is one."""
    for record in records:
        final = Path(str(record.settings.get("out"))) / FINAL
        if final.is_dir():
            write_card(record, final)


def until(record: Record, tasks: int) -> Record:
    """The record as it was after so many tasks."""
    if tasks == len(record.tasks):
        return record
    return replace(
        record, tasks=record.tasks[:tasks], scores=[row[:tasks] for row in record.scores[:tasks]],
        selection_scores=None, scenario=record.scenario if tasks > 1 else None,
        history=[h for h in record.history if h["learning"] < tasks],
    )  # fmt: skip


def render(record: Record, folder: Path, *, task: str | None, license: str | None) -> str:
    """The card as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run = run_facts(record)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # noqa: S701  `finalize` escapes Markdown
        finalize=lambda value: value if isinstance(value, Markup) else markdown(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, code=code, markup=Markup)
    return environment.get_template("card.md.j2").render(
        run=run,
        task=task,
        front=Markup(dump_yaml(front_matter(record, run, task=task, license=license))),
        load=Markup(_loading(folder, record) if task else SERVING),
        base=Path(clean(run.body["model"].get("name") or "")).name,
        base_id=base_model(record),
        cells=[[_cell(*pair) for pair in zip(*row, strict=True)]
               for row in zip(run.scores, run.noise, strict=True)],
        sources=[public(t.get("source") or DASH) for t in run.body["tasks"]],
        sentences=run_sentences(run),
        scenario=scenario_sentence(record.scenario),
        noise=noise_note(run.tasks),
        meanings=MEANINGS,
        general=general_lines(run),
        recipe=dump_yaml(run.body["recipe"]) if run.body["recipe"] else "",
        settings=[f"{k} {v}" for k, v in run.body["settings"].items()
                  if k not in ("model", "out") and v is not None],
        versions=[f"{k} {v}" for k, v in run.body["versions"].items()],
        command=shlex.join(public(word) for word in run.body["command"] or ()),
        version=holdfast.__version__,
    )  # fmt: skip


def front_matter(
    record: Record, run: RunFacts, *, task: str | None, license: str | None
) -> dict[str, Any]:
    """What the Hub reads of a card; a key whose value is not known is left out."""
    about = [t for t in run.body["tasks"] if task in (None, t["name"])]
    datasets = [place[0] for t in run.body["tasks"] if (place := hub_place(t))]
    own = about[-1].get("kind") == "module" or run.body["settings"].get("head") == "levi"
    found = {
        "license": license,
        "library_name": "holdfast" if own else "transformers",
        "base_model": base_model(record),
        "datasets": list(dict.fromkeys(datasets)),
        "metrics": list(
            dict.fromkeys(CALLED.get(m, m) for t in about if (m := t.get("metric")) in METRICS)
        ),
        "tags": ["holdfast", *(["continual-learning"] if len(run.tasks) > 1 else [])],
    }
    return {key: value for key, value in found.items() if value}


def base_model(record: Record) -> str | None:
    """The id of the base model on the Hub, if it came from there."""
    name = str(record.model.get("name") or "")
    if name == "minilm":
        return MINILM
    # What lies in a folder has a hash.
    known = "hash" in record.model and record.model["hash"] is None
    return name if known and _HUB_ID.fullmatch(name) else None


def hub_place(task: dict[str, Any]) -> tuple[str, str | None] | None:
    """A task's dataset on the Hub and its configuration; None where its rows are from elsewhere."""
    place, _, options = str(task.get("source") or "").partition("?")
    if not place.startswith(HUB):
        return None
    dataset, config = split_id(place.removeprefix(HUB))
    config = config or dict(parse_qsl(options)).get("config")
    known = _HUB_ID.fullmatch(dataset) and _CONFIG.fullmatch(config or "default")
    return (dataset, config) if known else None


def eval_result(run: RunFacts, index: int) -> dict[str, Any] | None:
    """An entry of `.eval_results/*.yaml`, the Hub's format; None for a task from elsewhere."""
    facts, told = run.tasks[index], run.body["tasks"][index]
    place = hub_place(told)
    if place is None or facts.final is None:
        return None
    said = [f"{facts.metric} on {facts.rows['evaluation']} rows"]
    said += [f"standard error {facts.noise:.4f}"] if facts.noise is not None else []
    return {
        "dataset": {"id": place[0], "task_id": place[1] or "default"},
        "value": facts.final,
        "date": str(run.body["created"])[:10],
        "notes": clean("; ".join([*said, *map(str, told.get("warnings") or ())])),
    }


def _cell(score: Cell, off: Cell) -> str:
    return number(score) if off is None else f"{number(score)} ± {number(off)}"


SERVING = 'import holdfast\nserved = holdfast.load("FOLDER")'


def _loading(folder: Path, record: Record) -> str:
    """Two lines of Python that load an exported model, by the class that its folder names."""
    kind, name = record.tasks[-1].get("kind"), ""
    with suppress(OSError, ValueError, KeyError, TypeError):
        (name,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    if kind == "module" or not str(name).isidentifier():
        return SERVING
    beside = "AutoImageProcessor" if kind == "images" else "AutoTokenizer"
    made = ", ".join(f'{each}.from_pretrained("FOLDER")' for each in (name, beside))
    return f"from transformers import {beside}, {name}\nmodel, processor = {made}"


# --- text -----------------------------------------------------------------------------------------


class Markup(str):
    """Text that is Markdown already."""


def markdown(value: object) -> str:
    """Any value as Markdown that shows it on one line: no link, no tag, no cell of a table."""
    text = str(value)
    return _MARKS.sub(r"\\\1", clean(text)).replace("://", ":\\//") if text else ""


def code(text: str, language: str = "") -> Markup:
    """A block of code, whose fence is longer than any in it."""
    text = BIDI.sub("", text)
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def public(word: str) -> str:
    """A word of a command, or a task's source, without the folders of whoever ran it."""
    return re.sub(r"^(?:~|[A-Za-z]:\\|/)[^?]*[/\\](?=[^/\\?])", "", clean(word))


def record_beside(folder: Path, tasks: Iterable[str]) -> Record | None:
    """The record of a run, of its `final/` or a task's folder, as it was after these tasks."""
    names: Sequence[str] = list(tasks)
    for home in (folder, *folder.absolute().parents[:2]):
        if (home / RECORD).is_file():
            record = Record.load(home)
            return until(record, len(names)) if record.names[: len(names)] == names else None
    return None
