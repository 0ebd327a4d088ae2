"""KL anchor: hold what the model says of the task's own rows to what it said before.

    P = λ · mean over counted outputs of KL(π₀ ‖ π)          (direction "reverse": KL(π ‖ π₀))

π is the model of now, in the training pass itself; π₀ the anchor, in evaluation mode: the model as
the task began (after its head was fitted), or the base, as it was before its first task. Counted
are the rows of a classifier, and the tokens of a language model whose label is not −100, each
predicted from those before it (of masked language models, taggers and decoders with an encoder: at
its own place). Of a regression ½ (z⁰ − z)² stands in place of the divergence, of several labels a
row the sum of each label's.

How far a model forgets goes with KL(π ‖ π₀) on the new task's inputs (RL's Razor, arXiv
2509.04259); ASFT (arXiv 2509.23753) adds λ KL(π₀ ‖ π) to a loss whose tokens count as they are
probable,

    L = 1/n Σ_t sg[p(y_t)] · (−log p(y_t)) + λ KL            sg: held constant

in place of the plain mean of −log p(y_t): `token_weight="detached_probability"`. As a penalty that
is what is added to the model's own loss:

    P = 1/n Σ_t (sg[p(y_t)] − 1) · (−log p(y_t)) + λ KL

where 1/n is what the model's own loss has in its place, told by its value: a Trainer divides by the
labels of several micro-batches. That loss must be of every label alike, without label smoothing.
λ = 0 leaves DFT.

π₀ of classes is kept by row, from one pass over the rows before the first step, so that a step
costs nothing more. A vocabulary is too large for that: there each micro-batch has a second forward
pass, without gradients, of remembered weights (4 bytes a weight that is trained), or of the base
with PEFT's adapters switched off (no copy). Where the training pass returns no logits, its loss
being fused with the last layer (TRL), the model itself is run once more, with gradients.

A fresh head knows nothing: held to the answers it starts with, a classifier learns less. Fit it
first (`head_first`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from holdfast.engine.batches import LABELS, Batch, Seen, identities
from holdfast.engine.forwarding import adapters, without_adapters
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common import answers
from holdfast.methods.common.answers import divergence, exact
from holdfast.methods.common.importance import kind_of


@dataclass(frozen=True, kw_only=True)
class KLAnchor(Method):
    """Hold the model's outputs on the task's own rows near to an anchor's.

    strength: λ ≥ 0, beside the task's own loss, in nats per nat.
    anchor: `start`, the model as the task began, or `base`, as it was before its first task: with
        PEFT, adapters off. A base has the task's own head as that began.
    direction: `forward`, KL(π₀ ‖ π), or `reverse`, KL(π ‖ π₀).
    keep: `logits` of each row, or `weights` for a second pass; `auto`: logits of (rows, classes)
        where the task's rows are passed before its first step, and weights elsewhere.
    token_weight: `detached_probability` weighs the loss of each label by its probability (ASFT).
    """

    name: ClassVar[str] = "kl_anchor"
    summary: ClassVar[str] = "holds the model's outputs on the task's own rows near the start's"
    paper: ClassVar[str] = "ASFT, arXiv 2509.23753; RL's Razor, arXiv 2509.04259"
    bytes_per_weight: ClassVar[str] = (
        "0 with logits kept by row (4 a row and class, 8 a row) or with adapters switched off, "
        "4 with start or base weights remembered"
    )
    tunable: ClassVar[tuple[str, ...]] = ("strength", "direction", "token_weight")
    ranges: ClassVar[Mapping[str, Range]] = {"strength": Range(0.01, 3.0, log=True)}

    strength: Annotated[float, Field(ge=0)] = 0.1
    anchor: Literal["start", "base"] = "start"
    direction: Literal["forward", "reverse"] = "forward"
    keep: Literal["auto", "logits", "weights"] = "auto"
    token_weight: Literal["none", "detached_probability"] = "none"

    @torch.no_grad()
    def begin_task(self, view: View) -> None:
        if view.resuming:
            return
        state, base = view.state, self.anchor == "base"
        answers.forget(state)
        before = state.weights.pop("anchor", {}) if base else {}
        kept = {name: w for name, w in before.items() if "/" not in name}  # no head's
        if gone := kept.keys() - view.shared.keys():
            raise Refused(f"{min(gone)} was trained in an earlier task, and is not in this one",
                          where="kl_anchor",
                          remedy="train it on, or anchor at the start")  # fmt: skip
        # What is not kept is as it was when the anchor was set.
        state.weights["anchor"] = kept
        by_row = self.keep != "weights" and self._answer(view)
        off = _switched_off(view) if base else set()
        for name, w in view.weights.items():
            own = name not in view.shared
            if name not in off and (not by_row or (base and not own)):
                kept.setdefault(name, w.detach().clone())

    def penalty(self, view: View) -> Tensor:
        logits, counted, labels = _counted(view)
        now = exact(logits[counted])
        kind = kind_of(_model(view), now)
        total = torch.zeros((), dtype=now.dtype, device=now.device)
        if len(now) == 0:
            return total
        if self.strength:
            before = self._before(view, counted)
            reverse = self.direction == "reverse"
            total = total + self.strength * divergence(before, now, kind, reverse=reverse)
        if self.token_weight != "none":
            if labels is None or kind != "classes":
                raise Refused("only labels of classes have a probability",
                              where="kl_anchor.token_weight", remedy="use none")  # fmt: skip
            each = functional.cross_entropy(now, labels[counted], reduction="none")
            own = each.mean() if view.loss is None else view.loss
            share = own.detach() / each.detach().sum().clamp(min=1e-30)  # 1/n
            # sg[p(y)] − 1 with −log p(y) = each
            total = total + share * (torch.expm1(-each.detach()) * each).sum()
        return total

    def end_task(self, view: View) -> None:
        answers.forget(view.state)
        kept = view.state.weights.pop("anchor", {})
        if self.anchor == "base":
            view.state.weights["anchor"] = {n: w for n, w in kept.items() if n in view.shared}

    # --- the anchor -----------------------------------------------------------------------------

    def _before(self, view: View, counted: Tensor) -> Tensor:
        if answers.kept(view.state):
            found = answers.recall(
                view.state, view.rows, where="kl_anchor", remedy="use keep='weights'"
            )
            return found["anchor"][counted]
        assert view.inputs is not None
        logits, *_ = _aligned(view, self._anchored(view, view.inputs))
        return exact(logits[counted])

    @torch.no_grad()
    def _anchored(self, view: View, batch: Batch) -> Tensor:
        """The anchor's logits for a batch."""
        off: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.anchor == "base":
            off = without_adapters(_model(view))
        with off:
            kept = view.state.weights.get("anchor", {})
            return _logits(view.forward(batch, weights=kept, training=False))

    def _answer(self, view: View) -> bool:
        """Keep the anchor's logits of every row; False where they are not those of classes."""
        rows, found, seen = [], [], Seen()
        for batch in seen.through(view.data()):
            logits = self._anchored(view, batch)
            if logits.ndim != 2:
                if self.keep == "logits":
                    raise Refused(f"logits of shape {tuple(logits.shape)} are too many to keep",
                                  where="kl_anchor.keep", remedy="use weights")  # fmt: skip
                return False
            rows.append(identities(batch))
            found.append(exact(logits))
        seen.require_equal(next(iter(view.weights.values())).device)
        if rows:
            answers.keep(view.state, rows, {"anchor": found})
        elif self.keep == "logits":
            raise Refused("no rows to keep the logits of", where="kl_anchor", remedy="pass data=")
        return bool(rows)


def _model(view: View) -> torch.nn.Module:
    return view.bound.models[view.task]


def _switched_off(view: View) -> set[str]:
    """Names of the weights that play no part once adapters are switched off."""
    off = {
        id(p)
        for layer in adapters(_model(view))
        for held in layer.adapter_layer_names
        for p in getattr(layer, held).parameters()
    }
    return {name for name, w in view.weights.items() if id(w) in off}


def _counted(view: View) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, which of their places count (without the last axis), and a label each if known."""
    if view.outputs is None or view.inputs is None:
        raise Refused("no outputs here", where="kl_anchor",
                      remedy="call bound.penalty(batch, outputs)")  # fmt: skip
    outputs = view.outputs
    if getattr(outputs, "logits", None) is None:  # a loss that is fused with the last layer
        outputs = view.forward()
    return _aligned(view, _logits(outputs))


def _aligned(view: View, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and labels at the same places, and which of these count."""
    inputs = view.inputs or {}
    labels = next((v for k, v in inputs.items() if k in LABELS and isinstance(v, Tensor)), None)
    if labels is not None and labels.is_floating_point():
        labels = None  # numbers, or several labels a row: all rows count
    # Without labels all counts that is no padding.
    mask = inputs.get("attention_mask") if logits.ndim == 3 else None
    counted = logits.new_ones(logits.shape[:-1], dtype=torch.bool) if mask is None else mask != 0
    if labels is not None:
        labels = labels.reshape(labels.shape[: logits.ndim - 1])  # (rows, 1) of classes too
        counted = labels != -100
    if counted.shape != logits.shape[:-1]:
        raise Refused(f"labels of shape {tuple(counted.shape)} do not fit logits of "
                      f"{tuple(logits.shape)}", where="kl_anchor")  # fmt: skip
    if logits.ndim == 3 and _shifts(_model(view)):
        # What the logits at t say is judged by the token at t + 1.
        logits, counted = logits[:, :-1], counted[:, 1:]
        labels = None if labels is None else labels[:, 1:]
    return logits, counted, labels


def _shifts(model: Any) -> bool:
    """Whether the labels of a model stand one place after the logits they judge.

    Hugging Face models say so by `loss_type`; one that does not say is taken for a causal one.
    """
    joint = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    kind = getattr(model, "loss_type", None)
    # A model of pictures and text is ForConditionalGeneration, as a translator is.
    return not joint and kind in (None, "ForCausalLM", "ForConditionalGeneration")


def _logits(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise Refused("the model returns no logits of (rows, classes) or (rows, tokens, classes)",
                      where="kl_anchor", remedy="use lwf, or hold weights")  # fmt: skip
    return logits
