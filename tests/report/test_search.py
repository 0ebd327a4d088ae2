"""The page of a search: the verdict first, pictures that say what was measured, all it warns of."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_searches import FLAT, control, final, nothing, only_controls, search, task, trial
from test_page import Page, inert

from holdfast.cli import main
from holdfast.errors import Refused
from holdfast.report import as_text
from holdfast.report import search_draw as draw
from holdfast.report.canvas import Picture
from holdfast.report.search import load_search, notes, render, search_table


def drawn(picture: Picture | None) -> str:
    """The light image as SVG."""
    assert picture is not None
    return base64.b64decode(picture.panels[0].light.split(",", 1)[1]).decode()


def words(picture: Picture | None) -> list[str]:
    """Every text of a picture."""
    found = re.findall(r"<text.*?</text>", drawn(picture), re.S)
    return [re.sub(r"<[^>]*>", "", text) for text in found]


def order(page: Page, *texts: str) -> None:
    at = [page.text.index(text) for text in texts]
    assert at == sorted(at), list(zip(texts, at, strict=True))


# --- what is said ---------------------------------------------------------------------------------


def test_the_verdict_is_the_first_thing_on_the_page() -> None:
    html = render(search())
    page = inert(html)
    assert re.search(r"<h1>Gain <small>trec6 → sst2</small></h1>", html)
    order(page, "holdfast search", "Gain", "Trial 7 reaches", "+0.029, +0.058", "12 345 training",
          "1 440 on the final runs", "of 10 trials", "The searched curve and its controls",
          "Rates of trial 7", "The best trials", "Tasks")  # fmt: skip


def test_a_flat_rate_that_wins_is_said_with_its_seeds() -> None:
    page = inert(render(only_controls()))
    order(page, "No gain", "Of all trials the flat rate 0.0005", "3 fresh seeds.")
    assert "A flat rate: every part learns at 0.0005" in page.text
    assert ["part", "multiplier", "learning rate"] not in page.cells


def test_what_makes_a_result_doubtful_stands_above_the_pictures() -> None:
    page = inert(render(only_controls()))
    order(page, "None of the 6 searched trials was finished", "6 of 6 searched trials learned no",
          "The best flat rate, 0.0005, is the lowest that was tried", "Importance")  # fmt: skip
    assert ["trec6", "accuracy", "2", "960", "107", "500"] in page.cells
    assert "task one no better than one answer for all" in page.text
    assert "Each task has 3 rungs, after 17, 67, 100 % of its steps" in page.text


def test_who_led_before_and_after_confirming_is_shown_with_every_score() -> None:
    by_seed = {7: {"0": 1.5, "9": 1.3, "10": 1.25}, 5: {"0": 1.38, "9": 1.4}}
    trials = [{"number": n, "value": s["0"], "mean": sum(s.values()) / len(s), "by_seed": s}
              for n, s in by_seed.items()]  # fmt: skip
    said = "Trial 7 leads, before it trial 9 did: lead of +0.100, noise sd 0.035 of one score."
    again = {"sentence": said, "seeds": [9, 10], "trials": trials}
    body = search(confirmation=again)
    body["config"] |= {"learn_old": "once"}
    body["steps"] |= {"confirming": 4800, "first": 960}
    page = inert(render(body))
    order(page, "Gain", said, "4 800 on confirming runs", "trec6 learned once a seed")
    assert ["trial", "new + old, all seeds", "before", "seed 9", "seed 10"] in page.cells
    assert ["7", "1.350", "1.500", "1.300", "1.250"] in page.cells
    assert ["5", "1.390", "1.380", "1.400", "–"] in page.cells
    assert "Task two has 3 rungs" in page.text and "while task one" not in page.text
    text = " ".join(as_text(search_table(body), width=140).split())
    assert "noise sd 0.035" in text
    for shown in (text, page.text):
        assert "--from RUN --recipe recipe.yaml --lr 0.001" in shown
    assert "confirm" not in inert(render(search())).text


def test_rungs_are_explained_only_where_something_was_pruned() -> None:
    body = only_controls()
    body["config"] = {**body["config"], "pruner": "none"}
    assert "rungs" not in inert(render(body)).text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"planned": 20}, "Not over: 10 of 20 trials have ended."),
        ({"winner": 4}, "The best trial is bertcl, a control that needs no search."),
        ({"best_flat": 2}, "0.002, is the highest that was tried: a higher one"),
        ({"space": {**search()["space"], "rate": [9.5e-4, 4e-3]}}, "lies at the end of what was"),
        ({"tasks": [task("a", warnings=["3 texts cut"]), task("b")]}, "a: 3 texts cut"),
    ],
)
def test_a_doubt_is_said_where_there_is_one(more: dict[str, Any], said: str) -> None:
    assert not [note for note in notes(search()) if said in note]
    assert [note for note in notes(search(**more)) if said in note]


def test_a_plain_gain_has_no_doubts() -> None:
    # of 1.3, 1.4, 1.3 none ties at an sd of .02: 2 sqrt(2) sd is .057
    assert notes(search()) == [] and 'class="warnings"' not in render(search())


def test_flat_rates_within_the_noise_of_the_seeds_tie() -> None:
    body = search()
    (flat,) = [f for f in body["final"] if f["kind"] == "flat"]
    flat["sd"] = 0.036  # 2 sqrt(2) sd is .102, of two replicates .072
    (note,) = notes(body)
    assert note.startswith("The flat rates 0.0005, 0.001, 0.002 tie: ") and "within 0.102" in note
    body["config"]["replicates"] = 2
    assert notes(body) == []
    flat["sd"] = None
    assert notes(body) == []


# --- tables ---------------------------------------------------------------------------------------


def test_each_contender_is_compared_with_the_best_flat_rate() -> None:
    page = inert(render(search()))
    found = {row[0]: row for row in page.cells if len(row) == 9}
    assert found["flat@0.001"][2] == "–"
    # gaps .05 .04 .04: mean .0433, sd .0058, t(2) = 4.303: ± .0143
    assert found["trial 7"][2] == "+0.043[+0.029, +0.058]"
    assert found["bertcl@0.001"][2] == "+0.003[−0.048, +0.055]"


def test_seeds_that_diverged_are_counted_and_drawn() -> None:
    body = search(final=[final("trial 7", "searched", None, None, None),
                         final("flat@0.001", "flat", 1.4, None, 1.4)])  # fmt: skip
    page = inert(render(body))
    found = {row[0]: row for row in page.cells if len(row) == 9}
    assert found["trial 7"][7] == "3, 3 diverged" and found["flat@0.001"][7] == "3, 1 diverged"
    assert "diverged" in words(draw.controls(body))
    assert "3, 3 diverged" in as_text(search_table(body), width=140)


def test_the_rates_of_the_winner_and_how_to_use_them() -> None:
    page = inert(render(search()))
    for row in (["embeddings", "0.500", "0.0005"], ["head", "2.000", "0.002"]):
        assert row in page.cells
    assert "--recipe recipe.yaml --lr 0.001" in page.text and "over the 6 layers" in page.text
    assert "is the lowest that was tried" in as_text(search_table(only_controls()), width=140)
    text = as_text(search_table(search()), width=140)
    assert "To use trial 7: --recipe recipe.yaml --lr 0.001" in text
    assert "final runs, evaluation rows; 10 trials: 9 finished, 1 pruned" in text


def test_tuned_settings_are_on_the_page() -> None:
    body = search()
    body["space"] = {**body["space"], "tuned": {"dps.drop": [0.1, 0.9]}}
    for t in body["trials"]:
        t["params"] = {"rate": t["rate"], "dps.drop": 0.25 + t["number"] / 100}
    page = inert(render(body))
    heads = next(row for row in page.cells if row[:1] == ["trial"])
    assert heads[6] == "dps.drop"
    assert next(row for row in page.cells if row[:1] == ["7"])[6] == "0.32"
    order(page, "Settings of methods", "dps.drop", "0.32", "The best trials")


# --- pictures -------------------------------------------------------------------------------------


def test_rates_are_plain_numbers_on_a_log_axis() -> None:
    said = words(draw.rates(search()))
    assert {"0.0005", "0.001", "0.002"} <= set(said)
    assert not [w for w in said if "$" in w or "math" in w]
    wide = search([control(0, 1.0, 1e-5), trial(1, 1.2, multipliers=[0.01, 1.0, 10.0, 10.0])])
    assert {"1e-5", "0.0001", "0.001", "0.01"} <= set(words(draw.rates(wide)))


def test_rates_are_those_of_searched_trials_with_the_flat_rate_beside_them() -> None:
    assert draw.rates(only_controls()) is None
    said = words(draw.rates(search()))
    assert "trial 7, the best" in said and "best flat rate" in said
    assert "mean of the 4 best" in said  # not of the five controls
    few = draw.rates(search([trial(0, 1.0), trial(1, 1.1)]))
    assert not [w for w in words(few) if w.startswith("mean")]
    assert few is not None and "Shaded" not in few.caption


def test_many_parts_are_not_all_named() -> None:
    body = search([trial(0, 1.0, multipliers=[1.0] * 40)])
    body["space"] = {**body["space"], "parts": ["embeddings", *map(str, range(38)), "head"]}
    said = words(draw.rates(body))
    assert "embeddings" in said and len([w for w in said if w.isdigit()]) <= draw.NAMED


def test_stopped_trials_have_no_height_in_the_history() -> None:
    """They stand on the axis, below the lowest score."""
    body = search([control(0, 1.0, 1e-3), trial(1, 1.4), trial(2), trial(3, state="fail")])
    picture = draw.history(body)
    assert {"pruned", "failed", "control", "searched"} <= set(words(picture))
    groups = re.findall(r'id="PathCollection_.*?</g>\s*</g>', drawn(picture), re.S)
    heights = [float(re.findall(r'<use [^>]*y="([^"]*)"', group)[0]) for group in groups]
    stopped, failed, lowest, best = heights[:4]  # downwards, those with scores drawn over the rest
    assert stopped == failed > lowest > best
    assert "pruned" not in words(draw.history(search([trial(0, 1.0), trial(1, 1.1)])))


def test_history_counts_in_whole_trials() -> None:
    said = words(draw.history(search()))
    assert not [w for w in said if re.fullmatch(r"\d+\.5", w)]
    assert "new + old score, selection rows" in said and "trial" in said


def test_equal_scores_have_no_offset_axis() -> None:
    body = search([control(i, 0.8375 + i * 1e-7, rate) for i, rate in enumerate(FLAT)])
    assert not [w for w in words(draw.history(body)) if "e" in w and "+" in w and "new" not in w]


def test_no_importance_where_all_trials_scored_alike() -> None:
    flat = {"shares": {"embeddings": 0.0, "head": 0.0}, "note": "12 trials"}
    assert draw.importance(search(importance=flat)) is None
    assert "share of the importance (all: 1)" in words(draw.importance(search()))


def test_axes_name_the_metric() -> None:
    body = search(tasks=[task("a"), task("b", metric="matthews")])
    said = words(draw.front(body))
    assert "old task afterwards (accuracy, selection rows)" in said
    assert "new task (matthews)" in said
    body["config"] = {**body["config"], "objective": "pareto"}
    picture = draw.front(body)
    assert picture is not None and "highest sum was trained again" in picture.caption


def test_a_search_of_which_nothing_came_has_a_page() -> None:
    page = inert(render(nothing()))
    order(page, "Not measured", "No flat control was finished",
          "None of the 4 searched trials was finished.", "tuned–")  # fmt: skip
    assert page.pictures == [] and "The best trials" not in page.text
    assert "–" in as_text(search_table(nothing()), width=140)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["trials", "final", "winner", "planned", "space", "gain", "config"])
def test_damaged_facts_are_refused(key: str, tmp_path: Path) -> None:
    refused({**search(), key: "text"}, f"{key} of the facts is str", tmp_path)
    refused({k: v for k, v in search().items() if k != key}, f"no {key} in the facts", tmp_path)


@pytest.mark.parametrize(
    ("key", "inner"),
    [("trials", "value"), ("final", "old_sd"), ("tasks", "rows"), ("gain", "sentence")],
)
def test_damaged_entries_are_refused(key: str, inner: str, tmp_path: Path) -> None:
    body = search()
    entry = body[key][0] if isinstance(body[key], list) else body[key]
    entry[inner] = 3 if inner == "sentence" else "text"
    refused(body, f"{inner} of {key} is", tmp_path)
    del entry[inner]
    refused(body, f"no {inner} in {key}", tmp_path)
    if isinstance(body[key], list):
        body[key][0] = "text"
        refused(body, f"{key} hold str", tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("final", 0, "seeds", 0), [1], "the seeds of final hold list"),
        (("final", 0, "seeds", 0, "new_plus_old"), ["x"], "new_plus_old of the seeds"),
        (("space", "rate"), [], "do not fit together"),
        (("space", "parts", 0), ..., "do not fit together"),
        (("trials", 0, "multipliers", 1), {}, "a text where a number belongs"),
        (("tasks", 0, "rows", "train"), "", "a text where a number belongs"),
    ],
)
def test_facts_that_do_not_fit_are_refused(
    path: tuple[Any, ...], value: Any, says: str, tmp_path: Path
) -> None:
    body = json.loads(json.dumps(search()))
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    refused(body, says, tmp_path)


def test_what_no_check_foresaw_is_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = search()
    body["counts"] = {"complete": [1]}
    body["reasons"] = {"collapsed": "many"}
    (tmp_path / "search.json").write_text(json.dumps(body))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    said = capsys.readouterr().err
    assert "damaged search.json" in said and said.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_whole_facts_are_read(tmp_path: Path) -> None:
    for body in (search(), only_controls(), nothing()):
        (tmp_path / "search.json").write_text(json.dumps(body))
        assert load_search(tmp_path) == body


@pytest.mark.parametrize("word", ["NaN", "1e999"])
def test_facts_with_what_is_no_number_are_refused(word: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps(search()).replace("0.53", word))
    with pytest.raises(Refused, match=f"not JSON: {word} is no finite number"):
        load_search(tmp_path)


def refused(body: dict[str, Any], said: str, folder: Path) -> None:
    (folder / "search.json").write_text(json.dumps(body))
    with pytest.raises(Refused, match=said):
        load_search(folder)
