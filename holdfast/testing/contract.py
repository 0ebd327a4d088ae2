"""The contract suite: what every method must satisfy, as tests to inherit.

    from holdfast.testing import MethodContract

    class TestMine(MethodContract):
        @pytest.fixture(params=[Mine(), Mine(strength=3.0)], ids=repr)
        def method(self, request):
            return request.param

Each test trains a tiny classifier on two tasks that share an encoder, with dropout, weight decay,
momentum and clipping.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.method import HOOKS, Method
from holdfast.errors import Refused
from holdfast.files import read_yaml, write_yaml
from holdfast.testing.toy import TASKS, Classifier, ToyTraining, make_batch

CUTS = [("one", 1), ("one", 2), ("one", 5), ("one", 9), ("one", None), ("two", 1), ("two", 4)]


class MethodContract:
    """Inherit, and override the fixture `method`.

    bytes_per_weight: the limit of what the method remembers; None: the largest number in its
        `bytes_per_weight`.
    accumulates: whether two micro-batches of four rows equal one of eight; False for methods
        that draw anew for each micro-batch.
    """

    bytes_per_weight: ClassVar[float | None] = None
    accumulates: ClassVar[bool] = True

    @pytest.fixture
    def method(self) -> Method:
        raise NotImplementedError("override the fixture `method`")

    def limit(self, method: Method) -> float:
        """Bytes that the method may remember per weight."""
        if self.bytes_per_weight is not None:
            return self.bytes_per_weight
        return max(float(n) for n in re.findall(r"\d+(?:\.\d+)?", method.bytes_per_weight))

    # --- configuration ------------------------------------------------------------------------

    def test_declares_what_it_is(self, method: Method) -> None:
        kind = type(method)
        assert re.fullmatch(r"[a-z][a-z0-9_]*", kind.name), "the name is a YAML key"
        assert kind.summary and "\n" not in kind.summary
        assert kind.paper and re.search(r"\d", kind.bytes_per_weight)
        assert kind.__doc__, "a docstring explains the settings"
        for f in fields(method):
            assert re.search(rf"\b{f.name}\b", kind.__doc__), f"{f.name} is not in the docstring"
        assert any(kind.defines(hook) for hook in HOOKS)

    def test_configuration_survives_a_file(self, method: Method, tmp_path: Path) -> None:
        path = tmp_path / "settings.yaml"
        write_yaml(path, method.to_dict())
        again = type(method).from_dict(read_yaml(path), where=str(path))
        assert again == method
        assert hash(again) == hash(method)
        assert again.to_dict() == json.loads(json.dumps(method.to_dict(), allow_nan=False))

    def test_misspelt_setting_is_refused(self, method: Method) -> None:
        for f in fields(method):
            with pytest.raises(Refused, match=f"did you mean '{f.name}'") as refusal:
                type(method).from_dict({f"{f.name}z": getattr(method, f.name)}, where="here")
            assert "here" in str(refusal.value)

    def test_impossible_numbers_are_refused(self, method: Method) -> None:
        for f in fields(method):
            value = getattr(method, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            for wrong in (math.nan, math.inf, -math.inf, True, "1", 1e16, -1e14, -(10**30)):
                with pytest.raises(Refused, match=f"{method.name}.{f.name}"):
                    replace(method, **{f.name: wrong})

    def test_ranges_are_within_what_is_allowed(self, method: Method) -> None:
        for name, (low, high, log) in method.ranges.items():
            assert name in {f.name for f in fields(method)}
            assert low < high and (low > 0 or not log)
            whole = type(getattr(type(method)(), name)) is int
            for value in (low, high):
                replace(method, **{name: int(value) if whole else value})

    # --- state --------------------------------------------------------------------------------

    def test_state_follows_names_and_is_counted(self, method: Method) -> None:
        toy = ToyTraining(method)
        for task in TASKS:
            toy.begin(task)
            weights = toy.bound.weights
            learned = {id(p): p for m in toy.models.values() for p in m.parameters()}
            count = sum(p.numel() for p in learned.values())
            for step in range(toy.steps):
                toy.learn(step, step + 1)
                held = 0
                for slot in toy.bound.states[method.name].weights.values():
                    for name, tensor in slot.items():
                        assert name in weights or name.split("/")[0] in TASKS, name
                        if name in weights:
                            torch.broadcast_shapes(tensor.shape, weights[name].shape)
                        held += tensor.numel() * tensor.element_size()
                assert held / count <= self.limit(method) + 0.25, "bytes per weight"
            toy.end()

    @pytest.mark.parametrize(("task", "step"), CUTS)
    def test_saved_and_loaded_it_goes_on_bit_for_bit(
        self, method: Method, task: str, step: int | None
    ) -> None:
        whole = ToyTraining(method).learn_all()
        first = ToyTraining(method)
        for current in TASKS[: TASKS.index(task)]:
            first.begin(current)
            first.learn()
            first.end()
        first.begin(task)
        first.learn(0, step)
        if step is None:
            first.end()
        second = ToyTraining.load(first.save(), method, closed=step is None)
        if step is not None:
            second.learn(step)
            second.end()
        for current in TASKS[TASKS.index(task) + 1 :]:
            second.begin(current)
            second.learn()
            second.end()
        same(second.everything(), whole.everything())

    def test_saved_state_does_not_change_afterwards(self, method: Method) -> None:
        toy = ToyTraining(method)
        toy.begin("one")
        toy.learn()
        toy.end()
        meta = toy.bound.state_dict()["meta"]
        before = json.dumps(meta)
        toy.begin("two")
        toy.learn()
        toy.end()
        assert json.dumps(meta) == before

    def test_a_task_may_be_ended_and_gone_on_with(self, method: Method) -> None:
        toy = ToyTraining(method)
        toy.begin("one")
        toy.learn(0, 3)
        toy.end()
        saved = toy.bound.state_dict()["tensors"]
        if type(method).per_task:
            assert not any(key.startswith(f"{method.name}/weights/") for key in saved)
        toy.learn(3)
        with contextlib.suppress(Refused):  # where the start of the task is gone, say
            toy.end()
        _finite(toy.weights())

    # --- manners ------------------------------------------------------------------------------

    def test_unbinding_leaves_the_model_as_it_was(self, method: Method) -> None:
        plain, toy = ToyTraining(None), ToyTraining(method)
        for p in (plain, toy):
            p.begin("one")
        keys = list(toy.model.state_dict())
        toy.learn()
        assert list(toy.model.state_dict()) == keys
        plain.bound.unbind()
        toy.bound.unbind()
        if not type(method).defines("prepare"):
            assert _anatomy(toy.model) == _anatomy(plain.model)
        assert _hooks(toy.optimizer) == [0, 0]

    def test_the_model_can_be_copied_and_saved_whole(self, method: Method) -> None:
        """As a reference or a running mean is: what a copy does is nothing to the recipe."""
        toy, alone = ToyTraining(method), ToyTraining(method)
        for each in (toy, alone):
            each.begin("one")
            each.learn()
            each.end()
            each.begin("two")
            each.learn(0, 3)
            each.backward(3)
            if each is toy:
                torch.save(toy.model, io.BytesIO())
                with torch.random.fork_rng():
                    copy.deepcopy(toy.model).train()(**make_batch("one", 0)).loss.backward()
            each.learn(3)
        same(toy.everything(), alone.everything())

    def test_global_randomness_is_untouched(self, method: Method) -> None:
        states = []
        for used in (None, method):
            toy = ToyTraining(used)
            seen = []
            for task in TASKS:
                toy.begin(task)
                torch.manual_seed(3)
                toy.learn()
                toy.end()
                seen.append(torch.get_rng_state())
            states.append(seen)
        for plain, ours in zip(*states, strict=True):
            assert torch.equal(plain, ours), "the method draws elsewhere than from view.generator"

    def test_frozen_weights_are_not_touched(self, method: Method) -> None:
        layers = "encoder.layers"
        frozen = {"encoder.embeddings.weight", f"{layers}.0.up.weight", f"{layers}.1.up.bias"}
        toy = ToyTraining(method, frozen=frozen)
        toy.begin("one")
        before = toy.weights()
        toy.learn()
        toy.end()
        after = toy.weights()
        for name in frozen:
            assert torch.equal(after[f"one: {name}"], before[f"one: {name}"]), name
        toy.frozen = ()  # unfrozen later, all works
        toy.begin("two")
        toy.learn()
        toy.end()
        _finite(toy.weights())

    def test_order_in_the_optimizer_does_not_matter(self, method: Method) -> None:
        forwards = ToyTraining(method).learn_all()
        backwards = ToyTraining(method, reverse=True).learn_all()
        same(backwards.everything(), forwards.everything())

    def test_evaluation_sees_the_weights_themselves(self, method: Method) -> None:
        toy = ToyTraining(method)
        toy.begin("one")
        if type(method).defines("prepare"):
            return  # there is no plain model to compare with
        batch = make_batch("one", 100)
        for step in range(toy.steps):
            toy.learn(step, step + 1)
            plain = Classifier()
            plain.load_state_dict(toy.model.state_dict())
            toy.model.eval()
            assert torch.equal(toy.model(**batch).logits, plain.eval()(**batch).logits)
            toy.model.train()

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_non_finite_gradients_change_nothing(self, method: Method, value: float) -> None:
        toy = ToyTraining(method)
        for task in TASKS:
            toy.begin(task)
            for step in range(toy.steps):
                before, skipped = toy.everything(), toy.bound.skipped
                toy.backward(step)
                grad = next(p.grad for p in toy.model.parameters() if p.grad is not None)
                grad.view(-1)[0] = value
                toy.optimizer.step()
                same(toy.everything(), before)
                assert toy.bound.skipped == skipped + 1
                toy.learn(step, step + 1)
            toy.end()
        _finite(toy.weights())

    def test_bfloat16_weights_keep_exact_sums(self, method: Method) -> None:
        toy = ToyTraining(method, dtype=torch.bfloat16)
        for task in TASKS:
            toy.begin(task)
            started = _narrow(toy)
            toy.learn()
            assert all(w.dtype is torch.bfloat16 for w in toy.bound.weights.values())
            # A copy of weights may be bfloat16, a sum may not: counting by ones stops at 256.
            for name, tensor in _narrow(toy).items():
                assert name in started and torch.equal(tensor, started[name]), name
            toy.end()
        _finite(toy.weights())

    def test_accumulation_equals_a_large_batch(self, method: Method) -> None:
        if not self.accumulates:
            pytest.skip("draws anew for each micro-batch")
        whole, halves = ToyTraining(method, dropout=False), ToyTraining(method, dropout=False)
        for task in TASKS:
            for toy, pieces in ((whole, 1), (halves, 2)):
                toy.begin(task)
                # Rounding differences may tip a threshold: compare the first steps only.
                toy.learn(0, 3, pieces=pieces)
            ours, theirs = halves.weights(), whole.weights()
            for name in theirs:
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=name)
            for toy in (whole, halves):
                toy.end()
            for task_, model in halves.models.items():
                model.load_state_dict(whole.models[task_].state_dict())


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Everything is equal, tensors bit for bit and in dtype."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    for key, value in theirs.items():
        if not isinstance(value, Tensor):
            assert ours[key] == value, key
            continue
        assert ours[key].dtype == value.dtype, key
        equal = torch.equal(ours[key].nan_to_num(nan=7e30), value.nan_to_num(nan=7e30))
        assert equal, f"{key} differs by {(ours[key].double() - value.double()).abs().max()}"


def _finite(weights: Mapping[str, Tensor]) -> None:
    for name, w in weights.items():
        assert torch.isfinite(w).all(), name


def _narrow(toy: ToyTraining) -> dict[str, Tensor]:
    tensors = toy.bound.state_dict()["tensors"].items()
    return {k: t.clone() for k, t in tensors if t.dtype in (torch.bfloat16, torch.float16)}


def _anatomy(model: nn.Module) -> list[Any]:
    """Class, attributes and hooks of every module, hooks of every parameter."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
        found.append([name, type(module), sorted(vars(module)), hooks])
    return found + [[name, bool(p._backward_hooks)] for name, p in model.named_parameters()]


def _hooks(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
