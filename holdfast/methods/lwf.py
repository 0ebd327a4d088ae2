"""LwF: learning without forgetting (Li & Hoiem, ECCV 2016, arXiv 1606.09282, eq. 2-3).

Before a task every old head's outputs on the new task's rows are kept; while it is learned, each
old head, on the changing encoder, is held to these answers:

    P = λ Σ_old T² · mean over rows of KL(softmax(z⁰/T) ‖ softmax(z/T))

z⁰ are the logits before the task, z the current ones. A regression has ½ (z⁰ − z)² in place of the
divergence: that of two normal distributions of variance 1; with several labels per row their
divergences are summed. No row of an old task is kept, and the answers (one number per class and
row) are looked up by a row's content, so that the order of batches does not matter. The old heads
read what the encoder returned for the task's own loss: no second pass. They are not trained.
Of a head that tags every token, a row's divergence is the mean over its tokens.
Deviation: the paper's loss is a cross entropy, which differs by the answers' constant entropy.

Where all tasks share one head, the old one is its outputs for the labels before the new task: one
term, its softmax over these labels. They are trained, by the new task's loss too.

Fit the task's own head first: a random head drives the encoder away from the answers.

**rows="near"** is ours. An old head's answers on rows unlike any of its own task are of no use, and
holding them costs the new task much. With it each row counts by how near it lies to the old task's
rows, measured in the inputs x̃ = (x, 1) of that task's last layer before the new task:

    share = min(1, d / h),   h = x̃ᵀ (M+εI)⁻¹ x̃,   M = E_old[x̃ x̃ᵀ],   d = E_old[h] = tr M(M+εI)⁻¹

so that a row as near as the old ones are on average counts in full (but for ε, .3 of M's mean
diagonal, h is 1 plus the squared Mahalanobis distance). M is all that is kept of the old rows:
4 (inputs + 1)² bytes per task, measured when it was learned. For a head of several layers, or one
that does not take one input per row, every row counts in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from holdfast.engine.batches import Seen, first_rows, rows_in
from holdfast.engine.head_first import known_outputs, only_layer
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused, tell_once
from holdfast.methods.common import answers
from holdfast.methods.common.answers import divergence
from holdfast.methods.common.importance import kind_of

MEASURED = 100  # rows of a finished task from which its moment is measured
RIDGE = 0.3  # of the moment's mean diagonal: a hundred rows do not span its directions


@dataclass(frozen=True, kw_only=True)
class LwF(Method):
    """Hold the old heads' answers on the new task's rows.

    strength: λ ≥ 0 of each old head, relative to the task's own loss.
    temperature: T > 0; the larger, the more small probabilities count.
    rows: `all` of the new task's count alike, as published, or each by how `near` it is.
    """

    name: ClassVar[str] = "lwf"
    summary: ClassVar[str] = "holds the old heads' answers on the new task's rows"
    paper: ClassVar[str] = "Li & Hoiem, ECCV 2016, arXiv 1606.09282"
    group: ClassVar[str] = "old tasks"
    cost: ClassVar[str] = "the old heads on features of the same pass"
    use: ClassVar[str] = "the next task, without old rows"
    head_first: ClassVar[bool] = True
    bytes_per_weight: ClassVar[str] = (
        "0 (the answers: 4 bytes a row and old class, 8 a row; with near rows 4 more a row and "
        "old task, and 4 d² an old head of d inputs)"
    )
    needs_features: ClassVar[bool] = True
    needs_old_task: ClassVar[bool] = True
    tunable: ClassVar[tuple[str, ...]] = ("strength", "temperature")
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(0.1, 10.0, log=True),
        "temperature": Range(1.0, 4.0),
    }

    strength: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    rows: Literal["all", "near"] = "all"

    @property
    def needs_data(self) -> bool:
        return self.rows == "near"

    def wants_rows(self, view: View) -> bool:
        return bool(view.finished)

    def read_rows(self, view: View) -> None:
        cache = view.state.cache
        if "answers" not in cache:
            cache["answers"] = {"rows": [], "by task": {}, "near": _near(view)}
        found, near = cache["answers"], cache["answers"]["near"]
        with contextlib.ExitStack() as stack:
            given = {task: stack.enter_context(_given(each.layer)) for task, each in near.items()}
            outputs = {t: o for t, o in view.old_outputs().items() if not _headless(view, t, o)}
        if not outputs:
            del cache["answers"]
            tell_once("lwf: tasks that share a whole model have no heads to hold the answers of")
            return
        for task, output in outputs.items():
            logits = _logits(output, view, task)
            found["by task"].setdefault(task, []).append(logits)
            one_head = known_outputs(view.bound.models[task]) is not None
            shares = []
            for each in near if one_head else near.keys() & {task}:
                x = _one_a_row(given[each], len(logits))
                shares.append(logits.new_ones(len(logits)) if x is None else near[each].shares(x))
            if shares:  # near one of the tasks of a head is near
                most = torch.stack(shares).amax(0)
                found["by task"].setdefault(f"{task}/shares", []).append(most)
        found["rows"].append(view.rows)

    def begin_task(self, view: View) -> None:
        if view.resuming:
            return
        answers.forget(view.state)
        found = view.state.cache.pop("answers", None)
        if found is not None:
            answers.keep(view.state, found["rows"], found["by task"])

    def penalty(self, view: View) -> Tensor:
        total = torch.zeros((), device=next(iter(view.weights.values())).device)
        if not answers.kept(view.state):
            return total
        before = answers.recall(view.state, view.rows, where="lwf",
                                remedy="pass the rows as training sees them, not changed at "
                                "random")  # fmt: skip
        for task, outputs in view.old_outputs().items():
            now = _logits(outputs, view, task)
            kind = kind_of(view.bound.models[task], now)
            held, shares = before[task], before.get(f"{task}/shares")
            if now.ndim > 2:
                held, shares = _of_tokens(held, now, view.inputs or {})
            total = total + divergence(held, now, kind, temperature=self.temperature, shares=shares)
        return self.strength * total

    def unbound(self, view: View) -> None:
        view.state.cache.pop("answers", None)  # of a task that failed to begin

    @torch.no_grad()
    def end_task(self, view: View) -> None:
        answers.forget(view.state)
        layer = _last_layer(view, view.task) if self.rows == "near" else None
        moment = None if layer is None else _moment(view, layer)
        if moment is not None:
            view.state.tensors.setdefault("moments", {})[view.task] = moment


def _of_tokens(held: Tensor, now: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Answers for tags, as long as `now`, that hold no padding, and 1 / tokens of each row."""
    mask = inputs.get("attention_mask")
    mask = torch.ones(now.shape[:2], device=now.device) if mask is None else mask
    held = answers.lasting(held, now.shape[1])
    return torch.where(mask[..., None] > 0, held, now.detach()), 1 / mask.sum(1).clamp(min=1)


class _Near:
    """How near inputs of a head's last layer lie to those of its own task, whose moment is M."""

    def __init__(self, layer: nn.Linear, moment: Tensor) -> None:
        moment = moment.to(layer.weight.device)  # a loaded one is on the CPU
        eye = torch.eye(len(moment), device=moment.device)
        self.layer = layer
        self.factor = torch.linalg.cholesky(moment + RIDGE * moment.diagonal().mean() * eye)
        self.usual = torch.cholesky_solve(moment, self.factor).trace()  # d

    def shares(self, x: Tensor) -> Tensor:
        """How much each row of x (rows, inputs + 1) counts, from 0 to 1: (rows,)."""
        h = (x * torch.cholesky_solve(x.T, self.factor).T).sum(1)
        return (self.usual / h).clamp(max=1.0)


def _headless(view: View, task: str, outputs: Any) -> bool:
    """Whether a finished task's model is this very one, and gives no logits of (rows, classes)."""
    models, logits = view.bound.models, getattr(outputs, "logits", None)
    ours = {id(p) for p in models[view.task].parameters()}
    return getattr(logits, "ndim", 0) != 2 and all(id(p) in ours for p in models[task].parameters())


def _near(view: View) -> dict[str, _Near]:
    """For each finished task with a moment, how near rows lie to its own."""
    moments = view.state.tensors.get("moments", {})
    layers = {task: _last_layer(view, task) for task in moments}
    return {task: _Near(layer, moments[task]) for task, layer in layers.items() if layer}


def _moment(view: View, layer: nn.Linear) -> Tensor | None:
    """M of a finished task, a mean over its rows: (inputs + 1, inputs + 1)."""
    found, seen, state = [], Seen(), view.generator.get_state()
    for batch in seen.through(first_rows(view.data(), MEASURED)):
        with _given(layer) as given:
            view.forward(batch, training=False)
        found.append(_one_a_row(given, rows_in(batch)))
    view.generator.set_state(state)  # draws after this do not depend on it
    seen.require_equal(layer.weight.device)
    if not found:
        raise Refused("no rows to measure", where="lwf", remedy="pass the task's rows as data=")
    known = [x for x in found if x is not None]
    if len(known) < len(found):
        return None
    x = torch.cat(known)
    moment = x.T @ x / len(x)
    if not bool(moment.isfinite().all()):
        raise Refused("the inputs of the head are not finite", where="lwf",
                      remedy="look for rows or weights that are not")  # fmt: skip
    return moment


def _last_layer(view: View, task: str) -> nn.Linear | None:
    """The linear layer that is a task's whole head; None if the head is not one."""
    model, encoder = view.bound.models.get(task), view.encoder
    if model is None:
        return None
    below = {id(p) for p in encoder.parameters()} if encoder is not None else set()
    own = [p for p in model.parameters() if id(p) not in below]
    # For a head in `modules_to_save` PEFT also keeps the original one, frozen.
    return only_layer(model, [p for p in own if p.requires_grad] or own)


@contextlib.contextmanager
def _given(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record a layer's inputs within the block, with a 1 appended: (…, inputs + 1) per call."""
    given: list[Tensor] = []

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(functional.pad(inputs[0].detach().float(), (0, 1), value=1.0))

    handle = layer.register_forward_pre_hook(see)
    try:
        yield given
    finally:
        handle.remove()


def _one_a_row(given: list[Tensor], rows: int) -> Tensor | None:
    """The inputs of a layer's first call: (rows, inputs + 1); None unless there is one per row."""
    return given[0] if given and given[0].shape[:-1] == (rows,) else None


def _logits(outputs: Any, view: View, task: str) -> Tensor:
    """Logits in at least float32: (rows, classes), or of tags (rows, tokens, classes)."""
    logits = getattr(outputs, "logits", None)
    config = getattr(view.bound.models[task], "config", None)
    # A language model's are numbers for each word of its vocabulary.
    words = getattr(config, "vocab_size", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or (
        logits.ndim == 3 and logits.shape[-1] == words
    ):  # fmt: skip
        raise Refused(
            f"the head of {task!r} does not return logits of (rows, classes)",
            where="lwf",
            remedy="kl_anchor holds the outputs of other models",
        )
    return answers.exact(logits)
