"""Comparisons whose model or rows change while they run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from holdfast import Recipe, Refused, compare
from holdfast.experiments import compare as comparing
from holdfast.recipe import PRESETS

RECIPES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "plain": (PRESETS["plain"](), {}),
    "slow": (PRESETS["plain"](), {"lr": 1e-6}),
}


def edit_config(own: Path) -> None:
    file = own / "bert" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_dropout_prob": 0.5}))


def edit_training_rows(own: Path) -> None:
    file = own / "mood.jsonl"
    file.write_text(file.read_text().replace("film", "book"))


def edit_evaluation_rows(own: Path) -> None:
    file = own / "held.jsonl"
    file.write_text(file.read_text().replace("film", "book"))


@pytest.mark.parametrize(
    ("edit", "after", "said"),
    [
        (edit_config, 1, "model files"),
        (edit_training_rows, 2, "rows of mood"),  # after the seeds of the first recipe
        (edit_evaluation_rows, 1, "evaluation rows of mood"),
    ],
)
def test_what_changes_while_a_comparison_runs_is_refused(
    edit: Any, after: int, said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, real, made = Path(shutil.copytree(place, tmp_path / "own")), comparing.run_sequence, []
    shutil.copy(own / "mood.jsonl", own / "held.jsonl")

    def ran(**job: Any) -> Any:
        made.append(real(**job))
        if len(made) == after:
            edit(own)
        return made[-1]

    monkeypatch.setattr(comparing, "run_sequence", ran)
    recipes = RECIPES if after == 2 else {"plain": RECIPES["plain"]}
    with pytest.raises(Refused, match=rf"seed-\d: {said}: others than .*seed-0 had"):
        compare(str(own / "bert"), [f"{own / 'mood.jsonl'}?evaluation=held.jsonl"], recipes,
                seeds=[0, 1], out=tmp_path / "c", progress=False, epochs=0.5, batch_size=4,
                save_steps=0, max_length=16)  # fmt: skip


def test_a_shared_first_task_of_other_rows_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, real = Path(shutil.copytree(place, tmp_path / "own")), comparing.run_sequence

    def ran(**job: Any) -> Any:
        found = real(**job)
        edit_training_rows(own)
        return found

    monkeypatch.setattr(comparing, "run_sequence", ran)
    recipes = {"plain": RECIPES["plain"], "ewc": (Recipe.named("ewc"), {})}
    with pytest.raises(Refused, match=r"rows of mood: others than .*first.*seed-0 had"):
        compare(str(own / "bert"), [own / "mood.jsonl", own / "colour.jsonl"], recipes, seeds=[0],
                out=tmp_path / "c", progress=False, epochs=0.5, batch_size=4, save_steps=0,
                max_length=16)  # fmt: skip
