"""Population-based training: who goes on from whom, at which rates, and bit for bit from what."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fakes import make_curve, make_result
from fakes import plan as fake_plan
from safetensors.torch import load_file

from holdfast import DPS, Rates, Recipe, Replay
from holdfast.errors import Refused
from holdfast.experiments.engines.slurm import Slurm
from holdfast.experiments.record import Record
from holdfast.experiments.sequence import Job
from holdfast.files import read_yaml
from holdfast.search import pbt, segment, space
from holdfast.search import plan as plans
from holdfast.search import run as runs
from holdfast.search.final import contenders
from holdfast.search.pbt import Outcome, Segment, parents, perturbed
from holdfast.search.plan import Plan
from holdfast.search.run import search, tried
from holdfast.search.segment import Segments
from holdfast.search.space import Ancestor
from holdfast.search.study import Study

METHODS = Recipe(methods=[Replay(memory=4), DPS(stage=2, drop=0.5)], name="m")
SETTINGS: dict[str, Any] = {"epochs": 1.0, "batch_size": 8, "max_length": 16, "selection": 12,
                            "parts": 4, "recipe": METHODS}  # fmt: skip


def plan(place: Path, **more: Any) -> Plan:
    asked = {"sampler": "pbt", "trials": None, "pruner": None, "population": 2, **more}
    return fake_plan(place, **asked)


def halve(patch: pytest.MonkeyPatch) -> None:
    for module in (space, pbt, segment, plans):
        patch.setattr(module, "INTERVALS", 2)
    patch.setattr(pbt, "GENERATIONS", 4)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two intervals a task instead of six."""
    halve(monkeypatch)


class Begun:
    """Two members after the first half of task one; the second is to take over from the first."""

    def __init__(self, place: Path, folder: Path) -> None:
        self.plan, self.folder = plan(place, **SETTINGS, schedule="constant", warmup=0), folder
        made = self.plan
        self.first = [Segment(folder, 0, k, k, (pbt.first(made, k),)) for k in (0, 1)]
        train = Segments(made)
        for one in self.first:
            train(one)
        self.taker = pbt.succeed(self.first, [0.9, 0.1], made.seed)[1]

    def copied(self, out: Path) -> Segment:
        """The taker's segment, in a copy of the population."""
        shutil.copytree(self.folder, out)
        return replace(self.taker, population=out)


@pytest.fixture(scope="module")
def begun(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    with pytest.MonkeyPatch.context() as patch:
        halve(patch)
        return Begun(place, tmp_path_factory.mktemp("begun"))


# --- who, and at which rates ----------------------------------------------------------------------


def test_a_perturbation_in_closed_form() -> None:
    """Shape and scale apart: the geometric mean of the shape stays 1."""
    donor = Ancestor(3, 1e-3, (0.5, 1.0, 2.0))
    told = iter([0.9, 0.1, 0.6, 0.4])
    child = perturbed(donor, 5, lambda: next(told))
    mean = (1.2 * 0.8 * 1.2) ** (1 / 3)
    wanted = (0.5 * 1.2 / mean, 0.8 / mean, 2.0 * 1.2 / mean)
    assert child.member == 5 and child.multipliers == pytest.approx(wanted, rel=1e-12)
    assert math.prod(child.multipliers) == pytest.approx(1.0, rel=1e-12)
    assert child.rate == 1e-3 * 0.8  # whatever the shape did
    same = perturbed(donor, 5, lambda: 0.9)  # one factor for all parts is no other shape
    assert same.multipliers == pytest.approx(donor.multipliers) and same.rate == 1.2e-3


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.1, 0.9, 0.5, 0.8, 0.3, 0.7, 0.6, 0.2], {0: {1, 3}, 7: {1, 3}}),
        ([0.5, 0.5], {1: {0}}),  # of equal ones the first is the better
        ([0.2, 0.4, 0.3], {0: {1}}),
        ([None, 0.4, 0.3, 0.2], {0: {1}}),
        ([None, 0.4, None, None], {0: {1}, 2: {1}, 3: {1}}),  # who diverged has nothing to go on
        ([None, None], {}),
        ([0.5], {}),
    ],
)
def test_the_worst_quarter_takes_from_the_best(
    values: list[float | None], wanted: dict[int, set[int]]
) -> None:
    seen: dict[int, set[int]] = {}
    for draw in (0.0, 0.49, 0.51, 0.999):
        for member, parent in enumerate(parents(values, lambda now=draw: now)):
            if parent != member:
                seen.setdefault(member, set()).add(parent)
    assert seen == wanted


def told(population: Path, generation: int, *values: float | None, **more: Any) -> None:
    """Outcomes of a generation, as if its segments had been trained."""
    for member, value in enumerate(values):
        folder = population / f"{generation + 1}" / f"{member}"
        folder.mkdir(parents=True)
        body = {"value": value, "steps": 5, "seconds": 1.0, **more}
        (folder / "outcome.json").write_text(json.dumps(body))


def test_the_lineage_of_a_hand_made_population(place: Path, tmp_path: Path, halves: None) -> None:
    """Of two members the second takes over from the first, then the first from the second."""
    made = plan(place)
    told(tmp_path / "population", 0, 0.6, 0.5)
    told(tmp_path / "population", 1, 0.4, 0.7)
    told(tmp_path / "population", 2, 0.9, 0.8)
    one, two = ([*pbt.generations(tmp_path / "population", made)][-1])[:2]
    assert (one.generation, two.generation) == (3, 3)
    assert [a.member for a in one.lineage] == [0, 1, 0, 0]
    assert [a.member for a in two.lineage] == [0, 1, 0, 1]
    assert (one.parent, two.parent) == (0, 0)
    start, second, third, _ = one.lineage
    assert start == pbt.first(made, 0) and one.lineage[3] == third
    for child, donor in ((second, start), (third, second), (two.lineage[3], third)):
        assert {round(child.rate / donor.rate, 9)} <= {0.8, 1.2}
        assert math.prod(child.multipliers) == pytest.approx(1.0)
        assert child.multipliers != donor.multipliers

    curve = made.space.in_pieces(two.lineage, name="r")
    assert (curve.geometric_mean_rate, tuple(curve.multipliers)) == (start.rate, start.multipliers)
    assert [(p.task, p.at) for p in curve.pieces] == [(1, 0.5), (2, 0.0), (2, 0.5)]
    for piece, now in zip(curve.pieces, two.lineage[1:], strict=True):
        rates = [start.rate * m for m in piece.multipliers]
        assert rates == pytest.approx([now.rate * m for m in now.multipliers])
    # a lineage that goes on keeps its last rates, so that its groups and pieces are known
    short = made.space.in_pieces(two.lineage[:2], name="r")
    assert short.pieces[0] == curve.pieces[0]
    assert {p.multipliers for p in short.pieces} == {short.pieces[0].multipliers}

    pbt.keep(tmp_path, made)
    kept = json.loads((tmp_path / "population.json").read_text())["members"][1]
    assert [(a["task"], a["at"], a["member"]) for a in kept["lineage"]] == [
        (1, "0/2", 0), (1, "1/2", 1), (2, "0/2", 0), (2, "1/2", 1),
    ]  # fmt: skip
    assert kept["lineage"][1]["rate"] == second.rate and kept["scores"] == [0.5, 0.7, 0.8]


def test_members_are_trials_after_the_controls(place: Path, tmp_path: Path, halves: None) -> None:
    made = plan(place)
    population = tmp_path / "population"
    assert [r.state for r in pbt.rows(tmp_path, made)] == ["waiting", "waiting"]
    for generation in range(3):
        told(population, generation, 0.6, 0.5)
    assert [r.state for r in pbt.rows(tmp_path, made)] == ["running", "running"]
    told(population, 3, 1.5, None, old=0.9, new=0.8, old_after=0.7, reason="diverged: so")
    done, failed = pbt.rows(tmp_path, made)
    assert (done.number, failed.number) == (7, 8)  # five flat rates and two shapes come first
    assert (done.state, done.value, done.steps, done.rungs[4]) == ("complete", 1.5, 20, 1.5)
    assert (failed.state, failed.value, failed.reason) == ("fail", None, "diverged: so")
    # parameters are geometric means over the lineage; the recipe is relative to its first rate
    mean = math.prod(a.rate for a in failed.lineage) ** 0.25
    assert failed.rate == pytest.approx(mean) and failed.rate != failed.lineage[0].rate
    assert math.prod(failed.multipliers or []) == pytest.approx(1.0)
    assert failed.to_dict()["lr"] == failed.lineage[0].rate


# --- weights, moments, random states --------------------------------------------------------------


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoint(folder: Path) -> Path:
    found = segment.state_in(folder / "tasks")
    assert found is not None
    return found


def moments(state: Path) -> dict[int, dict[str, torch.Tensor]]:
    found = torch.load(state / "optimizer.pt", weights_only=True)["state"]
    return {k: {name: t.clone() for name, t in v.items()} for k, v in found.items()}


def test_who_takes_over_has_the_donors_weights_and_moments_and_its_own_rates(
    begun: Begun, tmp_path: Path, halves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, first, taker = begun.plan, begun.first, begun.copied(tmp_path / "p")
    train = Segments(made)
    seen: list[Any] = []

    class Seen(segment._Until):
        def on_train_begin(self, args: Any, state: Any, control: Any, **how: Any) -> None:
            super().on_train_begin(args, state, control, **how)
            optimizer = how["optimizer"].optimizer
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            seen.append(("weights", [w.detach().clone() for w in weights]))
            held = {i: optimizer.state[w] for i, w in enumerate(weights)}
            seen.append(("moments", {i: {k: v.clone() for k, v in one.items()}
                                     for i, one in held.items()}))  # fmt: skip

            def note(made: Any, *_: Any) -> None:
                seen.append(("step", {g["part_names"][0]: g["lr"] for g in made.param_groups}))

            optimizer.register_step_pre_hook(note)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(("data", (args.seed, args.data_seed, torch.get_rng_state())))

    monkeypatch.setattr(segment, "_Until", Seen)
    assert (taker.parent, taker.member) == (0, 1)
    donor, before = checkpoint(first[0].folder), checkpoint(first[1].folder)
    files = {name: sha(donor / name) for name in ("model.safetensors", "optimizer.pt")}
    wanted, own = moments(donor), load_file(before / "holdfast.safetensors")["generator"]
    train(taker)

    (_, weights), (_, held) = seen[:2]
    saved = load_file(donor / "model.safetensors")
    assert sorted(sha_of(w) for w in weights) == sorted(map(sha_of, saved.values()))
    for index, entries in wanted.items():
        for name, tensor in entries.items():
            assert torch.equal(held[index][name], tensor), (index, name)
    assert any(float(entries["exp_avg"].abs().sum()) for entries in held.values())
    # from the next step on the rates are the taker's: neither the donor's nor the taker's of before
    now = taker.lineage[-1]
    rates = next(value for kind, value in seen if kind == "step")
    assert rates["embeddings"] == pytest.approx(now.rate * now.multipliers[0])
    assert rates["head"] == pytest.approx(now.rate * now.multipliers[-1])
    for other in (first[0].lineage[0], first[1].lineage[0]):
        assert rates["head"] != pytest.approx(other.rate * other.multipliers[-1])
    # data order and random states are its own, also those that methods draw from
    seed, data_seed, state = next(value for kind, value in seen if kind == "data")
    assert (seed, data_seed) == (2, 2)  # those of member 1; the donor's are 0
    cpu = torch.load(before / "rng_state.pth", weights_only=False)["cpu"]
    assert torch.equal(state, cpu)
    assert not torch.equal(cpu, torch.load(donor / "rng_state.pth", weights_only=False)["cpu"])
    again = begun.copied(tmp_path / "placed")  # what was put there, before it was trained on
    again.folder.mkdir(parents=True)
    train._place(again, made.space.recipe(made.base, {}, name="t", lineage=again.lineage))
    start = checkpoint(again.folder)
    assert torch.equal(load_file(start / "holdfast.safetensors")["generator"], own)
    theirs = load_file(donor / "holdfast.safetensors")
    assert not torch.equal(theirs["generator"], own)
    for key, tensor in load_file(start / "holdfast.safetensors").items():
        assert key == "generator" or sha_of(tensor) == sha_of(theirs[key]), key
    assert files == {name: sha(start / name) for name in files} == {
        name: sha(donor / name) for name in files  # links: the donor's files are as they were
    }  # fmt: skip


def sha_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def test_a_member_is_a_run_at_its_lineages_rates(
    place: Path, tmp_path: Path, halves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, though it is trained in segments, where nothing was taken over."""
    made = plan(place, **SETTINGS)
    lineage = tuple(
        Ancestor(0, rate, (m, 1 / m, 2.0, 0.5))
        for rate, m in ((1e-3, 1.0), (3e-3, 1.0), (2e-3, 4.0), (1e-3, 0.5))
    )
    keeping = partial(segment.Learner, keeps=lambda *_: True)  # the last task's model too
    monkeypatch.setattr(segment, "Learner", lambda *a, keeps, **how: keeping(*a, **how))
    train, states = Segments(made), []
    for generation in range(4):
        now = Segment(tmp_path / "p", generation, 0, 0, lineage)
        outcome = train(now)
        states.append(checkpoint(now.folder))
    recipe = made.space.recipe(made.base, {}, name="replay", lineage=lineage)
    recipe.save(tmp_path / "recipe.yaml")
    whole = Job(model=made.model, recipe=Recipe.load(tmp_path / "recipe.yaml"), seed=made.seed,
                command=None, bar=None).run(
        list(made.tasks), replace(made.settings, lr=lineage[0].rate, save_steps=2), tmp_path / "w"
    )  # fmt: skip
    assert whole.selection_scores is not None
    (old, _), (after, new) = whole.selection_scores
    assert (outcome.old, outcome.new, outcome.old_after) == (old, new, after)
    assert outcome.value == after + new  # type: ignore[operator]
    for state in (states[1], states[3]):  # all tasks' models
        files = {p.relative_to(state) for p in state.rglob("model.safetensors")}
        assert files and {"1-mood", "2-question"} == {states[1].name, states[3].name}
        for name in files:
            assert sha(state / name) == sha(tmp_path / "w" / "tasks" / state.name / name), name
    steps = sum(n or 0 for n in whole.steps)
    assert sum(s.steps for s in map(pbt.read, (tmp_path / "p").glob("*/0")) if s) == steps
    assert Record.load(tmp_path / "p" / "4" / "0").status == "done"


class Kill(KeyboardInterrupt):
    """A process ends here, once."""

    done: ClassVar[set[str]] = set()

    @classmethod
    def at(cls, name: str) -> None:
        if name not in cls.done:
            cls.done.add(name)
            raise cls


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Processes end at several places, each once: the places so far."""
    Kill.done = set()
    link, rename = segment._link, Path.rename
    save, text = segment.Record.save, segment.write_text_atomic
    step = segment._Until.on_step_end

    def stepping(self: Any, args: Any, state: Any, control: Any, **how: Any) -> None:
        if self.segment.key == (1, 1):
            Kill.at("within a segment")
        step(self, args, state, control, **how)

    def linking(source: Any, path: Any) -> None:
        if "/2/1/" in str(path):
            Kill.at("while files are placed")
        link(source, path)

    def renaming(self: Path, to: Any) -> Path:
        if "/2/1/tasks.part" in str(self):
            Kill.at("before what was placed counts")
        return rename(self, to)

    def saving(self: Any, path: Any) -> None:
        if "/2/1/record.json" in str(path) and len(self.seconds) == 1:
            Kill.at("after a task, before its record")
        save(self, path)

    def writing(path: Any, *content: Any) -> None:
        if str(path).endswith("/2/1/outcome.json"):
            Kill.at("before the outcome")
        if str(path).endswith("/1/0/outcome.json"):
            Kill.at("before the outcome of a segment within a task")
        text(path, *content)

    monkeypatch.setattr(segment._Until, "on_step_end", stepping)
    monkeypatch.setattr(segment, "_link", linking)
    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(segment.Record, "save", saving)
    monkeypatch.setattr(segment, "write_text_atomic", writing)
    return Kill.done


def digests(population: Path) -> dict[str, str]:
    """Weights, moments and random states by path."""
    names = ("model.safetensors", "optimizer.pt", "rng_state.pth", "holdfast.safetensors")
    return {str(path.relative_to(population)): sha(path)
            for path in population.glob("*/*/tasks/**/*") if path.name in names}  # fmt: skip


def test_a_segment_that_is_killed_goes_on_bit_for_bit(
    begun: Begun, tmp_path: Path, halves: None, request: pytest.FixtureRequest
) -> None:
    """One that takes over and ends a task, wherever its process ends."""
    train, whole = Segments(begun.plan), begun.copied(tmp_path / "whole")
    wanted = train(whole)
    places, again = request.getfixturevalue("killed"), begun.copied(tmp_path / "killed")
    found = None
    while found is None:
        with suppress(Kill):
            found = train(again)
    assert len(places) == 5
    assert replace(found, seconds=0.0) == replace(wanted, seconds=0.0)
    files = digests(tmp_path / "whole")
    assert digests(tmp_path / "killed") == files and len(files) > 4


@pytest.mark.slow
def test_a_population_that_is_killed_goes_on_bit_for_bit(
    place: Path, tmp_path: Path, halves: None, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.setattr(pbt, "GENERATIONS", 3)  # up to the middle of task two
    made = plan(place, **SETTINGS)

    def whole(out: Path) -> dict[str, str]:
        seen: dict[str, str] = {}
        while True:
            with suppress(Kill):
                pbt.evolve(out, made, Segments(made),
                           look=lambda: seen.update(digests(out / "population")))  # fmt: skip
                return seen

    wanted = whole(tmp_path / "whole")
    places = request.getfixturevalue("killed")
    found = whole(tmp_path / "killed")
    assert len(places) == 6
    for name, digest in found.items():
        assert wanted.get(name, digest) == digest, name
    outcomes = [
        [replace(o, seconds=0.0) for _, told in pbt.lives(tmp_path / out, made) for o in told]
        for out in ("whole", "killed")
    ]
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 6
    assert {name for name in wanted if name.startswith("3/")} <= found.keys()


def test_what_diverged_goes_on_from_another(begun: Begun, tmp_path: Path, halves: None) -> None:
    """It has no state of its own yet: its random states begin anew, and are not the donor's."""
    train = Segments(begun.plan)
    begun.copied(tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "1" / "1")
    good = replace(begun.first[0], population=tmp_path / "p")
    bad = Segment(tmp_path / "p", 0, 1, 1, (Ancestor(1, 1e15, (1.0,) * 4),))
    values = [train(good).value, train(bad).value]
    assert values[0] is not None and values[1] is None
    ended = bad.outcome
    assert ended is not None and ended.reason is not None and "diverged" in ended.reason
    taker = pbt.succeed([good, bad], values, 0)[1]
    assert taker.parent == 0 and train(taker).value is not None
    drawn = [load_file(checkpoint(s.folder) / "holdfast.safetensors")["generator"]
             for s in (good, taker)]  # fmt: skip
    assert not torch.equal(*drawn)


# --- a whole search -------------------------------------------------------------------------------


def faked(plan: Plan) -> Callable[[Segment], Outcome]:
    """Better the nearer a member's rates come to 1e-3, the second sixth of task two excepted."""

    def one(segment: Segment) -> Outcome:
        known = segment.outcome
        if known is None:
            off = sum(abs(math.log(a.rate / 1e-3)) for a in segment.lineage)
            value = 1.9 - 0.001 * off
            known = Outcome(value, 0.9, 1.0, value - 1.0, 5, 1.0)
            segment.folder.mkdir(parents=True)
            (segment.folder / "outcome.json").write_text(json.dumps(vars(known)))
        return known

    return one


def test_a_search_by_a_population(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "members", faked)
    asked: dict[str, Any] = {
        "out": tmp_path, "sampler": "pbt", "population": 4, "epochs": 1.0, "batch_size": 4,
        "max_length": 16, "selection": 12, "parts": 4, "progress": False, "train": make_curve,
        "flat": [1e-3],
        "evaluate": make_result,
    }  # fmt: skip
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    body = search(str(place / "bert"), tasks, **asked)
    assert body["counts"]["complete"] == body["planned"] == 3 + 4
    assert body["winner"] >= 3 and body["config"]["population"] == 4
    won = body["trials"][body["winner"]]
    assert won["steps"] == 12 * 5 and len(won["lineage"]) == 12
    # the final runs follow its schedule; flat as it is flat at its mean rate
    apart = ("out", "progress", "train", "evaluate")
    settings = {k: v for k, v in asked.items() if k not in apart}
    made = Plan.make(str(place / "bert"), tasks, **settings)
    best, ablation, *_ = contenders(made, tried(Study(tmp_path, made)))
    assert [a.rate for a in best.lineage] == [a["rate"] for a in won["lineage"]]
    assert not ablation.lineage and ablation.rate == pytest.approx(won["rate"])
    curve = Rates.load(tmp_path / "rates.yaml")
    wanted = made.space.in_pieces(best.lineage, name="searched")
    assert replace(curve, provenance={}) == wanted
    assert len(curve.pieces) == 11 and Recipe.load(tmp_path / "recipe.yaml").rates.pieces
    assert curve.geometric_mean_rate == won["lr"] == best.lineage[0].rate
    kept = json.loads((tmp_path / "population.json").read_text())
    assert [m["trial"] for m in kept["members"]] == [3, 4, 5, 6]
    assert read_yaml(tmp_path / "recipe.yaml")["name"] == "searched"

    def never(_: Plan) -> Any:
        raise AssertionError("the finished search trained again")

    monkeypatch.setattr(runs, "members", lambda _: lambda s: s.outcome or never(made))
    again = search(str(place / "bert"), tasks, **{**asked, "train": never})
    assert again["trials"] == body["trials"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"population": 1}, "--population: must be a whole number from 2 to 100, not 1"),
        ({"population": 2.5}, "--population: must be"),
        ({"population": True}, "--population: must be"),
        ({"pruner": "halving"}, "--pruner: a population stops none"),
        ({"objective": "pareto"}, "--sampler: pbt compares members by one objective"),
        ({"trials": 20}, "--trials: does not go with --sampler pbt"),
        ({"replicates": 2}, "--replicates: does not go"),
        ({"tune": ["dps.drop"]}, "--tune: does not go"),
        ({"confirm": 2}, "--confirm: does not go"),
        ({"learn_old": "once"}, "--learn-old: does not go"),
        ({"sampler": "tpe"}, "--population: is of --sampler pbt"),
        ({"epochs": 0.1}, "steps, of which a population needs 6"),
        ({"recipe": Recipe(rates=Rates.from_list(
            [1.0, 1.0, 1.0], pieces=[{"task": 1, "at": 1, "multipliers": [1.0, 1.0, 1.0]}]))},
         "has rates of its own"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_population_is_refused(
    more: dict[str, Any], said: str, place: Path
) -> None:
    with pytest.raises(Refused, match=said) as refusal:
        plan(place, **more)
    assert "\n" not in str(refusal.value)


def test_a_storage_is_refused(place: Path, tmp_path: Path) -> None:
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    with pytest.raises(Refused, match="--storage: a population lies in --out"):
        search(str(place / "bert"), tasks, out=tmp_path / "s", url="journal:x", sampler="pbt",
               epochs=1.0, batch_size=4, max_length=16, selection=12)  # fmt: skip
    assert not (tmp_path / "s").exists()


def test_an_engine_of_several_machines_is_refused(place: Path, tmp_path: Path) -> None:
    """By what helps: a storage, which such an engine asks for else, is refused too."""
    tasks = [place / "mood.jsonl", place / "question.jsonl"]
    with pytest.raises(Refused, match="a population lives on one machine"):
        search(str(place / "bert"), tasks, out=tmp_path / "s", sampler="pbt",
               engine=Slurm(partition="gpu", cluster="slurm"))  # fmt: skip
