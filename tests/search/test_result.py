"""What a search says it found: honest about controls, seeds and noise."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import STEPS, curve, make_curve, make_result, plan, result

from holdfast import LoRA, Rates, Recipe
from holdfast.errors import Busy, Refused, TrainingDiverged
from holdfast.experiments import lease
from holdfast.experiments.runs import open_run
from holdfast.experiments.verify import verify
from holdfast.report.search import load_search
from holdfast.search import final
from holdfast.search.combine import combine
from holdfast.search.final import FinalJob, Result, contenders, finish, jobs
from holdfast.search.objective import Scores
from holdfast.search.plan import Plan
from holdfast.search.result import gain, steps
from holdfast.search.rows import TrialRow, best, front, importance
from holdfast.search.run import search
from holdfast.search.study import Study
from holdfast.search.trials import read_study
from holdfast.search.worker import work


def row(number: int, new: float | None = None, old_after: float | None = None, *,
        kind: str | None = None, state: str = "complete", **more: Any) -> TrialRow:  # fmt: skip
    usual: dict[str, Any] = {
        "number": number, "state": state, "control": kind and f"{kind}@{number}", "kind": kind,
        "params": {"rate": 1e-3}, "rate": 1e-3, "multipliers": [1.0] * 4, "old": 0.9, "new": new,
        "old_after": old_after, "reason": None, "steps": STEPS, "seconds": 1.0, "attempts": 1,
    }  # fmt: skip
    return TrialRow(**{**usual, **more})


@pytest.fixture(scope="module")
def asked(place: Path) -> dict[str, Any]:
    return {
        "model": str(place / "bert"), "tasks": [place / "mood.jsonl", place / "question.jsonl"],
        "trials": 16, "sampler": "random", "pruner": "none", "epochs": 1.0, "max_length": 16,
        "selection": 12, "parts": 4, "train": make_curve, "evaluate": make_result,
        "progress": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole search."""
    out = tmp_path_factory.mktemp("search") / "out"
    search(**asked, out=out, command=["holdfast", "search", "--storage", "x://a:b@c"])
    return out


def test_the_facts_do_not_say_where_the_folder_lies(found: Path) -> None:
    """It may be moved, and shown to others."""
    for path in (p for p in found.iterdir() if p.suffix in (".json", ".yaml", ".csv", ".html")):
        assert str(found) not in path.read_text()
    body = json.loads((found / "search.json").read_text())
    assert body["study"]["storage"] == "sqlite:///study.db"


# --- choosing -----------------------------------------------------------------------------------


def test_the_best_is_chosen_among_finished_trials() -> None:
    rows = [row(0, 0.5, 0.5, kind="flat"), row(1, 0.6, 0.5, kind="flat"), row(2, 0.7, 0.5),
            row(3, 0.5, 0.7), row(4, 0.9, 0.9, state="pruned"), row(5)]  # fmt: skip
    top, flat = best(rows), best(rows, kind="flat")
    assert top is not None and top.number == 2  # the earlier of two equals
    assert flat is not None and flat.number == 1
    assert best([row(0, state="fail")]) is None


def test_the_front_holds_what_none_beats_in_both() -> None:
    rows = [row(0, 0.5, 0.9), row(1, 0.9, 0.5), row(2, 0.7, 0.7), row(3, 0.6, 0.7),
            row(4, 0.7, 0.7), row(5, 0.4, 0.4)]  # fmt: skip
    assert [r.number for r in front(rows)] == [0, 2, 4, 1]


def entry(kind: str, *values: float | None, **more: Any) -> dict[str, Any]:
    seeds = [{"seed": i, "new_plus_old": v, "reason": None if v is not None else "diverged"}
             for i, v in enumerate(values)]  # fmt: skip
    known = [v for v in values if v is not None]
    mean = sum(known) / len(known) if known else None
    return {"kind": kind, "label": kind, "rate": 1e-3, "seeds": seeds, "mean": mean, "sd": 0.01,
            **more}  # fmt: skip


def test_a_gain_is_one_only_where_the_interval_says_so() -> None:
    flat = entry("flat", 1.0, 1.1, 1.2)
    sure = gain([flat, entry("searched", 1.10, 1.21, 1.31)])
    assert sure["verdict"] == "gain" and sure["mean"] == pytest.approx(0.32 / 3)
    assert sure["low"] > 0 and sure["n"] == 3
    # the same mean difference, scattered: t(2) · sd / √3 reaches over 0
    unsure = gain([flat, entry("searched", 1.0, 1.1, 1.52)])
    assert unsure["mean"] == pytest.approx(0.32 / 3) and unsure["low"] < 0 < unsure["high"]
    assert unsure["verdict"] == "no gain" and unsure["sentence"].startswith("No gain")
    assert gain([flat, entry("searched", 0.8, 0.9, 1.01)])["verdict"] == "loss"


def test_a_search_that_learned_nothing_has_no_other_verdict() -> None:
    """However sure its difference is: both tasks at or below one answer for all rows."""
    finals = [entry("flat", 1.0, 1.0, 1.0), entry("searched", 1.1, 1.11, 1.1)]
    for final_ in finals:
        for seed in final_["seeds"]:
            seed |= {"old": 0.5, "new": 0.25}
    said = gain(finals, [0.5, 0.3])
    assert said["verdict"] == "nothing learned"
    assert said["sentence"].endswith("than one answer for all rows does (0.500 and 0.300).")
    assert gain(finals, [0.5, 0.2])["verdict"] == "gain"  # one task is enough
    assert gain(finals, [0.5, None])["verdict"] == gain(finals)["verdict"] == "gain"
    assert gain([entry("flat", None)], [0.5, 0.3])["verdict"] == "not measured"


def test_a_winner_that_diverges_once_gained_nothing() -> None:
    said = gain([entry("flat", 1.0, 1.1, 1.2), entry("searched", 1.2, 1.31, None)])
    assert said["verdict"] == "no gain" and "diverged with seed 2" in said["sentence"]
    assert said["n"] == 2
    for scores in ((1.3, None, None), (None, None, None)):
        said = gain([entry("flat", 1.0, 1.1, 1.2), entry("searched", *scores)])
        assert said["verdict"] == "no gain" and said["sentence"].startswith("No gain")
    assert gain([entry("flat", 1.0, 1.1, 1.2), entry("searched", 0.2, 0.31, None)])["verdict"] == (
        "loss"
    )


def test_the_verdict_is_against_the_better_flat_control() -> None:
    """Of the best flat rate and the winner's own rate and settings."""
    won, low, high = (
        entry("searched", 1.10, 1.21, 1.31), entry("flat", 1.0, 1.1, 1.2),
        entry("ablation", 1.10, 1.20, 1.32),
    )  # fmt: skip
    assert gain([won, low])["verdict"] == "gain"
    for finals in ([won, low, high], [won, high, low]):
        said = gain(finals)
        assert said["verdict"] == "no gain" and said["control"] == "ablation"
        assert "flat at its own rate 0.001 and settings 1.207" in said["sentence"]
    better = gain([won, entry("ablation", 0.9, 0.9, 0.9), low])
    assert better["verdict"] == "gain" and better["control"] == "flat"
    # one that diverged once has fewer seeds to say it with
    assert gain([won, entry("ablation", 1.2, None, 1.4), low])["control"] == "flat"
    assert gain([won, entry("ablation", 1.1, 1.2, 1.3)])["control"] == "ablation"


def test_means_and_difference_are_of_the_same_seeds() -> None:
    said = gain([entry("searched", 1.2, 1.31, None), entry("flat", 1.0, 1.1, 1.8)])
    assert "1.255 ± 0.078" in said["sentence"] and "1.050 ± 0.071" in said["sentence"]
    assert said["mean"] == pytest.approx(1.255 - 1.050)
    said = gain([entry("searched", 1.2, 1.3, 1.8), entry("flat", 1.0, 1.1, None)])
    assert "1.250 ± 0.071" in said["sentence"] and "1.050 ± 0.071" in said["sentence"]


@pytest.mark.parametrize("tune", [[], ["ewc.strength"]])
def test_a_curve_is_not_credited_with_what_rate_or_settings_earned(
    tune: list[str], asked: dict[str, Any], tmp_path: Path
) -> None:
    """The shape does nothing here: all that counts is the base rate, or a method's setting."""
    key, peak = ("ewc.strength", 10.0) if tune else ("rate", 1e-3)

    def value(params: Any) -> float:
        return 0.8 - 0.01 * abs(math.log(params[key] / peak))

    def train(plan: Plan) -> Any:
        def one(job: Any, watch: Any) -> Scores:
            ewc = {f"ewc.{k}": v for m in job.recipe.methods for k, v in m.to_dict().items()}
            v = value({"rate": job.lr, **ewc})
            return Scores(0.9, v, v, STEPS, 1.0)

        return one

    def evaluate(plan: Plan) -> Any:
        return lambda job: Result(value(job.contender.params), 0.9, 0.7 + job.seed / 100, STEPS)

    body = search(**{**asked, "train": train, "evaluate": evaluate}, out=tmp_path, tune=tune,
                  flat=[1e-4, 1e-2])  # fmt: skip
    assert body["final"][0]["kind"] == "searched"
    flat = next(f for f in body["final"] if f["kind"] == "flat")
    assert body["final"][0]["mean"] > flat["mean"]
    assert body["gain"]["verdict"] == "no gain" and body["gain"]["mean"] == pytest.approx(0)


def test_without_a_flat_control_nothing_is_claimed() -> None:
    assert gain([entry("searched", 1.0, 1.1)])["verdict"] == "not measured"
    alone = gain([entry("flat", 1.0, 1.1)])
    assert alone["verdict"] == "no gain" and "flat rate 0.001 did best" in alone["sentence"]


def test_steps_are_compared_with_what_was_not_pruned(place: Path) -> None:
    rows = [row(0, 0.5, 0.5), row(1, state="pruned", steps=10), row(2, state="fail", steps=5),
            row(3, state="running", steps=None)]  # fmt: skip
    said = steps(plan(place), rows, [{"steps": 7}])
    assert said["spent"] == STEPS + 15 and said["unpruned"] == 3 * STEPS and said["final"] == 7
    assert said["share"] == pytest.approx((STEPS + 15) / (3 * STEPS))


# --- the final runs -----------------------------------------------------------------------------


def finished(place: Path, out: Path) -> tuple[Plan, list[TrialRow]]:
    from holdfast.search.rows import rows

    of = Study(out, plan(place))
    work(of, curve)
    return of.plan, rows(of.trials(), of.plan.space)


def test_who_is_run_again_and_with_which_seeds(place: Path, tmp_path: Path) -> None:
    made, rows = finished(place, tmp_path)
    rows[-1] = replace(rows[-1], new=1.0, old_after=1.0)
    them = contenders(made, rows)
    flat = best(rows, kind="flat")
    assert flat is not None and rows[-1].control is None
    kinds = [c.kind for c in them]
    assert kinds == ["searched", "ablation", "flat", "layer_decay", "bertcl"]
    # the ablation has all of the winner but its shape
    won, ablation = them[:2]
    assert ablation.rate == won.rate != flat.rate and ablation.label == f"flat as {won.label}"
    assert made.space.multipliers(ablation.params) == [1.0] * 4
    # the shapes run at the best flat rate, not at the one of their trial
    assert {c.rate for c in them[2:]} == {flat.rate}
    todo = jobs(tmp_path, made, rows)
    assert len(todo) == 3 * len(them) and len({j.folder for j in todo}) == len(todo)
    assert {j.seed for j in todo}.isdisjoint(made.seeds)


def test_fresh_seeds_are_none_that_a_replicate_saw(place: Path) -> None:
    made = plan(place, replicates=4, seed=10)
    assert made.seeds == [10, 11, 12, 13] and made.fresh_seeds == [14, 15, 16]


def test_a_winning_flat_rate_is_run_once(place: Path) -> None:
    made = plan(place)
    controls = [row(i, 0.5, 0.5, kind=c.kind, params=c.params, rate=c.params["rate"])
                for i, c in enumerate(made.controls)]  # fmt: skip
    controls[2] = row(2, 0.8, 0.8, kind="flat", params=made.controls[2].params, rate=1e-3)
    assert [c.kind for c in contenders(made, controls)] == ["flat", "layer_decay", "bertcl"]
    assert contenders(made, []) == []


@pytest.mark.parametrize("best_flat", [0, 1, 2])
def test_a_winning_shape_is_run_once_at_a_rate(best_flat: int, place: Path) -> None:
    """Controls' shapes have the middle rate: where that is the best flat one too, it is one run."""
    made = plan(place)
    i = next(i for i, c in enumerate(made.controls) if c.kind == "bertcl")
    new = {i: 0.9, best_flat: 0.8}
    found = [row(j, new.get(j, 0.5), 0.5, kind=c.kind, control=c.label, params=c.params,
                 rate=c.params["rate"]) for j, c in enumerate(made.controls)]  # fmt: skip
    them = contenders(made, found)
    rates = [c.params["rate"] for c in made.controls]
    once = rates[best_flat] == rates[i]
    assert once is (best_flat == len(made.flat) // 2)
    wanted = [["searched", "flat", "layer_decay"],
              ["searched", "ablation", "flat", "layer_decay", "bertcl"]]  # fmt: skip
    assert [c.kind for c in them] == wanted[not once]
    assert them[0].label == f"bertcl@{rates[i]:g}" and len({c.label for c in them}) == len(them)


def test_final_runs_are_shared_with_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another one works on is left to it, and read when it is done."""
    contender = final.Contender("a", "flat", 0, {"rate": 1e-3, "x.head": 1.0})
    todo = [FinalJob(contender, seed, tmp_path / str(seed)) for seed in range(3)]
    order: list[int] = []
    waits: list[float] = []
    monkeypatch.setattr(final, "wait", lambda seconds, _: waits.append(seconds))

    def evaluate(job: FinalJob) -> Result:
        order.append(job.seed)
        if job.seed == 0 and len(waits) < 1:
            raise Busy("is being worked on")
        return result(job)

    assert len(finish(todo, evaluate)) == 3
    assert order == [0, 1, 2, 0, 0] and len(waits) == 1


def test_a_final_run_of_another_host_is_taken_up_after_a_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody stands still before it while there are others to be made."""
    contender = final.Contender("a", "flat", 0, {"rate": 1e-3, "x.head": 1.0})
    todo = [FinalJob(contender, seed, tmp_path / str(seed)) for seed in range(3)]
    order: list[int] = []
    for of, name, value in ((lease, "BEAT", 0.05), (lease, "STALE", 0.4), (final, "POLL", 0.01)):
        monkeypatch.setattr(of, name, value)
    (tmp_path / "0").mkdir()
    sign = {"process": 7, "host": "elsewhere", "boot": "x", "locked": True, "token": "t"}
    (tmp_path / "0" / "lease.1").write_text(json.dumps(sign))
    begun = time.monotonic()
    finish(todo, lambda job: (order.append(job.seed), result(job))[1])
    assert order == [1, 2, 0] and time.monotonic() - begun >= lease.STALE


def test_a_final_run_that_another_process_has_is_busy(place: Path, tmp_path: Path) -> None:
    made = plan(place)
    control = made.controls[0]
    contender = final.Contender(control.label, control.kind, 0, control.params)
    job = FinalJob(contender, 1, tmp_path / "seed-1")
    with open_run(job.folder, {}), pytest.raises(Busy):
        final.Evaluation(made)(job)


def test_a_final_run_that_diverged_is_not_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process reads all final runs at its end."""
    made = plan(place)
    runs: list[Path] = []

    def diverge(run: Any, tasks: Any, settings: Any, folder: Path) -> None:
        (folder / "tasks").mkdir(parents=True)
        runs.append(folder)
        raise TrainingDiverged("diverged: no gradient of 8 steps was finite", where="mood")

    monkeypatch.setattr(final.Job, "run", diverge)
    control = made.controls[0]
    contender = final.Contender(control.label, control.kind, 0, control.params)
    todo = [FinalJob(contender, 1, tmp_path / "seed-1")]
    first = finish(todo, final.Evaluation(made))
    again = finish(todo, final.Evaluation(made))
    assert first == again and len(runs) == 1
    (found,) = again.values()
    assert found.new_plus_old is None and "no gradient of 8 steps" in str(found.reason)
    assert not (tmp_path / "seed-1" / "tasks").exists()


# --- files --------------------------------------------------------------------------------------


def test_the_files_of_a_search(found: Path) -> None:
    body = json.loads((found / "search.json").read_text())
    assert body["counts"] == {"complete": 16, "pruned": 0, "fail": 0, "running": 0, "waiting": 0}
    assert len(body["final"]) >= 3 and all(len(f["seeds"]) == 3 for f in body["final"])
    assert body["steps"]["spent"] == 16 * STEPS and body["steps"]["share"] == 1
    assert "a:b" not in (found / "search.json").read_text()
    winner = max(body["trials"], key=lambda t: (t["value"], -t["number"]))
    assert body["winner"] == winner["number"]
    rates = Rates.load(found / "rates.yaml")
    assert rates.multipliers == pytest.approx(winner["multipliers"])
    assert rates.geometric_mean_rate == winner["rate"] and rates.layers == 2
    assert rates.geometric_mean == pytest.approx(1)


@pytest.mark.parametrize("name", ["search.json", "trials.csv", "rates.yaml", "recipe.yaml"])
def test_verify_finds_what_was_changed(name: str, found: Path, tmp_path: Path) -> None:
    """Faults P3: each names the file; a digit is still a digit."""
    for file in found.iterdir():
        if file.is_file() and file.suffix in (".json", ".csv", ".yaml"):
            shutil.copyfile(file, tmp_path / file.name)
    told: list[str] = []
    assert verify([tmp_path], told.append) == 0
    text = (tmp_path / name).read_text()
    at = text.rindex("1")
    (tmp_path / name).write_text(text[:at] + "3" + text[at + 1 :])
    assert verify([tmp_path], told.append) == 1
    assert "checksum differs" in told[-2] if name == "search.json" else name in told[-2]
    if name == "search.json":
        with pytest.raises(Refused, match="checksum differs"):
            load_search(tmp_path)


def test_the_provenance_of_rates(found: Path) -> None:
    said = Rates.load(found / "rates.yaml").provenance
    assert said["source"].startswith("holdfast search ")
    assert [t["name"] for t in said["tasks"]] == ["mood", "question"]
    assert all(len(t["hash"]) == 64 for t in said["tasks"])
    assert len(said["model"]["weights"]) == 64
    assert said["evaluation"]["seeds"] == [1, 2, 3]
    assert {"verdict", "low", "high", "n"} <= said["evaluation"]["against_flat"].keys()
    assert [c["label"].split("@")[0] for c in said["controls"] if "flat as" not in c["label"]] == [
        "flat", "layer_decay", "bertcl"]  # fmt: skip
    assert said["search"]["steps"] == 16 * STEPS and said["versions"]["torch"] and "commit" in said


def test_trials_csv_is_what_combine_takes(found: Path) -> None:
    study = read_study(found)
    body = json.loads((found / "search.json").read_text())
    assert len(study.trials) == 16 and study.parts == 4 and study.layers == 2
    assert study.study == body["study"]["title"] and "mood > question (task)" in str(study.study)
    one = study.trials[9]
    theirs = body["trials"][9]
    assert one.reward == pytest.approx(theirs["value"]) and one.steps == STEPS
    assert one.lr == pytest.approx([theirs["rate"] * m for m in theirs["multipliers"]])
    assert combine([found], out=found.parent / "fused.yaml").layers == 2


def test_a_finished_search_is_only_read(asked: dict[str, Any], found: Path, tmp_path: Path) -> None:
    before = json.loads((found / "search.json").read_text())

    def never(_: Plan) -> Any:
        raise AssertionError("nothing is left to train")

    again = search(**{**asked, "train": never}, out=found)
    for key in ("trials", "final", "gain", "winner", "importance", "steps"):
        assert again[key] == before[key] or json.loads(json.dumps(again[key])) == before[key]


def test_methods_that_were_tuned_are_saved_as_a_recipe(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    body = search(**{**asked, "trials": 8}, out=tmp_path, tune=["ewc.strength"])
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    won = body["trials"][body["winner"]]
    assert recipe.methods[0].strength == pytest.approx(won["params"]["ewc.strength"])  # type: ignore[attr-defined]
    assert recipe.rates.multipliers == pytest.approx(won["multipliers"])


# --- importance ---------------------------------------------------------------------------------


def test_what_decides_has_the_largest_share(place: Path) -> None:
    import random

    space, draw = plan(place).space, random.Random(0)
    rows = []
    for i in range(40):
        params = {n: draw.uniform(r.low, r.high) for n, r in space.ranges.items()}
        m = space.multipliers(params)
        good = 1 / (1 + (m[3] - 1) ** 2)
        rows.append(row(i, good, 0.0, params=params, multipliers=m, rate=params["rate"]))
    shares = importance(rows, space).shares
    assert (
        sum(shares.values()) == pytest.approx(1) and max(shares, key=shares.__getitem__) == "head"
    )
    assert list(shares) == ["embeddings", "point.1", "point.2", "head", "base rate"]


def test_too_few_trials_have_no_importance_and_rungs_stand_in(place: Path) -> None:
    space = plan(place).space
    assert importance([row(0, 0.5, 0.5)], space).shares == {}
    rows = [row(i, state="pruned", params={"rate": 1e-3 + i * 1e-5}, rate=1e-3 + i * 1e-5,
                rungs={1: i / 20} | ({2: 0.5} if i < 3 else {})) for i in range(12)]  # fmt: skip
    said = importance(rows, space)
    assert "at rung 1" in said.note and said.shares["base rate"] == 1


# --- refused before any training ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"trials": 7}, "7 trials, of which 7 are controls"),
        ({"trials": 0}, "--trials"),
        ({"objective": "pareto", "pruner": "halving"}, "--pruner"),
        ({"tune": ["dps.dorp"]}, "did you mean 'dps.drop'"),
        ({"shift": "lenght"}, "length"),
        ({"shift": "length"}, "2 tasks for the shift 'length'"),
        ({"recipe": "bertcl"}, "rates of its own"),
        ({"recipe": "ecw"}, "did you mean 'ewc'"),
        ({"flat": [1e-4, 1e-4]}, "--flat"),
        ({"flat": []}, "--flat"),
        ({"lr": 1e-4}, "--lr"),
        ({"workers": 0}, "--workers"),
        ({"fresh": 2}, "--seeds"),
        ({"replicates": 0}, "--replicates"),
        ({"confirm": 1}, "--confirm: 1 trial leaves no choice"),
        ({"confirm_seeds": 1}, "--confirm-seeds"),
        ({"trials": 15, "confirm": 4}, "7 are controls and 8 confirm the best 4; at least 16"),
        ({"trials": 25, "confirm": 9}, "at least 27"),
        ({"learn_old": "twice"}, "--learn-old: unknown .twice."),
        ({"learn_old": "once", "recipe": Recipe(peft=LoRA(rank=2))}, "without peft"),
        ({"learn_old": "once", "tune": ["r3f.strength"]}, "without r3f; take --learn-old each"),
        ({"seed": -1}, "--seed"),
        ({"epochs": 0.0}, "--epochs"),
        ({"url": "nonsense"}, "--storage"),
        ({"sampler": "best"}, "--sampler"),
        ({"parts": 1}, "--parts"),
        ({"model": "./nothing"}, "no such folder"),
        ({"max_length": 4096}, "--max-length"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_training(
    more: dict[str, Any], said: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    def never(_: Plan) -> Any:
        raise AssertionError("training began")

    with pytest.raises(Refused, match=said) as refusal:
        search(**{**asked, "train": never, "out": tmp_path / "out", **more})
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out" / "trials").exists() or "storage" in said
