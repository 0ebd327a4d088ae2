"""Tasks from the Hugging Face Hub, through `datasets`; no code from the Hub is run."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from holdfast.errors import Refused, nearest
from holdfast.tasks.spec import Options
from holdfast.tasks.table import MAX_RECORDS, TAGS, Table, listed, shown

# Ids that moved when the Hub gave every dataset an owner.
MOVED = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue", "imdb": "stanfordnlp/imdb"}
EVALUATION = ("validation", "validation_matched", "dev", "test")
PATIENCE = 3.0  # seconds for the Hub to answer at all


def read(
    place: str, options: Options, wanted: frozenset[str]
) -> tuple[Table, Table | None, tuple[str, ...] | None, bool]:
    """Training table, evaluation table, label names if the dataset has them, and whether its
    labels are floats."""
    splits = load(place, options)
    if "train" not in splits:
        raise Refused(f"no split 'train'; it has {listed(list(splits))}", where=place)
    chosen = options.evaluation or next((name for name in EVALUATION if name in splits), None)
    if chosen is not None and chosen not in splits:
        raise Refused(
            f"no split {shown(chosen)}", where=place, remedy=nearest(chosen, list(splits))
        )
    train = _table(splits["train"], f"{place}, train", wanted)
    evaluation = _table(splits[chosen], f"{place}, {chosen}", wanted) if chosen else None
    features = splits["train"].features
    asked = (options.label,) if options.label else ("label", *TAGS)
    feature = next((features[name] for name in asked if name in features), None)
    names = getattr(getattr(feature, "feature", feature), "names", None)
    floats = str(getattr(feature, "dtype", "")).startswith("float")
    return train, evaluation, tuple(names) if names else None, floats


def must_answer(place: str) -> None:
    """Refuse `place`, an id on the Hub, if the Hub cannot be reached; checked once a process.

    The Hub's own clients retry for most of a minute, and log many lines.
    """
    from huggingface_hub import constants

    for name in ("huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
        raise Refused(
            f"no network: {constants.ENDPOINT} does not answer",
            where=place,
            remedy="name a local path, or set HF_HUB_OFFLINE=1 to use what was fetched before",
        )


@functools.cache
def answers(endpoint: str) -> bool:
    """Whether the Hub's own client, with its proxies, gets any answer in `PATIENCE` seconds."""
    from huggingface_hub import get_session

    answered: list[Any] = []

    def ask() -> None:
        with suppress(Exception):  # networks fail in many ways
            answered.append(get_session().head(endpoint, timeout=PATIENCE))

    asking = threading.Thread(target=ask, daemon=True)  # resolving a name may take longer than that
    asking.start()
    asking.join(PATIENCE)
    return bool(answered)


def load(place: str, options: Options) -> Mapping[str, Any]:
    """The splits of a dataset; `Refused` if the Hub gives none."""
    dataset, config = _split_id(place)
    if config and options.config:
        raise Refused("the configuration stands twice", where=place)
    import datasets

    must_answer(place)
    try:
        found = datasets.load_dataset(dataset, options.config or config, revision=options.revision)
    except Exception as error:  # network, missing, private, scripts: one line each
        lines = str(error).strip().splitlines()
        raise Refused(
            f"the Hub gave no dataset ({type(error).__name__}: {lines[0][:200] if lines else ''})",
            where=place,
            remedy="is the id right, and the network up? A local path must exist",
        ) from error
    if not isinstance(found, Mapping):
        raise Refused("the dataset has no splits", where=place)
    return found


def _split_id(place: str) -> tuple[str, str | None]:
    """`glue/mrpc`, `owner/name`, `owner/name/config` -> dataset id and configuration."""
    first, *rest = place.split("/")
    if first in MOVED and len(rest) <= 1:
        return MOVED[first], rest[0] if rest else None
    if len(rest) == 2:
        return f"{first}/{rest[0]}", rest[1]
    return place, None


def _table(split: Any, name: str, wanted: frozenset[str]) -> Table:
    table = Table(name, wanted, unit="row", columns=list(split.column_names))
    if len(split) > MAX_RECORDS:
        raise Refused(f"{len(split):,} rows are too many", where=name)
    for column, feature in split.features.items():
        if column not in wanted and getattr(feature, "dtype", None) == "string":
            table.wordy.add(column)
    unread = [column for column in table.columns if column not in wanted]
    for number, cells in enumerate(split.remove_columns(unread), start=1):
        table.add(number, cells)
    return table
