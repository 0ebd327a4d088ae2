"""The contract suite itself: each broken method below is caught by the test that should."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from holdfast.engine.method import Method, Range, View
from holdfast.errors import Refused
from holdfast.testing import MethodContract
from holdfast.testing.__main__ import main

CAUGHT = (AssertionError, pytest.fail.Exception, Refused)


@dataclass(frozen=True, kw_only=True)
class Sound(Method):
    """A running mean of gradients, added to them; every way to break it is below.

    share: of the mean that is added.
    """

    name: ClassVar[str] = "sound"
    summary: ClassVar[str] = "adds a running mean of gradients"
    paper: ClassVar[str] = "none"
    bytes_per_weight: ClassVar[str] = "4 (the mean)"
    ranges: ClassVar[Mapping[str, Range]] = {"share": Range(0.1, 0.9)}

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def before_step(self, view: View) -> None:
        means = view.state.slot("mean")
        for name in view.weights:
            grad = view.grads[name]
            if grad is None:
                continue
            if name not in means:
                means[name] = torch.zeros_like(grad, dtype=torch.float32)
            means[name].mul_(0.9).add_(grad)
            grad.add_(means[name], alpha=self.share)


class TestSound(MethodContract):
    @pytest.fixture(params=[Sound(), Sound(share=0.1)], ids=repr)
    def method(self, request: pytest.FixtureRequest) -> Method:
        method: Method = request.param
        return method


def broken(**body: Any) -> Method:
    """`Sound` with something replaced."""
    kind = type("Broken", (Sound,), {"__doc__": Sound.__doc__, "__annotations__": {}, **body})
    made: Method = dataclass(frozen=True, kw_only=True)(kind)()
    return made


def caught(test: str, method: Method, *arguments: Any) -> None:
    with pytest.raises(CAUGHT):
        getattr(MethodContract(), test)(method, *arguments)


def test_undeclared_settings_and_names() -> None:
    caught("test_declares_what_it_is", broken(__doc__="Says nothing of its settings."))
    caught("test_declares_what_it_is", broken(name="Bad Name"))
    caught("test_declares_what_it_is", broken(bytes_per_weight="little"))


def test_unchecked_numbers() -> None:
    loose = broken(__annotations__={"share": float}, share=0.5)
    caught("test_impossible_numbers_are_refused", loose)


def test_ranges_beyond_what_is_allowed() -> None:
    for wrong in (Range(0.1, 1.0), Range(0.5, 0.5), Range(0.0, 0.5, log=True)):
        caught("test_ranges_are_within_what_is_allowed", broken(ranges={"share": wrong}))
    caught("test_ranges_are_within_what_is_allowed", broken(ranges={"shara": Range(0.1, 0.2)}))


def test_configuration_lost_in_a_file(tmp_path: Path) -> None:
    forgetful = broken(to_dict=lambda self: {})
    object.__setattr__(forgetful, "share", 0.25)
    caught("test_configuration_survives_a_file", forgetful, tmp_path)


def test_state_without_names_or_too_large() -> None:
    def unnamed(self: Method, view: View) -> None:
        view.state.slot("sum")["0"] = torch.zeros(1)

    def large(self: Method, view: View) -> None:
        Sound.before_step(self, view)  # type: ignore[arg-type]
        for name, mean in view.state.slot("mean").items():
            view.state.slot("copy")[name] = mean.clone()

    def misshaped(self: Method, view: View) -> None:
        for name, w in view.weights.items():
            view.state.slot("sum")[name] = torch.zeros(w.numel() + 1)

    for before in (unnamed, large, misshaped):
        with pytest.raises((*CAUGHT, RuntimeError)):
            MethodContract().test_state_follows_names_and_is_counted(broken(before_step=before))


def test_memory_outside_the_bound() -> None:
    hidden: dict[str, int] = {}

    def count(self: Method, view: View) -> None:
        hidden["steps"] = hidden.get("steps", 0) + 1
        for name in view.weights:
            grad = view.grads[name]
            assert grad is not None
            grad.mul_(1 + hidden["steps"])

    for task, step in (("one", 2), ("two", 4), ("one", None)):
        caught(
            "test_saved_and_loaded_it_goes_on_bit_for_bit", broken(before_step=count), task, step
        )


def test_global_randomness() -> None:
    def noise(self: Method, view: View) -> None:
        for name in view.weights:
            grad = view.grads[name]
            assert grad is not None
            grad.add_(torch.randn_like(grad))

    caught("test_global_randomness_is_untouched", broken(before_step=noise))


def test_order_of_parameters() -> None:
    def first(self: Method, view: View) -> None:
        grad = view.bound.optimizer.param_groups[0]["params"][0].grad
        grad.zero_()

    caught("test_order_in_the_optimizer_does_not_matter", broken(before_step=first))


def test_frozen_weights_that_move() -> None:
    def shrink(self: Method, view: View) -> None:
        for w in view.weights.values():
            w.mul_(0.99)

    caught("test_frozen_weights_are_not_touched", broken(after_step=shrink))


def test_sums_in_the_type_of_the_weights() -> None:
    def narrow(self: Method, view: View) -> None:
        for name in view.weights:
            grad = view.grads[name]
            assert grad is not None
            means = view.state.slot("mean")
            means[name] = means.get(name, torch.zeros_like(grad)) + grad

    caught("test_bfloat16_weights_keep_exact_sums", broken(before_step=narrow))


def test_hooks_left_on_the_model() -> None:
    def hook(self: Method, view: View) -> None:
        model = view.bound.models[view.task]
        model.register_forward_hook(lambda m, i, out: None)

    caught("test_unbinding_leaves_the_model_as_it_was", broken(begin_task=hook))


def test_evaluation_that_is_changed() -> None:
    def hook(self: Method, view: View) -> None:
        layer = next(iter(view.modules["encoder.layers.1.down.weight"]))
        layer.register_forward_hook(lambda m, i, out: out * 1.01)

    caught("test_evaluation_sees_the_weights_themselves", broken(begin_task=hook))


def test_noise_for_each_micro_batch() -> None:
    def weights(self: Method, view: View, name: str, w: Tensor) -> Tensor:
        return w * (torch.rand(w.shape, generator=view.generator) > 0.3)

    def mixed(self: Method, view: View) -> Collection[str]:
        return ["encoder.layers.0.up.weight"]

    caught("test_accumulation_equals_a_large_batch", broken(weights=weights, mixed=mixed))


def test_work_before_the_gradients_are_known_to_be_finite() -> None:
    """A hook on gradients themselves runs in steps that are then left out."""

    def hook(self: Method, view: View) -> None:
        view.state.numbers["seen"] = 0

        def see(*_: Any) -> None:
            view.state.numbers["seen"] += 1

        view.bound.optimizer.register_step_pre_hook(see)

    for value in (float("inf"), float("nan")):
        caught("test_non_finite_gradients_change_nothing", broken(begin_task=hook), value)


def test_saved_numbers_that_change_later() -> None:
    def end(self: Method, view: View) -> None:
        view.state.numbers.setdefault("tasks", []).append(view.task)

    # The engine copies them: a method cannot break this one.
    MethodContract().test_saved_state_does_not_change_afterwards(broken(end_task=end))


# --- from the command line ------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
OWN = "examples/own_method.py:HoldHead"


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "holdfast.testing", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_tests_defaults_and_every_settings() -> None:
    done = suite(OWN, "--settings", "{strength: 3.0}", "--settings", '{"strength": 0.25}',
                 "-k", "survives or accumulation", "-rA", "--accumulates", "no")  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "3 passed, 3 skipped" in done.stdout
    assert all(f"HoldHead(strength={value})" in done.stdout for value in (1.0, 3.0, 0.25))


def test_the_command_finds_what_is_wrong(tmp_path: Path) -> None:
    """In a file that shares its name with a module of Python's."""
    text = (ROOT / "examples" / "own_method.py").read_text(encoding="utf-8")
    file = tmp_path / "json.py"
    file.write_text(text.replace("strength: λ ≥ 0.", ""), encoding="utf-8")
    done = suite(f"{file}:HoldHead", "-k", "declares or survives")
    assert done.returncode == 1
    assert "strength is not in the docstring" in done.stdout and "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([OWN.replace("HoldHead", "HoldHeat")], "did you mean 'HoldHead'?"),
        ([OWN.partition(":")[0]], "say MODULE:CLASS or FILE.py:CLASS"),
        (["nowhere.py:Mine"], "nowhere.py: no such file"),
        (["holdfast.methods.common.subnetwork:LeavesOut"], "declares no name, summary, paper, by"),
        (["nowhere.mine:Mine"], "No module named 'nowhere'"),
        ([OWN, "--settings", "{strenth: 1.0}"], "did you mean 'strength'?"),
        ([OWN, "--settings", "{strength: -1.0}"], "hold_head.strength"),
    ],
)
def test_the_command_refuses_in_one_line(words: list[str], says: str) -> None:
    done = suite(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_the_command_says_that_pytest_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["holdfast.methods.ewc:EWC"]) == 2
    assert "needs pytest; pip install" in capsys.readouterr().err
