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
    from holdfast.experiments.serving import load
    from holdfast.report.tables import write_csv, write_jsonl
    from holdfast.tasks.rows import unlabelled

    if chosen.batch_size < 1:
        raise Refused("must be above 0", where="--batch-size")
    if chosen.out.suffix not in (".jsonl", ".csv"):
        raise Refused("neither .jsonl nor .csv", where=str(chosen.out), remedy="name such a file")
    shares = "probabilities" if chosen.out.suffix == ".jsonl" else "probability"
    if taken := {"label", shares} & {*chosen.keep}:
        raise Refused(f"{taken.pop()!r} is what is written", where="--keep",
                      remedy="rename that column in the file")  # fmt: skip
    served = load(chosen.run_folder)
    about = served.tasks[served.named(chosen.task)]
    texts, pairs, kept, cut = unlabelled(
        chosen.rows, chosen.keep, pairs=bool(about["pairs"]), prompts=about["kind"] == "generation"
    )
    made = served.predictions(chosen.task, texts, pairs, batch=chosen.batch_size)
    with tqdm(total=len(texts), unit="row", leave=False, disable=None) as bar:
        rows = []
        for given, each in zip(kept, made, strict=True):
            row = {**given, "label": each.label}
            if each.probabilities:
                best = max(each.probabilities.values())
                row[shares] = each.probabilities if shares == "probabilities" else best
            rows.append(row)
            bar.update()
    if chosen.out.suffix == ".csv":
        write_csv(rows, chosen.out, [*chosen.keep, "label", *([shares] if about["labels"] else [])])
    else:
        write_jsonl(rows, chosen.out)
    told = f", {cut:,} of them cut at 20,000 characters" if cut else ""
    if served.one_head and about["labels"]:
        told += f", each one of all {len(about['labels'])} labels of the tasks' one head"
    print(f"{chosen.out}: {len(rows):,} rows{told}; texts are cut at {served.max_length} tokens")
