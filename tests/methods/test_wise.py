"""WiSE-FT: every weight between its start and its end, and what is chosen on selection rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from holdfast.engine.head_first import HeadFirst
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.files import write_yaml
from holdfast.methods import EWC, LwF, Merge, WiSE
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, ToyTraining, make_batch

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [(WiSE(), 4), (WiSE(alpha=0.2, first=True, head=True), 4)]


def learned(method: WiSE, task: str = "two", **how: Any) -> tuple[ToyTraining, dict[str, Tensor]]:
    """A toy at the end of a task, not closed yet; all weights as the task began."""
    toy = ToyTraining(method, **how)
    for name in ("one", "two"):
        toy.begin(name)
        start = snapshot(toy)
        toy.learn()
        if name == task:
            return toy, start
        toy.end()
    raise AssertionError


def snapshot(toy: ToyTraining) -> dict[str, Tensor]:
    return {n: w.detach().clone() for n, w in toy.bound.weights.items()}


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> Any:
    return {n: (1 - alpha) * start[n] + alpha * end[n] for n in end}


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        torch.testing.assert_close(ours[name], w, atol=1e-6, rtol=1e-5, msg=name)


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_shared_weights_end_between_and_the_head_where_asked(head: bool) -> None:
    toy, start = learned(WiSE(alpha=0.3, head=head))
    end = snapshot(toy)
    old_head = {n: p.clone() for n, p in toy.models["one"].classifier.named_parameters()}
    toy.end()
    expected = between(start, end, 0.3)
    if not head:
        expected |= {n: w for n, w in end.items() if n.startswith("two/")}
    close(snapshot(toy), expected)
    for name, p in toy.models["one"].classifier.named_parameters():
        assert torch.equal(p, old_head[name])
    assert toy.bound.states["wise"].numbers == {"alpha": 0.3}
    assert not toy.bound.states["wise"].bytes()


@pytest.mark.parametrize("methods", [(EWC(), WiSE(first=True)), (WiSE(first=True), EWC())])
def test_others_remember_the_interpolated_weights_in_any_order(methods: tuple[Method, ...]) -> None:
    """Named before it, EWC would pull the next task towards weights that are gone."""
    model, rows = Classifier(), [make_batch("one", step) for step in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    bound = Recipe(methods=methods).bind(model, optimizer, total_steps=3)
    learned = model.encoder.embeddings.weight
    for batch in rows:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    before = learned.detach().clone()
    bound.end_task(rows)
    assert not torch.equal(learned, before), "it was interpolated"
    for name, w in bound.shared.items():
        assert torch.equal(bound.states["ewc"].weights["anchor"][name], w), name


def test_the_next_task_starts_from_the_interpolated_weights() -> None:
    def shared() -> dict[str, Tensor]:
        return {n: w for n, w in snapshot(toy).items() if n in toy.bound.shared}

    toy, _ = learned(WiSE(alpha=0.3, first=True), "one")
    toy.end()
    start = shared()
    toy.begin("two")
    toy.learn()
    end = shared()
    toy.end()
    close(shared(), between(start, end, 0.3))


@pytest.mark.parametrize("first", [False, True])
def test_the_first_task_goes_back_to_the_pre_trained_weights_only_where_asked(first: bool) -> None:
    method = WiSE(alpha=0.3, first=first)
    toy, start = learned(method, "one")
    end = snapshot(toy)
    toy.end()
    found = snapshot(toy)
    for name in toy.bound.shared:
        if first:
            expected = 0.7 * start[name] + 0.3 * end[name]
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(found[name], end[name])
    assert method.idle_at_first is not first


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_both_ends_are_exact(alpha: float) -> None:
    toy, start = learned(WiSE(alpha=alpha), dtype=torch.bfloat16)
    end = snapshot(toy)
    toy.end()
    for name in toy.bound.shared:
        assert torch.equal(toy.bound.weights[name], (end if alpha else start)[name])


def test_bfloat16_weights_are_rounded_once() -> None:
    toy, start = learned(WiSE(alpha=0.3), dtype=torch.bfloat16)
    end = snapshot(toy)
    toy.end()
    for name in toy.bound.shared:
        exact = torch.lerp(start[name].double(), end[name].double(), 0.3)
        torch.testing.assert_close(
            toy.bound.weights[name].double(), exact, atol=1e-6, rtol=2**-8, msg=name
        )


# --- the start ------------------------------------------------------------------------------------


def closed_by(begin: Callable[[ToyTraining, dict[str, Tensor]], None]) -> tuple[ToyTraining, int]:
    toy = ToyTraining(WiSE(alpha=0.3))
    toy.begin("one")
    toy.learn()
    toy.end()
    start = {n: w.detach().clone() for n, w in toy.bound.shared.items()}
    begin(toy, start)
    toy.learn()
    held = toy.bound.states["wise"].bytes()
    toy.end()
    return toy, held


def test_start_weights_that_a_checkpoint_holds_are_not_copied() -> None:
    def with_start(toy: ToyTraining, start: dict[str, Tensor]) -> None:
        model = toy.model = toy.add_model("two")
        toy.optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        rows = [make_batch("two", 0)]
        toy.bound.begin_task("two", toy.optimizer, 9, model=model, data=rows, start=lambda: start)

    with_copy, copied = closed_by(lambda toy, _: toy.begin("two"))
    without, held = closed_by(with_start)
    assert held == 0 and copied == 4 * sum(w.numel() for w in without.bound.shared.values())
    for name, w in with_copy.bound.weights.items():
        assert torch.equal(without.bound.weights[name], w), name


def test_a_start_that_nobody_kept_is_refused() -> None:
    toy, _ = learned(WiSE())
    del toy.bound.states["wise"].weights["start"]
    with pytest.raises(Refused, match=r"wise: nobody kept.*start="):
        toy.end()


def test_a_deployed_model_stays_and_the_first_task_learned_here_goes_back() -> None:
    torch.manual_seed(0)
    deployed = Classifier()
    before = copy.deepcopy(deployed.state_dict())
    bound = Recipe(methods=[WiSE(alpha=0.5, first=True)]).unbound()
    bound.remember("deployed", deployed, [make_batch("one", 0)])
    for name, w in deployed.state_dict().items():
        assert torch.equal(w, before[name])
    model = Classifier(encoder=deployed.encoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound.begin_task("two", optimizer, 1, model=model)
    with torch.no_grad():
        for w in model.encoder.parameters():
            w.grad = torch.ones_like(w)
    optimizer.step()
    bound.end_task()
    for name, w in deployed.encoder.state_dict().items():
        torch.testing.assert_close(w, before[f"encoder.{name}"] - 0.05)


def test_a_head_goes_back_to_how_it_was_fitted() -> None:
    torch.manual_seed(0)
    model = Classifier()
    rows = [make_batch("one", step) for step in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(head_first=HeadFirst(), methods=[WiSE(alpha=0.0, first=True, head=True)])
    random = model.classifier.weight.detach().clone()
    bound = recipe.bind(model, optimizer, total_steps=3, task="one", data=rows)
    fitted = model.classifier.weight.detach().clone()
    model(**rows[0]).loss.backward()
    optimizer.step()
    bound.end_task()
    assert torch.equal(model.classifier.weight, fitted) and not torch.equal(fitted, random)


# --- chosen on selection rows ---------------------------------------------------------------------


def choosing(
    tolerance: float, score: Callable[[float], float]
) -> tuple[ToyTraining, Any, Any, list[Any]]:
    """Close a task whose selection score is a function of the α that the weights stand at."""
    toy, start = learned(WiSE(choose=tolerance, alpha=0.01))
    end, asked = snapshot(toy), []
    name = "encoder.layers.0.up.weight"

    def evaluate() -> Mapping[str, float]:
        way = (toy.bound.weights[name].detach() - start[name]) / (end[name] - start[name])
        asked.append(round(way.median().item(), 3))
        return {"score": score(asked[-1])}

    toy.bound.evaluate = evaluate
    toy.end()
    return toy, start, end, asked


@pytest.mark.parametrize(
    ("tolerance", "alpha"), [(0.0, 1.0), (0.05, 0.7), (0.15, 0.6), (0.45, 0.3), (2.0, 0.1)]
)
def test_the_smallest_share_within_the_tolerance_is_taken(tolerance: float, alpha: float) -> None:
    """The score rises by .1 a tenth up to α .7, and from there on next to nothing."""
    toy, start, end, asked = choosing(tolerance, lambda a: min(a, 0.7) + 1e-9 * a)
    assert toy.bound.states["wise"].numbers == {"alpha": alpha}
    assert asked[0] == 1.0 and asked[1:] == pytest.approx([t / 10 for t in range(1, len(asked))])
    shared = toy.bound.shared.keys()
    expected = {n: w for n, w in between(start, end, alpha).items() if n in shared}
    close({n: w for n, w in snapshot(toy).items() if n in shared}, expected)


def test_where_none_is_good_enough_the_learned_weights_stay_bit_for_bit() -> None:
    toy, _, end, asked = choosing(0.01, lambda a: float(a == 1.0))
    for name, w in snapshot(toy).items():
        assert torch.equal(w, end[name]), name
    assert len(asked) == 10 and toy.bound.states["wise"].numbers == {"alpha": 1.0}


# --- LoRA -----------------------------------------------------------------------------------------


def lora(rank: int = 3) -> Any:
    import peft

    config = peft.LoraConfig(r=rank, target_modules=["query", "value"], task_type="SEQ_CLS")
    torch.manual_seed(0)
    return peft.get_peft_model(models.bert(), config)


def products(model: Any) -> dict[str, Tensor]:
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {a: found[a.replace("lora_A", "lora_B")] @ w for a, w in found.items() if "lora_A" in a}


def test_of_lora_the_product_is_interpolated() -> None:
    """The factors interpolated each would shrink a fresh pair's product by α²."""
    model = lora()
    bound = Recipe(methods=[WiSE(alpha=0.4, first=True)]).unbound()
    batch = models.collate(models.rows(4))
    starts, ends = [], []
    for task in ("one", "two"):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
        bound.begin_task(task, optimizer, 3, model=model)
        starts.append(products(model))
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        ends.append(products(model))
        bound.end_task()
        for name, found in products(model).items():
            exact = torch.lerp(starts[-1][name], ends[-1][name], 0.4)
            u, s, vt = torch.linalg.svd(exact)
            nearest = (u[:, :3] * s[:3]) @ vt[:3]  # of rank 6 in the second task
            torch.testing.assert_close(found, nearest, atol=1e-5, rtol=1e-4, msg=name)
            assert exact.abs().max() > 1e-3


# --- in a recipe ----------------------------------------------------------------------------------


def test_two_ways_back_in_one_recipe_are_refused(tmp_path: Any) -> None:
    for methods in ([WiSE(), Merge()], [Merge(), WiSE()]):
        with pytest.raises(Refused, match=r"wise cannot stand beside merge: both go back"):
            Recipe(methods=methods)
    path = tmp_path / "both.yaml"
    write_yaml(path, {"methods": {"merge": None, "wise": {"alpha": 0.3}}})
    with pytest.raises(Refused, match=r"both.yaml.*wise cannot stand beside merge"):
        Recipe.load(path)
    assert len(Recipe(methods=[WiSE(), LwF()]).methods) == 2
