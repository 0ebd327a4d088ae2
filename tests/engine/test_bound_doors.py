"""What a method can reach beside weights and gradients: rows, features, old heads, moments of a
bound's life; tasks learned elsewhere; parts by the recipe."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import models
import pytest
import torch
from models import bert, collate, rows, save_bert, write_task
from safetensors.torch import load, save
from torch import Tensor, nn

import holdfast
from holdfast.engine.batches import identities
from holdfast.engine.bound import Bound
from holdfast.engine.head_first import HeadFirst
from holdfast.engine.head_last import HeadLast
from holdfast.engine.method import Method, View
from holdfast.engine.plan import changed
from holdfast.errors import Refused, tell_once
from holdfast.methods import DPS, EWC, L2SP, ChildTuning, LwF, Merge, Replay
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch


class Passes:
    """How often an encoder really computed; `returning` passes over what is within."""

    def __init__(self, encoder: Any) -> None:
        self.count = 0
        encoder.embeddings.register_forward_hook(self._seen)

    def _seen(self, *_: Any) -> None:
        self.count += 1

    def since(self) -> int:
        found, self.count = self.count, 0
        return found


def second_task(*methods: Method, head_first: HeadFirst | None = None) -> tuple[Bound, nn.Module]:
    """A bound whose first task is learned, and the model of the second."""
    torch.manual_seed(0)
    one = Classifier()
    bound = Recipe(methods=methods, head_first=head_first).unbound()
    bound.begin_task("one", sgd(one), 3, model=one, data=data("one"))
    bound.end_task(data("one"))
    return bound, Classifier(classes=4, encoder=one.encoder)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def data(task: str, steps: int = 3) -> list[dict[str, Tensor]]:
    return [make_batch(task, step) for step in range(steps)]


# --- rows before a task ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reader(Method):
    """Reads the rows before every task, or before those after the first."""

    name: ClassVar[str] = "reader"
    later: bool = False

    def wants_rows(self, view: View) -> bool:
        return bool(view.finished) or not self.later

    def read_rows(self, view: View) -> None:
        seen = view.state.cache.setdefault("seen", [])
        modes = {m.training for m in view.bound.models[view.task].modules()}
        seen.append((view.inputs, view.outputs.logits, view.features, modes,
                     torch.is_grad_enabled()))  # fmt: skip

    def begin_task(self, view: View) -> None:
        view.state.cache["begun after"] = len(view.state.cache.get("seen", []))


class Asker(Reader):
    """Asks the old heads too."""

    name: ClassVar[str] = "asker"

    def read_rows(self, view: View) -> None:
        for task, outputs in view.old_outputs().items():
            view.state.cache.setdefault(task, []).append(outputs.logits)


def test_all_that_read_rows_before_a_task_share_one_pass() -> None:
    """Two methods, the answers of the old heads and the head's own fit: three batches, three."""
    bound, two = second_task(Reader(), Asker(), LwF(), head_first=HeadFirst())
    passes = Passes(two.encoder)
    bound.begin_task("two", sgd(two), 3, model=two, data=data("two"))
    assert passes.since() == 3
    assert bound.fitted is not None and bound.fitted["fit"] == "logistic"
    assert len(bound.states["reader"].cache["seen"]) == 3 + 3  # of the first task too
    asked = bound.states["asker"].cache["one"]
    one = bound.models["one"].eval()
    for logits, batch in zip(asked, data("two"), strict=True):
        assert torch.equal(logits, one(batch["tokens"]).logits)


def test_what_is_read_is_of_that_batch_in_evaluation_mode_before_begin_task() -> None:
    torch.manual_seed(0)
    model, batches = Classifier(), data("one")
    model.train()
    model.encoder.layers[0].eval()
    modes = [m.training for m in model.modules()]
    bound = Recipe(methods=[Reader()]).bind(model, sgd(model), total_steps=3, data=batches)
    assert [m.training for m in model.modules()] == modes
    cache = bound.states["reader"].cache
    assert cache["begun after"] == 3
    model.eval()
    for batch, (inputs, logits, features, modes_, grads) in zip(
        batches, cache["seen"], strict=True
    ):
        assert inputs is batch and modes_ == {False} and not grads
        assert torch.equal(logits, model(**batch).logits)
        assert torch.equal(features, model.encoder(batch["tokens"]))
    assert (bound.inputs, bound.outputs, bound.features) == (None, None, None)


def test_rows_are_read_only_where_they_are_wanted() -> None:
    torch.manual_seed(0)
    one = Classifier()
    passes = Passes(one.encoder)
    bound = Recipe(methods=[Reader(later=True)]).unbound()
    bound.begin_task("one", sgd(one), 3, model=one)  # without any rows
    bound.end_task()
    assert passes.since() == 0
    with pytest.raises(Refused, match=r"reader reads the rows of a task before.*pass data="):
        bound.begin_task("two", sgd(one), 3, model=one)
    bound.begin_task("two", sgd(one), 3, model=one, data=data("two"))
    assert passes.since() == 3
    # A saved state is loaded next: nothing is measured.
    bound.begin_task("two", sgd(one), 3, model=one, resuming=True)
    assert passes.since() == 0


@pytest.mark.parametrize("when", ["begin", "end", "remember"])
def test_an_iterator_is_refused(when: str) -> None:
    """It would be empty the second time it is read."""
    bound, two = second_task(EWC(rows=4))
    once: Iterator[Any] = iter(data("two"))
    if when == "begin":
        with pytest.raises(Refused, match=r"^data: an iterator can be read once only.*a loader"):
            bound.begin_task("two", sgd(two), 3, model=two, data=once)
    elif when == "remember":
        with pytest.raises(Refused, match=r"^data: an iterator"):
            bound.remember("two", two, once)
    else:
        bound.begin_task("two", sgd(two), 3, model=two)
        with pytest.raises(Refused, match=r"^data: an iterator"):
            bound.end_task(once)
    assert bound.finished == ["one"]
    assert len(list(once)) == 3  # none was used up
    bound.unbind()


@pytest.mark.parametrize("method", [EWC(rows=4), Replay(memory=2), Merge(rows=8)])
def test_missing_rows_of_a_finished_task_are_asked_for(method: Method) -> None:
    toy = ToyTraining(method)
    toy.begin("one")
    with pytest.raises(Refused, match=rf"^end_task: {method.name} reads the rows.*pass data="):
        toy.bound.end_task()
    assert toy.bound.finished == []


# --- the step's own pass --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Looker(Method):
    """Looks at features and at the old heads in every step."""

    name: ClassVar[str] = "looker"
    needs_features: ClassVar[bool] = True

    def penalty(self, view: View) -> Tensor:
        assert view.inputs is not None
        cache = view.state.cache
        cache["features"], cache["rows"] = view.features, view.rows
        cache["old"] = view.old_outputs()
        return 0.1 * sum((o.logits.square().mean() for o in cache["old"].values()),
                         view.features.square().mean())  # fmt: skip


def step(bound: Bound, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A step's loss with penalties, and its gradients."""
    model.zero_grad()
    outputs = model(**batch)
    loss: Tensor = outputs.loss + bound.penalty(batch, outputs)
    loss.backward()
    return loss


def test_features_and_old_heads_cost_no_pass_of_the_encoder() -> None:
    bound, two = second_task(Looker())
    passes = Passes(two.encoder)
    bound.begin_task("two", sgd(two), 3, model=two)
    step(bound, two, make_batch("two", 0))
    assert passes.since() == 1
    looked = bound.states["looker"].cache
    assert list(looked["old"]) == ["one"] and looked["old"]["one"].loss is None  # no labels
    assert bound.features is None  # it holds a graph: not beyond the micro-batch


def test_features_carry_the_gradient_of_a_second_pass() -> None:
    """Against the old head on the encoder, written down; dropout as in the loss itself."""
    bound, two = second_task(Looker())
    one: Any = bound.models["one"]
    bound.begin_task("two", sgd(two), 3, model=two)
    batch = make_batch("two", 0)
    torch.manual_seed(4)
    step(bound, two, batch)
    ours = {n: p.grad.clone() for n, p in two.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in one.classifier.parameters())  # old heads stay
    bound.unbind()
    two.zero_grad()
    torch.manual_seed(4)
    features = two.encoder(batch["tokens"])
    loss = nn.functional.cross_entropy(two.classifier(features), batch["labels"])
    old = nn.functional.linear(features, one.classifier.weight.detach(), one.classifier.bias)
    (loss + 0.1 * (features.square().mean() + old.square().mean())).backward()
    for name, p in two.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-7, rtol=1e-5)


def test_old_outputs_of_other_rows_run_the_encoder_in_evaluation_mode() -> None:
    bound, two = second_task(Looker())
    bound.begin_task("two", sgd(two), 3, model=two)
    one, batch = bound.models["one"], make_batch("two", 5)
    modes = [m.training for m in (*one.modules(), *two.modules())]
    found = bound.views["looker"].old_outputs(batch)["one"].logits
    assert [m.training for m in (*one.modules(), *two.modules())] == modes
    assert torch.equal(found, one.eval()(batch["tokens"]).logits)


@pytest.mark.parametrize("training", [True, False, None])
def test_forward_leaves_every_module_in_its_mode(training: bool | None) -> None:
    bound, two = second_task(Looker())
    bound.begin_task("two", sgd(two), 3, model=two)
    one: Any = bound.models["one"].eval()
    two.train()
    two.encoder.layers[1].eval()  # on purpose
    before = [(m, m.training) for m in (*one.modules(), *two.modules())]
    seen: dict[str, bool] = {}
    two.encoder.layers[0].dropout.register_forward_hook(
        lambda m, *_: seen.update(dropout=m.training)
    )
    torch.manual_seed(0)
    random = torch.get_rng_state()
    for task in ("one", "two"):
        outputs = bound.views["looker"].forward(make_batch("two", 0), task=task, training=training)
        assert seen.pop("dropout") is (True if training is None else training)
        assert outputs.logits.shape == (8, 3 if task == "one" else 4)
        assert [(m, m.training) for m, _ in before] == before
    assert torch.equal(torch.get_rng_state(), random)
    if training is False:
        again = bound.views["looker"].forward(make_batch("two", 0), training=False)
        assert torch.equal(again.logits, outputs.logits)


def test_rows_are_told_by_content_not_by_place_or_padding() -> None:
    batch = {"input_ids": torch.tensor([[2, 7, 9, 3], [2, 9, 7, 3], [2, 7, 9, 3]])}
    batch["attention_mask"] = torch.ones(3, 4, dtype=torch.long)
    batch["labels"] = torch.tensor([0, 1, 1])
    one, two, again = identities(batch).tolist()
    assert one == again and one != two  # the order of tokens counts, labels do not
    padded = {
        "labels": torch.tensor([5, 5, 5]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1] * 4 + [1, 0]]),
        "input_ids": torch.tensor([[0, 0, 2, 9, 7, 3], [2, 7, 9, 3, 0, 0], [2, 7, 9, 3, 3, 0]]),
    }
    left, right, longer = identities(padded).tolist()
    assert (left, right) == (two, one) and longer not in (one, two)
    batch["token_type_ids"] = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]])
    pair = identities(batch).tolist()
    assert pair[0] != pair[2]
    bound, two_ = second_task(Looker())
    bound.begin_task("two", sgd(two_), 3, model=two_)
    mine = make_batch("two", 0)
    step(bound, two_, mine)
    assert torch.equal(bound.states["looker"].cache["rows"], identities(mine))
    bound.optimizer.step()
    with pytest.raises(Refused, match=r"view\.rows"):
        _ = bound.views["looker"].rows


# --- moments of a bound's life --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Handle(Method):
    """Puts a hook on the model, and keeps a table that can be made again."""

    name: ClassVar[str] = "handle"

    def begin_task(self, view: View) -> None:
        module = view.bound.models[view.task]
        handle = module.register_forward_hook(lambda *_: None)
        view.state.cache |= {"handle": handle, "table": "of begin_task"}

    def loaded(self, view: View) -> None:
        view.state.cache |= {"table": f"of step {view.step}", "resumed": view.resuming}
        view.state.cache["count"] = view.state.numbers["count"]

    def after_step(self, view: View) -> None:
        view.state.numbers["count"] = view.state.numbers.get("count", 0) + 1

    def unbound(self, view: View) -> None:
        handle = view.state.cache.pop("handle", None)
        if handle is not None:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Failing(Method):
    name: ClassVar[str] = "failing"

    def begin_task(self, view: View) -> None:
        raise Refused("this task cannot be served", where="failing")


def hooks(model: nn.Module) -> int:
    return len(model._forward_hooks)


def test_unbound_is_called_when_the_recipe_lets_go() -> None:
    model = Classifier()
    bound = Recipe(methods=[Handle()]).bind(model, sgd(model), total_steps=3)
    assert hooks(model) == 1
    bound.unbind()
    bound.unbind()
    assert hooks(model) == 0
    bound.begin_task("two", sgd(model), 3, model=model)
    bound.begin_task("three", sgd(model), 3, model=model)  # lets go of the task before
    assert hooks(model) == 1


@pytest.mark.parametrize("order", [[Handle(), Failing()], [Failing(), Handle()]])
def test_unbound_is_called_where_a_task_fails_to_begin(order: list[Method]) -> None:
    """Also of a method whose own begin_task was never reached."""
    model = Classifier()
    optimizer = sgd(model)
    with pytest.raises(Refused, match="cannot be served"):
        Recipe(methods=order).bind(model, optimizer, total_steps=3)
    assert hooks(model) == 0
    Recipe().bind(model, optimizer, total_steps=3)  # the optimizer is free again


@dataclass(frozen=True, kw_only=True)
class Measuring(Method):
    """Measures at a task's end, and fails the first time if told so."""

    name: ClassVar[str] = "measuring"
    fails: bool = False

    ended: ClassVar[list[str]] = []

    def end_task(self, view: View) -> None:
        self.ended.append(view.task)
        (view.state.cache["counts"],) = view.grams().counts.values()
        if self.fails and len(self.ended) == 1:
            raise Refused("this task cannot be closed", where="measuring")


def test_after_an_end_that_failed_gram_matrices_are_measured_anew() -> None:
    counts = []
    for fails in (False, True):
        model = Classifier()
        bound = Recipe(methods=[Measuring(fails=fails)]).bind(model, sgd(model), total_steps=3)
        Measuring.ended.clear()
        if fails:
            with pytest.raises(Refused, match="cannot be closed"):
                bound.end_task(data("one"))
        bound.end_task(data("two"))
        counts.append(bound.states["measuring"].cache["counts"])
    assert torch.equal(*counts)


def test_a_cache_is_not_saved_and_made_again_when_a_state_was_loaded() -> None:
    model = Classifier()
    bound = Recipe(methods=[Handle()]).bind(model, sgd(model), total_steps=5)
    for number in range(2):
        bound.optimizer.zero_grad()
        model(**make_batch("one", number)).loss.backward()
        bound.optimizer.step()
    assert bound.states["handle"].cache["table"] == "of begin_task"
    state = bound.state_dict()
    assert list(state["tensors"]) == ["generator"] and bound.states["handle"].bytes() == 0
    assert state["meta"]["numbers"] == {"handle": {"count": 2}}
    other = Classifier()
    again = Recipe(methods=[Handle()]).bind(other, sgd(other), total_steps=5, resuming=True)
    again.load_state_dict(as_saved(state))
    # After everything was taken up: it sees the step, and the numbers that were saved.
    assert again.states["handle"].cache == {"table": "of step 2", "resumed": False, "count": 2}


def as_saved(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes from a file."""
    tensors = {k: t.clone().contiguous() for k, t in state["tensors"].items()}
    return {"tensors": load(save(tensors)), "meta": json.loads(json.dumps(state["meta"]))}


TUNED: list[tuple[Method, Method]] = [
    (EWC(rows=4), EWC(strength=5.0, rows=4)),
    (Replay(memory=2), Replay(memory=2, share=1.0, every=3, weight=0.5)),
    (LwF(), LwF(strength=3.0, temperature=1.0)),
    (Merge(rows=8), Merge(rows=6, strength=3.0)),
]


@pytest.mark.parametrize(("before", "after"), TUNED, ids=lambda m: m.name)
def test_between_tasks_a_state_is_taken_up_under_another_strength(
    before: Method, after: Method
) -> None:
    toy = ToyTraining(before)
    toy.begin("one")
    toy.learn(0, 2)
    middle = as_saved(toy.bound.state_dict())
    toy.learn(2)
    toy.end()
    ended = as_saved(toy.bound.state_dict())
    bound = Recipe(methods=[after]).unbound()
    bound.load_state_dict(ended)
    assert bound.finished == ["one"]
    assert bound.state_dict()["meta"]["methods"] == {after.name: after.to_dict()}
    with pytest.raises(Refused, match="was saved by"):
        Recipe(methods=[after]).unbound().load_state_dict(middle)
    with pytest.raises(Refused, match="of the middle of task 'one'; begin that task first"):
        Recipe(methods=[before]).unbound().load_state_dict(middle)


def test_what_decides_the_state_itself_may_never_differ() -> None:
    toy = ToyTraining(EWC(rows=4))
    toy.begin("one")
    toy.end()
    state = as_saved(toy.bound.state_dict())
    with pytest.raises(Refused, match="was saved by"):
        Recipe(methods=[EWC(rows=5)]).unbound().load_state_dict(state)


def test_a_task_of_a_finished_ones_name_is_in_its_middle() -> None:
    """Learned a second time after another, it does not count as ended before it has."""
    bound = Recipe(methods=[L2SP(), EWC(rows=4)]).unbound()
    model = Classifier()
    for task in ("one", "two"):
        bound.begin_task(task, sgd(model), 3, model=model)
        bound.end_task(data(task))
    bound.begin_task("one", sgd(model), 3, model=model)
    state = as_saved(bound.state_dict())
    with pytest.raises(Refused, match="was saved by"):
        Recipe(methods=[L2SP(), EWC(strength=5.0, rows=4)]).unbound().load_state_dict(state)


# --- a task learned elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [EWC(rows=20, labels="true"), EWC(rows=20, labels="expected", online=True),
     DPS(score="retention", fisher_labels="true", fisher_rows=20, stage=2), Merge(rows=20)],
)  # fmt: skip
def test_a_deployed_model_is_remembered_as_if_it_was_learned_here(method: Method) -> None:
    """The same state but for what training alone leaves, from one pass over its rows."""
    here = ToyTraining(method)
    here.begin("one")
    here.learn()
    deployed = copy.deepcopy(here.model)
    before = {k: v.clone() for k, v in deployed.state_dict().items()}
    here.end()
    bound = Recipe(methods=[method]).unbound()
    bound.remember("one", deployed, lambda: here._rows("one"))
    assert bound.finished == ["one"] and not bound.resuming
    ours, theirs = bound.states[method.name], here.bound.states[method.name]
    for kind in ("weights", "tensors"):
        mine, its = getattr(ours, kind), getattr(theirs, kind)
        assert mine.keys() == its.keys() and (kind != "weights" or mine or method.name == "merge")
        for slot in its:
            assert mine[slot].keys() == its[slot].keys()
            for name, tensor in its[slot].items():
                assert torch.equal(mine[slot][name], tensor), (slot, name)
    for name, tensor in deployed.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in deployed.parameters())

    torch.manual_seed(1)
    two = Classifier(encoder=deployed.base_model)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(two.parameters(), lr=0.02)
    bound.begin_task("two", optimizer, 3, model=two, data=data("two"))
    for number in range(3):
        step(bound, two, make_batch("two", number))
        optimizer.step()
    assert bound.step == 3 and bound.skipped == 0
    bound.end_task(data("two"))
    assert bound.finished == ["one", "two"]


def test_a_remembered_task_pulls_back() -> None:
    """P = λ/2 Σ F (θ − θ*)²: its gradient on the second task is λ F (θ − θ*)."""
    torch.manual_seed(0)
    one = Classifier().double()
    bound = Recipe(methods=[EWC(strength=7.0, rows=20, labels="true")]).unbound()
    bound.remember("one", one, data("one"))
    fisher = bound.states["ewc"].weights["fisher"]
    anchor = {n: w.detach().clone() for n, w in one.named_parameters()}
    assert fisher.keys() == {n for n in anchor if n.startswith("encoder.")}
    two = Classifier(encoder=one.encoder).double()
    bound.begin_task("two", sgd(two), 3, model=two)
    for w in bound.weights.values():
        w.data += 0.1
        w.grad = torch.zeros_like(w)
    bound._before_step()
    for n, f in fisher.items():
        grad = bound.weights[n].grad
        assert grad is not None
        torch.testing.assert_close(grad, 7.0 * f.double() * (bound.weights[n].detach() - anchor[n]),
                                   atol=1e-9, rtol=1e-5)  # fmt: skip
    assert sum(float(f.sum()) for f in fisher.values()) > 0


def test_a_remembered_tasks_head_is_not_fitted_again() -> None:
    torch.manual_seed(0)
    one = Classifier()
    bound = Recipe(methods=[Asker()], head_first=HeadFirst()).unbound()
    head = one.classifier.weight.detach().clone()
    bound.remember("one", one, data("one"))
    assert torch.equal(one.classifier.weight, head)
    two = Classifier(encoder=one.encoder)
    bound.begin_task("two", sgd(two), 3, model=two, data=data("two"))
    assert bound.fitted is not None and torch.equal(one.classifier.weight, head)
    assert [a.shape for a in bound.states["asker"].cache["one"]] == [(8, 3)] * 3


# --- parts by the recipe --------------------------------------------------------------------------

POOLER = {"*.pooler.*": "layer.1"}


def multiplier(recipe: Recipe, model: nn.Module, name: str) -> float:
    """What a parameter's rate is multiplied by."""
    p = dict(model.named_parameters())[name]
    groups = recipe.param_groups(model, lr=1.0)
    return float(next(g["lr"] for g in groups if any(q is p for q in g["params"])))


def test_a_part_named_by_the_recipe_decides_the_rate(tmp_path: Path) -> None:
    """BERTcL's head is three times as fast; BERT's pooler, which tasks share, need not be."""
    model, name = bert(), "bert.pooler.dense.weight"
    published = Recipe(rates=Rates.bertcl())
    assert multiplier(published, model, name) == pytest.approx(3.0)
    path = tmp_path / "mine.yaml"
    path.write_text("rates: bertcl\nparts: {'*.pooler.*': layer.1}\n")
    recipe = Recipe.load(path)
    assert recipe.parts == POOLER
    assert multiplier(recipe, model, name) == pytest.approx(
        multiplier(published, model, "bert.encoder.layer.1.output.dense.weight")
    )
    assert multiplier(recipe, model, "classifier.weight") == pytest.approx(3.0)
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert "parts" not in published.to_dict()  # runs of before keep their hash


def test_methods_and_later_rates_see_the_parts_of_the_recipe() -> None:
    model = bert()
    recipe = Recipe(rates=Rates.bertcl(), parts=POOLER, methods=[L2SP()])
    optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=1e-3))
    bound = recipe.bind(model, optimizer, total_steps=3)
    assert bound.views["l2sp"].parts["bert.pooler.dense.weight"] == "layer.1"
    assert bound.views["l2sp"].parts["task/classifier.weight"] == "head"
    bound.set_rates(replace(Rates.flat(), head=5.0))
    assert bound.views["l2sp"].lr("bert.pooler.dense.weight") == pytest.approx(1e-3)
    assert bound.views["l2sp"].lr("task/classifier.weight") == pytest.approx(5e-3)


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"*.poller.*": "layer.1"}, r"no parameter matches '\*\.poller\.\*'; nearest are .*pooler"),
        ({"*.pooler.*": "layer.7"}, r"override '\*\.pooler\.\*': no part 'layer\.7'"),
    ],
)
def test_parts_that_are_not_there_are_refused(parts: dict[str, str], complaint: str) -> None:
    model, recipe = bert(), Recipe(parts=parts)
    with pytest.raises(Refused, match=complaint):
        recipe.param_groups(model, lr=1.0)
    optimizer = sgd(model)
    with pytest.raises(Refused, match=complaint):
        recipe.bind(model, optimizer, total_steps=3)
    Recipe().bind(model, optimizer, total_steps=3)


@pytest.mark.parametrize("wrong", [["*.pooler.*"], {"*.pooler.*": 5}, "layer.1"])
def test_parts_must_be_a_mapping_of_names(wrong: Any) -> None:
    with pytest.raises(Refused, match=r"recipe\.parts"):
        Recipe.from_dict({"parts": wrong})


def test_the_record_shows_the_parts_of_the_recipe(tmp_path: Path) -> None:
    place, task = save_bert(tmp_path / "bert"), write_task(tmp_path, "mood")
    sizes = {}
    for name, parts in (("published", {}), ("mine", POOLER)):
        recipe = Recipe(rates=Rates.bertcl(), parts=parts)
        record = holdfast.run_sequence(
            str(place), [task], recipe, out=tmp_path / name, epochs=0.2, max_length=16,
            progress=False,
        )  # fmt: skip
        sizes[name] = dict(zip(record.rates["order"], record.rates["parameters"], strict=True))
    moved = 16 * 16 + 16  # weight and bias of the pooler
    assert sizes["mine"]["head"] == sizes["published"]["head"] - moved
    assert sizes["mine"]["layer.1"] == sizes["published"]["layer.1"] + moved


# --- a recipe of which nothing acts ---------------------------------------------------------------

IDLE = "every method of recipe 'mine' waits for a second task: this run is plain fine-tuning"


@pytest.mark.parametrize(
    ("recipe", "idle"),
    [
        (Recipe(methods=[EWC()], name="mine"), True),
        (Recipe(methods=[EWC(), LwF(), Merge(), Replay()], name="mine"), True),
        (Recipe(methods=[DPS(score="retention")], name="mine"), True),
        (Recipe(methods=[EWC(), DPS()], name="mine"), False),
        (Recipe(methods=[L2SP()], name="mine"), False),
        (Recipe(methods=[EWC()], rates=Rates.bertcl(), name="mine"), False),
        (Recipe(methods=[EWC()], head_first=HeadFirst(), name="mine"), False),
        (Recipe(name="mine"), False),  # which says it by its name
    ],
)
def test_a_recipe_knows_whether_it_is_plain_alone(recipe: Recipe, idle: bool) -> None:
    assert recipe.idle_alone() == (IDLE if idle else None)


@pytest.mark.parametrize(
    "method",
    [EWC(), LwF(), Merge(), Replay(), DPS(score="retention", drop=0.9, stage=2), DPS(stage=2),
     L2SP(strength=0.5)],
)  # fmt: skip
def test_idle_at_first_is_true_of_what_it_is_said_of(method: Method) -> None:
    """The first task, step by step and bit for bit, beside plain training."""
    plain, ours = ToyTraining(None), ToyTraining(method)
    for toy in (plain, ours):
        toy.begin("one")
        torch.manual_seed(3)
        toy.learn()
    pairs = zip(ours.weights().values(), plain.weights().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == method.idle_at_first


def test_a_run_of_one_task_says_that_its_recipe_is_idle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell_once.cache_clear()
    place = save_bert(tmp_path / "bert")
    tasks = [write_task(tmp_path, topic) for topic in ("mood", "colour")]
    recipe = Recipe(methods=[EWC(rows=4)], name="mine")
    how: dict[str, Any] = {"epochs": 0.2, "max_length": 16, "progress": False}

    def told(out: str, tasks: Any, recipe: Any, **more: Any) -> tuple[list[str], int]:
        caplog.clear()
        record = holdfast.run_sequence(str(place), tasks, recipe, out=tmp_path / out, **how, **more)
        return record.warnings, sum(r.message == IDLE for r in caplog.records)

    assert told("alone", tasks[:1], recipe) == ([IDLE], 1)
    assert told("alone", tasks[:1], recipe)[0] == [IDLE]  # read again: not twice
    assert told("acts", tasks[:1], Recipe(methods=[DPS()], name="mine")) == ([], 0)
    # Of a sequence it is not true, nor worth a line of the runs that its tasks alone are.
    assert told("both", tasks, recipe, alone=True) == ([], 0)


def test_a_trainer_of_one_task_says_that_its_recipe_is_idle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from models import arguments

    for task, methods, said in (
        ({}, [EWC(rows=4)], 1),
        ({"task": "first"}, [EWC(rows=4)], 0),  # named: one of several
        ({}, [L2SP()], 0),
    ):
        caplog.clear()
        trainer = holdfast.Trainer(
            model=bert(), args=arguments(tmp_path, max_steps=1), train_dataset=rows(8),
            data_collator=collate, recipe=Recipe(methods=methods, name="mine"), **task,
        )  # fmt: skip
        trainer.train()
        assert sum(r.message == IDLE for r in caplog.records) == said


# --- the order of calls ---------------------------------------------------------------------------


def test_rates_that_the_optimizer_does_not_have_are_refused() -> None:
    model = Classifier(2)
    with pytest.raises(Refused, match=r"recipe\.rates: the optimizer does not have them"):
        Recipe(rates=Rates.bertcl()).bind(
            model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4
        )


def test_a_task_that_never_ended_is_told(said: Callable[[], list[str]]) -> None:
    toy = ToyTraining(EWC(rows=4))
    toy.begin("one")
    toy.learn(0, 1)
    toy.begin("two")
    (line,) = said()
    assert "task 'one' was never ended, so nothing of it is remembered" in line


def test_a_step_without_the_state_that_was_announced_is_refused() -> None:
    model = Classifier(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recipe().bind(model, optimizer, total_steps=4, resuming=True)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with pytest.raises(Refused, match="begun to be resumed, and no state was loaded"):
        optimizer.step()


def test_a_second_task_of_the_same_name_keeps_what_is_of_it() -> None:
    """A state saved in its middle is of no ended task, though one of that name has ended."""
    toy = ToyTraining(L2SP())
    toy.begin("one")
    toy.learn(0, 1)
    toy.end()
    toy.bound.begin_task("one", toy.optimizer, 4, model=toy.model)
    saved = as_saved(toy.bound.state_dict())
    assert not saved["meta"]["ended"]
    assert any(key.startswith("l2sp/weights/start") for key in saved["tensors"])


def test_what_is_fitted_and_the_order_of_methods_are_part_of_the_plan() -> None:
    def planned(*methods: Any, **how: Any) -> dict[str, Any]:
        model = Classifier(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Recipe(methods=methods, **how).bind(model, optimizer, total_steps=4).planned()

    one, two = planned(L2SP(), EWC()), planned(EWC(), L2SP())
    assert changed(one, two) == ['methods: ["l2sp", "ewc"] → ["ewc", "l2sp"]']
    assert changed(planned(), planned(head_last=HeadLast())) == ["head_last is new"]


def test_weights_that_begin_to_train_are_told(said: Callable[[], list[str]]) -> None:
    for method in (L2SP(), EWC(rows=4)):
        toy = ToyTraining(method, frozen={"encoder.embeddings.weight"})
        toy.begin("one")
        toy.learn(0, 1)
        toy.end()
        toy.frozen = ()
        toy.begin("two")
    (line,) = said()  # L2SP holds what each task begins with
    assert "(encoder.embeddings.weight, …) did not train in earlier tasks" in line


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [EWC(rows=4), Merge(), ChildTuning()])
def test_a_task_begins_and_ends_also_where_gradients_are_switched_off(
    method: Method, off: Any
) -> None:
    """As beside an evaluation, under the same `with`."""

    def learned(around: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model, given = Classifier(), data("one")
        optimizer, bound = sgd(model), Recipe(methods=[method]).unbound()
        for task in ("one", "two"):
            with around():
                bound.begin_task(task, optimizer, 3, model=model, data=given)
            for batch in given:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with around():
                bound.end_task(given)
        return [w.detach().clone() for w in model.parameters()]

    pairs = zip(learned(off), learned(contextlib.nullcontext), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_copy_or_pickle_is_refused_for_it_would_train_without_the_recipe() -> None:
    toy = ToyTraining(EWC(rows=4))
    toy.begin("one")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(Refused, match=r"not copied or pickled.*load_state_dict"):
            copied(toy.bound)
    with pytest.raises(Refused, match="not copied or pickled"):
        copy.deepcopy((toy.model, toy.optimizer, toy.bound))


def test_a_task_of_which_another_optimizer_made_the_steps_is_told(
    said: Callable[[], list[str]],
) -> None:
    model = Classifier()
    bound = Recipe(methods=[L2SP()]).bind(model, sgd(model), total_steps=3, task="one")
    other = sgd(model)
    for batch in data("one"):
        model(**batch).loss.backward()
        other.step()
    bound.end_task(data("one"))
    (line,) = said()
    assert "one: weights changed, and the bound SGD made no step" in line


# --- models that are made otherwise ---------------------------------------------------------------


@pytest.mark.parametrize("method", [Replay(), EWC(rows=4), ChildTuning()])
def test_a_model_that_returns_its_loss_otherwise_is_refused_in_one_line(method: Method) -> None:
    model = models.Plain()  # it returns a dict
    given = [collate(rows(4, seed=seed)) for seed in range(2)]
    bound = Recipe(methods=[method]).unbound()
    with pytest.raises(Refused, match=r"returned no loss.*as \.loss, no dict or tuple"):
        for task in ("one", "two"):
            bound.begin_task(task, sgd(model), 3, model=model, data=given)
            for batch in given:
                out = model(**batch)
                own = bound.penalty(batch, out, out["loss"]) if bound.has_penalty else 0
                (out["loss"] + own).backward()
                bound.optimizer.step()
            bound.end_task(given)


def test_a_model_that_does_not_run_without_labels_is_refused_in_one_line() -> None:
    """As another task's head is asked for its answers."""
    model, given = models.Plain(), [collate(rows(4))]
    bound = Recipe(methods=[LwF()]).bind(model, sgd(model), total_steps=3, task="one", data=given)
    bound.end_task(given)
    with pytest.raises(Refused, match=r"does not run without labels .*give them a default"):
        bound.begin_task("two", sgd(model), 3, data=given)
        bound.penalty(given[0], model(**given[0]))


def test_a_weight_that_was_replaced_in_its_module_is_refused_by_name() -> None:
    model = Classifier()
    bound = Recipe(methods=[EWC(rows=4)]).bind(model, sgd(model), total_steps=3)
    model(**data("one")[0]).loss.backward()
    bound.optimizer.step()
    layer = next(m for m in model.encoder.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(Refused, match=r"weight: was replaced in its module"):
        bound.end_task(data("one"))
