"""The comparison as rows, and rows as CSV that a spreadsheet opens without running anything."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from holdfast.experiments.record import Record
from holdfast.files import write_text_atomic
from holdfast.report.facts import COLUMNS, PAIRED, Judged, comparisons

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
TOLD = {"p": "t_p"}  # beside `p` of the signed ranks
_FORMULA = "=+-@\t\r\n|%＝＋－＠"


def cell(value: object) -> str:
    """One CSV cell: empty for None; text a spreadsheet would run gets a leading quote (S8)."""
    if value is None:
        return ""
    text = str(value)
    if _NUMBER.fullmatch(text):
        return text
    risky = text.startswith(tuple(_FORMULA)) or text.lstrip()[:1] in tuple(_FORMULA)
    return "'" + text if text and risky else text


def write_csv(
    rows: Sequence[Mapping[str, Any]], path: str | Path, header: Sequence[str] = ()
) -> None:
    """Write rows with a column for every key that occurs, in order of first appearance.

    header: the columns that stand first, also where no row has them.
    """
    header = list(dict.fromkeys((*header, *(key for row in rows for key in row))))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    # csv quotes no lone carriage return, behind which a formula would stand in a row of its own
    table: list[list[object]] = [[*header], *([row.get(key) for key in header] for row in rows)]
    writer.writerows([[re.sub(r"\r\n?", "\n", cell(value)) for value in line] for line in table])
    write_text_atomic(Path(path), out.getvalue())


def write_jsonl(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write one JSON object a row; a number that is none (NaN) as null."""
    out = io.StringIO()
    for row in rows:
        plain = {k: None if v != v else v for k, v in row.items()}
        out.write(json.dumps(plain, ensure_ascii=False, default=str) + "\n")
    write_text_atomic(Path(path), out.getvalue())


def comparison_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a configuration: means, spreads, and differences to the control."""
    rows = []
    for study in comparisons(records):
        for group in study.groups:
            row: dict[str, Any] = {
                "model": study.model,
                "tasks": " > ".join(task.name for task in study.tasks),
                "scenario": study.scenario,
                "recipe": group.label,
                "control": "yes" if group.control else "",
                "seeds": " ".join(str(seed) for seed in group.seeds if seed is not None),
                "runs": len(group.runs),
                "failed": group.failed,
            }
            for name in COLUMNS:
                row |= {
                    f"{name}_{key}": value for key, value in group.spread[name]._asdict().items()
                }
            for name in PAIRED:
                gap = group.difference.get(name)
                for key in ("mean", "low", "high", "n", "p"):
                    row[f"{name}_minus_control_{key}"] = getattr(gap, key, None)
                judged = group.judged.get(name)
                for item in fields(Judged):
                    row[f"{name}_minus_control_{TOLD.get(item.name, item.name)}"] = getattr(
                        judged, item.name, None
                    )
            rows.append(row)
    return rows


def run_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each cell of every score matrix, measured or not."""
    return [
        {
            "recipe": group.label,
            "seed": run.body["seed"],
            "learned": run.tasks[i].name,
            "tested": run.tasks[j].name,
            "metric": run.tasks[j].metric,
            "score": run.scores[i][j],
            "noise": run.noise[i][j],
            "tasks": " > ".join(task.name for task in run.tasks),
            "scenario": study.scenario,
        }
        for study in comparisons(records)
        for group in study.groups
        for run in group.runs
        for i in range(len(run.tasks))
        for j in range(len(run.tasks))
    ]
