"""PEFT's methods in a recipe: what tasks share stays, and a few weights in it are trained.

The adapters lie inside the network that they were put on, which keeps its class. All tasks of a
sequence train the same ones.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from holdfast.engine.attachment import default_shared
from holdfast.engine.forwarding import adapters
from holdfast.errors import Refused, nearest
from holdfast.files import only_keys

# Settings of PEFT's that say how it saves and loads, or that train what a head's task does.
_OURS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "layer_replication",
         "modules_to_save", "peft_type", "peft_version", "revision", "runtime_config", "task_type",
         "trainable_token_indices"}  # fmt: skip


@dataclass(frozen=True, init=False)
class PEFT:
    """A method of PEFT's on layers that tasks share; all else that they share is frozen.

    A task's own head is trained whole.

    type: PEFT's name of it: `lora`, `ia3`, `ln_tuning`, `osf`, `shira`, … `Refused` if its
        weights cannot be folded into those of the model.
    settings: of PEFT's class of settings for it. Those left out are PEFT's own choice; for the
        layers it has one for many architectures.
    """

    type: str
    settings: Mapping[str, Any] = field(hash=False)

    def __init__(self, type: str, **settings: Any) -> None:
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        object.__setattr__(self, "type", type)
        object.__setattr__(self, "settings", settings)
        kind = _kind(type)
        known = [f.name for f in fields(kind) if f.name not in _OURS]
        if own := sorted(_OURS & settings.keys()):
            raise Refused("is not for a recipe to say", where=f"peft.{own[0]}",
                          remedy="leave it out")  # fmt: skip
        only_keys(settings, known, called=lambda name: f"peft.{name}")
        for name, value in settings.items():
            if problem := _problem(get_type_hints(kind)[name], value):
                raise Refused(f"{problem}, not {value!r}", where=f"peft.{name}")
        self._config()

    @classmethod
    def from_dict(cls, values: Any) -> PEFT:
        """The method in plain values: its `type`, and its settings beside it."""
        if not isinstance(values, Mapping) or not isinstance(values.get("type"), str):
            raise Refused("needs a type", where="peft", remedy="peft: {type: lora, r: 8}")
        return cls(**{str(name): value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a recipe file."""
        return {"type": self.type, **copy.deepcopy(dict(self.settings))}

    def _config(self) -> Any:
        """PEFT's settings: new each time, since PEFT writes into them."""
        with _refusals():
            return _kind(self.type)(**copy.deepcopy(dict(self.settings)))

    def _put_on(self, core: nn.Module) -> None:
        from peft import inject_adapter_in_model

        for setting in ("target_modules", "feedforward_modules"):
            if isinstance(names := self.settings.get(setting), list):
                _check_names(core, names, where=f"peft.{setting}")
        config, before = self._config(), len(adapters(core))
        sums = {p: p.detach().sum(dtype=torch.float64) for p in core.parameters()}
        with _refusals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PEFT then does by itself
            inject_adapter_in_model(config, core)
        if len(adapters(core)) == before:
            raise Refused(f"{self.type} fits no layer of the model", where="peft.target_modules",
                          remedy="lora fits linear layers of any class")  # fmt: skip
        if any(p.detach().sum(dtype=torch.float64) != total for p, total in sums.items()):
            raise Refused(f"these settings of {self.type} change the weights below the adapters",
                          where="peft", remedy="leave out how they begin")  # fmt: skip
        for layer in adapters(core):
            _keep_mask(layer)


def LoRA(
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Literal["all-linear"] | Sequence[str] = "all-linear",
) -> PEFT:
    """`PEFT("lora", …)` in the paper's words: W stays, and W + (α / r) B A is trained."""
    names = targets if isinstance(targets, str) else list(targets)
    return PEFT("lora", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)


def adapt(model: nn.Module, methods: PEFT | Sequence[PEFT]) -> nn.Module:
    """`model` itself, with adapters, before its optimizer is built.

    Of several the later lie around the earlier. Draws from torch's own generator.
    """
    methods = [methods] if isinstance(methods, PEFT) else methods
    if methods and adapters(model):
        raise Refused("the model has adapters already", where="peft",
                      remedy="leave them out, or peft")  # fmt: skip
    for later in methods[1:]:
        # Others change a weight by what it is: by W alone as they train, but folded in by W + ….
        if later.type not in ("lora", "ia3", "ln_tuning") or later.settings.get("use_dora"):
            raise Refused(f"{later.type} cannot lie around other adapters", where="peft",
                          remedy="put it first, and lora or ia3 after it")  # fmt: skip
    core = default_shared(model) or model
    for method in methods:
        method._put_on(core)
    _check_unshared(core)
    with _refusals(), folded(core):  # what PEFT cannot fold in is told before training
        return model


def check_adapted(model: nn.Module, methods: PEFT | Sequence[PEFT]) -> None:
    """Refuse a model without the adapters: all of it would be trained."""
    if methods and not adapters(model):
        raise Refused("the model was not prepared", where="peft", remedy="model = "
                      "recipe.prepare(model), before its optimizer is built")  # fmt: skip


# --- what PEFT serves -----------------------------------------------------------------------------


def _kind(type: str) -> Any:
    """PEFT's class of settings for a type; `Refused` if it is not served."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS
    except ImportError:
        raise Refused("needs PEFT", where="peft", remedy="pip install peft") from None
    kinds = {name.value.lower(): kind for name, kind in KINDS.items()}
    if type not in kinds:
        served = [name for name, kind in kinds.items() if _unserved(kind) is None]
        raise Refused(f"PEFT has no {type!r}", where="peft.type", remedy=nearest(type, served))
    if why := _unserved(kinds[type]):
        raise Refused(f"{type} {why}", where="peft.type", remedy="take lora")
    return kinds[type]


def _unserved(kind: Any) -> str | None:
    """Why a type cannot be served, if it cannot."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    name = next(n for n, k in PEFT_TYPE_TO_CONFIG_MAPPING.items() if k is kind)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
    if getattr(tuner, "uses_shared_state", False):
        return "shares weights between layers, which PEFT holds outside the model"
    if hasattr(tuner, "update_and_allocate"):
        return "changes its size by calls of its own after each step"
    if getattr(tuner, "tuner_layer_cls", None) is None:
        return "is no change of the model's weights, so that no ordinary model could be saved"
    return None


def _problem(hint: Any, value: Any) -> str | None:
    """What is wrong with a setting's value by its annotation, if something is."""
    strict = TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        # PEFT declares LoRA's α an integer, and takes any number.
        strict.validate_python(int(value) if isinstance(value, float) and hint is int else value)
    except ValidationError as error:
        found = {e["type"]: str(e["msg"]) for e in reversed(error.errors())}
        return found.get("literal_error") or [*found.values()][-1]
    return None


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What PEFT raises about settings, in one line."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        said = str(error).splitlines() or ["this cannot be folded into the model's weights"]
        if "specify `target_modules`" in said[0]:
            raise Refused("PEFT knows no layers for a model of this class", remedy="name them",
                          where="peft.target_modules") from None  # fmt: skip
        raise Refused(said[0].rstrip("."), where="peft") from None


def _check_names(core: nn.Module, names: list[str], *, where: str) -> None:
    """Refuse a name that no layer's path ends with."""
    paths = [path.removesuffix(".base_layer") for path, module in core.named_modules()
             if [*module.parameters(recurse=False)]]  # fmt: skip
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            raise Refused(f"no layer {name!r}", where=where, remedy=nearest(
                          name, sorted({path.rpartition(".")[2] for path in paths})))  # fmt: skip


def _check_unshared(core: nn.Module) -> None:
    """Refuse adapters on a weight that another layer uses too: folded in, it would change both."""
    uses = [id(p) for module in core.modules() for p in module._parameters.values()]
    paths = {module: path for path, module in core.named_modules()}
    for layer in adapters(core):
        if any(uses.count(id(p)) > 1 for p in layer.get_base_layer().parameters()):
            raise Refused(f"{paths[layer]} shares its weight with another layer",
                          where="peft.target_modules")  # fmt: skip


def _keep_mask(layer: Any) -> None:
    """SHiRA's mask as a buffer, so that it is saved with the weights that it places."""
    if isinstance(getattr(layer, "shira_indices", None), dict):
        from peft.tuners._buffer_dict import BufferDict

        layer.shira_indices = BufferDict(layer.shira_indices)


# --- the adapters of a model ----------------------------------------------------------------------


def adapter_weights(model: nn.Module, *, base: bool = False) -> dict[str, Tensor]:
    """What PEFT put into a model by name, with `base` also the weights below it; not copied."""
    layers = adapters(model)
    inside = {id(t) for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    if not base:  # biases below may be trained too
        below = [layer.get_base_layer() for layer in layers]
        inside -= {id(p) for b in below for p in b.parameters() if not p.requires_grad}
        inside -= {id(t) for b in below for t in b.buffers()}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: t.detach() for name, t in named if id(t) in inside}


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Within the block the network without adapters, their change in its own weights.

    Names are those of the network before; afterwards all is as it was, bit for bit. Takes a copy
    of each weight below an adapter meanwhile.
    """
    layers = adapters(model)
    held = {id(layer) for layer in layers}
    outside = [module for module in model.modules() if id(module) not in held]
    places: list[Any] = [(parent, name, child) for parent in outside
                         for name, child in parent.named_children()
                         if id(child) in held]  # fmt: skip
    # PEFT's own inverse is not exact: what was there is put back.
    bases = [layer.get_base_layer() for layer in layers]
    kept = [(base, dict(base._parameters)) for base in {*bases}]
    data = [(p, p.data) for _, named in kept for p in named.values() if p is not None]
    try:
        for p, before in data:
            p.data = before.clone()
        with torch.no_grad():
            for layer in reversed(layers):  # the inner before the outer
                layer.merge()
        for p, before in data:
            p.data = p.data.to(before.dtype)
        for parent, name, layer in places:
            setattr(parent, name, layer.get_base_layer())
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OSF cannot undo it, which is done below
            for layer in layers:
                layer.unmerge()
                layer.merged_adapters.clear()
        for base, named in kept:
            base._parameters.clear()
            base._parameters.update(named)
        for p, before in data:
            p.data = before
