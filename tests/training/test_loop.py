"""A loop of one's own, stopped and gone on with: bit for bit, by name, in its own types."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import collate, rows, same
from test_damage import flip
from test_kept import slots
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from holdfast import DPS, EWC, L2SP, Recipe, Refused, Replay
from holdfast.training import checkpoints, loop
from holdfast.training.loop import load_checkpoint, save_checkpoint

STEPS = 12
RECIPES = {
    "plain": Recipe(),
    "mix": Recipe(methods=[DPS(mix=True, stage=4)]),
    "together": Recipe(
        methods=[EWC(strength=50.0), Replay(memory=6, share=0.5), L2SP(), DPS(stage=3)],
        max_grad_norm=0.5,
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=1e-2),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "steps": lambda o: schedulers.MultiStepLR(o, [3, 7, 7, 9]),  # a Counter of whole numbers
    "one cycle": lambda o: schedulers.OneCycleLR(o, 1e-2, total_steps=STEPS + 1),
    "in turn": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 9)], [4]
    ),
}


class Net(nn.Module):
    """With dropout and a buffer that training changes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(models.SIZE, 16)
        self.norm = nn.BatchNorm1d(16)
        self.layer = nn.Linear(16, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = self.norm(self.layer(self.embed(input_ids).mean(1)))
        logits = self.out(nn.functional.dropout(hidden, 0.2, self.training))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Run:
    """Two tasks: a first one that leaves rows and anchors, a second one that may be resumed."""

    def __init__(self, recipe: Recipe, optimizer: str = "adamw", scheduler: str = "lambda",
                 seed: int = 0, reverse: bool = False) -> None:  # fmt: skip
        self.model = Net(seed)
        self.bound = recipe.unbound(seed=seed)
        self.data = torch.Generator().manual_seed(seed)
        first = recipe.param_groups(self.model, lr=1e-2)
        self.bound.begin_task("one", torch.optim.SGD(first, lr=1e-2), 2, model=self.model)
        batches = [collate(rows(8, seed=seed + i)) for i in range(2)]
        for batch in batches:
            loss = self.model(**batch).loss + self.bound.penalty(batch)
            loss.backward()
            self.bound.optimizer.step()
            self.bound.optimizer.zero_grad()
        self.bound.end_task(batches)
        groups = recipe.param_groups(self.model, lr=1e-2)
        if reverse:
            for group in groups[::-1]:
                group["params"] = list(reversed(group["params"]))
            groups = groups[::-1]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.bound.begin_task("two", self.optimizer, STEPS, model=self.model)
        self.others = {"scheduler": self.scheduler, "data": self.data}

    def step(self, micro: int = 2) -> None:
        """One optimizer step of two micro-batches; `micro` of them, and the step is not made."""
        for _ in range(micro):
            picked = torch.randint(1000, (), generator=self.data)
            noise = random.random() + float(np.random.rand())
            batch = collate(rows(4, seed=int(picked)))
            loss = self.model(**batch).loss * (1 + 0.1 * noise)
            ((loss + self.bound.penalty(batch)) / 2).backward()
        if micro == 2:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def end(self) -> dict[str, Tensor]:
        """All that training leaves: weights, buffers, moments by name, the methods' state."""
        found = dict(self.bound.state_dict()["tensors"]) | self.model.state_dict()
        for name, w in self.bound.weights.items():
            for key, value in self.optimizer.state[w].items():
                found[f"{name}|{key}"] = torch.as_tensor(value)
        return {k: v.clone() for k, v in found.items()}


def whole(*args: Any) -> dict[str, Tensor]:
    run = Run(*args)
    seed_all(9)
    for _ in range(STEPS):
        run.step()
    return run.end()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def cut(folder: Path, *args: Any, at: int = 5) -> Run:
    """Saved after a step and killed in the middle of the next: one micro-batch of two."""
    run = Run(*args)
    seed_all(9)
    for _ in range(at):
        run.step()
    save_checkpoint(folder, run.bound, position={"step": at}, **run.others)
    run.step(micro=1)
    return run


CASES = [
    *((recipe, "adamw", "lambda") for recipe in RECIPES),
    *(("together", name, "lambda") for name in ("fused", "sgd", "rprop")),
    *(("mix", "adamw", name) for name in SCHEDULERS if name != "lambda"),
]


@pytest.mark.parametrize(("recipe", "optimizer", "scheduler"), CASES)
@pytest.mark.filterwarnings("ignore:.*epoch parameter in")
def test_it_goes_on_as_if_nothing_had_happened(
    recipe: str, optimizer: str, scheduler: str, tmp_path: Path
) -> None:
    """From a model, generators and a data order that began otherwise."""
    of = RECIPES[recipe], optimizer, scheduler
    cut(tmp_path / "checkpoint-5", *of)
    again = Run(*of, 77)
    seed_all(1)
    assert load_checkpoint(tmp_path / "checkpoint-5", again.bound, **again.others) == {"step": 5}
    assert again.bound.step == 5
    while again.bound.step < STEPS:
        again.step()
    assert same(again.end(), whole(*of))


def test_another_order_of_parameters_is_found_by_name(tmp_path: Path) -> None:
    """torch would give the moments of one parameter to another of its shape (faults N11)."""
    of = RECIPES["plain"], "adamw", "lambda"
    run = cut(tmp_path / "checkpoint-5", *of)
    before = {n: run.optimizer.state[w]["exp_avg"].clone() for n, w in run.bound.weights.items()}
    again = Run(*of, 3, True)
    assert [n for g in loop._names(again.bound) for n in g] != [
        n for g in loop._names(run.bound) for n in g
    ]
    load_checkpoint(tmp_path / "checkpoint-5", again.bound, **again.others)
    after = {n: again.optimizer.state[w]["exp_avg"] for n, w in again.bound.weights.items()}
    assert same(after, before)


def test_types_of_optimizer_state_are_kept(tmp_path: Path) -> None:
    """torch's own load would make 299892736 of 300000001 (faults N10)."""
    odd = {
        "index": torch.tensor([300_000_001]),
        "wide": torch.full((2,), 1 / 3, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "told": 0.1,
    }
    model = models.Plain().bfloat16()
    bound = Recipe().bind(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=2)
    bound.optimizer.state[model.out.bias] = dict(odd)
    save_checkpoint(tmp_path / "checkpoint-1", bound, position={})
    other = models.Plain(seed=1).bfloat16()
    again = Recipe().bind(other, torch.optim.SGD(other.parameters(), lr=0.1), total_steps=2)
    load_checkpoint(tmp_path / "checkpoint-1", again)
    found = again.optimizer.state[other.out.bias]
    assert found.pop("told") == odd.pop("told") == 0.1
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in odd.items()}
    assert same(found, odd) and set(again.optimizer.state) == {other.out.bias}


def test_checkpoints_rotate_and_share_what_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "KEPT_FROM", 0)
    run = Run(RECIPES["together"])
    for step in range(1, 5):
        run.step()
        save_checkpoint(
            tmp_path / f"checkpoint-{step}", run.bound, position={}, keep=2, **run.others
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    three, four = slots(tmp_path / "checkpoint-3"), slots(tmp_path / "checkpoint-4")
    assert three["ewc/weights/fisher"].samefile(four["ewc/weights/fisher"])


# --- refused --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop") / "checkpoint-5"
    cut(folder, RECIPES["mix"], "adamw", "lambda")
    return folder


REFUSALS: dict[str, tuple[Callable[[], Run], dict[str, Any], str]] = {
    "another optimizer": (lambda: Run(RECIPES["mix"], "sgd"), {}, "was AdamW, is SGD"),
    "another method": (lambda: Run(Recipe(methods=[DPS(stage=4)])), {}, "was saved by"),
    "another object": (lambda: Run(RECIPES["mix"]), {"scaler": None}, "holds the state of"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_does_not_fit_is_refused_and_nothing_changes(what: str, saved: Path) -> None:
    make, more, says = REFUSALS[what]
    run = make()
    before, drawn = run.end(), torch.get_rng_state()
    with pytest.raises(Refused, match=says):
        load_checkpoint(saved, run.bound, **run.others, **more)
    assert same(run.end(), before) and torch.equal(torch.get_rng_state(), drawn)


def test_other_parameters_and_groups_are_named(saved: Path) -> None:
    run = Run(RECIPES["mix"])
    run.model.norm.running_mean = torch.zeros(3)
    with pytest.raises(Refused, match=r"two/norm.running_mean was \[\[16\], 'float32'\]"):
        load_checkpoint(saved, run.bound, **run.others)
    run = Run(RECIPES["mix"])
    apart = run.optimizer.param_groups[0]["params"].pop()
    run.optimizer.param_groups.append({**run.optimizer.param_groups[0], "params": [apart]})
    with pytest.raises(Refused, match=r"groups are others: embed.weight"):
        load_checkpoint(saved, run.bound, **run.others)


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    run = cut(tmp_path / "checkpoint-5", RECIPES["plain"])
    flip(tmp_path / "checkpoint-5" / loop.OPTIMIZER)
    with pytest.raises(Refused, match=r"optimizer.safetensors is not as it was written"):
        load_checkpoint(tmp_path / "checkpoint-5", run.bound, **run.others)


def test_what_only_pickle_could_save_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"callback": print}

    run = Run(RECIPES["plain"])
    with pytest.raises(Refused, match="others/odd/callback: a builtin_function_or_method"):
        save_checkpoint(tmp_path / "checkpoint-1", run.bound, position={}, odd=Odd())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("odd", [{(1, 2): 3}, {"a": np.arange(3)},
                                 {"a": torch.ones(2).to_sparse()}])  # fmt: skip
def test_what_would_not_come_back_is_refused(tmp_path: Path, odd: Any) -> None:
    run = Run(RECIPES["plain"])
    with pytest.raises(Refused, match="without pickle"):
        save_checkpoint(tmp_path / "checkpoint-1", run.bound, position={},
                        odd=SimpleNamespace(state_dict=lambda: odd))  # fmt: skip


def test_a_position_of_numpys_numbers_comes_back(tmp_path: Path) -> None:
    run, folder = Run(RECIPES["plain"]), tmp_path / "checkpoint-1"
    save_checkpoint(folder, run.bound, position={"row": np.int64(3), 5: "x"})
    assert load_checkpoint(folder, run.bound) == {"row": 3, 5: "x"}


def test_half_a_step_is_refused_unless_it_was_given_up(tmp_path: Path) -> None:
    run = Run(RECIPES["together"])
    run.step(micro=1)
    with pytest.raises(Refused, match="a step is half made"):
        save_checkpoint(tmp_path / "checkpoint-1", run.bound, position={}, **run.others)
    run.optimizer.zero_grad()  # the rest of an epoch, dropped
    save_checkpoint(tmp_path / "checkpoint-1", run.bound, position={}, **run.others)


def test_state_that_is_no_tensor_is_refused_and_wrappers_leave_no_trace(tmp_path: Path) -> None:
    class Counting(Net):
        def get_extra_state(self) -> dict[str, int]:
            return {"count": 1}

    def bind(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Recipe().bind(model, optimizer, total_steps=2)

    with pytest.raises(Refused, match="_extra_state: a module keeps state that is no tensor"):
        save_checkpoint(tmp_path / "checkpoint-1", bind(Counting(0)), position={})
    compiled: Any = torch.compile(Net(0), backend="eager")
    save_checkpoint(tmp_path / "checkpoint-1", bind(compiled), position={})
    other = Net(1)
    load_checkpoint(tmp_path / "checkpoint-1", bind(other))
    assert same(dict(other.state_dict()), dict(Net(0).state_dict()))


# --- the page -------------------------------------------------------------------------------------


def test_the_example_of_the_page_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    def ran(folder: str) -> dict[str, Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        space: dict[str, Any] = {}
        exec(example, space)
        assert space["bound"].step == 24
        return dict(space["model"].state_dict()) | space["bound"].state_dict()["tensors"]

    calls: list[int] = []

    def killed(*args: Any, **kwargs: Any) -> None:
        save_checkpoint(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_checkpoint", killed)
        ran("cut")
    assert (tmp_path / "cut" / "run" / "checkpoint-10").is_dir()
    assert same(ran("cut"), ran("whole"))
