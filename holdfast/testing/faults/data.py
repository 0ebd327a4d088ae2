"""Data: files that are empty, torn, mislabelled, or not what they were."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

from holdfast.errors import Refused
from holdfast.methods import DPS
from holdfast.recipe import Recipe
from holdfast.tasks import Task, load_task
from holdfast.testing.faults.place import (
    Loop,
    Place,
    classifier,
    encoded,
    equal,
    refuses,
    same,
    warned,
    weights,
)
from holdfast.testing.faults.suite import Wrong, tried, untried

HEAD = "text,label\n"
GOOD = "".join(f"the good film {i},yes\na bad book {i},no\n" for i in range(8))


def told(task: Task, word: str) -> None:
    """What was left out or is odd has to be counted in a warning."""
    if not any(word in line for line in task.warnings):
        raise Wrong(f"no warning says {word!r}: {task.warnings}")


def jsonl(*rows: Any) -> str:
    good = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": "ab"[i % 2]} for i in range(16)]
    return "".join(
        row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in [*good, *rows]
    )


def texts(task: Task) -> list[str]:
    return [row.text for row in (*task.train, *task.selection, *task.evaluation)]


def parquet(path: Path, **columns: list[Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@tried("D1", "command line")
def d1(place: Place) -> None:
    empty: dict[str, str | bytes] = {
        "empty.csv": "", "empty.jsonl": "", "head.csv": HEAD, "blank.csv": HEAD + "\n \n",
        "bom.csv": "\ufeff", "none.jsonl": "{}\n{}\n", "packed.csv.gz": gzip.compress(b""),
        "texts.csv": HEAD + ",yes\n ,no\n",
    }  # fmt: skip
    for name, content in empty.items():
        place.refused(place.write(name, content), says=name)


@tried("D1", "Trainer")
def d1_trainer(place: Place) -> None:
    trainer = place.trainer([])
    before = weights(trainer.model)
    try:
        trainer.train()
    except Exception:
        same(before, weights(trainer.model))
        return
    raise Wrong("trained on no rows")


@tried("D2", "command line")
def d2(place: Place) -> None:
    one = HEAD + "".join(f"film {i},yes\n" for i in range(9))
    place.refused(place.write("one.csv", one), says=("one.csv", "yes"))
    constant = HEAD + "".join(f"film {i},0.5\n" for i in range(9))
    place.refused(f"{place.write('constant.csv', constant)}?type=regression", says="0.5")


@tried("D2", "Trainer")
def d2_trainer(place: Place) -> None:
    trainer = place.trainer(model=classifier(num_labels=1))
    refuses(trainer.train, "num_labels")


@tried("D3", "command line")
def d3(place: Place) -> None:
    place.write("t/meta.json", json.dumps({"labels": ["no", "yes"]}))
    rows = [json.dumps({"text": f"film {i}", "label": i % 2}) for i in range(12)]
    place.write("t/validation.jsonl", "\n".join(rows))
    for label in ("2", "-1", "1.5", "true", '"maybe"', "1e30"):
        place.write("t/train.jsonl", "\n".join([*rows, f'{{"text": "x", "label": {label}}}']))
        place.refused(place / "t", says=("train.jsonl", "line 13"))


@tried("D3", "Trainer")
def d3_trainer(place: Place) -> None:
    trainer = place.trainer(encoded(labels=lambda i: 7 if i == 0 else i % 2))
    refuses(trainer.train, "label 7 is outside 0 to 1")  # before its batch, not the first step


@tried("D4", "command line")
def d4(place: Place) -> None:
    names = ["NA", "None", "null", "nan", "NaN", "N/A"]
    rows = [(f"{name} {i}", name) for i in range(8) for name in names]
    rows += [(name, name) for name in names]
    cells = HEAD + "".join(f"{text},{label}\n" for text, label in rows)
    lines = "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows)
    files = [
        place.write("a.csv", cells),
        place.write("a.tsv", cells.replace(",", "\t")),
        place.write("a.jsonl", lines),
        parquet(place / "a.parquet", text=[t for t, _ in rows], label=[n for _, n in rows]),
    ]
    for file in files:
        task = load_task(file)
        equal(sorted(task.labels or ()), sorted(names), "labels")
        equal(sorted(texts(task)), sorted(t for t, _ in rows), "texts")


@tried("D5", "command line")
def d5(place: Place) -> None:
    for one, two in (("1", "01"), ("1", "True"), ("1", "1.0"), ("1", "+1"), ("yes", "yes ")):
        rows = "".join(f"a {i},{one}\nb {i},{two}\nc {i},2\n" for i in range(6))
        place.refused(place.write("odd.csv", HEAD + rows), says="spellings")
    mixed = "".join(f'{{"text": "a {i}", "label": {("1", "true", "2")[i % 3]}}}\n'
                    for i in range(12))  # fmt: skip
    place.refused(place.write("odd.jsonl", mixed), says="spellings")


@tried("D5", "command line")
def d5_order(place: Place) -> None:
    place.write("b.csv", HEAD + "the good x,no\na bad y,yes\n")
    held = load_task(f"{place.write('a.csv', HEAD + GOOD)}?evaluation=b.csv")
    names = held.labels or ()
    equal([names[int(row.label)] for row in held.evaluation], ["no", "yes"], "labels")


@tried("D6", "command line")
def d6(place: Place) -> None:
    task = load_task(place.write("a.csv", f"{HEAD}{GOOD},yes\n  ,no\n"))
    equal(len(texts(task)), 16, "rows")
    told(task, "2 rows without text")
    null = {"text": None, "label": "a"}
    task = load_task(place.write("a.jsonl", jsonl(null)))
    equal(len(texts(task)), 16, "rows")
    told(task, "1 row without text")
    for text in ("NaN", "5", "[1]"):
        line = f'{{"text": {text}, "label": "a"}}'
        place.refused(place.write("b.jsonl", jsonl(line)), says="line 17")
    place.refused(place.write("c.csv", f"{HEAD}{GOOD}no label,\n"), says="line 18")
    numbers = parquet(place / "d.parquet", text=[1.0, math.nan] * 9, label=["a", "b"] * 9)
    place.refused(numbers, says="row 1")


@tried("D7", "command line")
def d7(place: Place) -> None:
    odd = 'one\ntwo, "three"'
    task = load_task(place.write("a.csv", HEAD + GOOD + '"one\ntwo, ""three""",yes\n'))
    if odd not in texts(task):
        raise Wrong("a quoted newline or comma was read as another text")
    for line in ("short", "a,b,c", '"never closed,yes', '"closed" early,yes'):
        place.refused(place.write("b.csv", f"{HEAD}{GOOD}{line}\n"), says="line 18")


@tried("D8", "command line")
def d8(place: Place) -> None:
    table = (HEAD + GOOD).encode()
    place.refused(place.write("a.csv", table + b"caf\xe9,yes\n"), says=("line 18", "UTF-8"))
    place.refused(place.write("b.csv", (HEAD + GOOD).encode("utf-16")), says="UTF-8")
    packed = gzip.compress(table + b"caf\xe9,yes\n")
    place.refused(place.write("c.csv.gz", packed), says=("line 18", "UTF-8"))
    half = '{"text": "\\ud800", "label": "a"}'
    place.refused(place.write("d.jsonl", jsonl(half)), says="line 17")
    task = load_task(place.write("e.csv", b"\xef\xbb\xbf" + table))
    equal(task.labels, ("no", "yes"), "labels behind a byte order mark")
    equal(len(texts(task)), 16, "rows behind a byte order mark")


@tried("D9", "command line")
def d9(place: Place) -> None:
    path = place.write("a.csv", HEAD + GOOD + f"{'word ' * 1_000_000},yes\n")
    tracemalloc.start()
    try:
        task = load_task(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6, f"{peak / 1e6:.0f} MB for a line of 5 MB"
    equal(max(map(len, texts(task))) <= 20_000, True, "the line is cut")
    told(task, "20,000")


@tried("D10", "command line")
def d10(place: Place) -> None:
    path = parquet(place / "whole.parquet", text=[f"film {i}" for i in range(60)],
                   label=["yes", "no"] * 30)  # fmt: skip
    content = path.read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        place.refused(place.write("cut.parquet", content[:length]), says="cut.parquet")
    for fake in (b"PAR1", b"PAR1" * 9, (HEAD + GOOD).encode(), b"\x80\x04N."):
        place.refused(place.write("fake.parquet", fake), says="fake.parquet")


@tried("D11", "command line")
def d11(place: Place) -> None:
    place.write("b.csv", HEAD + "THE  good film 0,yes\na bad book 1,no\nsomething new,no\n")
    told(load_task(f"{place.write('a.csv', HEAD + GOOD)}?evaluation=b.csv"), "2 evaluation rows")


@tried("D12", "command line")
def d12(place: Place) -> None:
    for none in ("-100", "-100.0", " -100"):
        rows = GOOD.replace("yes", "1").replace("no", "0") + f"left out,{none}\n" * 3
        try:
            task = load_task(place.write("a.csv", HEAD + rows))
        except Refused:
            continue
        equal(task.labels, ("0", "1"), f"labels beside {none}")
        told(task, "3 rows")
    place.refused(place.write("b.csv", HEAD + "".join(f"x {i},-100\n" for i in range(9))))


@tried("D12", "Trainer")
def d12_trainer(place: Place) -> None:
    with warned() as lines:
        trainer = place.trainer(encoded(labels=lambda i: -100))
        before = weights(trainer.model)
        try:
            trainer.train()
        except Refused:
            pass
        else:
            if not trainer.bound.skipped or not lines:
                raise Wrong(f"{trainer.state.global_step} steps on no label, without a word")
    same(before, weights(trainer.model))


untried("D12", "plain loop", "the loss is the loop's own, and its gradient is 0 there: no hook can "
        "tell that from a step that has one")  # fmt: skip


@tried("D13", "command line")
def d13(place: Place) -> None:
    path = place.rows()
    assert place.train(path)[0] == 0
    place.rows(more=" again")
    code, said = place.train(path)
    if code == 0:
        raise Wrong("the scores of other rows are told as those of these")
    assert code == 2 and "other" in said, said


def _resumed(place: Place, data: list[Any]) -> None:
    from holdfast.testing.faults.checkpoints import stopped_trainer

    checkpoint = stopped_trainer(place, step=2)
    trainer = place.trainer(data, recipe=Recipe(methods=[DPS(stage=2)]))
    refuses(lambda: trainer.train(resume_from_checkpoint=str(checkpoint)), "rows")


@tried("D13", "Trainer")
def d13_trainer(place: Place) -> None:
    _resumed(place, encoded(labels=lambda i: 1 - i % 2))


@tried("D13", "Trainer")
def d13_order(place: Place) -> None:
    _resumed(place, encoded()[::-1])


@tried("D13", "plain loop")
def d13_loop(place: Place) -> None:
    from holdfast.engine.plan import rows_hash
    from holdfast.training.loop import load_checkpoint, save_checkpoint

    at = place / "checkpoint-2"
    loop, rows = Loop(DPS(stage=2)).steps(0, 2), encoded()
    save_checkpoint(at, loop.bound, position={}, plan={"rows": rows_hash(rows)})
    rows[3]["labels"] = 1 - rows[3]["labels"]
    again = Loop(DPS(stage=2)).bound
    refuses(lambda: load_checkpoint(at, again, plan={"rows": rows_hash(rows)}), "rows")


@tried("D14", "command line")
def d14(place: Place) -> None:
    first = place.rows()
    wrong = place.write("wrong.jsonl", jsonl('{"text": "x"}'))
    for second in (place / "none.jsonl", wrong, first, "builtin:nosuch"):
        place.refused(first, second, verb="sequence", recipe="plain")
        assert not (place / "run").exists(), "refused, but a folder was made"


@tried("D14", "command line")
def d14_cells(place: Place) -> None:
    first, second = place.rows(), place.rows("two.jsonl", more=" two")
    code, said = place.train(first, second, verb="sequence", recipe="plain")
    assert code == 0, said
    equal(place.record()["scores"][0][1], None, "the cell of a task not yet learned")
