"""What Trainer's own resume loses: half a window, an order of parameters, types of moments; and
signals, after which the step that ran is saved."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import arguments, bert, collate, rows, same
from test_checkpoints import DROPOUT, RECIPES, StopAt, everything, two_tasks
from test_damage import SAVING
from torch import Tensor

import holdfast
from holdfast import Recipe, Refused
from holdfast.training import stopping
from holdfast.training.manifest import damage, newest_complete
from holdfast.training.stopping import Stopped


def at_micro_batch(monkeypatch: pytest.MonkeyPatch, number: int, do: Any) -> None:
    """Call `do` before a micro-batch of the second task; the first one has six."""
    original, calls = transformers.Trainer.training_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6 + number:
            do()
        return original(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", counted)


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["together", "dps_mix"])
def test_killed_within_a_window_it_goes_on_from_the_last_whole_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six micro-batches an epoch in windows of two: the tenth is the second half of step 5."""

    def killed() -> None:
        raise KeyboardInterrupt

    whole = two_tasks(tmp_path / "whole", RECIPES[name])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_micro_batch(patch, 10, killed)
        two_tasks(tmp_path / "cut", RECIPES[name], save_strategy="steps", save_steps=4)
    checkpoint = newest_complete(tmp_path / "cut" / "two")
    assert checkpoint is not None and checkpoint.name == "checkpoint-4"
    again = two_tasks(tmp_path / "cut", RECIPES[name], resume=True)
    assert same(everything(again), everything(whole))


def test_another_order_of_parameters_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch takes moments by position: those of two layers of one shape would change places."""
    two_tasks(tmp_path, RECIPES["plain"], stop=4)
    original = Recipe.param_groups

    def backwards(self: Recipe, *args: Any, **kwargs: Any) -> Any:
        groups = original(self, *args, **kwargs)
        for group in groups:
            group["params"] = list(group["params"])[::-1]
        return groups

    monkeypatch.setattr(Recipe, "param_groups", backwards)
    with pytest.raises(Refused, match=r"order changed: .* stands where .* stood") as refusal:
        two_tasks(tmp_path, RECIPES["plain"], resume=True)
    assert "exact_resume" not in str(refusal.value)  # which would not help


class Counting(torch.optim.SGD):
    """Keeps what its parameters' type cannot hold."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                state.setdefault("count", torch.tensor([300_000_000]))
                state.setdefault("sum", torch.zeros_like(w, dtype=torch.float32))
                state["count"] += 1
                state["sum"] += w.grad.float() / 3
                w -= group["lr"] * state["sum"].to(w.dtype)


def test_moments_keep_their_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch casts them to bfloat16: 300000001 becomes 299892736 (faults N10)."""

    class Narrow(transformers.Trainer):
        def get_optimizer_cls_and_kwargs(self, *_: Any) -> Any:
            return Counting, {"lr": 1e-3}

    monkeypatch.setattr(Narrow, "get_optimizer_cls_and_kwargs", lambda *_: (Counting, {"lr": 1e-3}))
    cls = holdfast.with_recipe(Narrow)

    def trained(out: Path, *, stop: int | None = None, resume: Any = None) -> Any:
        trainer = cls(
            model=bert(**DROPOUT).bfloat16(), args=arguments(out), data_collator=collate,
            train_dataset=rows(22), callbacks=[StopAt(stop)] if stop else None,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def state(trainer: Any) -> dict[str, Tensor]:
        found = trainer.bound.optimizer.state
        return {
            f"{n}|{k}": v for n, w in trainer.bound.weights.items() for k, v in found[w].items()
        }

    whole = trained(tmp_path / "whole")
    trained(tmp_path / "cut", stop=3)
    again = trained(tmp_path / "cut", resume=True)
    assert {str(v.dtype) for v in state(again).values()} == {"torch.int64", "torch.float32"}
    assert same(state(again), state(whole)) and same(everything(again), everything(whole))


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Any:
    """The handlers of a test's surroundings, which must be back at its end."""
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert not stopping.active() and not stopping.asked()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(("micro", "step"), [(9, 5), (12, 6), (18, 9)])
def test_a_trainer_that_asks_for_it_saves_the_step_and_stops(
    micro: int, step: int, number: int, code: int, tmp_path: Path, handlers: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the middle of an epoch, at its end, and in the last step of all."""
    if (micro, number) == (9, signal.SIGTERM):
        whole = everything(two_tasks(tmp_path / "whole", RECIPES["dps_mix"]))
    more = {"save_strategy": "epoch"} if step == 6 else {}
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        at_micro_batch(patch, micro, lambda: os.kill(os.getpid(), number))
        patch.setattr(
            holdfast.Trainer, "__init__", _asking(holdfast.Trainer.__init__), raising=True
        )
        two_tasks(tmp_path / "cut", RECIPES["dps_mix"], **more)
    assert stopped.value.code == code and isinstance(stopped.value, SystemExit)
    newest = newest_complete(tmp_path / "cut" / "two")
    assert newest is not None and newest.name == f"checkpoint-{step}"
    assert damage(newest) is None
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("holdfast:")]
    assert len(said) == 1 and f"step {step} is saved in {tmp_path}" in said[0]
    if (micro, number) == (9, signal.SIGTERM):
        again = two_tasks(tmp_path / "cut", RECIPES["dps_mix"], resume=True)
        assert same(everything(again), whole)


def test_what_was_saved_stays_beside_the_best(tmp_path: Path, handlers: None) -> None:
    """Trainer ends with all but the best removed, at a limit of one (faults P18)."""

    class Growing(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:  # in step 8
                os.kill(os.getpid(), signal.SIGTERM)

        def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            more["metrics"]["eval_loss"] = float(state.global_step)  # the first is the best

    args = arguments(
        tmp_path, **SAVING, eval_strategy="steps", eval_steps=3, num_train_epochs=3,
        save_total_limit=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = holdfast.Trainer(
        model=bert(), args=args, train_dataset=rows(22), eval_dataset=rows(4),
        data_collator=collate, callbacks=[Growing()], stop_on_signals=True,
    )  # fmt: skip
    with pytest.raises(Stopped):
        trainer.train()
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-8"}
    assert args.save_total_limit == 1


def _asking(original: Any) -> Any:
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, stop_on_signals=True, **kwargs)

    return made


def test_a_trainer_that_does_not_ask_is_interrupted_as_ever(
    tmp_path: Path, handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_micro_batch(patch, 9, lambda: os.kill(os.getpid(), signal.SIGINT))
        two_tasks(tmp_path, RECIPES["plain"], **SAVING)
    newest = newest_complete(tmp_path / "two")
    assert newest is not None and newest.name == "checkpoint-3"


def test_an_error_puts_the_handlers_back(tmp_path: Path, handlers: None) -> None:
    with pytest.raises(ZeroDivisionError), stopping.handled(), stopping.looking():
        raise ZeroDivisionError
    with pytest.raises(Stopped), stopping.handled():  # outside of a loop: at once
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_loop_in_a_loop_and_other_threads(handlers: None) -> None:
    with stopping.handled():
        inner = stopping.handled()
        with inner:
            assert stopping.active()
        assert stopping.active()  # the outer one still holds
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(bool(stopping.install())))
        thread.start()
        thread.join(10)
        assert done == [True]
    with stopping.handled():
        assert not stopping.asked()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_ends_when_it_is_told(handlers: None) -> None:
    """A pool made within training ends its processes by SIGTERM, and waits for them."""
    with stopping.handled(), stopping.looking():
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begun, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        os.close(ready), os.close(begun)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert not stopping.asked()


def test_what_is_ignored_stays_ignored(handlers: None) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.handled():
            os.kill(os.getpid(), signal.SIGINT)
            assert not stopping.asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_stopped_survives_pickling() -> None:
    """A worker's is sent to the first process."""
    found = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM)))  # noqa: S301 - our own
    assert (found.code, found.number, str(found)) == (143, 15, "stopped by SIGTERM")
