"""Recipes beside each other: folders, order, one process or several."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sequences import files, told
from tqdm.auto import tqdm

from holdfast import (
    EWC,
    L2SP,
    HeadFirst,
    LwF,
    Merge,
    Recipe,
    Refused,
    Replay,
    compare,
    run_sequence,
)
from holdfast.errors import NotFinite, TrainingDiverged
from holdfast.experiments import compare as comparing
from holdfast.experiments import learner, tuning
from holdfast.experiments.engines import Partly
from holdfast.experiments.engines.plan import Only, Plan
from holdfast.experiments.metrics import new_plus_old
from holdfast.experiments.processes import spread
from holdfast.experiments.record import Record
from holdfast.experiments.runs import check_held, ended, open_run
from holdfast.experiments.sequence import Arm
from holdfast.methods import METHODS
from holdfast.recipe import PRESETS
from holdfast.report import find_records
from holdfast.report.facts import comparisons
from holdfast.tasks.kinds import classification
from holdfast.training.stopping import Stopped

SETTINGS: dict[str, Any] = {"epochs": 0.5, "batch_size": 4, "save_steps": 0, "max_length": 16}
RECIPES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "plain": (PRESETS["plain"](), {}),
    "Plain, slow": (PRESETS["plain"](), {"lr": 1e-6}),
}


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes find the tests' own modules."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


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
    monkeypatch.setattr(classification.KIND, "load_model", called)
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
        ({"lr": float("nan")}, "--lr"), ({"workers": 0}, "--workers"),
    ],
    ids=["no seeds", "a seed twice", "one folder", "bad value", "unknown setting", "nan",
         "no process"],
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


# --- equal terms ----------------------------------------------------------------------------------

QUICK = {"epochs": 1.0, "batch_size": 4, "lr": 5e-3}  # 8 steps a task, long ones: all would show
SMALL = {"ewc": {"rows": 8}, "replay": {"memory": 4}, "merge": {"rows": 8},
         "kfac_ewc": {"rows": 8, "every": 2}, "dps": {"score": "retention", "stage": 2},
         "wise": {"first": False}}  # fmt: skip
IDLE = {"plain": Recipe(name="plain"), "ewc": Recipe(methods=[EWC(rows=8)]),
        "lwf": Recipe(methods=[LwF()]), "replay": Recipe(methods=[Replay(memory=4)]),
        "merge": Recipe(methods=[Merge(rows=8)]),
        "near": Recipe(head_first=HeadFirst(), name="near",
                       methods=[Merge(rows=8), LwF(rows="near")]),
        "lwf_merge": PRESETS["lwf_merge"]()}  # fmt: skip


def without_seconds(folder: Path) -> dict[str, Any]:
    """What a record says but for times, and from where its first task is."""
    record = told(folder)
    for fitted in record["head_first"].values():
        fitted.pop("seconds")
    return {key: value for key, value in record.items() if key != "first"}


def by_itself(place: Path, recipe: Recipe, out: Path, **more: Any) -> None:
    tasks = [place / "mood.jsonl", place / "colour.jsonl"]
    run_sequence(str(place / "bert"), tasks, recipe, out=out, progress=False,
                 **{**SETTINGS, **QUICK, "seed": 3, **more})  # fmt: skip


@pytest.fixture(scope="module")
def shared(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    compared(place, out, {n: (r, {}) for n, r in IDLE.items()}, seeds=[3], **QUICK)
    return out


@pytest.mark.parametrize("name", IDLE)
def test_a_first_task_that_is_shared_gives_the_run_by_itself(
    name: str, place: Path, shared: Path, tmp_path: Path
) -> None:
    """Bit for bit: all scores, all weights, all that methods remember, after each task."""
    by_itself(place, IDLE[name], tmp_path)
    mine = shared / name / "seed-3"
    assert files(mine) == files(tmp_path)
    assert without_seconds(mine) == without_seconds(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if m.from_dict(SMALL.get(n, {})).idle_at_first]
)
def test_every_method_that_waits_may_share_its_first_task(
    name: str, place: Path, tmp_path: Path
) -> None:
    recipe = Recipe(methods=[METHODS[name].from_dict(SMALL.get(name, {}))])
    compared(place, tmp_path / "c", {"plain": RECIPES["plain"], "it": (recipe, {})}, seeds=[3],
             **QUICK)  # fmt: skip
    by_itself(place, recipe, tmp_path / "alone")
    assert "first" in told(tmp_path / "c" / "it" / "seed-3")
    assert files(tmp_path / "c" / "it" / "seed-3") == files(tmp_path / "alone")


def test_a_first_task_is_trained_once_and_its_seconds_stand_with_each(shared: Path) -> None:
    """Two of them: one with the head fitted first."""
    firsts = {str(p.parent): Record.load(p) for p in (shared / "first").rglob("record.json")}
    assert len(firsts) == 2
    for name in IDLE:
        record = Record.load(shared / name / "seed-3")
        first = firsts[record.extra["first"]["folder"]]
        assert first.names == record.names[:1] and first.steps == record.steps[:1]
        assert record.extra["first"]["seconds"] == first.seconds[0] <= (record.seconds[0] or 0)
    assert {r.recipe["name"] for r in find_records([shared])} == {
        "plain", "custom", "near", "lwf_merge"
    }  # fmt: skip
    assert len(find_records([shared / "first"])) == 2  # asked for by themselves


def test_a_repeat_is_a_run_of_its_own_from_the_first_task_on(place: Path, tmp_path: Path) -> None:
    """One that went on from the first task of the other would tell of half the noise."""
    recipes = {"plain": RECIPES["plain"], "ewc": (IDLE["ewc"], {})}
    records = compared(place, tmp_path, recipes, repeat=True, **QUICK)
    folders = [Path(r.settings["out"]).relative_to(tmp_path) for r in records]
    names = [f"{n}/seed-{s}" for n in recipes for s in ("0", "3", "0-again")]
    assert list(map(str, folders)) == names
    assert ["first" in r.extra for r in records] == [True, True, False] * 2
    assert records[2].scores == records[0].scores and records[5].scores == records[3].scores
    (found,) = comparisons(records)
    assert found.repeats["new_plus_old"] == (2, 0.0, 0.0)
    assert [group.seeds for group in found.groups] == [[0, 3]] * 2


def test_what_acts_on_the_first_task_has_its_own(place: Path, tmp_path: Path) -> None:
    recipes = {"plain": RECIPES["plain"], "slow": RECIPES["Plain, slow"],
               "l2sp": (Recipe(methods=[L2SP(strength=0.0, head_strength=0.0)]), {}),
               "ewc": (Recipe(methods=[EWC(strength=0.0, rows=8)]), {})}  # fmt: skip
    compared(place, tmp_path, recipes, seeds=[3], **QUICK)
    runs = {name: told(tmp_path / name / "seed-3") for name in recipes}
    assert {name for name, run in runs.items() if "first" in run} == {"plain", "ewc"}
    # Two more that do nothing differ from plain in nothing: weights, rows, their order, steps.
    weights = {
        name: {k: v for k, v in files(tmp_path / name / "seed-3").items() if "holdfast" not in k}
        for name in recipes
    }
    assert weights["plain"] == weights["l2sp"] == weights["ewc"] != weights["slow"]
    for key in ("scores", "selection_scores", "steps", "history"):
        assert runs["plain"][key] == runs["l2sp"][key] == runs["ewc"][key], key


def test_one_that_was_killed_goes_on_with_the_first_task_that_is_there(
    place: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second task of ewc, which is then alone to need the first."""
    recipes = {n: (IDLE[n], {}) for n in ("plain", "ewc")}
    original, calls = learner.Learner.learn, []

    def third(self: Any, index: int) -> None:
        calls.append(index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner.Learner, "learn", third)
        compared(place, tmp_path, recipes, seeds=[3], **QUICK)
    assert calls == [0, 1, 1]
    calls.clear()
    calls.extend([0, 0, 0])  # from here on only counted
    monkeypatch.setattr(learner.Learner, "learn", third)
    compared(place, tmp_path, recipes, seeds=[3], **QUICK)
    assert calls[3:] == [1]
    for name in recipes:
        assert files(tmp_path / name / "seed-3") == files(shared / name / "seed-3")


def test_a_first_task_that_others_deleted_is_trained_by_itself(
    place: Path, shared: Path, tmp_path: Path
) -> None:
    by_itself(place, IDLE["plain"], tmp_path / "run", arm=Arm(first=tmp_path / "gone"))
    assert files(tmp_path / "run") == files(shared / "plain" / "seed-3")
    assert "first" not in told(tmp_path / "run")


def test_only_first_tasks_that_nobody_trains_are_deleted(tmp_path: Path) -> None:
    """Another comparison may share the folder."""
    runs = [tmp_path / key / "seed-1000" for key in ("a", "b")]
    for run in runs:
        run.mkdir(parents=True)
    with open_run(runs[1], {}):
        comparing._delete(tmp_path)
        assert not runs[0].parent.exists()
        check_held(runs[1])
    comparing._delete(tmp_path)
    assert not runs[1].exists()


@pytest.mark.parametrize("run", ["first/*/seed-3", "ewc/seed-3"])
def test_what_is_of_one_run_of_a_comparison_is_not_of_those_that_go_on_from_it(
    run: str, place: Path, shared: Path, tmp_path: Path
) -> None:
    """A report would leave them out, or call them tuned."""
    last = next(shared.glob(run))
    record = run_sequence(None, [place / "question.jsonl"], from_run=last, out=tmp_path,
                          progress=False, epochs=0.1)  # fmt: skip
    assert record.extra.keys() == {"from", "began"} and record.extra["from"] == str(last)
    assert len(find_records([tmp_path])) == 1


def test_equal_configurations_are_told() -> None:
    recipes = {"a": (Recipe(methods=[EWC()], name="x"), {}), "b": (PRESETS["ewc"](), {"lr": 2e-4}),
               "c": (PRESETS["ewc"](), {"lr": 1e-4})}  # fmt: skip
    (line,) = comparing._same(recipes, {})
    assert line.startswith("a and b are one configuration")


# --- a budget -------------------------------------------------------------------------------------

EWC_ONLY = {"ewc": (Recipe(methods=[EWC(rows=8)], name="ewc"), {})}


def test_a_budget_chooses_on_selection_rows_and_trains_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"budget": 3, "seeds": [0, 3], "lr": 2e-3, "rates": [1e-3, 2e-2]}
    records = compared(place, tmp_path, EWC_ONLY, **given)
    assert [r.recipe["name"] for r in records] == ["plain", "plain", "ewc", "ewc"]
    for label, record in (("plain", records[0]), ("ewc", records[3])):
        tried = [Record.load(tmp_path / "tuning" / label / str(i)) for i in range(3)]
        assert {r.seed for r in tried} == {tuning.SEED}
        assert all(c is None for r in tried for row in r.scores for c in row)  # on evaluation rows
        assert not list((tmp_path / "tuning").rglob("*.safetensors"))
        best, most = -1, -1.0  # a twin: read what was tried, one after another
        for i, run in enumerate(tried):
            score = new_plus_old(run.selection_scores or [])
            if score is not None and score > most:
                best, most = i, score
        assert record.settings["lr"] == tried[best].settings["lr"]
        assert record.recipe["methods"] == tried[best].recipe["methods"]
        said = record.extra["tuned"]
        assert (said["runs"], said["chosen"], said["score"]) == (3, best, most)
        assert said["values"]["rate"] == record.settings["lr"]
        assert None not in record.scores[-1] and tried[0].settings["lr"] == 2e-3
    rates = [[Record.load(tmp_path / "tuning" / n / str(i)).settings["lr"] for i in range(3)]
             for n in ("plain", "ewc")]  # fmt: skip
    assert rates[0] == rates[1]
    assert len(find_records([tmp_path])) == 4

    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    before = {p: p.read_bytes() for p in tmp_path.rglob("record.json")}
    monkeypatch.setattr(classification.KIND, "load_model", called)
    compared(place, tmp_path, EWC_ONLY, **given)
    assert {p: p.read_bytes() for p in tmp_path.rglob("record.json")} == before


def pretended(
    asked: list[dict[str, Any]], diverge: float, error: type[Refused] = TrainingDiverged
) -> Any:
    """Runs that are not trained: the score on selection rows is highest at 1e-4."""

    def run(model: str, tasks: Any, recipe: Recipe, **job: Any) -> Record:
        asked.append({"recipe": recipe, **job})
        if job["lr"] > diverge:
            raise error("diverged")
        score = 1.0 - abs(job["lr"] - 1e-4)
        return Record(tasks=[{"name": "a"}], scores=[[None]], selection_scores=[[score]],
                      recipe=recipe.to_dict(), extra=dict(job["arm"].notes))  # fmt: skip

    return run


@pytest.mark.parametrize("error", [TrainingDiverged, NotFinite])  # while it learns, or at its end
def test_a_run_that_diverges_is_not_chosen_nor_tried_again(
    error: type[Refused], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(comparing, "run_sequence", pretended(asked, 1e-4, error))
    for expected in (8, 8 - 5):  # the second time but for those that diverged
        records = compare("m", ["a"], {}, seeds=[0], out=tmp_path, budget=8)
        tried = [job["lr"] for job in asked if job["seed"] == tuning.SEED]
        assert len(tried) == expected and all(job["arm"].scored == ("selection",)
                                              for job in asked[: len(tried)])  # fmt: skip
        below = [lr for lr in tried if lr <= 1e-4]
        assert len(below) == 3 and asked[-1]["lr"] == max(below)  # of 2e-5 to 5e-4, and 2e-4 itself
        assert records[0].extra["tuned"]["diverged"] == 5
        asked.clear()


def kept(asked: list[str], diverge: float) -> Any:
    """As `pretended`, but the record is in its folder."""

    def run(model: str, tasks: Any, recipe: Recipe, **job: Any) -> Record:
        if ended(job["out"]):
            return Record.load(job["out"])
        asked.append(str(job["out"]))
        if job["lr"] > diverge:
            raise TrainingDiverged("diverged")
        size = len(tasks)
        scores = [[0.5 if j <= i else None for j in range(size)] for i in range(size)]
        record = Record(tasks=[{"name": n} for n in tasks], scores=scores, seconds=[1.0] * size,
                        selection_scores=scores, recipe=recipe.to_dict(),
                        extra=dict(job["arm"].notes))  # fmt: skip
        record.save(Path(job["out"]) / "record.json")
        return record

    return run


def test_a_plan_comes_to_its_end_round_by_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First tasks, tuning runs of which one diverges, first tasks again, and the final runs."""
    asked: list[str] = []
    monkeypatch.setattr(comparing, "run_sequence", kept(asked, diverge=1e-4))
    once = partial(compare, "m", ["a", "b"], EWC_ONLY, seeds=[0], out=tmp_path, budget=2, lr=1e-4,
                   rates=[1e-3, 1e-2])  # fmt: skip
    rounds = []
    for _ in range(9):
        with suppress(Partly):
            once(engine=Plan(["compare"], tmp_path))
        runs = [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()]
        if not runs:
            break
        rounds.append(sorted({run.rsplit("/", 2)[0] if "first" in run else run for run in runs}))
        for run in runs:
            with suppress(Partly):
                once(engine=Only(run, tmp_path))
    tried = [f"tuning/{label}/{i}" for label in ("ewc", "plain") for i in range(2)]
    assert rounds == [["tuning/first"], tried, ["first"], ["ewc/seed-0", "plain/seed-0"]]
    records = once()
    assert len(asked) == len({*asked}) == 2 + 2 + 1 + 2  # none of those whose first one diverged
    assert [r.extra["tuned"]["diverged"] for r in records] == [1, 1]


def test_settings_of_a_recipes_own_are_tuned_like_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(comparing, "run_sequence", pretended(asked, diverge=1.0))
    recipes = {"own": (Recipe(name="own"), {"lr": 3e-4, "epochs": 1.0})}
    compare("m", ["a"], recipes, seeds=[0, 1], out=tmp_path, budget=4)
    by_label = {name: [j for j in asked if f"tuning/{name}/" in str(j["out"])]
                for name in ("plain", "own")}  # fmt: skip
    assert [len(each) for each in by_label.values()] == [4, 4]
    own, plain = ([j["lr"] for j in by_label[n]] for n in ("own", "plain"))
    assert own[0] == 3e-4 and plain[0] == 2e-4 and own[1:] == plain[1:]
    assert all(j["epochs"] == 1.0 for j in by_label["own"])
    assert len(asked) == 8 + 4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"budget": 0}, "--budget"), ({"budget": True}, "--budget"), ({"budget": 1.5}, "--budget"),
        ({"budget": 2, "rates": [1e-3, 1e-4]}, "--rates"), ({"rates": [1e-4, 1e-3]}, "--budget N"),
        ({"budget": 2, "seeds": [0, tuning.SEED]}, "seed of tuning"),
        ({"budget": 2, "recipes": {"plain": (PRESETS["ewc"](), {})}}, "plain is the control"),
        ({"recipes": {"Tuning": RECIPES["plain"]}}, "tuning is a folder"),
    ],
)  # fmt: skip
def test_budgets_that_are_refused(more: Any, says: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=says):
        compared(place, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


# --- processes ------------------------------------------------------------------------------------


def killed_once(mark: Path, number: int) -> tuple[int, int]:
    """Dies by SIGKILL the first time that it is asked."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid()


def stopped_once(mark: Path) -> str:
    """Is sent SIGTERM alone, as by a guard of memory, the first time that it is asked."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    return "done"


def killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("_importable")
def test_a_killed_process_is_replaced_and_its_job_done(tmp_path: Path) -> None:
    """Of a pool one killed process would break every job."""
    jobs = [partial(killed_once, tmp_path / "mark", n) for n in range(3)]
    done = dict(spread(jobs, 2, where="x"))
    assert [done[n][0] for n in range(3)] == [0, 1, 2] and (tmp_path / "mark").exists()
    assert len({pid for _, pid in done.values()}) <= 2  # a process takes one job after another


@pytest.mark.usefixtures("_importable")
def test_a_process_that_is_stopped_from_elsewhere_is_replaced(tmp_path: Path) -> None:
    job = partial(stopped_once, tmp_path / "mark")
    assert list(spread([job], 1, where="x")) == [(0, "done")]


def killed_holding_the_bars(mark: Path) -> int:
    """Dies by SIGKILL the first time, with the lock of all processes' bars."""
    tqdm.get_lock().acquire()
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    tqdm.get_lock().release()
    return 1


@pytest.mark.slow
@pytest.mark.usefixtures("_importable")
def test_a_process_that_is_killed_while_it_draws_holds_up_nobody(tmp_path: Path) -> None:
    job = partial(killed_holding_the_bars, tmp_path / "mark")
    assert list(spread([job], 1, where="x")) == [(0, 1)]
    with tqdm.get_lock():
        pass


@pytest.mark.usefixtures("_importable")
def test_a_job_that_ends_its_processes_is_given_up() -> None:
    with pytest.raises(Refused, match=r"x: its processes were .* by SIGKILL; .*fewer --workers"):
        list(spread([partial(killed, 0)], 1, where="x"))


def waiting(mark: Path) -> None:
    mark.touch()
    time.sleep(600)


@pytest.mark.usefixtures("_importable")
def test_a_signal_ends_those_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        if (tmp_path / "0").exists():
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("holdfast.experiments.processes.stopping.check", check)
    with pytest.raises(Stopped):
        list(spread([partial(waiting, tmp_path / "0")], 1, where="x"))
    assert not multiprocessing.active_children()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
