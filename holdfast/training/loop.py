"""Checkpoints for your own training loop, by parameter name and without pickle.

    save_checkpoint("run/checkpoint-100", bound, position={"epoch": 1, "batch": 37},
                    scheduler=scheduler)
    position = load_checkpoint("run/checkpoint-100", bound, scheduler=scheduler)

A folder holds the weights of every task's model, the optimizer's state and options by parameter
name and in their own dtypes, and the state of the methods, of any other objects you pass, and of
every random generator. torch's own `Optimizer.load_state_dict` matches parameters by position only
and casts their state to the parameter's dtype.
"""

from __future__ import annotations

import json
import random
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.state import SCHEMA, check_fit, check_schema, describe
from holdfast.errors import Refused
from holdfast.files import write_text_atomic
from holdfast.network.parts import canonical
from holdfast.ops import distributed
from holdfast.training.checkpoints import load_state, reading, require_shared, save_state
from holdfast.training.manifest import ANEW, MANIFEST, Spot, commit, damage, rotate, spot
from holdfast.training.tensors import write_tensors

LOOP, WEIGHTS, OPTIMIZER, OTHERS = (
    "loop.json", "weights.safetensors", "optimizer.safetensors", "others.safetensors",
)  # fmt: skip
PLAIN = (type(None), bool, int, float, str)  # what JSON gives back as it was

# Which checkpoint each loop has saved last, or went on from.
_AT: weakref.WeakKeyDictionary[Bound, Spot] = weakref.WeakKeyDictionary()


def save_checkpoint(
    folder: str | Path,
    bound: Bound,
    *,
    position: Mapping[str, Any],
    keep: int | None = None,
    plan: Mapping[str, Any] | None = None,
    **others: Any,
) -> None:
    """Save all that the loop needs to resume, after a whole optimizer step.

    folder: named `checkpoint-<step>`, so that `newest_complete` finds it in its parent; while it
    is being overwritten it does not count. position: what your loop needs to find its place in the
    data, as JSON. keep: how many checkpoints to keep. plan: what a resumed loop has to share with
    this one beside the optimizer's options, the methods and the number of steps, as JSON: a seed,
    the rows (`holdfast.engine.plan.rows_hash`), alike on all ranks. others: anything else that has
    state: the scheduler, a GradScaler, a sampler's `torch.Generator`. Every rank calls this with
    the same folder: rank 0 writes the shared state, each its own position, others and random state.
    Raises `Refused` for state that is neither tensors nor plain values, for sharded weights, and
    where ranks do not see each other's files.
    """
    folder, first = Path(folder), distributed.rank() == 0
    if bound.half_made:
        raise Refused("a step is half made", where="save_checkpoint",
                      remedy="save after optimizer.step()")  # fmt: skip
    if plan is not None:
        bound.plan = lambda: plan
    weights = _weights(bound)
    tensors: dict[str, Tensor] = {}
    rest = {"random/cpu": torch.get_rng_state()}
    body = {
        "schema": SCHEMA,
        "ranks": distributed.world(),
        "position": _pack(position, "position", rest),
        "optimizer": _pack_optimizer(bound, tensors),
        "random": {"python": random.getstate(), "numpy": _numpy_state()},
    }
    if torch.cuda.is_available():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            rest[f"random/cuda/{i}"] = state
    body["others"] = {
        name: _pack(_state_of(name, thing), f"others/{name}", rest)
        for name, thing in others.items()
    }
    text = json.dumps(body, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _own(OTHERS), rest)
    write_text_atomic(folder / _own(LOOP), text)
    if first:
        (folder / MANIFEST).unlink(missing_ok=True)  # of a checkpoint being overwritten
        known = save_state(bound, folder)
        for name, held in ((WEIGHTS, weights), (OPTIMIZER, tensors)):
            known[name] = write_tensors(folder / name, held)
    distributed.wait()
    require_shared(folder, [_own(name, rank) for name in (LOOP, OTHERS)
                            for rank in range(distributed.world())],
                   next(iter(bound.weights.values())).device)  # fmt: skip
    if first:
        _AT[bound] = commit(folder, known, after=_AT.get(bound, ANEW))
        rotate(folder, keep)
    distributed.wait()  # no rank goes on before the checkpoint is whole


def load_checkpoint(
    folder: str | Path,
    bound: Bound,
    *,
    plan: Mapping[str, Any] | None = None,
    exact_resume: bool = True,
    **others: Any,
) -> dict[str, Any]:
    """Resume from a checkpoint; returns its `position`.

    Call it once everything is built as it was when training began: the model, the optimizer, the
    bound (attached to the same task, with `bound.models` of earlier tasks), and the same `plan` and
    `others`. Raises `Refused`, and changes nothing, if the folder is damaged or does not fit, or
    if the optimizer's options, the clipping, the number of steps (more are no difference) or the
    `plan` are others. With `exact_resume=False` these are told, and noted in `bound.changes`;
    options are those that were saved: set others after this call. Only a state that somebody else
    than holdfast wrote, checksums and all, may be refused once some of it is loaded.
    """
    folder = Path(folder)
    if wrong := damage(folder):
        raise Refused(wrong, where=str(folder), remedy="load the one before it")
    with reading(folder):
        try:
            body = json.loads((folder / _own(LOOP)).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Refused(f"{_own(LOOP)} is missing", where=str(folder), remedy="load one that "
                          "save_checkpoint wrote, on as many ranks") from None  # fmt: skip
        check_schema(body, LOOP, str(folder))
        if (ranks := body.get("ranks", 1)) != distributed.world():
            raise Refused(f"was saved on {ranks} ranks, not on {distributed.world()}",
                          where=str(folder), remedy="load it on as many")  # fmt: skip
        weights, saved = _weights(bound), load_file(folder / WEIGHTS)
        check_fit(describe(saved), describe(weights))
        if body["others"].keys() != others.keys():
            raise Refused(f"holds the state of {sorted(body['others'])}, not of {sorted(others)}",
                          where=str(folder), remedy="pass the same objects")  # fmt: skip
        tensors, rest = load_file(folder / OPTIMIZER), load_file(folder / _own(OTHERS))
        likes = {name: _state_of(name, thing) for name, thing in others.items()}
        groups = _matching_groups(bound, body["optimizer"])
        bound.plan = lambda: plan or {}
        # Refuses a state that does not fit before changing anything.
        load_state(bound, folder, exact=exact_resume)
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(saved[name])
        _unpack_optimizer(bound, body["optimizer"], groups, tensors)
        for name, thing in others.items():
            state = _unpack(body["others"][name], likes[name], f"others/{name}", rest)
            if isinstance(thing, torch.Generator):
                thing.set_state(state)
            else:
                thing.load_state_dict(state)
        _restore_random(body["random"], rest)
        _AT[bound] = spot(folder)
        position: dict[str, Any] = _unpack(body["position"], {}, "position", rest)
        return position


def _own(name: str, rank: int | None = None) -> str:
    """The file of a rank, where there are several; of this one if not said."""
    stem, dot, kind = name.partition(".")
    rank = distributed.rank() if rank is None else rank
    return name if distributed.world() == 1 else f"{stem}-{rank}{dot}{kind}"


def _weights(bound: Bound) -> dict[str, Tensor]:
    """Parameters and saved buffers of all models, each tensor once, by ``task/name``."""
    if not bound.task:
        raise Refused("no task has begun", where="bound", remedy="bind it to the model first")
    if any(map(distributed.sharded, bound.weights.values())):
        raise Refused("weights in shards are not served here", where="training.loop",
                      remedy="use torch.distributed.checkpoint, and save_state")  # fmt: skip
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    models: dict[str, nn.Module] = {bound.task: bound.models[bound.task], **bound.models}
    for task, model in models.items():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise Refused("a module keeps state that is no tensor", where=name,
                              remedy="save it in position=, or as one of the others")  # fmt: skip
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{task}/{canonical(name)}"] = tensor
    return found


# --- the optimizer --------------------------------------------------------------------------------


def _names(bound: Bound) -> list[list[str]]:
    """The names of each group's parameters, in order."""
    names = {id(w): name for name, w in bound.weights.items()}
    return [[names[id(w)] for w in g["params"]] for g in bound.optimizer.param_groups]


def _pack_optimizer(bound: Bound, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for name, w in bound.weights.items():
        state[name] = _pack(bound.optimizer.state.get(w, {}), name, tensors)
    for names, group in zip(_names(bound), bound.optimizer.param_groups, strict=True):
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        plain = _pack(options, f"group/{len(groups)}", tensors)
        groups.append({"names": names, "options": plain})
    return {"class": type(bound.optimizer).__name__, "state": state, "groups": groups}


def _matching_groups(bound: Bound, saved: Mapping[str, Any]) -> list[int]:
    """For each current group, the index of the saved one with the same parameters, in any order."""
    now, kind = _names(bound), type(bound.optimizer).__name__
    if saved["class"] != kind:
        raise Refused(f"the optimizer was {saved['class']}, is {kind}")
    before = {frozenset(g["names"]): i for i, g in enumerate(saved["groups"])}
    moved = [name for names in now if frozenset(names) not in before for name in names]
    if moved or len(before) != len(now):
        shown = ", ".join(moved[:5]) + (f" and {len(moved) - 5} more" if moved[5:] else "")
        raise Refused(f"the optimizer's groups are others: {shown}",
                      remedy="use the same rates and weight decay")  # fmt: skip
    return [before[frozenset(names)] for names in now]


def _unpack_optimizer(
    bound: Bound, saved: Mapping[str, Any], groups: list[int], tensors: Mapping[str, Tensor]
) -> None:
    optimizer = bound.optimizer
    on_device = any(g.get("capturable") or g.get("fused") for g in optimizer.param_groups)
    optimizer.state.clear()
    for name, w in bound.weights.items():
        entries = _unpack(saved["state"][name], {}, name, tensors)
        for key, value in entries.items():
            if isinstance(value, Tensor) and (key != "step" or on_device):
                entries[key] = value.to(w.device)  # moved, never cast to the parameter's dtype
        if entries:
            optimizer.state[w] = entries
    for group, index in zip(optimizer.param_groups, groups, strict=True):
        options = _unpack(saved["groups"][index]["options"], group, f"group/{index}", tensors)
        for key, value in options.items():
            if isinstance(group.get(key), Tensor):  # a captured graph holds this very tensor
                group[key].copy_(value)
            else:
                group[key] = value


# --- values as JSON and tensors -------------------------------------------------------------------


def _state_of(name: str, thing: Any) -> Any:
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if not hasattr(thing, "state_dict"):
        raise Refused(f"a {type(thing).__name__} has no state_dict()", where=name)
    return thing.state_dict()


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors`; Refused for any other object."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        tensors[where] = value
        return {"$tensor": where}
    if type(value) in PLAIN:
        return value
    if isinstance(value, list | tuple):
        return [_pack(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {k: _pack(item, f"{where}/{k}", tensors) for k, item in value.items()}
        if all(type(key) in PLAIN for key in value):
            return {"$pairs": [[k, _pack(v, f"{where}/{k}", tensors)] for k, v in value.items()]}
    elif getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a numpy scalar
        return _pack(value.item(), where, tensors)
    raise Refused(f"a {type(value).__name__} cannot be saved without pickle", where=where)


def _unpack(value: Any, like: Any, where: str, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_pack`; lists and mappings take the type that `like` has there."""
    if isinstance(value, dict) and "$tensor" in value:
        return tensors[value["$tensor"]].clone()
    if isinstance(value, dict) and "$pairs" in value:
        made = {k: _unpack(v, None, where, tensors) for k, v in value["$pairs"]}
        kind: Any = type(like) if isinstance(like, Mapping) else dict
        return kind(made)
    if isinstance(value, dict):
        of = like if isinstance(like, Mapping) else {}
        return {k: _unpack(v, of.get(k), where, tensors) for k, v in value.items()}
    if isinstance(value, list):
        kinds = like if isinstance(like, list | tuple) and len(like) == len(value) else value
        items = [_unpack(v, k, where, tensors) for v, k in zip(value, kinds, strict=True)]
        return tuple(items) if isinstance(like, tuple) else items
    return value


def _numpy_state() -> Any:
    """The state of numpy's global generator; None if nothing has imported numpy."""
    if "numpy" not in sys.modules:
        return None
    name, keys, *rest = sys.modules["numpy"].random.get_state()
    return [name, keys.tolist(), *rest]


def _restore_random(saved: Mapping[str, Any], rest: Mapping[str, Tensor]) -> None:
    version, inner, gauss = saved["python"]
    random.setstate((version, tuple(inner), gauss))
    if saved["numpy"] is not None:
        import numpy as np

        name, keys, *more = saved["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *more))
    torch.set_rng_state(rest["random/cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"random/cuda/{i}" in rest:
                torch.cuda.set_rng_state(rest[f"random/cuda/{i}"], i)
