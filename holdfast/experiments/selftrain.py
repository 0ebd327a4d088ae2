"""Self-training: a teacher labels rows that have none, a student learns from them and is the next.

After UPET (arXiv 2310.13022). The teacher of round 1 is fine-tuned on the labelled rows. In each
round it answers up to N rows without a label T times, with dropout: p_t, t = 1 … T. A row's pseudo
label is the one most p_t vote for (of equal votes, the more probable one by p̄ = mean p_t), and

    a = H(p̄) − mean_t H(p_t)        BALD: how much the passes disagree, in nats, 0 ≤ a ≤ log C

Of each pseudo label equally many rows are drawn, one after another without replacement, with
probability ∝ max(0, 1 − a). A student, the pre-trained model anew with adapters, is trained on them
and on the labelled rows, and becomes the teacher of the next round.

From memory: the paper's score s = α max p̄ + (1 − α)(1 − a) (`alpha`), and that a student starts
anew; values of α and of τ of its loss (`phce`) were not found. Deviations: the draw is ∝ s as it
stands, so that α = 0 is the released code's 1 − a; `phce` is the loss of the labelled rows too; the
paper's easy-hard contrast is left out, as in the released code.

Rows that the task holds already, above all its evaluation rows, are left out of those without a
label. Labels that their file may have are only compared with the pseudo labels, for the record.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holdfast.config import count
from holdfast.engine.peft import LoRA
from holdfast.errors import Refused, tell_once
from holdfast.experiments.ranks import check_alone
from holdfast.experiments.record import Record
from holdfast.experiments.runs import CONFIG, WEIGHTS, config_in, digest, other_settings
from holdfast.experiments.sequence import Job, load_tasks
from holdfast.experiments.settings import SelfTraining, Settings
from holdfast.files import only_keys, read_text, write_text_atomic
from holdfast.methods.phce import PHCE
from holdfast.recipe import Recipe
from holdfast.tasks import Task, files, labels
from holdfast.tasks.rows import unlabelled
from holdfast.tasks.spec import parse, with_options
from holdfast.tasks.task import Row

STATE = "selftrain.json"  # of the whole: its configuration, and what each round found


class Said(NamedTuple):
    """What T passes say of n rows: lists of n."""

    label: list[int]
    sure: list[float]  # max p̄
    bald: list[float]  # a
    agree: bool  # whether all passes are equal: a model without dropout


def selftrain(
    model: str,
    task: str | Path,
    unlabelled: str | Path,
    recipe: Recipe | str = "plain",
    *,
    student: Recipe | str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    command: Sequence[str] | None = None,
    **settings: Any,
) -> list[Record]:
    """Train a teacher on `task`, and students on rows of `unlabelled` too; a record a round.

    recipe: the teacher's; student: the students' (that of the teacher, with adapters).
    unlabelled: a file as `load_task` reads it, without labels, or a .txt of one text a line.
    out: the folder (runs/ and a hash); round k is an ordinary run in `out/round-k`, the rows that
    it learned from lie in `out/round-k.jsonl`, all else in `out/selftrain.json`. A killed one goes
    on, a finished one is only read, more rounds are added to it. settings: see `SelfTraining` and
    `Settings`.

    Raises `Refused`, before anything is trained, for a task that has not one class a row and for
    what cannot be read.
    """
    check_alone()
    own, usual = ([f.name for f in fields(cls)] for cls in (SelfTraining, Settings))
    only_keys(settings, [*own, *usual], called=Settings.where)
    how = SelfTraining.from_dict({k: v for k, v in settings.items() if k in own})
    plan = Settings.from_dict({k: v for k, v in settings.items() if k not in own})
    (labelled,) = load_tasks([task], seed=seed, plan=plan)
    if labelled.kind != "classification" or labelled.labels is None:
        kind = "regression" if labelled.regression else labelled.kind
        raise Refused(f"is of kind {kind}; self-training needs one class a row",
                      where=labelled.name)  # fmt: skip
    rows, truth = _new_rows(str(unlabelled), labelled)
    teacher = Recipe.named(recipe)
    learner = _student(teacher, student, how)
    config = {
        "model": model, "tasks": [[labelled.name, labelled.hash]], "recipe": teacher.to_dict(),
        "student": replace(learner, name="student").to_dict(), "seed": seed,
        "settings": plan.to_dict(), "unlabelled": digest({"rows": [row.plain for row in rows]}),
        "how": {k: v for k, v in how.to_dict().items() if k != "rounds"},
    }  # fmt: skip
    folder = Path("runs") / digest(config) if out is None else Path(out)
    found = _begun(folder, config)
    for line in labelled.warnings:
        tell_once(f"{labelled.name}: {line}")
    records: list[Record] = []
    for number in range(how.rounds + 1):
        home, now, told = folder / f"round-{number}", labelled, dict[str, Any]()
        bar = f"round {number}" if progress else None
        if number:
            before, file = folder / f"round-{number - 1}", home.with_suffix(".jsonl")
            if not file.is_file():
                _write(
                    file, _pseudo(before, labelled, rows, how, f"{seed} {number}", bar), labelled
                )
            now, told = _with_pseudo(labelled, file, truth, before=number - 1)
            if number < len(found) and told["pseudo"] != found[number].get("pseudo"):
                raise Refused(f"holds other rows than round {number} learned from", where=str(file),
                              remedy="delete it, and it is written anew")  # fmt: skip
        with_ = learner if number else teacher
        job = Job(model=model, recipe=replace(with_, name=f"{with_.name}, round {number}"),
                  seed=seed, command=list(command or sys.argv), bar=bar)  # fmt: skip
        lr = how.student_lr if number else None
        records.append(job.run([now], replace(plan, lr=lr or plan.lr), home))
        noted = {config_in(run).get(WEIGHTS) for run in (folder / "round-0", home)} - {None}
        if len(noted) > 1:  # each round reads the model anew
            raise Refused(f"{WEIGHTS}: others than round 0 had; they changed meanwhile",
                          where=str(home), remedy="put them back and delete this folder, and the "
                          "same command goes on")  # fmt: skip
        if number == len(found):
            selection = (records[-1].selection_scores or [[None]])[0][0]
            scores = {"selection": selection, "evaluation": records[-1].scores[0][0]}
            found.append({"round": number, **told, **scores})
            body = {"schema": 1, "config": config, "rounds": found}
            write_text_atomic(folder / STATE, json.dumps(body, indent=1, ensure_ascii=False))
    return records


def rounds_in(folder: Path) -> list[dict[str, Any]]:
    """What each round found: its number, scores, pseudo labels by class, how many of them agree."""
    found = json.loads(read_text(folder / STATE))["rounds"]
    for number, told in enumerate(found):
        numbers = [told["selection"], told["evaluation"], told.get("agreement")]
        whole = [told["round"], *told.get("pseudo", {}).values()]
        if told["round"] != number or not (
            all(isinstance(value, int | float | None) for value in numbers)
            and all(isinstance(value, int) for value in whole)
        ):
            raise ValueError(f"round {number}")
    return list(found)


def _begun(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds that are done; `Refused` if they are of another configuration."""
    if not (folder / STATE).is_file():
        if (folder / CONFIG).exists():
            raise Refused("holds a run", where=str(folder), remedy="choose another --out")
        return []
    try:
        before, found = json.loads(read_text(folder / STATE))["config"], rounds_in(folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(f"{STATE} is damaged", where=str(folder),
                      remedy="choose another --out") from None  # fmt: skip
    if before != json.loads(json.dumps(config)):
        raise other_settings(folder, before, config)
    return found


def _student(teacher: Recipe, asked: Recipe | str | None, how: SelfTraining) -> Recipe:
    """The students' recipe: the one asked for, or the teacher's with adapters."""
    if asked is None:
        made = replace(teacher, peft=teacher.peft or LoRA(), name=f"{teacher.name} with adapters")
    else:
        made = Recipe.named(asked)
    return made if how.phce is None else replace(made, methods=[*made.methods, PHCE(tau=how.phce)])


# --- rows without a label -------------------------------------------------------------------------


def _new_rows(spec: str, task: Task) -> tuple[list[Row], dict[tuple[str, str], int]]:
    """Rows of a file that the task does not hold, each once, and their labels where it has them."""
    asked, own = parse(spec), parse(task.source).options
    cells: list[dict[str, Any]] = []
    if asked.kind == "text" and not task.pairs:
        text = files.text(Path(asked.place))
        firsts, seconds = [line for line in text.split("\n") if line.strip()], None
    else:
        if asked.options.text is None:  # the columns of the task, unless the file names its own
            spec = with_options(spec, **{k: v for k in ("text", "pair") if (v := getattr(own, k))})
        label = asked.options.label or own.label or "label"
        firsts, seconds, cells, _ = unlabelled(spec, pairs=task.pairs, beside=label)
    pairs: Sequence[str | None] = seconds or [None] * len(firsts)
    made = [Row(text, pair, None) for text, pair in zip(firsts, pairs, strict=True)]
    held = {row.plain for row in (*task.train, *task.selection)}
    tested = {row.plain for row in task.evaluation}
    rows = {row.plain: row for row in made if row.plain not in held | tested}
    if left := sum(row.plain in tested for row in made):
        tell_once(f"{task.name}: {left:,} rows without a label are evaluation rows: left out")
    if not rows:
        raise Refused("no row that the task does not hold already", where=spec)
    read = [_label(next(iter(cell.values()), None), task) for cell in cells]
    known = zip(made, read, strict=False)
    return list(rows.values()), {r.plain: i for r, i in known if i is not None and r.plain in rows}


def _label(cell: Any, task: Task) -> int | None:
    """The class that a cell names, by its name or its id; None if it names none."""
    assert task.labels is not None
    for rule in (labels.by_name(task.labels), labels.by_id(task.labels)):
        try:
            return rule(cell, "")
        except Refused:
            continue
    return None


def _pseudo(
    teacher: Path, task: Task, rows: Sequence[Row], how: SelfTraining, seed: str, bar: str | None
) -> list[tuple[Row, float, float]]:
    """Rows that the teacher labels, chosen by what it says of them, with max p̄ and a."""
    draw = random.Random(f"selftrain rows {seed}").random
    rank = [draw() for _ in rows]
    rows = [rows[i] for i in sorted(heapq.nsmallest(how.rows, range(len(rows)), rank.__getitem__))]
    said = answered(teacher, task, rows, passes=how.passes, seed=seed, bar=bar)
    if said.agree and how.choose == "bald":
        tell_once(f"{teacher}: all passes agree, as without dropout: BALD tells nothing")
    draw = random.Random(f"selftrain draw {seed}").random
    return [(replace(rows[i], label=said.label[i]), said.sure[i], said.bald[i])
            for i in chosen(said, how, len(task.labels or ()), draw)]  # fmt: skip


def answered(
    teacher: Path, task: Task, rows: Sequence[Row], *, passes: int, seed: str, bar: str | None
) -> Said:
    """What the model in a run's folder says of rows in so many passes with dropout."""
    from holdfast.engine.forwarding import own_randomness
    from holdfast.experiments.callbacks import Counting, drawn
    from holdfast.experiments.serving import load
    from holdfast.tasks.kinds.classification import KIND, outputs

    served = load(teacher)
    encoded = KIND.encode([replace(row, label=0) for row in rows], task, served.processor,
                          max_length=served.max_length)  # fmt: skip
    collate, shown = KIND.collator(served.processor), None
    if bar is not None:
        shown = drawn(len(rows) * passes, f"{bar} · rows without a label, {passes} passes",
                      unit="row")  # fmt: skip
        collate = Counting(collate, shown)
    said = torch.zeros(passes, len(rows), len(task.labels or ()), dtype=torch.float64)
    noise = random.Random(f"selftrain passes {seed}").getrandbits(62)
    with own_randomness(torch.Generator().manual_seed(noise)):
        for p in said:
            for places, logits in outputs(served.models[task.name], encoded, collate, dropout=True):
                p[places] = logits.double().softmax(-1).cpu()
    if shown is not None:
        shown.close()
    votes = torch.nn.functional.one_hot(said.argmax(-1), said.shape[-1]).sum(0)
    mean = said.mean(0)
    # Half a probability is less than a vote: it decides between equal votes only.
    return Said((votes + mean / 2).argmax(-1).tolist(), mean.amax(-1).tolist(),
                bald(said).tolist(), bool((said == said[0]).all()))  # fmt: skip


def bald(p: Tensor) -> Tensor:
    """a = H(p̄) − mean_t H(p_t) of p (T, n, C): (n,), in nats; at least 0."""

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum(-1)

    return (entropy(p.mean(0)) - entropy(p).mean(0)).clamp(min=0)


def chosen(said: Said, how: SelfTraining, classes: int, uniform: Callable[[], float]) -> list[int]:
    """Places of the rows to learn from: of each class the same number, or all it has.

    A class has those with a score above 0, whatever `choose` is, so that controls take as many.
    """
    score = [how.alpha * sure + (1 - how.alpha) * max(0.0, 1 - a)
             for sure, a in zip(said.sure, said.bald, strict=True)]  # fmt: skip
    most = max(1, count(how.pseudo, len(score), what="pseudo") // classes)
    found: list[int] = []
    for label in range(classes):
        places = [i for i, said_of in enumerate(said.label) if said_of == label]
        size = min(most, sum(score[i] > 0 for i in places))
        if how.choose == "confidence":
            found += heapq.nlargest(size, places, key=said.sure.__getitem__)
            continue
        weights = [score[i] if how.choose == "bald" else 1.0 for i in places]
        found += [places[i] for i in drawn_by(weights, size, uniform)]
    return sorted(found)


def drawn_by(weights: Sequence[float], size: int, uniform: Callable[[], float]) -> list[int]:
    """Places drawn one after another without replacement, with probability ∝ weight each time.

    As a race: the waiting time −log(u) / w is exponential with rate w, and the first of several
    such is i with probability w_i / Σ w. A weight of 0 is never drawn.
    """
    race = [-math.log(1 - uniform()) / w if w > 0 else math.inf for w in weights]
    return heapq.nsmallest(size, [i for i, time in enumerate(race) if time < math.inf],
                           key=race.__getitem__)  # fmt: skip


# --- pseudo-labelled rows as a file, and as rows of the task --------------------------------------


def _write(file: Path, rows: Sequence[tuple[Row, float, float]], task: Task) -> None:
    """Rows as a JSONL file of a task, with the teacher's mean probability and BALD beside them."""
    assert task.labels is not None
    lines = [
        {"text": row.text, **({"pair": row.pair} if task.pairs else {}),
         "label": task.labels[row.label], "sure": sure, "bald": a}
        for row, sure, a in rows
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))


def _with_pseudo(
    task: Task, file: Path, truth: dict[tuple[str, str], int], *, before: int
) -> tuple[Task, dict[str, Any]]:
    """The task with the rows of a round's file among its training rows, and what they are."""
    assert task.labels is not None
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        rows = [Row(x["text"], x.get("pair"), task.labels.index(x["label"])) for x in lines]
        _ = {row.plain for row in rows}  # texts, all of them
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused("is damaged", where=str(file), remedy="delete it") from None
    counts = Counter(task.labels[row.label] for row in rows)
    right = [truth[row.plain] == row.label for row in rows if row.plain in truth]
    each = ", ".join(f"{name} {counts[name]:,}" for name in task.labels)
    line = f"{len(rows):,} training rows were labelled by the model of round {before} ({each})."
    made = replace(task, train=(*task.train, *rows), warnings=(*task.warnings, line))
    return made, {"pseudo": {name: counts[name] for name in task.labels},
                  "agreement": sum(right) / len(right) if right else None}  # fmt: skip
