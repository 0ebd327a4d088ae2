"""LNSR: layers that noise below them does not move (arXiv 2107.04835, 2206.05658).

    P = λ Σ_{r>b} mean over tokens of ‖f^{b→r}(x + ε) − f^{b→r}(x)‖² / d

x is the output of layer b (b = 0: the embeddings that the tokens enter as), f^{b→r}(x) that of
layer r above it, d its width, so that λ does not grow with it. ε is Gaussian, or points to another
row's representation at the same place (`manifold`); ‖ε‖ = 5 % of ‖x‖ at every token, whatever the
scale of a network's activations. ε is held constant. Padding does not count, nor does a token that
the other row has none beside.

No code was published, and λ and b could not be found ‡: the defaults and ranges are ours. All λ_r
are one λ; the division by d is ours.

Dropout: other masks on the two sides would move outputs by far more than 5 %, and P would be of
dropout. So the noisy side has the masks of the training pass, which is the clean side itself: the
layers up to b return what they did there, and the layers above run once more, on the random state
that layer b left. Without noise P is exactly 0. A compiled model is refused: its training pass is
not seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.config import count
from holdfast.engine.batches import LABELS
from holdfast.engine.forwarding import entrance, first_tensor
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused, tell_once
from holdfast.methods.common import noise
from holdfast.methods.common.answers import exact


@dataclass(frozen=True, kw_only=True)
class LNSR(Method):
    """Hold layers against noise on a lower one.

    strength: λ ≥ 0 of each layer above, in the task's loss per squared entry.
    layer: b ≥ 0, a number of repeated blocks, or a share of them, rounded down; 0: the embeddings.
        An encoder-decoder's decoder follows its encoder.
    epsilon: ‖ε‖ / ‖x‖ > 0.
    noise: `gaussian`, or towards another row of the micro-batch (`manifold`).
    """

    name: ClassVar[str] = "lnsr"
    summary: ClassVar[str] = "holds the upper layers against noise on a lower one"
    paper: ClassVar[str] = "Hua et al., NAACL 2021, arXiv 2107.04835; arXiv 2206.05658"
    group: ClassVar[str] = "regulariser"
    cost: ClassVar[str] = "one forward and backward pass more, of the layers above b"
    use: ClassVar[str] = "few rows; any task of a network with repeated blocks"
    bytes_per_weight: ClassVar[str] = "0 (activations of a second pass above b)"
    shares: ClassVar[tuple[str, ...]] = ("layer",)
    tunable: ClassVar[tuple[str, ...]] = ("strength", "layer", "epsilon", "noise")
    ranges: ClassVar[Mapping[str, Range]] = {
        "strength": Range(0.01, 10.0, log=True),
        "layer": Range(0.0, 0.75),
        "epsilon": Range(0.005, 0.2, log=True),
    }

    strength: Annotated[float, Field(ge=0)] = 1.0
    layer: Annotated[float | int, Field(ge=0)] = 0.5
    epsilon: Annotated[float, Field(gt=0)] = 0.05
    noise: Literal["gaussian", "manifold"] = "gaussian"

    def begin_task(self, view: View) -> None:
        total = len(view.blocks)
        if not total:
            raise Refused("the network has no repeated blocks", where="lnsr",
                          remedy="use r3f or smart, which hold the outputs alone")  # fmt: skip
        if self._at(total) >= total:
            raise Refused(f"layer {self._at(total)} of {total} has none above it",
                          where="lnsr.layer", remedy=f"use at most {total - 1}")  # fmt: skip

    def watched(self, view: View) -> Collection[nn.Module]:
        return list(view.blocks)

    def penalty(self, view: View) -> Tensor:
        seen, model, inputs = view.seen, view.bound.models[view.task], view.inputs
        if not seen or inputs is None:
            raise Refused("the training pass was not seen", where="lnsr",
                          remedy="do not compile the model, and call "
                          "bound.penalty(batch, outputs) after it")  # fmt: skip
        blocks = list(view.blocks)
        b = self._at(len(blocks))
        below = [m for m in blocks[:b] if m in seen]
        above = [m for m in blocks[b:] if m in seen]
        at: nn.Module | str = below[-1] if below else entrance(model, inputs)
        role = view.blocks[below[-1] if below else above[0]]
        seed, moved = noise.seed(view), dict[nn.Module, Tensor]()

        def change(x: Tensor) -> Tensor:
            return x + self._noise(x.detach(), seed, _places(view, x, role)).to(x.dtype)

        def noting(module: nn.Module) -> noise.Change:
            def note(x: Tensor) -> Tensor:
                moved[module] = x
                return x

            return note

        returns: dict[nn.Module, Any] = {module: seen[module] for module in below}
        view.forward(perturb={at: change, **{m: noting(m) for m in above}}, returns=returns,
                     dropout="same")  # fmt: skip
        shifts = [
            _shift(exact(first_tensor(seen[m])), exact(moved[m]),
                   _places(view, moved[m], view.blocks[m]))
            for m in above
        ]  # fmt: skip
        return self.strength * torch.stack([s.to(shifts[0].device) for s in shifts]).sum()

    def _at(self, total: int) -> int:
        return count(self.layer, total, least=0)

    def _noise(self, x: Tensor, seed: int, places: Tensor | None) -> Tensor:
        """ε for x, (rows, …): at every place of the size that was asked for."""
        x, axes = exact(x), noise.places(x)
        away = noise.normal(x, seed)
        if self.noise == "manifold":
            if len(x) < 2:
                tell_once("lnsr: a micro-batch of one row has no other row to move towards")
                return torch.zeros_like(x)
            # Row i towards row i + k, k ≠ 0.
            k = 1 + seed % (len(x) - 1)
            away = x.roll(-k, 0) - x
            if places is not None and x.ndim == 3:
                away = away * (places & places.roll(-k, 0))[..., None]
        sizes = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
        length = torch.linalg.vector_norm(away, dim=axes, keepdim=True).clamp(min=1e-30)
        return self.epsilon * sizes * away / length


def _places(view: View, x: Tensor, role: str) -> Tensor | None:
    """Which places of a layer's output hold tokens: (rows, tokens); None if all do."""
    inputs, config = view.inputs or {}, getattr(view.bound.models[view.task], "config", None)
    mask = inputs.get("attention_mask")
    if role == "decoder" and getattr(config, "is_encoder_decoder", False):
        labels = next((v for k, v in inputs.items() if k in LABELS), None)
        mask = inputs.get("decoder_attention_mask", None if labels is None else labels != -100)
    ours = isinstance(mask, Tensor) and x.ndim == 3 and mask.shape == x.shape[:2]
    return mask != 0 if ours and mask is not None else None


def _shift(before: Tensor, now: Tensor, places: Tensor | None) -> Tensor:
    """Mean over places of ‖now − before‖² / d."""
    each = (now - before).square().mean(noise.places(now))
    return each.mean() if places is None else (each * places).sum() / places.sum().clamp(min=1)
