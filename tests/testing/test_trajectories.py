"""Replaying recordings: those of the published code, and our own from the slow reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dps_reference import Reference
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.testing.trajectories import _mask_entries, main, replay_folder

SIZES = (4, 6, 5, 3)
LAYERS = range(len(SIZES) - 1)


def test_published_trajectories_are_reproduced(golden: Path, capsys: Any) -> None:
    assert main([str(golden)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(json.loads((golden / "index.json").read_text()))
    assert all(line.startswith("ok") for line in lines)


def record(
    folder: Path, *, mix: bool, adamw: bool, p: float = 0.3, us: int = 4, exact: bool = False
) -> Path:
    """A recording made with the slow reference in the published form; returns its file."""
    draw, steps = torch.Generator().manual_seed(0), 4 * us + 3
    options = {"lr": 0.03, "weight_decay": 0.05} if adamw else {"lr": 0.1}
    start = [0.3 * torch.randn(SIZES[i + 1], SIZES[i], generator=draw).double() for i in LAYERS]
    biases = [0.3 * torch.randn(SIZES[i + 1], generator=draw).double() for i in LAYERS]
    shared: dict[str, Any] = {"p": p, "us": us, "exact": exact, "adamw": adamw, **options}
    weights = Reference({str(i): w.numpy() for i, w in enumerate(start)}, mix=mix, **shared)
    plain = Reference({str(i): b.numpy() for i, b in enumerate(biases)}, **{**shared, "us": 10**6})
    x = torch.randn(steps, 5, SIZES[0], generator=draw)
    y = torch.randint(SIZES[-1], (steps, 5), generator=draw)
    tensors = {"x": x, "y": y, "loss": torch.zeros(steps)}
    for i in LAYERS:
        tensors |= {f"init.{i}.weight": start[i].float(), f"init.{i}.bias": biases[i].float()}
    for t in range(steps):
        weights.begin_step()
        columns = {str(i): torch.rand(1, SIZES[i], generator=draw) >= p for i in LAYERS}
        noise = {n: c.numpy() for n, c in columns.items()}
        seen = {n: torch.tensor(w, requires_grad=True) for n, w in weights.seen(noise).items()}
        bias = {n: torch.tensor(b, requires_grad=True) for n, b in plain.w.items()}
        h = x[t].double()
        for i in LAYERS:
            h = nn.functional.linear(h if i == 0 else h.tanh(), seen[str(i)], bias[str(i)])
        loss = nn.functional.cross_entropy(h, y[t])
        loss.backward()
        keep = weights.keep(noise)
        if mix:
            for n, k in keep.items():
                tensors[f"step{t}.{n}.keep"] = torch.tensor(np.ascontiguousarray(k)).to(torch.uint8)
        used = weights.step({n: _numpy(w.grad) for n, w in seen.items()}, noise)
        plain.step({n: _numpy(b.grad) for n, b in bias.items()})
        tensors["loss"][t] = loss.detach()
        for i in LAYERS:
            tensors[f"step{t}.{i}.grad"] = torch.tensor(used[str(i)]).float()
            tensors[f"step{t}.{i}.weight"] = torch.tensor(weights.w[str(i)]).float()
            tensors[f"step{t}.{i}.bias"] = torch.tensor(plain.w[str(i)]).float()
    run = {
        "kind": "mix" if mix else "dense", "optimizer": "adamw" if adamw else "sgd",
        "opt_kwargs": options, "p": p, "max_steps": 10 * us, "update_steps": us, "steps": steps,
        "sizes": list(SIZES), "batch": 5, "file": "run.safetensors",
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps([run]))
    save_file(tensors, folder / "run.safetensors")
    return folder / "run.safetensors"


def _numpy(grad: Tensor | None) -> Any:
    assert grad is not None
    return grad.numpy()


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize(("p", "us"), [(0.3, 4), (0.6, 1), (0.5, 3)])
def test_the_slow_references_trajectories_are_reproduced(
    mix: bool, adamw: bool, p: float, us: int, tmp_path: Path
) -> None:
    record(tmp_path, mix=mix, adamw=adamw, p=p, us=us)
    (result,) = replay_folder(tmp_path).values()
    assert result.ok, result


def test_exact_freezing_does_not_pass_for_the_published(tmp_path: Path) -> None:
    record(tmp_path, mix=False, adamw=True, exact=True)
    assert main([str(tmp_path)]) == 1


@pytest.mark.parametrize("key", ["loss", "step6.1.weight", "step0.0.bias", "step2.2.grad"])
@pytest.mark.parametrize("change", [1e-5, float("nan")])
def test_small_deviations_are_told(key: str, change: float, tmp_path: Path, capsys: Any) -> None:
    file = record(tmp_path, mix=True, adamw=False)
    tensors = load_file(file)
    tensors[key].view(-1)[3] += change
    save_file(tensors, file)
    assert main([str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert told.startswith("DEVIATES") and key in told


def test_wrong_masks_are_counted(tmp_path: Path) -> None:
    file = record(tmp_path, mix=True, adamw=False)
    tensors = load_file(file)
    keep = tensors["step5.1.keep"]
    keep[0] = 1 - keep[0]
    save_file(tensors, file)
    (result,) = replay_folder(tmp_path).values()
    assert result.mask_entries == keep.shape[1] and not result.ok


def test_wrong_dense_masks_are_counted(tmp_path: Path) -> None:
    file = record(tmp_path, mix=False, adamw=False)
    tensors = load_file(file)
    grad = tensors["step5.1.grad"]
    kept, dropped = grad.nonzero()[0], (grad == 0).nonzero()[0]
    grad[tuple(kept)], grad[tuple(dropped)] = 0.0, 1e-9
    save_file(tensors, file)
    (result,) = replay_folder(tmp_path).values()
    assert result.mask_entries == 2


def test_gradients_that_are_zero_anyway_are_no_wrong_mask() -> None:
    """A kept entry behind an input of zero has no gradient, in the recording and in the replay."""
    frozen = torch.tensor([False, False, True])
    recording = {"step4.0.grad": torch.tensor([0.0, 1.0, 0.0])}
    for ours, wrong in (([0.0, 1.0, 0.0], 0), ([0.5, 1.0, 0.0], 1)):
        assert _mask_entries(frozen, torch.tensor(ours), recording, "step4.0") == wrong


def test_nothing_to_replay_exits_with_two(tmp_path: Path, capsys: Any) -> None:
    assert main([]) == 2
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path)]) == 2
    assert "no index.json" in capsys.readouterr().err
    for text in ("[]", "{", '[{"file": "gone.safetensors"}]', '["x"]'):
        (tmp_path / "index.json").write_text(text)
        assert main([str(tmp_path)]) == 2, text
    file = record(tmp_path, mix=False, adamw=False)
    file.write_bytes(file.read_bytes()[:200])
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
