"""What a resumed run must share with the run it continues: settings, rows, weights that are not
saved. `Bound` keeps it beside the state and compares it, whoever saves and loads.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from holdfast.errors import Refused, tell_once
from holdfast.files import differences

MOST = 1024  # rows read of a dataset whose rows may take long to make
ENTRIES = 1 << 16  # of a tensor that are hashed, evenly spaced
CHUNK = 1000  # rows of a table at a time
STREAMED, UNREAD = "streamed: not compared", "cannot be read: not compared"
FIRM = "order"  # moments are matched by position there: no flag makes another order right
LEGACY = frozenset({"groups", "accumulation", "batch"})  # of checkpoints before `arguments`
# Of a Trainer's arguments those that change no step that is made, but for rounding, by how their
# names begin.
ASIDE = (
    "output_dir", "logging_", "log_", "eval_", "batch_eval", "per_device_eval", "prediction_loss",
    "bf16_full_eval", "fp16_full_eval", "save_", "hub_", "push_", "report_to", "run_name",
    "project", "trackio_", "disable_tqdm", "do_", "resume_from", "restore_callback", "ddp_",
    "local_rank", "dataloader_num", "dataloader_pin", "dataloader_pers", "dataloader_pre",
    "dataloader_multi", "dataset_num_proc", "include_", "skip_memory", "activation_check",
    "gradient_check", "torch_compile", "debug", "auto_find_batch", "enable_jit_checkpoint",
    "torch_empty_cache", "use_cpu", "use_cache", "generation_", "predict_with", "num_train_epochs",
    "max_steps", "max_grad_norm",
)  # fmt: skip
BEST = ("load_best_model", "metric_for_best", "greater_")  # count where the best one is taken
# Of an optimizer's options those that only change rounding, and what the rate is made of.
ASIDE_OPTIONS = frozenset(
    {
        "params",
        "param_names",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "base_lr",
        "multiplier",
    }
)


def options_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """The options that an optimizer begins with, as JSON: one value where its groups agree, else
    by the first name of each group. names: of its parameters, by id."""
    found: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        first = min((names.get(id(w), "") for w in group["params"]), default="")
        plain = {k: v for k, v in group.items() if k not in ASIDE_OPTIONS}
        if "initial_lr" in plain:  # a schedule has changed the rate already
            plain["lr"] = plain.pop("initial_lr")
        for key, value in plain.items():
            value = value.tolist() if isinstance(value, Tensor) else value
            if isinstance(value, bool | int | float | str | list | tuple | None):
                found.setdefault(key, {})[first] = value
    return {k: v[min(v)] if len({*map(str, v.values())}) == 1 else v for k, v in found.items()}


def arguments_of(args: Any) -> dict[str, Any]:
    """Those of a Trainer's arguments that change what a step does; its precision as it is, which
    Accelerate also reads from the environment."""
    told: dict[str, Any] = args.to_dict()
    if (precision := getattr(args, "mixed_precision", "no")) != "no":
        told[precision] = True
    aside = ASIDE if told.get("load_best_model_at_end") else (*ASIDE, *BEST)
    return {k: v for k, v in told.items() if not k.startswith(aside)}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, as `key: old → new`.

    More `steps` than it had are no difference: the training goes on. Arguments and options that
    only one version of a library has are none either.
    """
    one, two = (json.loads(json.dumps(dict(plan), default=str)) for plan in (before, now))
    old = {k: v for k, v in one.items() if k not in LEGACY}
    new = {k: v for k, v in two.items() if k in old}
    if (old.get("steps") or 0) < (new.get("steps") or 0):
        old["steps"] = new["steps"]
    if old.get("rows") in (STREAMED, UNREAD):
        tell_once(f"the training rows: {old['rows']} with those of the checkpoint")
    order = [old.pop(FIRM, None), new.pop(FIRM, None)]
    told = list[str]()
    for key in ("arguments", "options"):
        was, are = old.pop(key, {}), new.pop(key, {})
        both = was.keys() & are.keys()
        told += differences({k: was[k] for k in both}, {k: are[k] for k in both})
    told += differences(old, new)
    if None not in order and order[0] != order[1]:
        told.append(f"{FIRM} changed: {_moved(*order)}")
    return told


def refuse_changed(told: Sequence[str], *, exact: bool, where: str | None = None) -> None:
    """Refuse the differences that `changed` found, all if the resume has to be `exact`."""
    firm = any(line.startswith(f"{FIRM} ") for line in told)
    if told and (exact or firm):
        shown = ", ".join(told[:8]) + (f" and {len(told) - 8} more" if told[8:] else "")
        raise Refused(f"was saved with other settings: {shown}", where=where,
                      remedy="set them back" + ("" if firm else ", or pass exact_resume=False"),
                      )  # fmt: skip


def compare(before: Mapping[str, Any], now: Mapping[str, Any], *, exact: bool) -> list[str]:
    """Refuse what differs, on every rank, or with `exact=False` warn of it; returns it."""
    told = changed(before, now)
    refuse_changed(told, exact=exact)
    for line in told:
        warnings.warn(f"goes on with other settings: {line}", stacklevel=3)
    return told


def _moved(before: Sequence[str], now: Sequence[str]) -> str:
    wrong = [f"{b!r} stands where {a!r} stood" for a, b in zip(before, now, strict=False) if a != b]
    wrong += [f"{name!r} is gone" for name in before[len(now) :]]
    wrong += [f"{name!r} is new" for name in now[len(before) :]]
    return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if wrong[3:] else "")


# --- fingerprints ---------------------------------------------------------------------------------


def rows_hash(rows: Any) -> str | None:
    """A hash of training rows, labels and order included; None if there are none.

    All rows of lists and other sequences, tensors and tables (`datasets`); of other datasets, whose
    rows may take long to make, their number and at most 1,024 of them, evenly spaced. Rows are read
    with the global random state set aside. What is streamed is not read, and cannot be compared.
    """
    if rows is None:
        return None
    digest = hashlib.sha256()
    try:
        for piece in _pieces(rows):
            digest.update(piece)
    except _Streamed:
        return STREAMED
    except Exception:  # a dataset is anyone's code; training will meet its errors where they are
        return UNREAD
    return digest.hexdigest()[:16]


class _Streamed(Exception):
    pass


def _pieces(rows: Any) -> Iterator[bytes]:
    if callable(own := getattr(rows, "content_hash", None)):
        yield str(own()).encode()
    elif isinstance(rows, Mapping):
        for name, each in rows.items():
            yield str(name).encode()
            yield from _pieces(each)
    elif not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise _Streamed
    elif hasattr(rows, "with_format") and hasattr(rows, "features"):
        table = rows.with_format("arrow")
        for at in range(0, len(rows), CHUNK):
            part = table[at : at + CHUNK]
            # Copied: bytes of a part of a table tell where it was cut.
            part = part.take([*range(len(part))]).combine_chunks()
            yield str(part.schema.remove_metadata()).encode()
            yield from (bytes(batch.serialize()) for batch in part.to_batches())
    else:
        yield str(len(rows)).encode()
        step = 1 if _quick(rows) else max(1, -(-len(rows) // MOST))
        with _set_aside():
            for at in range(0, len(rows), step):
                yield json.dumps(rows[at], default=_plain).encode()


def _quick(rows: Any) -> bool:
    if isinstance(rows, Subset):
        return _quick(rows.dataset)
    return isinstance(rows, Sequence | TensorDataset | Tensor)


@contextmanager
def _set_aside() -> Iterator[None]:
    """Within the block every global generator is at 0: rows that are drawn are drawn alike."""
    numpy: Any = sys.modules.get("numpy")
    python, other = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        if numpy is not None:
            numpy.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(other)


def _plain(value: Any) -> Any:
    """What JSON does not know, as what it does: arrays and pictures by the hash of their bytes."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        return [str(value.dtype), list(value.shape), _bytes_of(value)]
    if getattr(getattr(value, "dtype", None), "hasobject", False):  # an array of addresses
        return [list(value.shape), value.tolist()]
    if callable(whole := getattr(value, "tobytes", None)):
        told = [str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]
        return [*told, hashlib.sha256(whole()).hexdigest()]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, type):
        return value.__qualname__
    try:
        told = value.__reduce_ex__(2)  # what it is made of, as copies of it would be
    except TypeError:  # such as a file
        return type(value).__name__
    return told if isinstance(told, str) else [type(value).__name__, *told[1:3]]


def _bytes_of(t: Tensor) -> str:
    return hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """A hash of tensors by name, of at most 65,536 evenly spaced entries each; None without any."""
    digest, some = hashlib.sha256(), False
    for name, w in weights:
        flat = w.detach().reshape(-1)
        few = flat[:: max(1, flat.numel() // ENTRIES)].cpu().contiguous()
        digest.update(f"{name} {tuple(w.shape)} {_bytes_of(few)}".encode())
        some = True
    return digest.hexdigest()[:16] if some else None
