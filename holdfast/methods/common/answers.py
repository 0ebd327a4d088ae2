"""A model's outputs: which of them count, kept by row, and how far they have moved.

Methods that hold outputs (lwf, kl_anchor) run the model once on each row before the task. Rows are
identified by content (`view.rows`), so that neither the order of batches nor padding matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from holdfast.engine.batches import LABELS
from holdfast.engine.method import View
from holdfast.engine.state import State
from holdfast.errors import Refused
from holdfast.methods.common.importance import Kind, wide


def keep(state: State, rows: Sequence[Tensor], found: Mapping[str, Sequence[Tensor]]) -> None:
    """Keep answers by key: for each batch its rows (n,), and for each key a tensor (n, …).

    Those of tokens, (n, tokens, …), are padded with zeros at the end to the longest of all.
    """
    known, order = torch.sort(torch.cat(list(rows)), stable=True)
    state.tensors["rows"] = {"known": known}
    state.tensors["answers"] = {key: _joined(each)[order] for key, each in found.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    longest = max(each.shape[1] for each in parts) if parts[0].ndim > 2 else 0
    return torch.cat([lasting(each, longest) if longest else each for each in parts])


def lasting(logits: Tensor, tokens: int) -> Tensor:
    """Logits (rows, n, classes) as (rows, tokens, classes), cut or padded with zeros."""
    return functional.pad(logits[:, :tokens], (0, 0, 0, max(0, tokens - logits.shape[1])))


def kept(state: State) -> bool:
    """Whether there are answers."""
    return "answers" in state.tensors


def recall(state: State, rows: Tensor, *, where: str, remedy: str) -> dict[str, Tensor]:
    """The answers for these rows, (rows, …) each; `Refused` for a row that was not kept."""
    for slot in (state.tensors["rows"], state.tensors["answers"]):
        for key, tensor in slot.items():  # loaded ones are on the CPU
            slot[key] = tensor.to(rows.device)
    known = state.tensors["rows"]["known"]
    place = torch.searchsorted(known, rows).clamp_(max=len(known) - 1)
    if not torch.equal(known[place], rows):
        raise Refused("a row was not among those read before the task", where=where, remedy=remedy)
    return {key: tensor[place] for key, tensor in state.tensors["answers"].items()}


def forget(state: State) -> None:
    """Drop what was kept."""
    for slot in ("rows", "answers"):
        state.tensors.pop(slot, None)


def exact(logits: Tensor) -> Tensor:
    """Logits in at least float32: bfloat16 logarithms are good for only two digits."""
    return logits.to(wide(logits.dtype))


def divergence(
    before: Tensor,
    now: Tensor,
    kind: Kind = "classes",
    *,
    temperature: float = 1.0,
    reverse: bool = False,
    shares: Tensor | None = None,
) -> Tensor:
    """The mean over rows of `divergences`, in which those of a row's tokens are summed.

    shares: (rows,), the weight of each row; 1 by default.
    """
    each = divergences(before, now, kind, temperature=temperature, reverse=reverse)
    each = each.flatten(1).sum(1) if each.ndim > 1 else each
    return (each if shares is None else each * shares).mean()


def divergences(
    before: Tensor,
    now: Tensor,
    kind: Kind = "classes",
    *,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """How far each output has moved, in nats: of outputs (…, classes) a tensor (…).

    classes: T² · KL(softmax(before/T) ‖ softmax(now/T)); reverse: KL(now ‖ before) instead.
    labels: the same for each label against its absence, summed over labels.
    numbers: ½ Σ (before − now)², the divergence of two normal distributions of variance 1.
    """
    if kind == "numbers":
        return 0.5 * (before - now).square().sum(-1)
    if kind == "labels":  # as two classes; absence has logit 0
        before, now = (torch.stack([z, torch.zeros_like(z)], -1) for z in (before, now))
    p = (before / temperature).log_softmax(-1)
    q = (now / temperature).log_softmax(-1)
    p, q = (q, p) if reverse else (p, q)
    each = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (each.sum(-1) if kind == "labels" else each)


def symmetric(
    before: Tensor,
    now: Tensor,
    kind: Kind = "classes",
    *,
    stop: Literal["none", "before", "targets"] = "none",
) -> Tensor:
    """`divergence` in both directions: KL(before ‖ now) + KL(now ‖ before); of numbers the squared
    distance Σ (before − now)².

    stop: what is held constant: nothing, `before`, or in each divergence the distribution that the
    mean is over (the first).
    """
    if stop == "before":
        before = before.detach()
    one, two = (before.detach(), now.detach()) if stop == "targets" else (before, now)
    return divergence(one, now, kind) + divergence(two, before, kind)


# --- which outputs count --------------------------------------------------------------------------


def of_step(view: View, where: str, **how: Any) -> Tensor:
    """Logits of the training pass. If it returned none, because its loss is fused with the last
    layer, the model is run once more, with gradients; `how`: as `view.forward` takes it."""
    if view.outputs is None or view.inputs is None:
        raise Refused("no outputs here", where=where, remedy="call bound.penalty(batch, outputs)")
    outputs = view.outputs
    if getattr(outputs, "logits", None) is None:
        outputs = view.forward(**how)
    return logits_of(outputs, where)


def logits_of(outputs: Any, where: str) -> Tensor:
    """Logits of (rows, classes) or (rows, tokens, classes)."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise Refused("the model returns no logits of (rows, classes) or (rows, tokens, classes)",
                      where=where, remedy="use lwf, or hold weights")  # fmt: skip
    return logits


def aligned(view: View, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and labels aligned by position, and which positions count: those with a label that is
    not −100, or without labels all but padding; every row of a regression or of several labels."""
    inputs = view.inputs or {}
    labels = next((v for k, v in inputs.items() if k in LABELS and isinstance(v, Tensor)), None)
    if labels is not None and labels.is_floating_point():
        labels = None  # a regression, or several labels per row: all rows count
    # Without labels every position counts that is not padding.
    mask = inputs.get("attention_mask") if logits.ndim == 3 else None
    counted = logits.new_ones(logits.shape[:-1], dtype=torch.bool) if mask is None else mask != 0
    if labels is not None:
        labels = labels.reshape(labels.shape[: logits.ndim - 1])  # also for classes of (rows, 1)
        counted = labels != -100
    if counted.shape != logits.shape[:-1]:
        raise Refused(f"labels of shape {tuple(counted.shape)} do not fit logits of "
                      f"{tuple(logits.shape)}", where="labels")  # fmt: skip
    if logits.ndim == 3 and shifts(view.bound.models[view.task]):
        # The logits at t predict the token at t + 1.
        logits, counted = logits[:, :-1], counted[:, 1:]
        labels = None if labels is None else labels[:, 1:]
    return logits, counted, labels


def shifts(model: Any) -> bool:
    """Whether a model's logits predict the label one position later.

    Hugging Face models declare this by `loss_type`; one that does not is taken to be causal.
    """
    joint = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    kind = getattr(model, "loss_type", None)
    # Image-and-text models are ForConditionalGeneration, as translators are.
    return not joint and kind in (None, "ForCausalLM", "ForConditionalGeneration")
