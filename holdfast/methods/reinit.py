"""ReInit: the pooler and the top layers begin anew (Zhang et al., ICLR 2021, arXiv 2006.05987).

The top of a pre-trained network is fitted to its own task, and a worse start for another than none.
Layers are those of `holdfast.parts`; of an encoder and decoder the decoder's are the top, towers
side by side lose theirs each. The values are drawn by the model's own `_init_weights` where it has
one, else by each module's `reset_parameters`, from torch's seed, and torch's random state stays as
it was.

It is done once, by `prepare`, to a network that has learned no task yet: neither a second task nor
a run that is gone on from begins anew, and a checkpoint overwrites what was drawn. The paper also
corrects Adam's bias (torch's Adam does) and trains longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from holdfast.engine.attachment import default_shared
from holdfast.engine.forwarding import adapters
from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.network.parts import EMBEDDINGS, HEAD, named_parameters, parts
from holdfast.ops.distributed import number_of

MARK = "_holdfast_reinitialised"  # set on what tasks share, once it is done


@dataclass(frozen=True, kw_only=True)
class ReInit(Method):
    """Draw the pooler and the top layers anew before the first task.

    layers: how many layers, from the top.
    pooler: whether modules called pooler too, in what tasks share; a model without one has none.
    """

    name: ClassVar[str] = "reinit"
    summary: ClassVar[str] = "draws the pooler and the top layers anew before the first task"
    paper: ClassVar[str] = "Zhang et al., ICLR 2021, arXiv 2006.05987"
    bytes_per_weight: ClassVar[str] = "0"
    group: ClassVar[str] = "start"
    cost: ClassVar[str] = "nothing"
    use: ClassVar[str] = "few rows"
    ranges: ClassVar[Mapping[str, Range]] = {"layers": Range(1, 6)}

    layers: Annotated[int, Field(ge=0)] = 2
    pooler: bool = True

    def prepare(self, model: nn.Module) -> nn.Module:
        """`model` itself, with new values in these layers."""
        chosen = self.chosen(model)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(number_of([torch.initial_seed(), self.name]))
            _draw(model, {id(p) for p in chosen.values()})
        if missed := [name for name, p in chosen.items() if bool(p.isnan().any())]:
            raise Refused("no initialiser draws this weight", where=missed[0],
                          remedy="give its module reset_parameters()")  # fmt: skip
        setattr(default_shared(model) or model, MARK, True)
        return model

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that begin anew, by name."""
        placed, named = parts(model), named_parameters(model)
        layers = {p: d for p, d in placed.depth.items() if p not in (EMBEDDINGS, HEAD)}
        depths = sorted({*layers.values()}, reverse=True)
        if self.layers > len(depths):
            raise Refused(f"the model has {len(depths)} layers, not {self.layers}",
                          where="reinit.layers")  # fmt: skip
        top = depths[: self.layers]
        shared = {id(p) for p in (default_shared(model) or model).parameters()}
        found = {
            name: p
            for name, p in named.items()
            if layers.get(placed.names[name]) in top
            or (self.pooler and id(p) in shared and "pooler" in name.lower())
        }
        if not found:
            raise Refused("nothing begins anew", where="reinit", remedy="layers=1")
        return found

    def begin_task(self, view: View) -> None:
        model = view.bound.models[view.task]
        if view.finished or view.resuming:
            return
        if adapters(model):
            raise Refused("adapters would leave the new layers as they were drawn", where="reinit",
                          remedy="leave out peft, or reinit")  # fmt: skip
        if not hasattr(default_shared(model) or model, MARK):
            raise Refused("the model was not prepared", where="reinit", remedy="model = "
                          "recipe.prepare(model), before its optimizer is built")  # fmt: skip


def _draw(model: nn.Module, chosen: set[int]) -> None:
    """New values for these parameters; what no initialiser knows is left as NaN."""
    modules = dict(model.named_modules())
    for path, module in reversed(modules.items()):  # inner ones first, as Transformers does
        own = [p for p in module.parameters(recurse=False) if id(p) in chosen]
        if not own:
            continue
        for p in own:
            p.fill_(torch.nan)
        above = [path.rsplit(".", n)[0] for n in range(path.count(".") + 1)] + [""]
        inits: list[Any] = [getattr(modules[p], "_init_weights", None) for p in above]
        for init in [i for i in inits if callable(i)][:1]:
            for t in (*own, *module.buffers(recurse=False)):
                _unmark(t)
            init(module)
        for name in ("reset_parameters", "_reset_parameters"):
            if any(bool(p.isnan().any()) for p in own) and hasattr(module, name):
                getattr(module, name)()


def _unmark(t: Tensor) -> None:
    """Transformers draws no value for a tensor that it has marked as loaded."""
    if hasattr(t, "_is_hf_initialized"):
        t._is_hf_initialized = False
