"""`holdfast predict`: labels for new rows, with every task's head on one encoder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.cli.options import add_trust

ABOUT = "label the rows of a file with one of a run's tasks"
EXAMPLE = "holdfast predict runs/a --task trec6 'questions.csv?text=question' --out labels.jsonl"
RESUMES = False
FAR = "out_of_domain"  # of a head of prototypes: how far a row is from all classes


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a finished run's folder")
    parser.add_argument("rows", help="a CSV, TSV, JSONL or Parquet file, its columns after a ?; "
                        "a folder of pictures")  # fmt: skip
    parser.add_argument("--task", required=True, help="the name of one of the run's tasks")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl or .csv file to write")
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN",
                        help="columns to copy, such as an id")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64)
    add_trust(parser)


def run(chosen: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from holdfast.errors import Refused
    from holdfast.experiments.serving import load
    from holdfast.report.tables import write_csv, write_jsonl
    from holdfast.tasks.kinds import kind_named
    from holdfast.tasks.rows import unlabelled

    if not 0 < chosen.batch_size < 2**31:
        raise Refused("must be above 0 and below 2^31", where="--batch-size")
    if chosen.out.suffix not in (".jsonl", ".csv"):
        raise Refused("neither .jsonl nor .csv", where=str(chosen.out), remedy="name such a file")
    named = Path(chosen.rows)
    named = named if named.exists() else Path(chosen.rows.partition("?")[0])
    if chosen.out.exists() and named.exists() and chosen.out.samefile(named):
        raise Refused("is the file of the rows, which would be lost", where=str(chosen.out),
                      remedy="choose another --out")  # fmt: skip
    shares = "probabilities" if chosen.out.suffix == ".jsonl" else "probability"
    if taken := {"label", shares, FAR} & {*chosen.keep}:
        raise Refused(f"{taken.pop()!r} is what is written", where="--keep",
                      remedy="rename that column in the file")  # fmt: skip
    served = load(chosen.run_folder)
    about = served.tasks[served.named(chosen.task)]
    if about["kind"] == "module":
        raise Refused("answers rows of arrays, which no file here holds", where=chosen.task,
                      remedy=f"in Python: holdfast.load({str(chosen.run_folder)!r}).predict("
                      f"{chosen.task!r}, rows)")  # fmt: skip
    if about["kind"] == "images":
        texts, pairs, kept, cut = _files(chosen)
    else:
        spec = _as_learned(chosen.rows, about)
        texts, pairs, kept, cut = unlabelled(
            spec, chosen.keep, pairs=bool(about["pairs"]), kind=about["kind"]
        )
    made = served.predictions(chosen.task, texts, pairs, batch=chosen.batch_size)
    with tqdm(total=len(texts), unit="row", leave=False, disable=None) as bar:
        rows = []
        for given, each in zip(kept, made, strict=True):
            row = {**given, "label": plain(each.label, text=shares == "probability")}
            if shares == "probabilities" and each.probabilities:
                row[shares] = each.probabilities
            elif each.label in each.probabilities:
                row[shares] = each.probabilities[each.label]
            if each.out_of_domain is not None:
                row[FAR] = each.out_of_domain
            rows.append(row)
            bar.update()
    if chosen.out.suffix == ".csv":
        told = [name for name in (shares, FAR) if any(name in row for row in rows)]
        write_csv(rows, chosen.out, [*chosen.keep, "label", *told])
    else:
        write_jsonl(rows, chosen.out)
    clipped = f", {cut:,} of them cut at 20,000 characters" if cut else ""
    if served.one_head and about["labels"]:
        clipped += f", each one of all {len(about['labels'])} labels of the tasks' one head"
    if kind_named(about["kind"]).TEXT:
        clipped += f"; texts are cut at {served.max_length} tokens"
    print(f"{chosen.out}: {len(rows):,} rows{clipped}")


def _as_learned(rows: str, about: Mapping[str, Any]) -> str:
    """The spec of rows with the task's own template, if it had one and none is named."""
    from holdfast.errors import tell_once
    from holdfast.tasks.spec import parse, with_options

    asked, made = parse(rows).options, about.get("template")
    if not isinstance(made, dict) or asked.text is not None or asked.prompt is not None:
        return rows
    made = {key: str(made[key]) for key in ("text", "prompt") if key in made}
    for key, template in made.items():
        tell_once(f"{about['name']}: texts are made as those it learned, by {key}={template!r}; "
                  "?text=COLUMN takes a column as it stands")  # fmt: skip
    return with_options(rows, **made)


def _files(chosen: argparse.Namespace) -> tuple[list[str], None, list[dict[str, Any]], int]:
    """The pictures of a folder; each row is told by its `file`."""
    from holdfast.errors import Refused
    from holdfast.tasks.pictures import pictures_in

    files = [str(file) for file in pictures_in(Path(chosen.rows))]
    if not files or chosen.keep:
        raise Refused("no folder of pictures" if not files else "has no columns to keep",
                      where=chosen.rows)  # fmt: skip
    chosen.keep = ["file"]
    return files, None, [{"file": file} for file in files], 0


def plain(label: Any, *, text: bool) -> Any:
    """A prediction as JSON writes it; as `text`, several labels stand as a|b, spans as JSON."""
    from holdfast.tasks.labels import SEPARATOR
    from holdfast.tasks.tagged import Span

    if not isinstance(label, tuple):
        return label
    spans = [each._asdict() for each in label if isinstance(each, Span)]
    if not text:
        return spans or list(label)
    return json.dumps(spans) if spans else SEPARATOR.join(label)
