"""What names things in Python and on the command line: tasks, recipes, models, folders, columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import bert, save_bert, write_task

from holdfast import EWC, Recipe, Refused, compare, run_sequence
from holdfast.cli import main
from holdfast.errors import tell_once
from holdfast.experiments import serving
from holdfast.tasks import Prediction
from holdfast.tasks.rows import unlabelled

NAMES = (
    "mood.jsonl", b"mood.jsonl", Path("mood.jsonl"), {"mood.jsonl", "colour.jsonl"},
    {"mood": "mood.jsonl"}, None, 3,
)  # fmt: skip


@pytest.mark.parametrize("tasks", NAMES, ids=lambda tasks: type(tasks).__name__)
@pytest.mark.parametrize("run", [run_sequence, compare])
def test_tasks_that_are_no_list_are_refused(run: Callable[..., Any], tasks: Any) -> None:
    """A text would be read letter by letter, and a set has no order that a seed could repeat."""
    more = {"recipes": {}, "seeds": [0], "out": "runs"} if run is compare else {}
    with pytest.raises(Refused, match="--tasks: must be a list of tasks"):
        run("minilm", tasks, **more)


@pytest.mark.parametrize("one", [None, 3, b"mood.jsonl", bert])
def test_what_names_no_task_is_refused(one: Any) -> None:
    with pytest.raises(Refused, match="a task is named by a text"):
        run_sequence("minilm", ["builtin:sentiment", one])


def test_names_may_come_from_a_generator(tmp_path: Path) -> None:
    model = str(save_bert(tmp_path / "model"))
    tasks = [write_task(tmp_path, topic) for topic in ("mood", "colour")]
    how: dict[str, Any] = {"epochs": 1.0, "max_length": 32, "progress": False}
    record = run_sequence(model, (str(t) for t in tasks), out=tmp_path / "run", **how)
    assert [task["name"] for task in record.tasks] == ["mood", "colour"]


@pytest.mark.parametrize("recipe", [{}, [], "", 0, EWC, EWC(), [EWC()], {"name": "ewc"}], ids=repr)
def test_what_is_no_recipe_is_refused_and_not_taken_for_plain(recipe: Any) -> None:
    with pytest.raises(Refused, match=r"--recipe: .*no recipe"):
        run_sequence("minilm", ["builtin:sentiment"], recipe)


def test_a_model_in_memory_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"--model: must be a name, not a BertFor.*save it"):
        run_sequence(bert(), ["builtin:sentiment"])  # type: ignore[arg-type]
    for out in (3, "", b"runs"):
        with pytest.raises(Refused, match="--out: names no folder"):
            run_sequence("minilm", ["builtin:sentiment"], out=out)  # type: ignore[arg-type]


def test_a_comparison_of_what_are_no_recipes_or_seeds_is_refused() -> None:
    plain = {"plain": (Recipe.named("plain"), {})}
    for recipes in (["ewc"], {"ewc": Recipe.named("ewc")}, "ewc"):
        with pytest.raises(Refused, match="--recipes: must map labels"):
            compare("minilm", ["a"], recipes, seeds=[0], out="runs")  # type: ignore[arg-type]
    for seeds in (3, "12", None):
        with pytest.raises(Refused, match="--seeds: must be a list"):
            compare("minilm", ["a"], plain, seeds=seeds, out="runs")  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [["--out", ""], ["--out="]])
def test_an_empty_word_is_not_the_folder_one_is_in(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--task", "builtin:sentiment", *words]) == 2
    assert "--out: names no folder" in capsys.readouterr().err


def test_a_warm_up_that_outlasts_a_task_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell_once.cache_clear()
    model, task = str(save_bert(tmp_path / "model")), write_task(tmp_path, "mood")
    how: dict[str, Any] = {"epochs": 1.0, "max_length": 32, "progress": False}
    run_sequence(model, [task], out=tmp_path / "one", warmup=1, **how)
    assert "warm-up" not in caplog.text
    run_sequence(model, [task], out=tmp_path / "two", warmup=5, **how)
    assert "mood: its 2 steps all lie in the warm-up of 5" in caplog.text


# --- rows to label --------------------------------------------------------------------------------


def written(folder: Path, **cells: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({k: f"{v} {i}" for k, v in cells.items()})
                              for i in range(3)))  # fmt: skip
    return path


def test_a_column_that_is_kept_is_the_files_also_where_texts_are_made(tmp_path: Path) -> None:
    path = written(tmp_path, prompt="film")
    texts, _, kept, _ = unlabelled(f"{path}?prompt=Q: {{prompt}} A:", ["prompt"], pairs=False,
                                   kind="generation")  # fmt: skip
    assert texts[0] == "Q: film 0 A:" and kept[0] == {"prompt": "film 0"}


@pytest.mark.parametrize("option", ["evaluation=x.csv", "labels=a|b", "metric=f1", "per_class=2",
                                    "strip=yes"])  # fmt: skip
def test_options_that_only_learning_heeds_are_refused_of_rows_to_label(
    tmp_path: Path, option: str
) -> None:
    with pytest.raises(Refused, match=r"is for rows to learn from"):
        unlabelled(f"{written(tmp_path, text='film')}?{option}", pairs=False)


def test_a_second_text_that_the_task_does_not_take_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell_once.cache_clear()
    path = str(written(tmp_path, sentence1="film", sentence2="book"))
    unlabelled(path, pairs=True)
    unlabelled(path, ["sentence2"], pairs=False)
    assert not caplog.records
    unlabelled(path, pairs=False)
    assert "the column 'sentence2' is not read: the task takes one text" in caplog.text


def test_rows_are_made_into_texts_as_those_that_were_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A column as it stands is another text than the model knows."""
    tell_once.cache_clear()
    model, task = str(save_bert(tmp_path / "model")), write_task(tmp_path, "mood")
    spec = f"{task}?text=Is it good: {{text}}&name=mood"
    how: dict[str, Any] = {"epochs": 1.0, "max_length": 32, "progress": False}
    run_sequence(model, [spec], out=tmp_path / "run", **how)
    seen: list[str] = []

    def predictions(self: Any, name: str, texts: list[str], *_: Any, **__: Any) -> Any:
        seen[:] = texts
        return [Prediction("good", {})] * len(texts)

    monkeypatch.setattr(serving.Served, "predictions", predictions)
    path = written(tmp_path, text="film", note="book")
    for rows, expected, told in (
        (str(path), "Is it good: film 0", True),
        (f"{path}?text=film of {{note}}", "film of book 0", False),
        (f"{path}?text=note", "book 0", False),
    ):
        caplog.clear()
        tell_once.cache_clear()
        words = [str(tmp_path / "run"), rows, "--task", "mood", "--out", str(tmp_path / "o.jsonl")]
        assert main(["predict", *words]) == 0
        assert seen[0] == expected
        assert ("made as those it learned, by text='Is it good: {text}'" in caplog.text) == told
