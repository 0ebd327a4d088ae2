"""`holdfast predict`: labels for new rows, with every task's head on one encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

ABOUT = "label the rows of a file with one of a run's tasks"
EXAMPLE = "holdfast predict runs/a --task trec6 'questions.csv?text=question' --out labels.jsonl"
RESUMES = False


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a finished run's folder")
    parser.add_argument("rows", help="a CSV, TSV, JSONL or Parquet file, its columns after a ?")
    parser.add_argument("--task", required=True, help="the name of one of the run's tasks")
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl or .csv file to write")
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN",
                        help="columns to copy, such as an id")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64)


def run(chosen: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from holdfast.errors import Refused
    from holdfast.experiments.serving import load, writer_for
    from holdfast.tasks.rows import unlabelled

    if chosen.batch_size < 1:
        raise Refused("must be above 0", where="--batch-size")
    write = writer_for(chosen.out)
    served = load(chosen.run_folder)
    about = served.tasks[served.named(chosen.task)]
    texts, pairs, kept = unlabelled(chosen.rows, chosen.keep, pairs=bool(about["pairs"]))
    made = served.predictions(chosen.task, texts, pairs, batch=chosen.batch_size)
    with tqdm(total=len(texts), unit="row", leave=False, disable=None) as bar:
        rows = []
        for given, each in zip(kept, made, strict=True):
            rows.append({**given, "label": each.label, **_shares(each.probabilities, chosen.out)})
            bar.update()
    write(rows)
    print(f"{chosen.out}: {len(rows):,} rows")


def _shares(shares: object, out: Path) -> dict[str, object]:
    """Probabilities as one field, or, in a table, the label's own."""
    assert isinstance(shares, dict)
    if not shares:
        return {}
    if out.suffix == ".jsonl":
        return {"probabilities": shares}
    return {"probability": max(shares.values())}
