"""What a model's weight files hold, so that nothing is drawn at random where weights were meant."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from holdfast.errors import Refused, tell_once
from holdfast.files import weight_files

FACTOR = 10  # layers a tensor: ALBERT has one for all of its layers
WHOLE_MODEL = "name a model that was saved whole"


def check_stored(source: str, config: Any) -> None:
    """Refuse, before a model is built, a configuration or weights that cannot be of one model.

    Of a Hub id only the configuration is known before its weights are fetched.
    """
    each = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    layers = {k: v for c in each for k, v in (vars(c) if c else {}).items()
              if "layer" in k and isinstance(v, int) and not isinstance(v, bool)}  # fmt: skip
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int) and count < 1:
        raise Refused(f"its config.json says {count} layers", where=source, remedy=WHOLE_MODEL)
    types = _types(Path(source))
    for name, count in layers.items():
        if types and count > FACTOR * len(types):  # which would take minutes to build
            raise Refused(f"{name} is {count:,}, its file has {len(types):,} tensors", where=source,
                          remedy="give it the config.json of its weights")  # fmt: skip
    whole = [k for k, v in types.items() if k.endswith(".weight") and v[0] in "IUB" and v != "BF16"]
    if whole:
        raise Refused(f"{whole[0]} is stored as whole numbers ({types[whole[0]]})", where=source,
                      remedy="name a model saved in a floating-point type")  # fmt: skip


def _types(folder: Path) -> dict[str, str]:
    """The type of each tensor in a folder's files, by name, from their headers alone."""
    found: dict[str, str] = {}
    for file in filter(Path.is_file, weight_files(folder)):
        with safe_open(file, "np") as opened:
            found |= {k: opened.get_slice(k).get_dtype() for k in opened.keys()}  # noqa: SIM118
    return found


def check_loaded(model: Any, told: Mapping[str, Iterable[str]], source: str) -> None:
    """Refuse a model whose missing weights, which were drawn, are not those of a fresh head, or
    that has fewer layers than its file. told: what `from_pretrained` says of them.

    A model of the class that was saved has all of them; of another class, what the two share: the
    encoder, and every module of which a part was loaded. A pooler alone is often not pre-trained,
    and not saved: it is told.
    """
    lists = {name: len(part) for root in (model, model.base_model)
             for name, part in root.named_modules() if isinstance(part, nn.ModuleList)}  # fmt: skip
    for name in sorted(told["unexpected_keys"]):
        for at in re.finditer(r"\.(\d+)\.", name):
            path = name[: at.start()]
            if int(at[1]) >= lists.get(path, math.inf):
                raise Refused(f"its config.json has {lists[path]} of {path}, its file has {name}",
                              where=source, remedy="give it the config.json of its weights, or "
                              "save the shorter model whole")  # fmt: skip
    gone = {name for name in told["missing_keys"] if not name.endswith("num_batches_tracked")}
    if type(model).__name__ not in (model.config.architectures or ()):
        there = {name.split(".")[0] for name, _ in model.named_parameters() if name not in gone}
        heads = {
            n for n in gone if there and n.split(".")[0] not in {model.base_model_prefix, *there}
        }
        poolers = {name for name in gone - heads if "pooler" in name.split(".")}
        gone -= heads | poolers
        if poolers and not gone:
            tell_once(f"{source}: was saved without its pooler, which begins at random")
    if gone:
        raise Refused(f"{len(gone):,} of its weights are not in its file, such as {min(gone)}",
                      where=source, remedy=WHOLE_MODEL)  # fmt: skip


def check_ids(largest: int, config: Any, where: str | None = None) -> None:
    """Refuse a token's id that the embedding has no row for: its tokenizer is of another model.

    The tokenizer may have more tokens than that, as long as no text has one: Gemma's do.
    """
    size = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and largest >= size:
        raise Refused(f"has a token with id {largest:,}, the model has {size:,} tokens",
                      where=where, remedy="save the model's own tokenizer beside it")  # fmt: skip


def check_texts(ids: Iterable[Iterable[int]], model: Any) -> None:
    """`check_ids` of texts that a model is asked about."""
    check_ids(max(map(max, filter(None, ids)), default=0), getattr(model, "config", None))
