"""Rows as vectors of a model's encoder, for shifts by cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from holdfast.engine.forwarding import in_mode
from holdfast.errors import Refused
from holdfast.tasks import Row
from holdfast.tasks.kinds.packed import alike

POOLINGS = ("mean", "cls")


def embedder(
    model: nn.Module,
    tokenizer: Any,
    *,
    pooling: str = "mean",
    batch: int = 64,
    max_length: int = 128,
) -> Callable[[Sequence[Row]], np.ndarray]:
    """A function from rows to an array (rows, width) in float32.

    The vector of a row is taken from the encoder's last layer: the `mean` over its tokens without
    padding, or `cls`, the first token's, as in BERTcL. Of an encoder-decoder the encoder is used.
    Evaluation mode and no gradients; the model is left as it was found, and no random number is
    drawn. Rows of similar length are batched together to save padding.

    Refused: an unknown pooling, no row, rows without tokens, outputs that are not finite.
    """
    if pooling not in POOLINGS:
        raise Refused(f"pooling {pooling!r}", remedy=f"known are {', '.join(POOLINGS)}")
    encoder: Any = getattr(model, "base_model", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = encoder.get_encoder()

    def embed(rows: Sequence[Row]) -> np.ndarray:
        if not rows:
            raise Refused("no rows to embed")
        pairs = None if rows[0].pair is None else [row.pair or "" for row in rows]
        fields = tokenizer([r.text for r in rows], pairs, truncation=True, max_length=max_length)
        ids = fields["input_ids"]
        if empty := [row.text for row, found in zip(rows, ids, strict=True) if not found]:
            raise Refused("a row without tokens", where=repr(empty[0][:60]))
        device = next(encoder.parameters()).device
        found: list[Any] = [None] * len(rows)
        with torch.no_grad(), in_mode(model.modules(), training=False):
            for chosen in alike([len(each) for each in ids], batch):
                inputs = tokenizer.pad(
                    {k: [v[i] for i in chosen] for k, v in fields.items()}, return_tensors="pt"
                ).to(device)
                hidden = encoder(**inputs).last_hidden_state.float()  # (rows, tokens, width)
                vectors = pooled(hidden, inputs["attention_mask"], pooling)
                for i, vector in zip(chosen, vectors.cpu().numpy(), strict=True):
                    found[i] = vector
        made: np.ndarray = np.stack(found)
        if not np.isfinite(made).all():
            raise Refused("an embedding is not finite", remedy="has the model diverged?")
        return made

    return embed


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Vectors (rows, width) of states (rows, tokens, width); `mask` (rows, tokens) is 1 or 0."""
    weights = mask.to(hidden.dtype)
    if pooling == "cls":  # the first token that is not padding, whichever side is padded
        weights = weights * (weights.cumsum(1) == 1)
    return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
