"""General ability beside the tasks: what a model could do before the first, and still can.

Measured of the *base*, the checkpoint before the first task, and of the model after each task:

nll, in nats: of a reference text, by decoders. It is read in windows of `max_length` tokens that do
not overlap (`generation`), and −log p is a mean over every token but the first of each window.

masked_nll, in nats: of a reference text, by an encoder whose checkpoint has a head for masked
tokens. 15 % of the text's tokens, the same each time, are replaced by the mask, and −log p of what
stood there is a mean over them. The head is the checkpoint's own with its output embeddings, on
today's encoder.

kl, in nats: how far a language model has moved from the base on the evaluation rows of the task
just learned, over their N answer tokens, teacher-forced,

    1/N Σ_t KL(base_t ‖ now_t)                            ≥ 0

cosine_distance: the same of an encoder, over R rows, with b and n the mean over a row's tokens of
what the base's encoder and today's return,

    1/R Σ_r 1 − cos(b_r, n_r)                             from 0 to 2

(CKA would not see a rotation, which an old head does see, and with fewer rows than dimensions it
says that little has changed.)

Scores of lm_eval, EleutherAI's harness, may stand beside these. The base is loaded again for each
measurement and not kept; no weight changes, and no random number that training draws.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForMaskedLM

from holdfast.engine.batches import without_labels
from holdfast.engine.forwarding import in_mode
from holdfast.errors import Refused, tell_once
from holdfast.experiments.embed import pooled
from holdfast.experiments.record import Record
from holdfast.methods.common.answers import divergences, shifts
from holdfast.tasks import Row, Task, files
from holdfast.tasks.kinds import Kind, generation
from holdfast.tasks.kinds.pretrained import device, load_config, load_saved, quiet
from holdfast.tasks.kinds.sharing import share_encoder
from holdfast.tasks.labels import IGNORED

if TYPE_CHECKING:
    from holdfast.experiments.learner import Learner

BATCH = 8  # rows a forward pass: two models' logits take 8 bytes a token and word
MASKED = 0.15  # of the tokens, as in BERT's training
Rows = Sequence[dict[str, Any]]  # encoded


class Probe:
    """Measures a run's models beside its tasks, and puts the numbers into its record.

    base: the checkpoint before the first task. reference: a file of running text. harness: names
    of lm_eval's tasks. All is checked, and `Refused`, when it is made.
    """

    def __init__(
        self, base: str, kind: Kind, *, max_length: int, reference: str | Path | None = None,
        harness: Sequence[str] = (),
    ) -> None:  # fmt: skip
        quiet()
        self.base, self.kind, self.harness = base, kind, tuple(harness)
        self.reference: dict[str, Any] | None = None
        self.measure, self.rows = "", list[dict[str, Any]]()
        if not kind.TEXT and (reference is not None or harness):
            raise Refused("general ability is measured on text, and these tasks have none",
                          where="--reference", remedy="leave it out")  # fmt: skip
        if self.harness:
            _check_harness(self.harness, kind)
        if reference is not None:
            text = files.text(Path(reference))
            self.reference = {"source": str(reference), "max_length": max_length,
                              "hash": hashlib.sha256(text.encode()).hexdigest()}  # fmt: skip
            self.measure = _measure_of(base, kind)
            if self.measure:
                words = kind.load_processor(base)
                self.collate = generation.KIND.collator(words)
                self.rows = (masked if kind.HEADS else windows)(text, words, max_length)
                if not self.rows:
                    raise Refused("too short to be scored", where=str(reference))

    def begin(self, record: Record) -> None:
        """Say what will not be measured; `Refused` if the record's numbers are of another text."""
        told, ours = record.general.get("reference"), self.reference
        if told and ours and any(told.get(k) != ours[k] for k in ("hash", "max_length")):
            raise Refused(f"its numbers are of {told.get('source')}, in windows of "
                          f"{told.get('max_length')} tokens", where="--reference",
                          remedy="name that text, or another --out")  # fmt: skip
        if ours:
            record.general["reference"] = told or ours
        learned, after = record.names[: len(record.seconds)], record.general.get("after", {})
        lines = []
        if missed := [name for name in learned if name not in after]:
            lines.append(f"General ability was not measured after {', '.join(missed)}.")
        if ours and not self.measure:
            lines.append("The model scores no running text (no decoder, no head for masked tokens):"
                         " only its distance from the base is measured.")  # fmt: skip
        for line in lines:
            tell_once(line)
            record.warn(line)

    def __call__(self, learner: Learner, index: int) -> None:
        """Measure the model of a task just learned, and the base if that was not done before."""
        model, task = learner.models[index], learner.tasks[index]
        general = learner.record.general
        before = general.setdefault("base", {})
        with _undrawn(), torch.no_grad(), in_mode(model.modules(), training=False):
            base = self._base(task).to(device()).eval()
            found = {}
            if self.reference and (rows := learner.rows(index, "evaluation")):
                found = moved(self.kind, base, model, rows, learner.collate)
            if self.measure and self.measure not in before:
                before[self.measure] = nll(base, self.rows, self.collate)
            if self.measure:
                if self.kind.HEADS:
                    share_encoder(model, base)
                scored = base if self.kind.HEADS else model
                found[self.measure] = nll(scored, self.rows, self.collate)
            if self.harness:
                if general.get("lm_eval") != [*self.harness]:
                    before |= _harness(base, learner.processor, self.harness)
                    general["lm_eval"] = [*self.harness]
                found |= _harness(model, learner.processor, self.harness)
        general.setdefault("after", {})[task.name] = found

    def _base(self, task: Task) -> Any:
        if self.measure == "masked_nll":
            return load_saved(AutoModelForMaskedLM, self.base)
        return self.kind.load_model(self.base, task, seed=0)


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """Every global random state as it was, whatever is drawn or seeded within the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# --- running text ---------------------------------------------------------------------------------


def _measure_of(base: str, kind: Kind) -> str:
    """How probable running text is by this checkpoint; empty if it cannot say."""
    config = load_config(base)
    if not kind.HEADS:
        return "" if config.is_encoder_decoder else "nll"
    masks = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    return "masked_nll" if masks else ""


def windows(text: str, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """A text for a decoder, as a task of running text is read, but in one piece."""
    row = Row("", None, text)
    task = Task(name="reference", labels=None, metric="likelihood", train=(row,), selection=(),
                evaluation=(), source="", kind="generation")  # fmt: skip
    return [*generation.KIND.encode([row], task, tokenizer, max_length=max_length)]


def masked(text: str, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """A text in windows with 15 % of all its tokens masked; the labels are what stood there."""
    made = tokenizer([text], truncation=True, max_length=max_length,
                     return_overflowing_tokens=True, return_special_tokens_mask=True)  # fmt: skip
    places = [(w, i) for w, special in enumerate(made["special_tokens_mask"])
              for i, is_special in enumerate(special) if not is_special]  # fmt: skip
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids),
             "labels": [IGNORED] * len(ids)} for ids in made["input_ids"]]  # fmt: skip
    for w, i in (places[n] for n in order[: math.ceil(MASKED * len(places))]):
        rows[w]["labels"][i] = rows[w]["input_ids"][i]
        rows[w]["input_ids"][i] = tokenizer.mask_token_id
    return [row for row in rows if any(label != IGNORED for label in row["labels"])]


def nll(model: Any, rows: Rows, collate: Any) -> float:
    """−log p of every label of `rows`, a mean in nats."""
    total, count = 0.0, 0
    for batch in _batches(model, rows, collate):
        logits, labels = _said(model, batch)
        total += float(functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return total / count


# --- distance from the base -----------------------------------------------------------------------


def moved(kind: Kind, base: Any, model: Any, rows: Rows, collate: Any) -> dict[str, float]:
    """How far `model` has moved from `base` on these rows: kl, or with heads cosine_distance."""
    if not kind.HEADS:
        return {"kl": kl(base, model, rows, collate)}
    return {
        "cosine_distance": cosine_distance(kind.shared(base), kind.shared(model), rows, collate)
    }


def kl(base: Any, model: Any, rows: Rows, collate: Any) -> float:
    """KL(base ‖ model) a label, in nats."""
    total, count = 0.0, 0
    for batch in _batches(model, rows, collate):
        (before, labels), (now, _) = _said(base, batch), _said(model, batch)
        total += float(divergences(before, now).sum())
        count += len(labels)
    return total / count


def cosine_distance(base: nn.Module, encoder: nn.Module, rows: Rows, collate: Any) -> float:
    """1 − cos between the vectors of a row by two encoders, a mean over rows: from 0 to 2."""
    total = 0.0
    for batch in _batches(encoder, rows, collate):
        b, n = (_vectors(each, without_labels(batch)) for each in (base, encoder))
        total += float((1 - functional.cosine_similarity(b, n)).clamp(min=0).sum())  # rounding
    return total / len(rows)


def _vectors(encoder: Any, inputs: dict[str, Any]) -> Tensor:
    """The mean over tokens of what an encoder returns: (rows, width)."""
    hidden = encoder(**inputs).last_hidden_state.float()
    mask = inputs.get("attention_mask", hidden.new_ones(hidden.shape[:2]))
    return pooled(hidden, mask, "mean")


def _batches(model: nn.Module, rows: Rows, collate: Any) -> Iterator[Any]:
    at = next(model.parameters()).device
    for start in range(0, len(rows), BATCH):
        few = range(start, min(start + BATCH, len(rows)))
        yield collate([rows[i] for i in few]).to(at)


def _said(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits (labels, words) and ids (labels,) of all labels that count."""
    logits, labels = model(**batch).logits, batch["labels"]
    if shifts(model):  # the token before says the next one
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return logits[counted].float(), labels[counted]


# --- lm_eval --------------------------------------------------------------------------------------


def _check_harness(tasks: Sequence[str], kind: Kind) -> None:
    if kind.HEADS:
        raise Refused("is for language models", where="--lm-eval", remedy="leave it out")
    try:
        from lm_eval.models.huggingface import HFLM  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise Refused("needs a package that is not installed", where="--lm-eval",
                      remedy="pip install lm-eval") from None  # fmt: skip
    known = TaskManager()
    for task in tasks:
        if not known.match_tasks([task]):
            raise Refused(f"no task {task!r}", where="--lm-eval",
                          remedy="`lm_eval ls tasks` lists them")  # fmt: skip


def _harness(model: nn.Module, tokenizer: Any, tasks: Sequence[str]) -> dict[str, float]:
    """Every score of lm_eval's tasks, as "task metric"; standard errors are left out."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    served = HFLM(pretrained=model, tokenizer=copy.copy(tokenizer), batch_size=BATCH)
    done = lm_eval.simple_evaluate(model=served, tasks=list(tasks), log_samples=False,
                                   bootstrap_iters=0)  # fmt: skip
    return {
        f"{task} {name.removesuffix(',none')}": float(value)
        for task, scores in done["results"].items()
        for name, value in scores.items()
        if isinstance(value, float) and "_stderr" not in name
    }
