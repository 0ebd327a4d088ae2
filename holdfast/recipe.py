"""A recipe: learning rates by part, methods, clipping. It is what a user writes, saves and shares.

recipe = Recipe(rates=Rates.bertcl(), methods=[EWC(strength=1e3)], max_grad_norm=1.0)
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from holdfast.engine.attachment import unwrap
from holdfast.engine.batches import Data
from holdfast.engine.bound import Bound
from holdfast.engine.head_first import HeadFirst
from holdfast.engine.head_last import HeadLast
from holdfast.engine.method import Method
from holdfast.engine.peft import PEFT, LoRA, adapt, check_adapted
from holdfast.errors import Refused, nearest
from holdfast.files import only_keys, read_yaml, write_yaml
from holdfast.methods import METHODS, method_named
from holdfast.methods.dps import DPS
from holdfast.methods.dropout import Dropout
from holdfast.methods.lwf import LwF
from holdfast.methods.merge import Merge
from holdfast.methods.swa import SWA
from holdfast.network.groups import follows_rates, param_groups
from holdfast.network.parts import parts
from holdfast.network.rates import Rates

HEADS: Mapping[str, Any] = {"head_first": HeadFirst, "head_last": HeadLast}


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: rates, methods (at most one of each name) and gradient clipping.

    `max_grad_norm=None` clips nothing in a plain loop and inherits
    `TrainingArguments.max_grad_norm` in a Trainer. `name` names the recipe in tables.
    `head_first` fits a task's fresh head before its first step, `head_last` fits it once more at
    the task's end. `peft` trains adapters in place of what tasks share; of several the later lie
    around the earlier. `parts` are {glob on parameter names: part}, for weights that
    `holdfast.parts` misplaces.
    """

    rates: Rates = field(default_factory=Rates.flat)
    methods: Sequence[Method] = ()
    max_grad_norm: float | None = None
    name: str = "custom"
    head_first: HeadFirst | None = None
    head_last: HeadLast | None = None
    peft: PEFT | Sequence[PEFT] = ()
    parts: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        given = (self.peft,) if isinstance(self.peft, PEFT) else tuple(self.peft or ())
        object.__setattr__(self, "peft", given)
        _check_parts(self.parts)
        names = [m.name for m in self.methods if isinstance(m, Method)]
        for m in self.methods:
            if not isinstance(m, Method):
                raise Refused(f"{m!r} is no method", where="recipe.methods")
            if names.count(m.name) > 1:
                raise Refused(f"{m.name} stands twice", where="recipe.methods")
            for other in m.excludes.keys() & {*names}:
                raise Refused(f"{m.name} cannot stand beside {other}: {m.excludes[other]}",
                              where="recipe.methods", remedy="keep one of them")  # fmt: skip
        for name, kind in HEADS.items():
            if not isinstance(getattr(self, name), kind | None):
                raise Refused(f"must be a {kind.__name__}, not {getattr(self, name)!r}",
                              where=f"recipe.{name}", remedy=f"{kind.__name__}()")  # fmt: skip
        for setting in given:
            if not isinstance(setting, PEFT):
                raise Refused(f"must be a PEFT, not {setting!r}", where="recipe.peft",
                              remedy="PEFT('lora', r=8)")  # fmt: skip
        norm = self.max_grad_norm
        number = isinstance(norm, int | float) and not isinstance(norm, bool)
        if norm is not None and not (number and 0 < norm < math.inf):
            raise Refused(f"must be above 0, not {norm!r}", where="recipe.max_grad_norm")

    # --- files --------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """The recipe in a YAML file, named after the file unless it gives a name."""
        path = Path(path)
        values = read_yaml(path)
        return cls.from_dict(values | {"name": values.get("name") or path.stem}, where=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """The recipe in plain values; unknown keys are refused, naming the nearest known one."""
        only_keys(values, [*(f.name for f in fields(cls)), "kind", "schema", *{"lora"} & {*values}],
                  where=where)  # fmt: skip
        if values.get("kind", "recipe") != "recipe" or values.get("schema", 1) != 1:
            raise Refused("is not a recipe of schema 1", where=where)
        methods = values.get("methods") or {}
        if not isinstance(methods, Mapping):
            raise Refused("methods must map names to settings", where=where)
        try:
            return cls(
                rates=_rates(values.get("rates")),
                methods=[_method(name, settings) for name, settings in methods.items()],
                max_grad_norm=values.get("max_grad_norm"),
                name=str(values.get("name") or "custom"),
                head_first=_head("head_first", values),
                head_last=_head("head_last", values),
                peft=_peft(values),
                parts=_check_parts(values.get("parts") or {}),
            )
        except Refused as error:
            raise error.within(where) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a recipe file."""
        body = {
            "kind": "recipe",
            "schema": 1,
            "name": self.name,
            "rates": self.rates.to_dict(),
            "methods": {m.name: m.to_dict() for m in self.methods},
            "max_grad_norm": self.max_grad_norm,
        }
        # Left out when unset, so that recipes written before they existed keep their hash.
        for name in HEADS:
            if (how := getattr(self, name)) is not None:
                body[name] = how.to_dict()
        if self.peft:
            each = [p.to_dict() for p in cast(Sequence[PEFT], self.peft)]
            body["peft"] = each if len(each) > 1 else each[0]
        if self.parts:
            body["parts"] = dict(self.parts)
        return body

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML."""
        write_yaml(Path(path), self.to_dict())

    @classmethod
    def named(cls, spec: Recipe | str | Path) -> Recipe:
        """The recipe called `spec` in `PRESETS`, or in that file; a recipe is itself."""
        if isinstance(spec, Recipe):
            return spec
        if not isinstance(spec, str | Path):
            raise Refused(f"{spec!r} is no recipe", where="--recipe",
                          remedy="a name, a .yaml file or Recipe(methods=[…])")  # fmt: skip
        if str(spec) in PRESETS:
            return PRESETS[str(spec)]()
        if Path(spec).suffix in {".yaml", ".yml"} or os.path.exists(spec):
            return cls.load(spec)
        remedy = nearest(str(spec), list(PRESETS))
        with suppress(Refused):
            PEFT(str(spec))
            remedy = f"write one with peft: {{type: {spec}}}"
        raise Refused(f"no recipe called {str(spec)!r}, nor a .yaml file", where="--recipe",
                      remedy=remedy)  # fmt: skip

    # --- at work ------------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> nn.Module:
        """Let methods and `peft` change the network: once, before the optimizer is built."""
        model = functools.reduce(lambda net, method: method.prepare(net), self.methods, model)
        return adapt(model, self.peft)

    def param_groups(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        no_decay: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Optimizer groups with this recipe's rates; see `holdfast.network.groups.param_groups`."""
        placed = parts(model, self.parts) if self.parts else None
        return param_groups(
            model, self.rates, lr=lr, weight_decay=weight_decay, parts=placed, no_decay=no_decay
        )

    def bind(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        task: str = "task",
        shared: nn.Module | None = None,
        data: Data | None = None,
        resuming: bool = False,
        seed: int = 0,
    ) -> Bound:
        """Attach to a model and an optimizer and begin the first task; see `Bound.begin_task`."""
        check_adapted(model, self.peft)
        if self.rates != Rates.flat() and not follows_rates(unwrap(optimizer)[0]):
            raise Refused("the optimizer does not have them", where="recipe.rates",
                          remedy="build it from recipe.param_groups(model, lr=…)")  # fmt: skip
        bound = self.unbound(seed=seed)
        bound.begin_task(task, optimizer, total_steps, model=model, shared=shared, data=data,
                         resuming=resuming)  # fmt: skip
        return bound

    def unbound(self, *, seed: int = 0) -> Bound:
        """The `Bound` for a whole sequence of tasks, before its first."""
        bound = Bound(
            self.methods,
            max_grad_norm=self.max_grad_norm,
            head_first=self.head_first,
            head_last=self.head_last,
            parts=self.parts,
            seed=seed,
        )
        bound.scheduled = self.scheduled
        return bound

    @property
    def scheduled(self) -> Rates | None:
        """The rates, where they come in pieces: a `Bound` keeps to the piece in force."""
        return self.rates if self.rates.pieces else None

    def check_bound(self, bound: Bound) -> None:
        """Refuse the bound of another recipe; rates and clipping may differ."""
        for name in ("methods", *HEADS, "parts"):
            if getattr(self, name) != getattr(bound, name):
                raise Refused(f"the bound was made by a recipe of other {name}", where="recipe",
                              remedy="pass the recipe of the task before")  # fmt: skip

    def idle_alone(self) -> str | None:
        """A line to show if nothing in this recipe affects a task learned by itself, else None."""
        acts = self.head_first or self.head_last or self.rates != Rates.flat()
        if acts or not self.methods or not all(m.idle_at_first for m in self.methods):
            return None
        return (f"every method of recipe {self.name!r} waits for a second task: "
                "this run is plain fine-tuning")  # fmt: skip


def _rates(values: Any) -> Rates:
    if values is None:
        return Rates.flat()
    if isinstance(values, str):
        return Rates.preset(values)
    if isinstance(values, Mapping):
        return Rates.from_dict(values, where="rates")
    raise Refused("rates must be a name or a mapping")


def _head(name: str, values: Mapping[str, Any]) -> Any:
    """`true`, for its defaults, or a mapping."""
    given = values.get(name)
    if given is None or given is False:
        return None
    if given is not True and not isinstance(given, Mapping):
        raise Refused(f"{name} must be true or a mapping", remedy=f"{name}: {{rows: 1000}}")
    return HEADS[name]() if given is True else HEADS[name].from_dict(given)


def _peft(values: Mapping[str, Any]) -> list[PEFT]:
    """One of PEFT's methods or a list of them; also what recipes called `lora` before."""
    given, before = values.get("peft") or [], values.get("lora") or None
    if before is not None:
        before = {} if before is True else before
        if given or not isinstance(before, Mapping):
            raise Refused("lora is peft now", where="lora", remedy="peft: {type: lora, r: 8}")
        only_keys(before, ["rank", "alpha", "dropout", "targets"], called=lambda k: f"lora.{k}")
        return [LoRA(**before)]
    return [PEFT.from_dict(each) for each in (given if isinstance(given, list) else [given])]


def _check_parts(values: Any) -> Mapping[str, str]:
    plain = isinstance(values, Mapping) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in values.items()
    )
    if not plain:
        raise Refused("parts must map patterns of parameter names to parts", where="recipe.parts",
                      remedy="parts: {'*.pooler.*': layer.5}")  # fmt: skip
    return values


def _method(name: str, settings: Any) -> Method:
    if not isinstance(settings, Mapping | None):
        raise Refused(f"the settings of {name} must be a mapping")
    return method_named(name).from_dict(settings or {})


def _preset(kind: type[Method]) -> Recipe:
    """A method by itself, at its defaults."""
    first = HeadFirst() if kind.head_first else None
    return Recipe(methods=[kind()], head_first=first, name=kind.name)


PRESETS: dict[str, Callable[[], Recipe]] = {
    "plain": lambda: Recipe(name="plain"),
    "bertcl": lambda: Recipe(rates=Rates.bertcl(), name="bertcl"),
    "head_first": lambda: Recipe(head_first=HeadFirst(), name="head_first"),
    "head_last": lambda: Recipe(head_last=HeadLast(), name="head_last"),
    **{name: functools.partial(_preset, kind) for name, kind in METHODS.items()},
    "dps_mix": lambda: Recipe(methods=[DPS(mix=True)], name="dps_mix"),
    "dps_retention": lambda: Recipe(
        methods=[DPS(score="retention", drop=0.9)], name="dps_retention"
    ),
    "lwf_merge": lambda: Recipe(head_first=HeadFirst(), methods=[LwF(), Merge()], name="lwf_merge"),
    # Chosen on the tuning pairs of benchmarks/forgetting.py: it keeps old tasks without their rows,
    # and on average learns a new one as the better flat rate does (docs/results say where not).
    "default": lambda: Recipe(
        head_first=HeadFirst(),
        methods=[Dropout(), SWA(), Merge(), LwF(rows="near", strength=1.5)],
        name="default",
    ),
}
