"""Fuse the results of searches into one curve of learning rates (BERTcL, arXiv 2404.01317).

Within a study the trials are ranked by reward = new + old_after, rank r = 0 the best, and their log
rates are averaged with weights that fall geometrically; studies are then averaged plainly::

    w_r = base^-r                                       base 1.8: the best weighs 4/9 of many
    ln lr[study, part] = Σ_r w_r ln lr[r, part] / Σ_r w_r
    ln lr[part]        = mean over studies of ln lr[study, part]

Equal rewards share the mean of the weights of their ranks, so that the result depends on which
trials there are and not on their order. The curve is stored as shape × scale: multipliers of
geometric mean 1, and `geometric_mean_rate` apart, since the published average was compared with a
rate 6.6 times larger. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import numpy as np

from holdfast import __version__
from holdfast.errors import Refused
from holdfast.files import LARGEST, check_seal, parse_json, read_plain, write_yaml
from holdfast.search.trials import FACTS, NAME, ReadStudy, read_study

if TYPE_CHECKING:
    from rich.table import Table

BASE = 1.8
TIED = 1e-9  # rewards closer than this are equal: one sum computed two ways differs by rounding
FORMULA = "exp(sum base^-rank ln lr / sum base^-rank) a study, log average over studies"


@dataclass(frozen=True)
class Fusion:
    """One curve out of several studies."""

    studies: tuple[ReadStudy, ...]
    rates: np.ndarray
    """(studies, parts) learning rates, one row a study."""
    weights: tuple[np.ndarray, ...]
    """For each study (trials,), summing to 1, in the order of `ReadStudy.trials`."""
    fused: np.ndarray
    """(parts,) learning rates: the geometric mean of `rates` over studies."""
    base: float
    layers: int | None

    @property
    def geometric_mean_rate(self) -> float:
        """exp(mean over parts of ln lr): the scale."""
        return geometric_mean(self.fused)

    @property
    def multipliers(self) -> list[float]:
        """lr / geometric mean: the shape, one value a part."""
        mean = math.fsum(np.log(self.fused)) / len(self.fused)
        return [float(m) for m in np.exp(np.log(self.fused) - mean)]

    def to_dict(self) -> dict[str, Any]:
        """The content of a rates file, as `Rates.load` takes it (which would load torch)."""
        studies = [
            {
                "file": study.source,
                "sha256": study.sha256,
                "study": study.study,
                "trials": len(study.trials),
                "left_out": dict(study.left_out),
                "best_reward": max(_rewards(study)),
                "rates": [float(rate) for rate in rates],
            }
            for study, rates in zip(self.studies, self.rates, strict=True)
        ]
        return {
            "kind": "rates",
            "schema": 1,
            "name": "combined",
            "multipliers": self.multipliers,
            "layers": self.layers,
            "freeze_below": 0.0,
            "geometric_mean_rate": self.geometric_mean_rate,
            "provenance": {
                "source": f"holdfast combine {__version__}",
                "formula": FORMULA,
                "base": self.base,
                "studies": studies,
            },
        }


def rank_weights(rewards: Sequence[float], base: float = BASE) -> np.ndarray:
    """base^-rank of each reward, rank 0 the largest, scaled to sum to 1: (trials,).

    Sorted rewards within `TIED` of their neighbour count as equal and share the mean of their
    weights. `base` 1 weighs all trials alike.
    """
    if isinstance(base, bool) or not isinstance(base, int | float) or not 1 <= base < math.inf:
        raise Refused(f"{base!r} is not a number from 1 on", where="--base",
                      remedy="1 is the plain mean, the papers' is 1.8")  # fmt: skip
    values = np.asarray(rewards, dtype=float)
    order = np.argsort(-values, kind="stable")
    weights = np.exp(-math.log(base) * np.arange(len(values)))  # base^-rank, 0 where too small
    level = np.concatenate([[0], np.cumsum(-np.diff(values[order]) > TIED)])
    shared = np.bincount(level, weights=weights) / np.bincount(level)
    found = np.empty(len(values))
    found[order] = shared[level] / weights.sum()
    return found


def fuse(studies: Sequence[ReadStudy], *, base: float = BASE, layers: int | None = None) -> Fusion:
    """The curve of several studies; `layers` where their files do not say how many there were.

    Refused: no study, a file given twice, different numbers of parts or of layers.
    """
    if not studies:
        raise Refused("no study", remedy="name the folder of a search, or a file of trials")
    first = studies[0]
    for i, study in enumerate(studies):
        if (twice := next((s for s in studies[:i] if s.sha256 == study.sha256), None)) is not None:
            raise Refused(f"is the same file as {twice.source}", where=study.source,
                          remedy="name it once, or it counts twice")  # fmt: skip
        if study.parts != first.parts:
            raise Refused(f"{study.parts} rates a trial, {first.source} has {first.parts}",
                          where=study.source,
                          remedy="combine studies of the same parts")  # fmt: skip
    weights = [rank_weights(_rewards(study), base) for study in studies]
    logs = [_log_average(study, w) for study, w in zip(studies, weights, strict=True)]
    # fsum is exact, so that the order of the studies does not matter
    fused = np.array([math.fsum(column) / len(studies) for column in zip(*logs, strict=True)])
    spread = fused - fused.mean()
    if not np.abs(spread).max() < 300 * math.log(10):
        raise Refused("its rates differ by more than 300 powers of ten", where=first.source)
    return Fusion(
        studies=tuple(studies), rates=np.exp(np.array(logs)), weights=tuple(weights),
        fused=np.exp(fused), base=float(base), layers=_layers(studies, layers),
    )  # fmt: skip


def _rewards(study: ReadStudy) -> list[float]:
    return [trial.reward for trial in study.trials if trial.reward is not None]


def _log_average(study: ReadStudy, weights: np.ndarray) -> list[float]:
    """Σ_r w_r ln lr_r / Σ_r w_r of each part: (parts,). Exact sums: row order does not matter."""
    logs = np.log(np.array([trial.lr for trial in study.trials]))  # (trials, parts)
    total = math.fsum(weights)
    return [math.fsum(weights * column) / total for column in logs.T]


def _layers(studies: Sequence[ReadStudy], given: int | None) -> int | None:
    if given is not None and (isinstance(given, bool) or given < 1):
        raise Refused(f"{given!r} is no number of layers", where="--layers")
    found = given
    for study in studies:
        if study.layers is not None and found not in (None, study.layers):
            others = "--layers says" if given is not None else "the studies before have"
            raise Refused(f"{study.layers} layers, {others} {found}", where=study.source,
                          remedy="combine studies of one depth")  # fmt: skip
        found = found or study.layers
    return found


def combine(
    paths: Sequence[str | Path], *, out: str | Path, base: float = BASE, layers: int | None = None
) -> Fusion:
    """Read studies, fuse them and write the rates file `out`.

    Example:
        >>> combine(["runs/search-a", "logs.json"], out="rates.yaml")  # doctest: +SKIP
    """
    out = Path(out)
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise Refused("a rates file ends in .yaml", where=str(out))
    fusion = fuse([_as_written(path) for path in paths], base=base, layers=layers)
    write_yaml(out, fusion.to_dict())
    return fusion


def _as_written(path: str | Path) -> ReadStudy:
    """The study of a path; `Refused` where the search beside it wrote other trials."""
    study, home = read_study(path), Path(path)
    home = home if home.is_dir() else home.parent
    if Path(study.source).name != NAME or not (home / FACTS).is_file():
        return study
    try:
        body = parse_json(read_plain(home / FACTS, 16 * LARGEST))
        check_seal(body, where=str(home / FACTS))
        wrote = body.get("files", {}).get(NAME)
    except Refused:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise Refused("cannot be read", where=str(home / FACTS),
                      remedy="`holdfast verify` tells more") from None  # fmt: skip
    if wrote not in (None, study.sha256):
        raise Refused("is not as its search wrote it", where=study.source,
                      remedy="run the search's command again; if you changed it, name a copy "
                      "in another folder")  # fmt: skip
    return study


def notes(fusion: Fusion) -> list[str]:
    """What a reader of the table should know, a line each."""
    lines = ["curve: multipliers of geometric mean 1; mean rate: the geometric mean over parts"]
    if fusion.layers is None:
        lines.append("layers unknown: the points are spread evenly; --layers 12 says it was 12")
    for study in {s.study: s for s in fusion.studies if s.study is not None}.values():
        count = sum(study.study == other.study for other in fusion.studies)
        if count > 1:
            lines.append(f"study {study.study} counts {count} times, once a file")
    return lines


def table(fusion: Fusion) -> Table:
    """Each study and their fusion: trials, what was left out, and the curve."""
    from rich.table import Table
    from rich.text import Text

    heads = ("study", "trials", "left out", "best reward", "best's weight", "mean rate",
             "embeddings", "points", "head")  # fmt: skip
    made = Table(title=f"rates fused, base {fusion.base:g}", title_justify="left")
    for head in heads:
        made.add_column(head, justify="left" if head in ("study", "points") else "right")
    for study, rates, weights in zip(fusion.studies, fusion.rates, fusion.weights, strict=True):
        gone = ", ".join(f"{count} {why}" for why, count in study.left_out.items()) or "none"
        best = f"{max(_rewards(study)):.3f}"
        called = study.study or "/".join(Path(study.source).parts[-2:])
        cells = [called, str(len(study.trials)), gone, best, f"{100 * weights.max():.0f} %"]
        made.add_row(*(Text(cell) for cell in cells + _curve(rates)))
    made.add_section()
    total = sum(len(study.trials) for study in fusion.studies)
    gone = str(sum(sum(study.left_out.values()) for study in fusion.studies))
    made.add_row("fused", str(total), gone, "", "", *_curve(fusion.fused), style="bold")
    made.caption, made.caption_justify = Text("\n".join(notes(fusion))), "left"
    return made


def _curve(rates: np.ndarray) -> list[str]:
    mean = geometric_mean(rates)
    first, *points, last = (f"{rate / mean:.3g}" for rate in rates)
    return [f"{mean:.2e}", first, " ".join(points), last]
