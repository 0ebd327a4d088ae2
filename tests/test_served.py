"""What docs/optimizers.md says is served: every optimizer, and what is refused instead."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import SERVED, STAGE, STEPS, Learner, Reference, backward
from tiny import adamw, bind, net
from torch import Tensor, nn

from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, L2SP, Replay
from holdfast.recipe import Recipe
from holdfast.testing.contract import same

ROOT = Path(__file__).parents[1]
DENSE = DPS(drop=0.5, stage=STAGE, modules="all")


@pytest.fixture(params=SERVED)
def optimizer(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes", reason="60 MB that few need: pip install bitsandbytes")
    return name


@pytest.fixture(params=["float32", "bfloat16", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    return found


def test_held_entries_stay_and_free_ones_move_as_by_the_reference(
    optimizer: str, dtype: torch.dtype
) -> None:
    follow_the_reference(optimizer, dtype)


@pytest.mark.parametrize("name", [name for name in SERVED if name.startswith("SGD")])
def test_float16_weights_follow_the_reference(name: str) -> None:
    """The ε of Adam and its kin is zero in float16: they run away, bound or not."""
    follow_the_reference(name, torch.float16)


def follow_the_reference(optimizer: str, dtype: torch.dtype) -> None:
    ours, reference = Learner(optimizer, DENSE, dtype), Reference(optimizer, 0.5, dtype)
    start, moved = ours.weights(), 0
    for step in range(STEPS):
        if step % STAGE == 0:
            start = ours.weights()
        ours.step(step)
        reference.step(step)
        same(ours.weights(), reference.weights())
        if step % (2 * STAGE) in range(STAGE, 2 * STAGE - 1):
            for name, frozen in ours.frozen().items():
                now = ours.weights()[name]
                assert 0 < frozen.sum() < frozen.numel()
                assert torch.equal(now[frozen], start[name][frozen]), (name, step)
                moved += int((now != start[name])[~frozen].sum())
    assert moved > 0
    assert ours.bound.step == STEPS


def test_zeroed_gradients_alone_do_not_hold_entries(optimizer: str) -> None:
    """Why `freeze="exact"` exists, and that the test above is not passed by doing nothing."""
    ours = Learner(optimizer, DPS(drop=0.5, stage=STAGE, modules="all", freeze="gradient"))
    for step in range(STAGE + 2):
        if step == STAGE:
            start = ours.weights()
        ours.step(step)
    drifted = [(ours.weights()[n] != start[n])[f].any() for n, f in ours.frozen().items()]
    # Signs of gradients are its only state.
    assert any(drifted) is not (optimizer == "Rprop")


@pytest.mark.parametrize("at", [2, STAGE + 1])
def test_saved_in_the_middle_of_a_stage_it_goes_on_bit_for_bit(optimizer: str, at: int) -> None:
    whole = Learner(optimizer, DENSE)
    for step in range(at):
        whole.step(step)
    saved = copy.deepcopy(
        (whole.model.state_dict(), whole.optimizer.state_dict(), whole.bound.state_dict())
    )
    other = Learner(optimizer, DENSE)
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    other.bound.load_state_dict(saved[2])
    for step in range(at, STEPS):
        whole.step(step)
        other.step(step)
        same(other.weights(), whole.weights())
    same(other.bound.state_dict()["tensors"], whole.bound.state_dict()["tensors"])


def test_a_step_that_is_not_finite_changes_nothing(optimizer: str) -> None:
    ours, plain = Learner(optimizer, DENSE), Learner(optimizer, DENSE)
    for step in range(2 * STAGE):
        backward(ours.model, ours.optimizer, step)
        w = next(iter(ours.bound.weights.values()))
        assert w.grad is not None
        w.grad.view(-1)[1] = float("nan") if step % 2 else float("inf")
        ours.optimizer.step()
        ours.step(step)
        plain.step(step)
    same(ours.weights(), plain.weights())
    same(ours.bound.state_dict()["tensors"], plain.bound.state_dict()["tensors"])
    same_nested(ours.optimizer.state_dict(), plain.optimizer.state_dict())
    assert (ours.bound.step, ours.bound.skipped) == (2 * STAGE, 2 * STAGE)


def same_nested(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            same_nested(one[key], two[key])
    elif isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, list):
        for a, b in zip(one, two, strict=True):
            same_nested(a, b)
    else:
        assert one == two


@pytest.mark.parametrize("enabled", [True, False])
def test_the_loss_scale_changes_nothing(optimizer: str, enabled: bool) -> None:
    """Nor an overflow, which is counted, whether the optimizer is fused or not."""
    plain = Learner(optimizer, DENSE)
    for step in range(2 * STAGE):
        plain.step(step)
    for scale in (1.0, 65536.0):
        ours = Learner(optimizer, DENSE)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        for step in range(2 * STAGE):
            for overflow in (True, False) if enabled else (False,):
                backward(ours.model, ours.optimizer, step)
                for w in ours.bound.weights.values():
                    assert w.grad is not None
                    w.grad.mul_(scaler.scale(torch.ones(())))
                    if overflow:
                        w.grad.view(-1)[0] = float("inf")
                scaler.step(ours.optimizer)
                scaler.update()
        same(ours.weights(), plain.weights())  # powers of two scale exactly
        same(ours.bound.state_dict()["tensors"], plain.bound.state_dict()["tensors"])
        assert (ours.bound.step, ours.bound.skipped) == (6, 6 if enabled else 0)


# --- what is refused ------------------------------------------------------------------------------


class NoHooks:
    """Looks like an optimizer, and never calls what is registered."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups = [{"params": list(model.parameters())}]

    def register_step_pre_hook(self, hook: Any) -> None: ...

    def register_step_post_hook(self, hook: Any) -> None: ...

    def step(self) -> None: ...


class TwoSets(torch.optim.SGD):
    """Schedule-free: it trains at one point and is evaluated at another."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class OwnScaling(torch.optim.SGD):
    """Takes the scaler itself, as torch once asked for."""

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any: ...


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "LBFGS": (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS runs its closure several"),
    "SparseAdam": (lambda m: torch.optim.SparseAdam(m.parameters()), "sparse gradients only"),
    "schedule-free": (lambda m: TwoSets(m.parameters()), "evaluates other weights than it trains"),
    "maximize=True": (lambda m: adamw(m, maximize=True), "climbs penalties too"),
    "differentiable=True": (lambda m: adamw(m, differentiable=True), "keeps a graph"),
    "step() without hooks": (NoHooks, r"step\(\) of NoHooks runs no step hooks"),
    "own GradScaler": (lambda m: OwnScaling(m.parameters()), "handles a GradScaler by itself"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused_at_bind(what: str) -> None:
    make, reason = REFUSED[what]
    model = net()
    with pytest.raises(Refused, match=reason) as refusal:
        bind(model, make(model), DPS())
    assert ";" in str(refusal.value)  # a remedy stands behind it
    assert type(model[0]) is nn.Linear


# --- Lightning ------------------------------------------------------------------------------------


def lightning_example() -> Any:
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples/lightning_module.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METHODS = [
    [DPS(drop=0.3, stage=4), L2SP()],
    [DPS(drop=0.3, stage=4, mix=True)],
    [EWC(), Replay(memory=4)],
]


@pytest.mark.parametrize("methods", METHODS, ids=["dense", "mix", "penalties"])
def test_lightning_gives_the_masks_of_a_plain_loop(methods: list[Method], tmp_path: Path) -> None:
    """On the same batches, in one go and stopped in the middle of a stage."""
    example = lightning_example()
    recipe, rows = Recipe(methods=methods, max_grad_norm=0.5), example.batches()
    loader = torch.utils.data.DataLoader(rows, batch_size=None)

    model = example.tiny_bert()
    groups = recipe.param_groups(model, lr=5e-3, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, fused=True)
    bound = recipe.bind(model, optimizer, total_steps=12)
    for index, batch in enumerate([*rows, *rows]):
        output = model(**batch)
        loss = output.loss + (bound.penalty(batch, output) if bound.has_penalty else 0)
        (loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert bound.step == 12

    # Lightning itself goes on from the ends of epochs only: here step 6, in the second stage.
    keep = example.pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = example.Tuned(example.tiny_bert(), recipe)
    example.trainer(enable_checkpointing=True, callbacks=[keep]).fit(whole, loader)
    resumed = example.Tuned(example.tiny_bert(), recipe)
    example.trainer().fit(resumed, loader, ckpt_path=tmp_path / "epoch=0.ckpt")
    for module in (whole, resumed):
        same(dict(module.model.state_dict()), dict(model.state_dict()))
        same(module.bound.state_dict()["tensors"], bound.state_dict()["tensors"])
        assert (module.bound.step, module.bound.skipped) == (12, 0)


def test_lightning_covers_are_unwrapped() -> None:
    pl = pytest.importorskip("pytorch_lightning")
    model = net()
    inner = adamw(model)
    assert bind(model, pl.core.optimizer.LightningOptimizer(inner)).optimizer is inner


# --- the table ------------------------------------------------------------------------------------


def rows() -> Iterator[tuple[str, list[str]]]:
    """The first cell of each row of docs/optimizers.md, and the tests that it names."""
    for line in (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| ") and not cells[0].startswith("What"):
            yield cells[0].strip("`"), re.findall(r"`(test_\w+)`", cells[-1])


def test_the_table_names_every_optimizer_and_real_tests() -> None:
    table = dict(rows())
    assert not [name for name in (*SERVED, *REFUSED) if name not in table]
    written = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py"))
    written += (ROOT / "holdfast" / "testing" / "contract.py").read_text(encoding="utf-8")
    real = set(re.findall(r"def (test_\w+)\(", written))
    assert not [(row, test) for row, tests in table.items() for test in tests if test not in real]
    assert not [row for row, tests in table.items() if not tests]
