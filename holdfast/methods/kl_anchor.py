"""KL anchor: keep the model's outputs on the task's own rows close to what they were before.

    P = λ · mean over counted outputs of KL(π₀ ‖ π)          (direction "reverse": KL(π ‖ π₀))

π is the current model, in the training pass itself; π₀ the anchor, in evaluation mode: the model as
the task began (after its head was fitted), or the base, as it was before its first task. The rows
of a classifier count, and the tokens of a language model whose label is not −100, each predicted
from those before it (for masked language models, taggers and encoder-decoders: at its own
position). A regression has ½ (z⁰ − z)² in place of the divergence; with several labels per row
their divergences are summed.

How much a model forgets tracks KL(π ‖ π₀) on the new task's inputs (RL's Razor, arXiv 2509.04259);
ASFT (arXiv 2509.23753) adds λ KL(π₀ ‖ π) to a loss that weights tokens by their probability,

    L = 1/n Σ_t sg[p(y_t)] · (−log p(y_t)) + λ KL            sg: held constant

in place of the plain mean of −log p(y_t): `token_weight="detached_probability"`. As a penalty added
to the model's own loss this is

    P = 1/n Σ_t (sg[p(y_t)] − 1) · (−log p(y_t)) + λ KL

where 1/n is the factor of the model's own loss, inferred from its value: a Trainer divides by the
labels of several micro-batches. That loss must weight all labels alike, without label smoothing.
λ = 0 leaves DFT.

For classes π₀ is kept by row, from one pass over the rows before the first step, so that steps cost
no extra. A vocabulary is too large for that: there each micro-batch has a second forward pass,
without gradients, with remembered weights (4 bytes per trained weight), or with the base, PEFT's
adapters switched off (no copy). If the training pass returns no logits because its loss is fused
with the last layer (TRL), the model itself is run once more, with gradients.

A fresh head knows nothing: anchored to its initial outputs, a classifier learns less. Fit it first
(`head_first`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from holdfast.engine.batches import Batch, Seen, identities
from holdfast.engine.forwarding import adapters, without_adapters
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.methods.common import answers
from holdfast.methods.common.answers import divergence, exact
from holdfast.methods.common.importance import kind_of


@dataclass(frozen=True, kw_only=True)
class KLAnchor(Method):
    """Keep the model's outputs on the task's own rows close to an anchor's.

    strength: λ ≥ 0, relative to the task's own loss, in nats per nat.
    anchor: `start`, the model as the task began, or `base`, as it was before its first task: with
        PEFT, adapters off. The base uses the task's own head as the task began.
    direction: `forward`, KL(π₀ ‖ π), or `reverse`, KL(π ‖ π₀).
    keep: `logits` of each row, or `weights` for a second pass; `auto`: logits of (rows, classes)
        if the task's rows are passed before its first step, otherwise weights.
    token_weight: `detached_probability` weights the loss of each label by its probability (ASFT).
    """

    name: ClassVar[str] = "kl_anchor"
    summary: ClassVar[str] = "holds the model's outputs on the task's own rows near the start's"
    paper: ClassVar[str] = "ASFT, arXiv 2509.23753; RL's Razor, arXiv 2509.04259"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "nothing measurable with logits kept by row, else one forward pass"
    use: ClassVar[str] = "holding general ability"
    head_first: ClassVar[bool] = True
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
        kept = {name: w for name, w in before.items() if "/" not in name}  # without heads
        if gone := kept.keys() - view.shared.keys():
            raise Refused(f"{min(gone)} was trained in an earlier task, and is not in this one",
                          where="kl_anchor",
                          remedy="train it on, or anchor at the start")  # fmt: skip
        # Weights not kept yet have not moved since the anchor was set.
        state.weights["anchor"] = kept
        by_row = self.keep != "weights" and self._answer(view)
        off = _switched_off(view) if base else set()
        for name, w in view.weights.items():
            own = name not in view.shared
            if name not in off and (not by_row or (base and not own)):
                kept.setdefault(name, w.detach().clone())

    def penalty(self, view: View) -> Tensor:
        logits, counted, labels = answers.aligned(view, answers.of_step(view, "kl_anchor"))
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
        logits, *_ = answers.aligned(view, self._anchored(view, view.inputs))
        return exact(logits[counted])

    @torch.no_grad()
    def _anchored(self, view: View, batch: Batch) -> Tensor:
        """The anchor's logits for a batch."""
        off: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.anchor == "base":
            off = without_adapters(_model(view))
        with off:
            kept = view.state.weights.get("anchor", {})
            outputs = view.forward(batch, weights=kept, training=False)
        return answers.logits_of(outputs, "kl_anchor")

    def _answer(self, view: View) -> bool:
        """Keep the anchor's logits of every row; False unless they are (rows, classes)."""
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
    """Names of the weights that are unused once adapters are switched off."""
    off = {
        id(p)
        for layer in adapters(_model(view))
        for held in layer.adapter_layer_names
        for p in getattr(layer, held).parameters()
    }
    return {name for name, w in view.weights.items() if id(w) in off}
