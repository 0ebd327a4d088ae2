"""LoRA by PEFT in a recipe: W stays, and W + (α / r) B A is trained (Hu et al., arXiv 2106.09685).

The adapters lie inside the network that they were put on, which keeps its class. B begins at 0, so
that the network answers as before. All tasks of a sequence train the same pair of factors.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.config import Checked
from holdfast.engine.attachment import default_shared
from holdfast.engine.forwarding import adapters
from holdfast.errors import Refused, nearest


@dataclass(frozen=True, kw_only=True)
class LoRA(Checked):
    """Low-rank adapters on the linear layers that tasks share; all else that they share is frozen.

    A task's own head is trained whole.

    rank: r, the rows of A.
    alpha: α; B A is multiplied by α / r.
    dropout: of the adapters' inputs while training.
    targets: `all-linear` (without a language model's output layer), or names of linear layers as
        their paths end: [query, value].
    """

    rank: Annotated[int, Field(gt=0)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    @classmethod
    def where(cls, name: str) -> str:
        return f"lora.{name}"

    def prepare(self, model: nn.Module) -> nn.Module:
        """`model` itself, with adapters, before its optimizer is built. Draws from torch's own
        generator."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise Refused("needs PEFT", where="lora", remedy="pip install peft") from None
        if adapters(model):
            raise Refused("the model has adapters already", where="lora",
                          remedy="leave them out, or lora")  # fmt: skip
        core = default_shared(model) or model
        names = self.targets if self.targets == "all-linear" else self._found(core)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout,
                            target_modules=names)  # fmt: skip
        with warnings.catch_warnings():  # Conv1D is transposed, which PEFT sees by itself
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            try:
                inject_adapter_in_model(config, core)
            except ValueError as error:
                raise Refused(str(error).splitlines()[0], where="lora.targets",
                              remedy="name linear layers") from None  # fmt: skip
        return model

    def _found(self, core: nn.Module) -> list[str]:
        """The paths of the layers that `targets` name; each must name one."""
        linear = {path: module for path, module in core.named_modules() if _linear(module)}
        ends = sorted({path.rpartition(".")[2] for path in linear})
        found: list[str] = []
        for name in self.targets:
            mine = [path for path in linear if f".{path}".endswith(f".{name}")]
            if not mine:
                raise Refused(f"no linear layer {name!r}", where="lora.targets",
                              remedy=nearest(name, ends))  # fmt: skip
            found += mine
        uses = [id(p) for m in core.modules() for p in m.parameters(recurse=False)]
        for path in found:
            if uses.count(id(linear[path].weight)) > 1:
                raise Refused(f"{path} shares its weight with another layer", where="lora.targets")
        return found

    def check(self, model: nn.Module) -> None:
        """Refuse a model without adapters: all of it would be trained."""
        if not adapters(model):
            raise Refused("the model was not prepared", where="lora", remedy="model = "
                          "recipe.prepare(model), before its optimizer is built")  # fmt: skip


def _linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def adapter_weights(model: nn.Module, *, base: bool = False) -> dict[str, Tensor]:
    """A and B of every adapted layer by name, with `base` also W; not copied."""
    kinds = (".lora_A.", ".lora_B.", *[".base_layer."] * base)
    return {n: p.detach() for n, p in model.named_parameters() if any(kind in n for kind in kinds)}


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Within the block the network without adapters, W + (α / r) B A in place of W.

    Names are those of the network before; afterwards all is as it was, bit for bit. Takes a copy
    of each W meanwhile.
    """
    layers = {id(layer): layer for layer in adapters(model)}
    places = [(parent, name, layers[id(child)]) for parent in model.modules()
              for name, child in parent.named_children() if id(child) in layers]  # fmt: skip
    kept: list[tuple[Any, Tensor]] = []
    try:
        for layer in layers.values():
            weight = layer.get_base_layer().weight
            with torch.no_grad():
                moved = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                kept.append((weight, weight.data))
                weight.data = weight.data + moved
        for parent, name, layer in places:
            setattr(parent, name, layer.get_base_layer())
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
        for weight, data in kept:
            weight.data = data
