"""Recipes beside each other: folders, order, one process or several."""

from __future__ import annotations

import json
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from holdfast import Recipe, Refused, compare
from holdfast.experiments import learner
from holdfast.recipe import PRESETS
from holdfast.training.stopping import Stopped

SETTINGS: dict[str, Any] = {"epochs": 0.5, "batch_size": 4, "save_steps": 0, "max_length": 16}
RECIPES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "plain": (PRESETS["plain"](), {}),
    "Plain, slow": (PRESETS["plain"](), {"lr": 1e-6}),
}


def compared(place: Path, out: Path, recipes: Any = RECIPES, **more: Any) -> Any:
    tasks = [place / "mood.jsonl", place / "colour.jsonl"]
    plain = {"seeds": [0, 3], "out": out, "progress": False, **SETTINGS}
    return compare(str(place / "bert"), tasks, recipes, **plain | more)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    compared(place, out)
    return out


def test_every_recipe_with_every_seed(place: Path, whole: Path) -> None:
    records = compared(place, whole)
    assert [(r.settings["lr"], r.seed) for r in records] == [
        (2e-4, 0), (2e-4, 3), (1e-6, 0), (1e-6, 3)
    ]  # fmt: skip
    found = sorted(str(p.relative_to(whole)) for p in whole.rglob("record.json"))
    assert found == [f"{n}/seed-{s}/record.json" for n in ("plain-slow", "plain") for s in (0, 3)]


def test_finished_runs_are_only_read_and_new_ones_added(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    before = [p.read_bytes() for p in sorted(whole.rglob("record.json"))]
    monkeypatch.setattr(learner, "load_model", called)
    compared(place, whole)
    assert [p.read_bytes() for p in sorted(whole.rglob("record.json"))] == before
    with pytest.raises(AssertionError, match="trained again"):
        compared(place, whole, seeds=[0, 3, 4])


def test_a_difference_in_rate_alone_shows(whole: Path) -> None:
    """Both runs begin with one model: the slow one stays nearer to it."""
    from safetensors.torch import load_file

    def weight(label: str, task: str) -> Any:
        home = whole / label / "seed-0" / "tasks" / task
        return load_file(home / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]

    moved = {n: float((weight(n, "1-mood") - weight(n, "2-colour")).abs().max())
             for n in ("plain", "plain-slow")}  # fmt: skip
    assert 0 < moved["plain-slow"] < moved["plain"] / 10


@pytest.mark.slow
def test_several_processes_give_the_same(place: Path, whole: Path, tmp_path: Path) -> None:
    records = compared(place, tmp_path, workers=2)
    for record in records:
        folder = Path(record.settings["out"]).relative_to(tmp_path)
        other = json.loads((whole / folder / "record.json").read_text())
        assert record.scores == other["scores"] and record.seed == other["seed"]
    assert (records[0].settings["lr"], records[0].seed) == (2e-4, 0)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"seeds": []}, "--seeds"), ({"seeds": [1, 1]}, "--seeds"),
        ({"recipes": {"A b": RECIPES["plain"], "a-b": RECIPES["plain"]}}, "one folder"),
        ({"recipes": {"good": RECIPES["plain"], "bad": (Recipe(), {"lr": -1.0})}}, "--lr"),
        ({"recipes": {"good": RECIPES["plain"], "bad": (Recipe(), {"rate": 1.0})}}, "rate"),
        ({"lr": float("nan")}, "--lr"),
    ],
    ids=["no seeds", "a seed twice", "one folder", "bad value", "unknown setting", "nan"],
)  # fmt: skip
def test_all_is_checked_before_the_first_run(
    more: Any, says: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=says):
        compared(place, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_a_refusal_in_another_process_is_a_refusal_here(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "plain").mkdir(parents=True)
    (tmp_path / "out" / "plain" / "seed-0").write_text("in the way")
    with pytest.raises(Refused, match="cannot be written") as refusal:
        compared(place, tmp_path / "out", {"plain": RECIPES["plain"]}, seeds=[0], workers=2)
    assert "--out" in str(refusal.value)


def test_a_signal_while_runs_are_handed_out_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving the pool would wait for every run that it was given, deaf to Ctrl-C."""
    ended: list[dict[str, Any]] = []

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.jobs = 0

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def submit(self, *_: Any, **__: Any) -> Future[Any]:
            self.jobs += 1
            if self.jobs == 2:
                raise Stopped(signal.SIGTERM)
            return Future()

        def shutdown(self, **how: Any) -> None:
            ended.append(how)

    monkeypatch.setattr("holdfast.experiments.compare.ProcessPoolExecutor", Pool)
    with pytest.raises(Stopped):
        compare("x", ["y"], {"plain": (Recipe(), {})}, seeds=[0, 1], out=tmp_path, workers=2)
    assert ended == [{"wait": False, "cancel_futures": True}]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
