"""Replay recorded trajectories of the published DPS.

    python -m holdfast.testing.trajectories FOLDER

The folder holds `index.json` and one safetensors file a run: a tanh MLP with its inputs, labels,
and for every step the gradients as the optimizer saw them, the weights after the step, and for Mix
which entries were kept. `DPS(freeze="gradient")` must reproduce each within `TOLERANCE`, masks
exactly. Prints one line a file and exits with 1 if one deviates.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast.engine.method import View
from holdfast.errors import Refused
from holdfast.methods.dps import DPS
from holdfast.recipe import Recipe

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Deviation:
    """How far a replay strays: the largest absolute difference, and mask entries that differ."""

    largest: float
    where: str
    mask_entries: int

    @property
    def ok(self) -> bool:
        return self.largest <= TOLERANCE and self.mask_entries == 0


class _Recorded(DPS):
    """DPS Mix that takes its noise from a recording."""

    recording: Mapping[str, Tensor]

    def draw(self, view: View, name: str) -> Tensor:
        return self.recording[f"step{view.step}.{_layer(name)}.keep"].bool()


def _layer(name: str) -> int:
    """Which linear layer of the MLP a parameter belongs to; activations stand between them."""
    return int(name.split(".")[0]) // 2


def _method(run: Mapping[str, Any], recording: Mapping[str, Tensor]) -> DPS:
    settings = {"drop": run["p"], "stage": run["update_steps"], "freeze": "gradient"}
    if run["kind"] == "dense":
        return DPS(**settings)
    method = _Recorded(**settings, mix=True, noise="weight")
    object.__setattr__(method, "recording", recording)
    return method


def _optimizer(run: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    kinds = {k.lower(): v for k, v in vars(torch.optim).items() if isinstance(v, type)}
    if run["optimizer"].lower() not in kinds:
        raise Refused(f"no torch optimizer {run['optimizer']!r}", where=run["file"])
    optimizer: torch.optim.Optimizer = kinds[run["optimizer"].lower()](
        model.parameters(), **run["opt_kwargs"]
    )
    return optimizer


def replay(run: Mapping[str, Any], recording: Mapping[str, Tensor]) -> Deviation:
    """Train as recorded and compare every gradient, weight, bias, loss and mask."""
    sizes = run["sizes"]
    model = nn.Sequential()
    for i in range(len(sizes) - 1):
        model.extend([nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh()])
    del model[-1]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(recording[f"init.{_layer(name)}.{name.split('.')[1]}"])
    optimizer, method = _optimizer(run, model), _method(run, recording)
    bound = Recipe(methods=[method]).bind(model, optimizer, total_steps=run["max_steps"])
    worst, where, wrong = 0.0, "-", 0

    def compare(key: str, theirs: Tensor, ours: Tensor) -> None:
        nonlocal worst, where
        distance = (theirs.double() - ours.detach().double()).abs().max().item()
        if math.isnan(distance):
            distance = math.inf
        if distance > worst:
            worst, where = distance, key

    for t in range(run["steps"]):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(recording["x"][t]), recording["y"][t])
        loss.backward()
        view = bound.views["dps"]
        masking = method.masking(view)
        frozen = {_layer(n): f.clone() for n, f in method.frozen(view).items()} if masking else {}
        optimizer.step()
        compare(f"loss[{t}]", recording["loss"][t], loss)
        for name, p in model.named_parameters():
            prefix, kind = f"step{t}.{_layer(name)}", name.split(".")[1]
            compare(f"{prefix}.{kind}", recording[f"{prefix}.{kind}"], p)
            if kind == "weight":
                assert p.grad is not None
                compare(f"{prefix}.grad", recording[f"{prefix}.grad"], p.grad)
                if _layer(name) in frozen:
                    wrong += _mask_entries(frozen[_layer(name)], p.grad, recording, prefix)
    return Deviation(worst, where, wrong)


def _mask_entries(
    frozen: Tensor, ours: Tensor, recording: Mapping[str, Tensor], prefix: str
) -> int:
    """Entries whose mask differs; Dense records show theirs as exact zeros of the gradient."""
    keep = recording.get(f"{prefix}.keep")
    if keep is not None:
        return int((frozen == keep.bool()).sum())
    moved = recording[f"{prefix}.grad"] != 0
    return int((frozen & moved).sum() + (~frozen & ~moved & (ours != 0)).sum())


def replay_folder(folder: Path) -> dict[str, Deviation]:
    """Every run that `folder/index.json` lists."""
    index = folder / "index.json"
    if not index.is_file():
        raise Refused("no index.json", where=str(folder), remedy="name a folder of trajectories")
    results = {}
    try:
        for run in json.loads(index.read_text(encoding="utf-8")):
            results[run["file"]] = replay(run, load_file(folder / run["file"]))
    except (KeyError, TypeError, OSError, SafetensorError, json.JSONDecodeError) as error:
        raise Refused(f"not a recording: {error!r}", where=str(folder)) from error
    if not results:
        raise Refused("lists no runs", where=str(index))
    return results


def main(arguments: list[str]) -> int:
    """0 if every file is reproduced, 1 if one deviates, 2 if there is none."""
    if len(arguments) != 1:
        print("usage: python -m holdfast.testing.trajectories FOLDER", file=sys.stderr)
        return 2
    try:
        results = replay_folder(Path(arguments[0]))
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    for file, result in results.items():
        verdict = "ok" if result.ok else "DEVIATES"
        print(f"{verdict:8} {file}: largest deviation {result.largest:.2e} at {result.where}, "
              f"{result.mask_entries} mask entries differ")  # fmt: skip
    return 0 if all(r.ok for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
