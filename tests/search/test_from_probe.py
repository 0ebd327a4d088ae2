"""`holdfast rates`: a probe of a tiny sequence, where it begins, what it writes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast import Rates, Recipe, run_sequence
from holdfast.cli import main
from holdfast.engine.peft import LoRA
from holdfast.errors import Refused
from holdfast.experiments.settings import Settings
from holdfast.search import from_probe
from holdfast.search.from_probe import Short, rates_from_probe, short_of

# 36 training rows: 9 steps an epoch, 36 in all, of which a probe takes 3.
TINY: dict[str, Any] = {"epochs": 4.0, "batch_size": 4, "lr": 5e-3, "max_length": 16,
                        "selection": 12, "progress": False}  # fmt: skip


def probed(place: Path, out: Path, **more: Any) -> Rates:
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    return rates_from_probe(str(place / "bert"), tasks, out=out, **{**TINY, **more})


@pytest.fixture(scope="module")
def first(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rates")
    probed(place, out)
    return out


def test_what_is_written_is_what_other_verbs_take(first: Path, place: Path, tmp_path: Path) -> None:
    rates, recipe = Rates.load(first / "rates.yaml"), Recipe.load(first / "recipe.yaml")
    told = rates.provenance
    assert recipe.rates == rates and rates.geometric_mean == pytest.approx(1)
    assert [p["part"] for p in told["parts"]] == ["embeddings", "layer.0", "layer.1", "head"]
    assert told["steps"] == {"old": 36, "probe": 3, "of": 36, "confirm": [3]}
    assert rates.layers == 2 and told["tolerance"] == 0.05
    at = told["confirmed"][0]
    assert at["aimed"] == pytest.approx(0.05 / 12)
    assert sorted(p.name for p in first.iterdir()) == ["old", "rates.yaml", "recipe.yaml"]
    record = run_sequence(None, [place / "question.jsonl"], recipe, from_run=first / "old",
                          lr=rates.geometric_mean_rate, out=tmp_path, progress=False)  # fmt: skip
    assert record.rates is not None and record.rates["multiplier"] == rates.multipliers


def test_a_probe_is_the_beginning_of_a_sequence_and_changes_nothing_of_it(
    first: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its update is the difference of two checkpoints, bit for bit; --from equals --tasks."""
    seen = {}

    def spied(update: Any, *rest: Any) -> Any:
        seen.update(update)
        return real(update, *rest)

    real = from_probe.benefit_and_harm
    monkeypatch.setattr(from_probe, "benefit_and_harm", spied)
    new = place / "question.jsonl"
    again = rates_from_probe(None, [new], from_run=first / "old", out=tmp_path / "again",
                             progress=False)  # fmt: skip
    before = Rates.load(first / "rates.yaml")
    assert again.multipliers == before.multipliers
    assert again.geometric_mean_rate == before.geometric_mean_rate
    assert again.provenance["steps"] == before.provenance["steps"] | {"old": 0}

    run_sequence(None, [new], from_run=first / "old", epochs=2.5 / 9, out=tmp_path / "run",
                 progress=False)  # fmt: skip
    homes = first / "old/tasks/1-mood", tmp_path / "run/tasks/2-question"
    one, two = (load_file(home / "model.safetensors") for home in homes)
    shared = [name for name in one if not name.startswith("classifier")]
    assert shared and all(torch.equal(seen[n], two[n] - one[n]) for n in shared)
    assert any(seen[name].any() for name in shared)


def test_from_a_saved_model(first: Path, place: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(first / "old/tasks/1-mood", saved)
    (saved / "manifest.json").unlink()
    made = rates_from_probe(None, [place / "question.jsonl"], "plain", from_run=saved,
                            old_task=place / "mood.jsonl", out=tmp_path / "out", confirm=0,
                            **TINY)  # fmt: skip
    assert made.multipliers == pytest.approx(Rates.load(first / "rates.yaml").multipliers, rel=1e-3)
    assert made.provenance["steps"]["confirm"] == [] and not (tmp_path / "out" / "old").exists()


def test_a_part_that_does_not_train_stays_frozen(
    first: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(update: Any, gradient: Any, fisher: Any, *rest: Any) -> Any:
        kept = {n: u for n, u in update.items() if "layer.0" not in n}
        return real(kept, gradient, fisher, *rest)

    real = from_probe.benefit_and_harm
    monkeypatch.setattr(from_probe, "benefit_and_harm", frozen)
    made = rates_from_probe(None, [place / "question.jsonl"], from_run=first / "old",
                            out=tmp_path, confirm=0, progress=False)  # fmt: skip
    assert [m == 0 for m in made.multipliers] == [False, True, False, False]


@pytest.mark.parametrize("confirm", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))])
def test_confirming_runs_correct_the_rate_and_end_where_it_is_right(
    first: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, confirm: int
) -> None:
    """Where the harm is C · rate², one run suffices and a second one agrees, whatever was
    predicted."""
    real, rates = Short.train, []

    def train(self: Short, *, lr: float, fully: bool = False, **more: Any) -> Any:
        if fully:
            return real(self, lr=lr, fully=True, **more)
        rates.append(lr)
        return SimpleNamespace(kl=400.0 * lr**2, steps=3, scores=[0.5, 0.5])

    monkeypatch.setattr(Short, "train", train)
    made = rates_from_probe(None, [place / "question.jsonl"], from_run=first / "old", out=tmp_path,
                            confirm=confirm, tolerance=0.1, progress=False)  # fmt: skip
    assert len(rates) == min(confirm, 2)
    right = (0.1 / 12 / 400.0) ** 0.5
    assert (made.geometric_mean_rate == pytest.approx(right)) is (confirm > 0)
    assert [r["rate"] for r in made.provenance["confirmed"]] == rates


@pytest.mark.parametrize("factor", [1e6, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_the_rate_stays_where_it_was_probed(
    first: Path, place: Path, tmp_path: Path, factor: float
) -> None:
    made = rates_from_probe(None, [place / "question.jsonl"], from_run=first / "old", out=tmp_path,
                            confirm=0, tolerance=factor, progress=False)  # fmt: skip
    assert made.geometric_mean_rate == pytest.approx(5e-3 * (0.1 if factor < 1 else 2.5))
    assert made.provenance["bounded"]


def test_a_probe_takes_a_tenth_of_the_task_at_most() -> None:
    plan = Settings(epochs=3.0, batch_size=4)
    assert [short_of(plan, 48, share) for share in (0.1, 0.05, 2, 3)] == [3, 1, 2, 3]
    for share in (4, 0.2, 0, 0.01):
        with pytest.raises(Refused, match=r"--from-probe: . of 36 steps; 1 to 3, a tenth"):
            short_of(plan, 48, share)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"recipe": "bertcl"}, "--recipe: has rates of its own (bertcl)"),
        ({"recipe": Recipe(peft=LoRA())}, "--recipe: trains adapters"),
        ({"confirm": 4}, "--confirm: must be a whole number from 0 to 3"),
        ({"tolerance": 0.0}, "--tolerance: must be above 0"),
        ({"share": 0.2}, "--from-probe: 7 of 36 steps"),
        ({"selection": 0}, "--selection"),
        ({"head": "shared"}, "one head each"),
        ({"old_task": "x.csv"}, "--from"),
    ],
)
def test_refusals_come_before_any_training(
    more: dict[str, Any], said: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as refusal:
        probed(place, tmp_path / "out", **more)
    assert said in str(refusal.value) and not (tmp_path / "out").exists()


def test_the_table_on_the_command_line(
    first: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rates", "--from-probe", "--from", str(first / "old"), "--tasks",
             str(place / "question.jsonl"), "--confirm", "0", "--out", str(tmp_path)]  # fmt: skip
    assert main(words) == 0
    out, made = capsys.readouterr().out, Rates.load(tmp_path / "rates.yaml")
    for part, m in zip(made.provenance["parts"], made.multipliers, strict=True):
        assert part["part"] in out and f"{part['benefit']:.2e}" in out and f"{m:.3f}" in out
    assert f"base rate {made.geometric_mean_rate:.3g}, for --lr" in out
    assert "steps: 3 of probe and confirming runs, the new task has 36; 0 for the old ones" in out
    assert main([*words[:-1], str(tmp_path / "b"), "--tasks", "a.csv", "b.csv"]) == 2
    assert "\n" not in capsys.readouterr().err.strip()
    assert json.loads((first / "old/record.json").read_text())["status"] == "done"
