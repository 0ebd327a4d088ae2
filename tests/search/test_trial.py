"""A trial is the run that `run_sequence` would make, without evaluation rows and loaded once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import plan as fake_plan

from holdfast import LoRA, Rates, Recipe, Replay, run_sequence
from holdfast.errors import Busy, Refused
from holdfast.experiments import learner
from holdfast.experiments.record import Record
from holdfast.search import final, trial
from holdfast.search.objective import Diverged, Pruned, Watch, evenly
from holdfast.search.plan import Plan
from holdfast.search.trial import Training
from holdfast.search.worker import Replicate
from holdfast.tasks.kinds import classification

SETTINGS: dict[str, Any] = {"epochs": 2.0, "batch_size": 4, "max_length": 16, "selection": 12}
RECIPE = Recipe(rates=Rates.bertcl(), methods=[Replay(memory=4)], name="t")
LR = 5e-3


@pytest.fixture(scope="module")
def plan(place: Path) -> Plan:
    """The rows of a run of these settings; 18 steps a task."""
    return fake_plan(place, rungs=3, **SETTINGS)


constant_score = trial.constant_score


@pytest.fixture(autouse=True)
def _never_collapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few steps teach little: without this, most trials here would stop after task one."""
    monkeypatch.setattr(trial, "constant_score", lambda *_: -1.0)


def job(out: Path, *, lr: float = LR, seed: int = 0, recipe: Recipe = RECIPE) -> Replicate:
    return Replicate(0, 0, seed, recipe, lr, out)


class Told:
    """A watch that notes, and may stop at a rung."""

    def __init__(self, stop: int = 0) -> None:
        self.rungs: dict[int, float] = {}
        self.stop = stop
        self.watch = Watch(evenly(3), self._tell)

    def _tell(self, rung: int, value: float) -> bool:
        assert rung not in self.rungs
        self.rungs[rung] = value
        return rung == self.stop


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, peft=LoRA(rank=2))])
def test_a_trial_is_the_run_of_its_recipe(
    recipe: Recipe, place: Path, plan: Plan, tmp_path: Path
) -> None:
    """Bit for bit, from copies of what was loaded once, also the second time."""
    train, told = Training(plan), Told()
    first = train(job(tmp_path / "0", recipe=recipe), told.watch)
    again = train(job(tmp_path / "1", recipe=recipe), Told().watch)
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    whole = run_sequence(str(place / "bert"), tasks, recipe, lr=LR, out=tmp_path / "whole",
                         progress=False, save_steps=0, **SETTINGS)  # fmt: skip
    assert whole.selection_scores is not None
    wanted = whole.selection_scores
    for found in (first, again):
        assert (found.old, found.old_after, found.new) == (wanted[0][0], *wanted[1])
        assert found.steps == sum(n or 0 for n in whole.steps) > 0
    assert sorted(told.rungs) == [1, 2, 3, 4, 5, 6]
    assert told.rungs[3] == wanted[0][0] and told.rungs[6] == sum(wanted[1])  # type: ignore[arg-type]


def test_trials_share_seed_rows_and_head(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their curve: what is compared differs in nothing else."""
    seen: list[list[torch.Tensor]] = []

    def noting(self: Any, *_: Any, model: Any, **__: Any) -> None:
        seen[-1] += [w.detach().clone() for w in model.classifier.parameters()]

        def batch(_: Any, __: Any, given: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                seen[-1].append(given["input_ids"].clone())

        model.register_forward_pre_hook(batch, with_kwargs=True)

    monkeypatch.setattr(trial._Rungs, "on_train_begin", noting, raising=False)
    train = Training(plan)
    for name, rates, lr in (("0", Rates.flat(), 1e-3), ("1", Rates.bertcl(), LR)):
        seen.append([])
        with pytest.raises(Pruned):
            train(job(tmp_path / name, lr=lr, recipe=Recipe(rates=rates)), Told(stop=4).watch)
    one, two = seen
    assert len(one) == len(two) == 2 + 18 + 2 + 6  # of each task: weight, bias and its steps
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_trial_that_does_not_fit_is_tried_with_half_the_rows(
    place: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trial that asks for them, bit for bit; with one row at a time it has failed."""
    half = fake_plan(place, rungs=3, **SETTINGS | {"batch_size": 2, "accumulation": 2})
    wanted = Training(half)(job(tmp_path / "half"), Told().watch)
    step, room, train = learner.Trainer.training_step, [2], Training(plan)

    def limited(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        if len(inputs["labels"]) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, model, inputs, *more)

    monkeypatch.setattr(learner.Trainer, "training_step", limited)
    found = train(job(tmp_path / "whole"), Told().watch)
    assert replace(found, seconds=0.0) == replace(wanted, seconds=0.0)
    assert "2 and an accumulation of 2" in Record.load(tmp_path / "whole").warnings[0]
    room[0] = 1
    with pytest.raises(Diverged, match="out of memory with 2 rows at a time"):
        train(job(tmp_path / "none"), Told().watch)


def test_evaluation_rows_are_not_looked_at(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    evaluate = learner.evaluate

    def counted(model: Any, found: Any, *args: Any) -> float:
        rows.append(len(found))
        return evaluate(model, found, *args)

    monkeypatch.setattr(learner, "evaluate", counted)
    encoded: list[int] = []
    encode = classification.KIND.encode
    monkeypatch.setattr(
        classification.KIND,
        "encode",
        lambda r, *a, **k: encoded.append(len(r)) or encode(r, *a, **k),
    )
    Training(plan)(job(tmp_path / "0"), Told().watch)
    # two rungs and the end of task one, of one task; the same of task two, of both
    assert rows == [12] * (3 + 2 * 3)
    assert sorted(encoded) == sorted(
        len(split) for task in plan.tasks for split in (task.train, task.selection)
    )
    record = Record.load(tmp_path / "0")
    assert record.status == "done" and record.scores == [[None, None], [None, None]]


def test_the_second_trial_loads_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Training(plan)
    train(job(tmp_path / "0"), Told().watch)
    for name in ("load_model", "load_processor", "add_head", "encode"):

        def called(*_: Any, _name: str = name, **__: Any) -> None:
            raise AssertionError(f"{_name} was called")

        monkeypatch.setattr(classification.KIND, name, called)
    train(job(tmp_path / "1", lr=1e-3), Told().watch)


def test_weights_do_not_fill_the_disk(plan: Plan, tmp_path: Path) -> None:
    train = Training(plan)
    train(job(tmp_path / "0"), Told().watch)
    with pytest.raises(Pruned, match="rung 4") as end:
        train(job(tmp_path / "1"), Told(stop=4).watch)
    assert end.value.steps == 18 + 6
    for folder in ("0", "1"):
        assert {p.name for p in (tmp_path / folder).iterdir()} == {
            "lease.1", "record.json", "run.json",
        }  # fmt: skip


def test_a_finished_trial_is_only_read(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker was killed before it told."""
    first = Training(plan)(job(tmp_path / "0"), Told().watch)
    monkeypatch.setattr(trial, "Learner", None)
    assert Training(plan)(job(tmp_path / "0"), Told().watch) == first


@pytest.mark.parametrize("save_steps", [5, 0])
def test_a_killed_trial_goes_on_from_its_last_checkpoint(
    save_steps: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without checkpoints from its beginning: to the same scores, bit for bit."""
    saving = fake_plan(place, rungs=3, **SETTINGS, save_steps=save_steps)
    whole = Training(saving)(job(tmp_path / "whole"), Told().watch)
    steps: list[int] = []
    after = trial._Rungs.on_step_end

    def cut(self: Any, args: Any, state: Any, control: Any, **how: Any) -> None:
        steps.append(self.index * state.max_steps + state.global_step)
        if len(steps) == 18 + 8:
            raise KeyboardInterrupt
        after(self, args, state, control, **how)

    monkeypatch.setattr(trial._Rungs, "on_step_end", cut)
    with pytest.raises(KeyboardInterrupt):
        Training(saving)(job(tmp_path / "cut"), Told().watch)
    assert steps[-1] == 18 + 8
    found = Training(saving)(job(tmp_path / "cut"), Told().watch)
    assert steps[26] == (18 + 6 if save_steps else 1)
    assert (found.old, found.new, found.old_after, found.steps) == (
        whole.old, whole.new, whole.old_after, whole.steps,
    )  # fmt: skip


def test_a_damaged_checkpoint_of_task_one_is_learned_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = fake_plan(place, rungs=3, **SETTINGS, save_steps=100)
    out = tmp_path / "cut"

    def cut(self: Any, *_: Any, **__: Any) -> None:
        if self.index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trial._Rungs, "on_step_end", cut)
        Training(saving)(job(out), Told().watch)
    weights = out / "tasks" / "1-mood" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    found = Training(saving)(job(out), Told().watch)
    whole = Training(saving)(job(tmp_path / "whole"), Told().watch)
    assert (found.old, found.new, found.old_after) == (whole.old, whole.new, whole.old_after)


def test_what_collapses_stops_after_task_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "constant_score", constant_score)
    still = Recipe(rates=Rates.flat(), name="still")
    with pytest.raises(Pruned, match=r"collapsed: 0\.\d+ on task one") as end:
        Training(plan)(job(tmp_path / "0", lr=1e-12, recipe=still), Told().watch)
    assert end.value.steps == 18
    assert "collapsed" in json.loads((tmp_path / "0" / "record.json").read_text())["warnings"][-1]


def test_what_diverges_is_no_error_of_the_search(place: Path, tmp_path: Path) -> None:
    """Its steps are counted, up to the rung where it is seen, and its weights are deleted."""
    saving = fake_plan(place, rungs=3, **SETTINGS, save_steps=2)
    with pytest.raises(Diverged, match="diverged") as end:
        Training(saving)(job(tmp_path / "0", lr=1e15), Told().watch)
    assert end.value.steps == 6
    assert not (tmp_path / "0" / "tasks").exists()
    assert "diverged" in Record.load(tmp_path / "0").warnings[-1]


def test_other_refusals_are_passed_on(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a full disk: the trial is not to blame."""

    def full(*_: Any, **__: Any) -> None:
        raise Refused("No space left on device")

    monkeypatch.setattr(trial.Learner, "learn", full)
    with pytest.raises(Refused, match="No space"):
        Training(plan)(job(tmp_path / "0"), Told().watch)


# --- task one learned once ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(place: Path) -> Plan:
    """At flat@`LR` task one is learned, for any curve of task two."""
    return fake_plan(place, rungs=3, **SETTINGS, learn_old="once", flat=[LR / 2, LR, 2 * LR])


@pytest.fixture(scope="module")
def flat(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sequence that nothing disturbed, at the control rate."""
    out = tmp_path_factory.mktemp("flat") / "whole"
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    run_sequence(str(place / "bert"), tasks, "plain", lr=LR, out=out, progress=False, save_steps=0,
                 **SETTINGS)  # fmt: skip
    return out


def shared(out: Path, number: int, **more: Any) -> Replicate:
    return replace(job(out / "trials" / str(number), **more), first=out / "first" / "seed-0")


def test_a_shared_first_task_is_that_of_an_undisturbed_run(
    once: Plan, flat: Path, place: Path, tmp_path: Path
) -> None:
    """Bit for bit: its weights, a trial of the same rate, and one of another curve after it."""
    train, told = Training(once), Told()
    plain = Recipe(rates=Rates.flat(), name="t")
    found = train(shared(tmp_path, 0, recipe=plain), told.watch)
    whole = Record.load(flat)
    name = "tasks/1-mood/model.safetensors"
    assert (tmp_path / "first" / "seed-0" / name).read_bytes() == (flat / name).read_bytes()
    assert whole.selection_scores is not None
    assert (found.old, found.old_after, found.new) == (
        whole.selection_scores[0][0], *whole.selection_scores[1],
    )  # fmt: skip
    other = train(shared(tmp_path, 1, lr=LR / 3), Told().watch)
    one = tmp_path / "first" / "seed-0"
    after = run_sequence(None, [place / "question.jsonl"], RECIPE, from_run=one, lr=LR / 3,
                         out=tmp_path / "after", progress=False)  # fmt: skip
    assert after.selection_scores is not None and other.old == found.old
    assert [other.old_after, other.new] == after.selection_scores[1]
    # the steps are those of task two, and so are the rungs
    assert found.steps == other.steps == whole.steps[1] == 18
    assert sorted(told.rungs) == [1, 2, 3] and told.rungs[3] == found.new + found.old_after
    record = Record.load(tmp_path / "trials" / "1")
    assert record.status == "done" and record.scores == [[None, None], [None, None]]
    assert record.extra == {"from": str(tmp_path / "first" / "seed-0"), "learn_old": "once"}
    assert record.settings["lr"] == LR / 3 and record.recipe["methods"]
    assert not (tmp_path / "trials" / "1" / "tasks").exists()


def test_task_one_is_learned_once_a_seed(
    once: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[tuple[int, int, float]] = []
    learn = learner.Learner.learn

    def noted(self: Any, index: int) -> None:
        learned.append((self.seed, index, self.plan.lr))
        learn(self, index)

    monkeypatch.setattr(learner.Learner, "learn", noted)
    train = Training(once)
    further = replace(shared(tmp_path, 2, seed=7), first=tmp_path / "first" / "seed-7")
    for one in (shared(tmp_path, 0, lr=1e-3), shared(tmp_path, 1, lr=2e-3), further):
        with pytest.raises(Pruned, match="rung 1") as end:
            train(one, Told(stop=1).watch)
        assert end.value.steps == 6
    assert learned == [(0, 0, LR), (0, 1, 1e-3), (0, 1, 2e-3), (7, 0, LR), (7, 1, LR)]


def test_what_another_process_learns_is_waited_for(
    once: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers begin at once: one learns task one, the other goes on from the same run."""
    waits: list[float] = []
    run = trial.Job.run

    def busy(self: Any, *given: Any) -> Any:
        if not waits:
            raise Busy("is being worked on")
        return run(self, *given)

    monkeypatch.setattr(trial.Job, "run", busy)
    monkeypatch.setattr(trial, "wait", lambda seconds, _: waits.append(seconds))
    with pytest.raises(Pruned, match="rung 1"):
        Training(once)(shared(tmp_path, 0), Told(stop=1).watch)
    assert len(waits) == 1


def test_a_killed_trial_goes_on_from_the_shared_task(
    once: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a task one of its own curve, also where its folder was cleared meanwhile."""

    def cut(self: Any, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.learner.record.save(self.learner.folder / "record.json")
        if state.global_step == 8:
            raise KeyboardInterrupt

    train = Training(once)
    whole = train(shared(tmp_path, 0), Told().watch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trial._Rungs, "on_step_end", cut)
        train(shared(tmp_path, 1), Told().watch)
    home = tmp_path / "trials" / "1" / "tasks"
    assert (home / "1-mood").is_dir()
    shutil.rmtree(home)
    found = train(shared(tmp_path, 1), Told().watch)
    assert replace(found, seconds=0.0) == replace(whole, seconds=0.0)


def test_final_runs_go_on_from_the_shared_task_too(once: Plan, flat: Path, tmp_path: Path) -> None:
    """On evaluation rows, of another folder than those of selection rows only."""
    whole = Record.load(flat)
    params = once.controls[1].params
    assert params["rate"] == once.old_rate == LR
    contender = final.Contender("flat", "flat", 1, params)
    one = final.FinalJob(contender, 0, tmp_path / "final" / "seed-0", tmp_path / "first")
    for _ in range(2):  # made, then read
        found = final.Evaluation(once)(one)
        assert (found.old, found.old_after, found.new) == (whole.scores[0][0], *whole.scores[1])
        assert found.steps == 18


def test_trials_leave_no_trace_in_each_other(plan: Plan, tmp_path: Path) -> None:
    """The pristine weights stay as they were loaded."""
    train = Training(plan)
    train(job(tmp_path / "0"), Told().watch)
    kept = {
        key: {n: p.clone() for n, p in model.state_dict().items()}
        for key, model in train.loaded._untrained.items()
    }
    train(job(tmp_path / "1", lr=1e-1), Told().watch)
    for key, model in train.loaded._untrained.items():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, kept[key][name])
