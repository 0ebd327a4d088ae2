"""Each hook and each field of the view, seen from methods made for the purpose."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import HOOKS, Method, View
from holdfast.errors import Refused
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

LOG: list[tuple[str, ...]] = []


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    LOG.clear()


@dataclass(frozen=True, kw_only=True)
class Logged(Method):
    """Writes down every hook it is called in."""

    name: ClassVar[str] = "first"

    def prepare(self, model: nn.Module) -> nn.Module:
        LOG.append(("prepare", self.name))
        return model

    def read_rows(self, view: View) -> None:
        LOG.append(("read_rows", self.name))

    def begin_task(self, view: View) -> None:
        LOG.append(("begin_task", self.name))

    def loaded(self, view: View) -> None:
        LOG.append(("loaded", self.name))

    def mixed(self, view: View) -> Collection[str]:
        return ["encoder.layers.0.up.weight"]

    def weights(self, view: View, name: str, w: Tensor) -> Tensor:
        LOG.append(("weights", self.name))
        return w

    def penalty(self, view: View) -> Tensor:
        LOG.append(("penalty", self.name))
        return torch.zeros(())

    def penalty_grad_(self, view: View) -> None:
        LOG.append(("penalty_grad_", self.name))

    def before_step(self, view: View) -> None:
        LOG.append(("before_step", self.name))

    def after_step(self, view: View) -> None:
        LOG.append(("after_step", self.name))

    def unbound(self, view: View) -> None:
        LOG.append(("unbound", self.name))

    def end_task(self, view: View) -> None:
        LOG.append(("end_task", self.name))


@dataclass(frozen=True, kw_only=True)
class Second(Logged):
    name: ClassVar[str] = "second"


def bind(*methods: Method, **optimizer: Any) -> Bound:
    torch.manual_seed(0)
    recipe = Recipe(methods=methods)
    model = recipe.prepare(Classifier())
    made = torch.optim.AdamW(model.parameters(), **({"lr": 0.01} | optimizer))
    rows = [make_batch("one", 50)]
    return recipe.bind(model, made, total_steps=5, task="one", data=rows)


def step(bound: Bound, number: int = 0) -> Any:
    bound.optimizer.zero_grad()
    batch = make_batch("one", number)
    out = bound.models["one"](**batch)
    loss = out.loss + bound.penalty(batch, out)
    loss.backward()
    bound.optimizer.step()
    return loss


@pytest.mark.parametrize("order", [(Logged(), Second()), (Second(), Logged())])
def test_hooks_run_in_phases_and_in_recipe_order_within(order: tuple[Method, Method]) -> None:
    bound = bind(*order)
    bound.load_state_dict(bound.state_dict())
    step(bound)
    bound.unbind()
    bound.end_task()
    # What was put on last comes off first.
    in_turn = {hook: order[::-1] if hook == "unbound" else order for hook in HOOKS}
    assert [(hook, m.name) for hook in HOOKS for m in in_turn[hook]] == LOG


@dataclass(frozen=True, kw_only=True)
class Adding(Method):
    """Adds twice the task's own loss, in every step but the first."""

    name: ClassVar[str] = "adding"

    def penalty(self, view: View) -> Tensor:
        assert view.loss is not None
        return 2 * view.loss if view.step else torch.zeros(())


def test_penalties_are_means_of_what_was_added_since_they_were_last_asked() -> None:
    bound = bind(Adding(), Logged())
    step(bound)
    assert bound.penalties() == {}  # nothing that a weight has a part in
    totals = [float(step(bound, number).detach()) for number in (1, 2)]
    assert bound.penalties() == pytest.approx({"adding": 2 / 3 * sum(totals) / 2})
    assert bound.penalties() == {}
    bound.penalty(make_batch("one", 3), bound.models["one"](**make_batch("one", 3)))
    bound.begin_task("two", bound.optimizer, 5, model=bound.models["one"], data=[])
    assert bound.penalties() == {}  # of another task


def test_a_method_defines_what_it_overrides() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Quiet(Method):
        name: ClassVar[str] = "quiet"

    assert [h for h in HOOKS if Quiet.defines(h)] == []
    assert all(Logged.defines(h) for h in HOOKS)
    assert all(Second.defines(h) for h in HOOKS)  # inherited hooks count
    bound = bind(Quiet())
    assert not bound.has_penalty
    assert bound.penalty() == 0.0


# --- single hooks ---------------------------------------------------------------------------------


def method(name: str = "probe", **body: Any) -> Method:
    """A method of one or two hooks."""
    kind = type("Probe", (Method,), {"name": name, "__annotations__": {}, **body})
    return dataclass(frozen=True, kw_only=True)(kind)()


def test_mixed_weights_reach_the_forward_pass_in_recipe_order() -> None:
    name = "classifier.weight"

    def make(title: str, change: Any) -> Method:
        return method(title, mixed=lambda self, view: [f"one/{name}"],
                      weights=lambda self, view, n, w: change(w))  # fmt: skip

    bound = bind(make("a", lambda w: w + 1), make("b", lambda w: w * 2))
    model = bound.models["one"]
    w = model.state_dict()[name]
    torch.testing.assert_close(model.classifier.weight, (w + 1) * 2)
    assert torch.equal(model.eval().classifier.weight, w)


def test_a_penalty_and_its_closed_gradient_train_alike() -> None:
    """½Σw², as an autograd penalty and as the gradient w."""

    def penalty(self: Method, view: View) -> Tensor:
        return sum((0.5 * w.square().sum() for w in view.weights.values()), torch.zeros(()))

    def closed(self: Method, view: View) -> None:
        for name, w in view.weights.items():
            grad = view.grads[name]
            assert grad is not None
            grad.add_(w)

    found = []
    for chosen in (method(penalty=penalty), method(penalty_grad_=closed)):
        bound = bind(chosen)
        for number in range(3):
            torch.manual_seed(number)
            step(bound, number)
        found.append({n: w.detach().clone() for n, w in bound.weights.items()})
    for name, w in found[0].items():
        torch.testing.assert_close(found[1][name], w)


def test_a_gradient_of_none_leaves_a_tensor_out_exactly() -> None:
    name = "encoder.layers.0.up.weight"

    def leave_out(self: Method, view: View) -> None:
        view.grads[name] = None
        del view.grads["encoder.embeddings.weight"]

    bound = bind(method(before_step=leave_out), weight_decay=0.5)
    before = {n: w.detach().clone() for n, w in bound.weights.items()}
    step(bound)
    for n, w in bound.weights.items():
        left_out = n in (name, "encoder.embeddings.weight")
        assert torch.equal(w, before[n]) is left_out, n
        assert bool(bound.views["probe"].moments(n)) is not left_out, n


def test_previous_weights_are_kept_only_for_those_who_need_them() -> None:
    seen: list[dict[str, Tensor]] = []

    def look(self: Method, view: View) -> None:
        seen.append({n: w.clone() for n, w in view.previous.items()})

    bound = bind(method(after_step=look, needs_previous=True))
    before = {n: w.detach().clone() for n, w in bound.weights.items()}
    step(bound)
    for n, w in before.items():
        assert torch.equal(seen[0][n], w) and not torch.equal(bound.weights[n], w)
    assert bound.previous == {}
    bound = bind(method(after_step=look))
    step(bound)
    assert seen[1] == {}


def test_steps_count_and_scratch_is_forgotten() -> None:
    seen: list[tuple[int, int, int]] = []

    def before(self: Method, view: View) -> None:
        view.scratch["n"] = view.scratch.get("n", 0) + 1

    def after(self: Method, view: View) -> None:
        seen.append((view.step, view.total_steps, view.scratch["n"]))

    bound = bind(method(before_step=before, after_step=after))
    for _ in range(3):
        step(bound)
    assert seen == [(0, 5, 1), (1, 5, 1), (2, 5, 1)]
    assert bound.step == 3


# --- the view -------------------------------------------------------------------------------------


def test_rates_moments_and_parts_by_name() -> None:
    recipe = Recipe(methods=[method(before_step=lambda self, view: None)])
    model = Classifier()
    encoder, head = list(model.encoder.parameters()), list(model.classifier.parameters())
    optimizer = torch.optim.AdamW([{"params": encoder, "lr": 0.5}, {"params": head, "lr": 0.25}])
    bound = recipe.bind(model, optimizer, total_steps=5, task="one")
    view = bound.views["probe"]
    assert view.lr("one/classifier.bias") == 0.25
    optimizer.param_groups[0]["lr"] = torch.tensor(0.125)  # a scheduler's, or a tensor
    assert view.lr("encoder.embeddings.weight") == 0.125
    assert view.moments("one/classifier.bias") == {}
    step(bound)
    moments = view.moments("one/classifier.bias")
    assert moments is optimizer.state[model.classifier.bias] and "exp_avg" in moments
    assert view.parts["one/classifier.bias"] == "head"
    assert view.parts["encoder.embeddings.weight"] == "embeddings"
    assert view.modules["encoder.layers.1.up.weight"] == (model.encoder.layers[1].up,)
    assert view.grads.keys() == view.weights.keys() and len(view.grads) == len(view.weights)


def test_inputs_and_outputs_are_there_inside_penalty_only() -> None:
    seen: list[Any] = []

    def penalty(self: Method, view: View) -> Tensor:
        seen.append((view.inputs, view.outputs))
        return torch.zeros(())

    bound = bind(method(penalty=penalty))
    step(bound)
    assert seen[0][0]["tokens"].shape == (8, 5) and seen[0][1].logits.shape == (8, 3)
    view = bound.views["probe"]
    assert view.inputs is None and view.outputs is None
    with pytest.raises(Refused, match=r"view\.forward: no batch here"):
        view.forward()


def test_forward_replaces_weights_by_name_and_puts_them_back() -> None:
    bound = bind(method(before_step=lambda self, view: None))
    view, model = bound.views["probe"], bound.models["one"].eval()
    batch = make_batch("one", 0)
    plain = model(**batch).logits
    zeros = {n: torch.zeros_like(view.weights[n]) for n in ("one/classifier.weight",)}
    with torch.no_grad():
        replaced = view.forward(batch, weights=zeros).logits
    assert torch.equal(replaced, model.classifier.bias.expand(8, 3))
    assert torch.equal(view.forward(batch).logits, plain)
    with pytest.raises(RuntimeError, match="no_grad"):
        view.forward(batch, weights=zeros)
    with torch.no_grad(), pytest.raises(KeyError):
        view.forward(batch, weights={"one/classifier.weight": zeros["one/classifier.weight"],
                                     "nothing": torch.zeros(1)})  # fmt: skip
    assert torch.equal(view.forward(batch).logits, plain)


def test_forward_inside_a_penalty_has_dropout_of_its_own() -> None:
    """As R3F uses it: the training pass draws the same dropout with and without."""
    losses: dict[bool, list[float]] = {}
    for extra in (False, True):

        def penalty(self: Method, view: View, extra: bool = extra) -> Tensor:
            if not extra:
                return torch.zeros(())
            first, second = view.forward().logits, view.forward().logits
            assert not torch.equal(first, second)  # each pass draws its own
            assert first.requires_grad
            return 0.0 * first.sum()

        bound = bind(method(penalty=penalty), lr=0.0)
        torch.manual_seed(5)
        losses[extra] = [step(bound, n).item() for n in range(3)]
    assert losses[True] == losses[False]


def test_forward_of_another_task_uses_its_head() -> None:
    toy = ToyTraining(None)
    toy.begin("one")
    first = toy.model
    toy.begin("two")
    batch = make_batch("one", 0)
    for model in toy.models.values():
        model.eval()
    old = toy.bound.forward(batch, task="one").logits
    assert torch.equal(old, first(**batch).logits)
    assert not torch.equal(old, toy.bound.forward(batch).logits)
    with pytest.raises(Refused, match="no model of task 'zero'"):
        toy.bound.forward(batch, task="zero")


def test_evaluation_is_the_callers() -> None:
    scores: list[Any] = []
    bound = bind(method(after_step=lambda self, view: scores.append(view.evaluate())))
    bound.evaluate = lambda: {"accuracy": 0.5}
    step(bound)
    assert scores == [{"accuracy": 0.5}]
    with pytest.raises(RuntimeError, match=r"set bound\.evaluate"):
        bind(method(after_step=lambda self, view: view.evaluate())).views["probe"].evaluate()


def test_data_is_there_inside_end_task_only() -> None:
    seen: list[Any] = []
    bound = bind(method(end_task=lambda self, view: seen.append(list(view.data()))))
    batches = [make_batch("one", 0)]
    bound.end_task(batches)
    with pytest.raises(Refused, match="'one' has ended, and made no step since"):
        bound.end_task(batches)
    step(bound)
    bound.end_task(lambda: iter(batches))
    assert seen == [batches, batches]
    assert list(bound.views["probe"].data()) == []


def test_what_a_method_remembers_is_saved_by_name() -> None:
    def remember(self: Method, view: View) -> None:
        view.state.slot("mean")["one/classifier.bias"] = torch.arange(3.0)
        view.state.tensors["rows"] = {"a/b": torch.tensor([1])}
        view.state.numbers["deep"] = {"list": [1, 2]}

    bound = bind(method(after_step=remember))
    step(bound)
    saved = bound.state_dict()
    assert set(saved["tensors"]) == {
        "generator", "probe/weights/mean/one/classifier.bias", "probe/tensors/rows/a/b",
    }  # fmt: skip
    kept = copy.deepcopy(saved["meta"])
    bound.states["probe"].numbers["deep"]["list"].append(3)
    assert saved["meta"] == kept
    assert bound.states["probe"].bytes() == 3 * 4 + 8
    bound.load_state_dict(saved)
    assert bound.states["probe"].numbers["deep"] == {"list": [1, 2]}
    bound.states["probe"].numbers["deep"]["list"].append(3)
    assert saved["meta"] == kept
