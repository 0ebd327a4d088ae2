"""What a Bound attaches to, and rates that change while it is attached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from models import bert, collate, rows
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import lr_scheduler as schedules

from holdfast import EWC, GPM, KfacEWC, Merge, Rates, Recipe, Replay
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.network.groups import param_groups
from holdfast.network.rates import Piece


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object = None) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:optimizer contains")
def test_a_parameter_twice_in_one_group_is_refused() -> None:
    model = network()
    twice = [*model.parameters(), model[0].weight]
    with pytest.raises(Refused, match="holds 1 parameters twice"):
        Recipe().bind(model, torch.optim.SGD(twice, lr=0.1), total_steps=1)


def test_other_rates_take_over_with_the_state_and_the_schedule() -> None:
    """As if the optimizer had been made with the new rates, but for the moments it already has."""
    model = network()
    first = Recipe(rates=Rates.flat())
    optimizer = torch.optim.AdamW(first.param_groups(model, lr=0.1, weight_decay=0.01))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    bound = first.bind(model, optimizer, total_steps=9)
    step(model, optimizer, scheduler)
    moments = {n: optimizer.state[w]["exp_avg"].clone() for n, w in bound.weights.items()}
    rates = Rates.from_list([1.0, *[0.5] * 8, 3.0])
    bound.set_rates(rates, scheduler)
    wanted = {"0": 1.0, "1": 0.5, "2": 0.5, "3": 3.0}
    for name, w in bound.weights.items():
        assert bound.group_of[name]["lr"] == pytest.approx(0.1 * wanted[name[0]] / 2)
        assert torch.equal(optimizer.state[w]["exp_avg"], moments[name])
        decay = 0.0 if name.endswith("bias") else 0.01
        assert bound.group_of[name]["weight_decay"] == decay
    step(model, optimizer, scheduler)
    for name in bound.weights:
        assert bound.group_of[name]["lr"] == pytest.approx(0.1 * wanted[name[0]] / 3)
    assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]


PIECES = [
    Piece(task=1, at=2, multipliers=(3.0, *[0.5] * 8, 2.0)),
    Piece(task=1, at=0.75, multipliers=(0.25, *[4.0] * 8, 1.0)),
    Piece(task=2, at=0.5, multipliers=(1.0, *[1.0] * 8, 8.0)),
]
IN_PIECES = Rates.from_list([1.0, *[2.0] * 8, 1.0], pieces=PIECES)


def by_hand(task: int, now: int) -> tuple[float, float, float]:
    """The multipliers of `PIECES` after `now` of eight steps: first layer, middle ones, head."""
    if task == 1:
        return (1.0, 2.0, 1.0) if now < 2 else (3.0, 0.5, 2.0) if now < 6 else (0.25, 4.0, 1.0)
    return (0.25, 4.0, 1.0) if now < 4 else (1.0, 1.0, 8.0)


@pytest.mark.parametrize("make", ["sequential", "chained", "plateau", "covered"])
@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:The epoch parameter")
def test_rates_in_pieces_are_those_of_a_loop_that_sets_them_by_hand(make: str) -> None:
    """Bit for bit over two tasks, also at a step that is left out, which no piece counts."""
    recipe = Recipe(rates=IN_PIECES)

    def learn(ours: bool) -> list[torch.Tensor]:
        model, bound = network(), None
        for task in (1, 2):
            optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=0.1, weight_decay=0.1))
            scheduler = globals()[make](optimizer)
            if ours:
                bound = bound or recipe.unbound()
                bound.begin_task(f"{task}", optimizer, 8, model=model)
            for now in [0, 1, None, *range(2, 8)]:
                optimizer.zero_grad()
                model(torch.ones(2, 4)).square().sum().backward()
                before = [group["lr"] for group in optimizer.param_groups]
                if now is None and ours:  # a step that is left out
                    model[0].weight.grad.fill_(float("nan"))  # type: ignore[union-attr,operator]
                if not ours and now is not None:
                    places = {"0": 0, "1": 1, "2": 1, "3": 2}
                    for group in optimizer.param_groups:
                        place = places[group["param_names"][0][0]]
                        factor = by_hand(task, now)[place] / (1.0, 2.0, 1.0)[place]
                        group["lr"] = group["lr"] * factor
                if ours or now is not None:
                    optimizer.step()
                if not ours:
                    for group, rate in zip(optimizer.param_groups, before, strict=True):
                        group["lr"] = rate
                assert [group["lr"] for group in optimizer.param_groups] == before
                if now is not None:
                    scheduler.step(*[1.0] if make == "plateau" else [])
            if bound is not None:
                bound.unbind()
                bound.end_task()
        return [w.detach() for w in model.parameters()]

    for one, two in zip(learn(ours=True), learn(ours=False), strict=True):
        assert torch.equal(one, two)


def test_methods_see_the_rates_in_force() -> None:
    class Seen(Method):
        name = "seen"

        def before_step(self, view: Any) -> None:
            seen.append(view.lr("3.bias"))

    seen: list[float] = []
    model, recipe = network(), Recipe(rates=IN_PIECES, methods=[Seen()])
    optimizer = torch.optim.SGD(recipe.param_groups(model, lr=0.1))
    bound = recipe.bind(model, optimizer, total_steps=8)
    for _ in range(8):
        step(model, optimizer)
    assert seen == pytest.approx([0.1, 0.1, *[0.2] * 4, *[0.1] * 2])
    made = [bound.rates[id(bound.group_of[f"{i}.bias"])] for i in range(4)]  # what is logged
    assert made == pytest.approx([0.025, 0.4, 0.4, 0.1])


def test_pieces_are_refused_where_they_would_not_hold() -> None:
    model, recipe = network(), Recipe(rates=IN_PIECES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # one group for all parts
    with pytest.raises(Refused, match=r"does not have them; build it from recipe\.param_groups"):
        recipe.bind(model, optimizer, total_steps=8)
    recipe.unbound().begin_task("task", optimizer, 8, model=model)
    with pytest.raises(Refused, match=r"a group for each part.*recipe\.param_groups"):
        step(model, optimizer)
    model = network()
    bound = recipe.bind(model, torch.optim.SGD(recipe.param_groups(model, lr=0.1)), total_steps=8)
    with pytest.raises(Refused, match="come in pieces"):
        bound.set_rates(TWO)
    other = recipe.unbound()
    other.scheduled = replace(IN_PIECES, pieces=PIECES[:1])
    saved, model = bound.state_dict(), network()
    other.begin_task("task", torch.optim.SGD(recipe.param_groups(model, lr=0.1)), 8, model=model)
    with pytest.raises(Refused, match="pieces"):  # exact resume is with the same pieces
        other.load_state_dict(saved)


ONE, TWO = Rates.from_list([1.0, 2.0, 1.0]), Rates.from_list([1.0, *[0.5] * 8, 3.0])


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    warm = schedules.LinearLR(optimizer, 0.1, total_iters=3)
    down = schedules.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    return schedules.SequentialLR(optimizer, [warm, down], [3])


def chained(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.ChainedScheduler(
        [schedules.ConstantLR(optimizer, 0.5, 4), schedules.ExponentialLR(optimizer, 0.9)]
    )


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def covered(optimizer: torch.optim.Optimizer) -> Any:
    return AcceleratedScheduler(schedules.StepLR(optimizer, 2, 0.5), [optimizer],
                                step_with_optimizer=False)  # fmt: skip


@pytest.mark.parametrize("changed_at", [0, 1, 3, 4])
@pytest.mark.parametrize("make", [sequential, chained, plateau, covered])
@pytest.mark.filterwarnings("ignore:Detected call of", "ignore:The epoch parameter")
def test_a_schedule_goes_on_over_other_rates(make: Any, changed_at: int) -> None:
    """At every step the rates are those of an optimizer that had the new ones from the start."""

    def learn(rates: Rates, other: Rates | None = None) -> list[dict[str, float]]:
        model, seen = network(), []
        recipe = Recipe(rates=rates)
        optimizer = torch.optim.SGD(recipe.param_groups(model, lr=0.1))
        scheduler = make(optimizer)
        bound = recipe.bind(model, optimizer, total_steps=9)
        for now in range(7):
            if other is not None and now == changed_at:
                bound.set_rates(other, scheduler)
            seen.append({n: g["lr"] for n, g in bound.group_of.items()})
            step(model, optimizer)
            scheduler.step(*[1.0] if make is plateau else [])
        return seen

    found, wanted = learn(ONE, TWO), learn(TWO)
    assert found[changed_at:] == [pytest.approx(each) for each in wanted[changed_at:]]
    assert found[:changed_at] != wanted[:changed_at] or not changed_at
    assert wanted[0] != wanted[-1]


def test_what_decays_and_every_other_option_stays() -> None:
    model = network()
    groups = param_groups(model, ONE, lr=0.1, weight_decay=0.01, no_decay=["2.weight", "*.bias"])
    groups[0]["weight_decay"] = 0.02
    optimizer = torch.optim.SGD(groups)
    before = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    bound = Recipe(rates=ONE).bind(model, optimizer, total_steps=9)
    bound.set_rates(TWO)
    after = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert after == before and set(before.values()) == {0.0, 0.01, 0.02}
    assert bound.group_of["3.weight"]["lr"] == pytest.approx(0.3)


def floors(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.ReduceLROnPlateau(optimizer, min_lr=[0.1 * i for i in range(3)])


def functions(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.LambdaLR(optimizer, [lambda _, i=i: float(i) for i in range(3)])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedules.OneCycleLR(o, 1.0, 9),
        lambda o: schedules.CyclicLR(o, 0.1, 1.0),
        floors,
        functions,
    ],
)
def test_a_schedule_with_rates_for_each_group_is_refused(make: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(param_groups(model, TWO, lr=0.1), momentum=0.9)
    bound, scheduler = Recipe().bind(model, optimizer, total_steps=9), make(optimizer)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(Refused, match="rates of its own for each group"):
        bound.set_rates(ONE, scheduler)
    assert [dict(group) for group in optimizer.param_groups] == before


def test_other_rates_may_not_freeze_and_need_a_base_rate() -> None:
    model = network()
    recipe = Recipe()
    bound = recipe.bind(
        model, torch.optim.SGD(recipe.param_groups(model, lr=0.1)), total_steps=1
    )  # fmt: skip
    with pytest.raises(Refused, match="freeze"):
        bound.set_rates(Rates.from_list([0.0, *[1.0] * 8, 1.0]))
    bound.unbind()
    plain = recipe.bind(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1)
    with pytest.raises(Refused, match="no base rate"):
        plain.set_rates(Rates.bertcl())


# --- what tasks share ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("names", [["classifier"], ["score_of"], None])
def test_a_classifier_beside_adapters_is_its_tasks_own(names: list[str] | None) -> None:
    """Neither remembered nor anchored; the next task may have other labels, also unwrapped."""
    first = bert(num_labels=2)
    if names == ["score_of"]:  # whatever a head is called
        first.score_of, first.classifier = first.classifier, nn.Identity()
        first.classifier.forward = lambda x: first.score_of(x)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, modules_to_save=names)
    model = get_peft_model(first, config)
    bound, method = Recipe(methods=[EWC(strength=10.0)]).unbound(), "ewc"
    batch = collate(rows(8))

    def learn(task: str, model: nn.Module) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        bound.begin_task(task, optimizer, 3, model=model)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        bound.end_task([batch])

    learn("one", model)
    assert bound.shared and all(".lora_" in n for n in bound.shared)
    assert len(bound.weights) == len(bound.shared) + 2
    assert bound.states[method].weights["fisher"].keys() == bound.shared.keys()
    second = bert(num_labels=3)
    second.bert = first.bert
    before = {n: w.detach().clone() for n, w in bound.shared.items()}
    learn("two", second)
    assert bound.shared.keys() == before.keys()
    assert {n for n in bound.weights if n not in bound.shared} == {
        "two/classifier.weight", "two/classifier.bias"}  # fmt: skip
    assert bound.states[method].weights["anchor"].keys() == before.keys()


# --- memory of weights that do not train --------------------------------------------------------


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["query"], r=2))  # type: ignore[arg-type]


def begin(bound: Any, task: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    bound.begin_task(task, optimizer, 2, model=model)
    return optimizer


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("method", [EWC(), KfacEWC(), GPM(), Merge()], ids=lambda m: m.name)
def test_a_method_that_would_hold_nothing_is_refused(method: Method) -> None:
    """The whole model was remembered, and then only adapters train."""
    batch, bound = collate(rows(8)), Recipe(methods=[method]).unbound()
    model = bert()
    bound.remember("old", model, [batch])
    wrapped = adapted(model)
    says = (
        rf"^new: of the \d+ weights that {method.name} remembers \(.*\) none trains now; remember"
    )
    with pytest.raises(Refused, match=says):
        begin(bound, "new", wrapped)
    # nothing is left attached
    begin(Recipe().unbound(), "new", wrapped)

    bound = Recipe(methods=[method]).unbound()
    bound.remember("old", wrapped, [batch])
    begin(bound, "new", wrapped)
    bound.unbind()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_what_holds_no_weights_or_has_none_to_hold_is_not_refused() -> None:
    batch, model = collate(rows(8)), bert()
    bound = Recipe(methods=[Replay(memory=4)]).unbound()
    bound.remember("old", model, [batch])
    begin(bound, "new", adapted(model))

    model, bound = bert(), Recipe(methods=[EWC()]).unbound()
    bound.remember("old", model, [batch])
    for p in model.base_model.parameters():  # only its head trains: nothing is forgotten
        p.requires_grad_(False)
    begin(bound, "new", model)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(Refused, match="remember: no weight of the model trains"):
        Recipe(methods=[EWC()]).unbound().remember("old", model, [batch])
