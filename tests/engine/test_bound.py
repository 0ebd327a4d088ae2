"""The engine: what it refuses, how it meets optimizers, scalers and closures, what it saves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import adamw, bind, net
from torch import Tensor, nn

from holdfast.engine.attachment import default_shared
from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import DPS, EWC, L2SP, Replay
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.testing.contract import same
from holdfast.testing.toy import Classifier, ToyTraining, make_batch


def data(step: int) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(step))


def hooks(optimizer: torch.optim.Optimizer) -> int:
    steps = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return sum(map(len, steps))


# --- refusals -------------------------------------------------------------------------------------


def test_sparse_embeddings_are_refused_at_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    with pytest.raises(Refused, match=r"^0: sparse gradients.*sparse=False"):
        bind(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_sparse_gradients_by_another_way_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bind(model, optimizer, L2SP())  # refused before anything is added to it
    model[0].weight.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(Refused, match="sparse"):
        optimizer.step()


def test_repeating_closures_are_refused() -> None:
    model = net()
    with pytest.raises(Refused, match="LBFGS"):
        bind(model, torch.optim.LBFGS(model.parameters()))

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    optimizer = Twice(model.parameters(), lr=0.1)
    bind(model, optimizer)
    with pytest.raises(RuntimeError, match="more than once"):
        optimizer.step(lambda: model(data(0)).sum().backward())


def test_strangers_in_the_optimizer_are_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD([*model.parameters(), *net().parameters()], lr=0.1)
    with pytest.raises(Refused, match=r"4 parameters that are not in the model.*param_groups"):
        bind(model, optimizer)


def test_one_optimizer_serves_one_bound() -> None:
    model = net()
    optimizer = adamw(model)
    first = bind(model, optimizer)
    with pytest.raises(Refused, match="bound already"):
        bind(model, optimizer)
    first.begin_task("again", optimizer, 5, model=model)  # its own may begin anew
    first.unbind()
    bind(model, optimizer)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, None])
def test_total_steps_is_a_whole_number(steps: Any) -> None:
    with pytest.raises(Refused, match="total_steps"):
        bind(net(), adamw(net()), total_steps=steps)


@pytest.mark.parametrize("task", ["", "a/b"])
def test_task_names_are_plain(task: str) -> None:
    model = net()
    with pytest.raises(Refused, match="task name"):
        bind(model, adamw(model), task=task)


def test_no_torch_optimizer_is_refused() -> None:
    with pytest.raises(Refused, match="no torch optimizer"):
        bind(net(), object())
    with pytest.raises(Refused, match="no model"):
        Recipe().unbound().begin_task("one", adamw(net()), 5)


def test_what_needs_a_task_is_refused_before_the_first() -> None:
    bound = Recipe(methods=[EWC()]).unbound()
    for ask in (bound.end_task, bound.penalty, lambda: bound.set_rates(Rates.flat())):
        with pytest.raises(Refused, match=r"no task has begun; .*begin_task"):
            ask()


@pytest.mark.parametrize("method", [EWC(), Replay(memory=0.5)])
@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([(torch.ones(2, 3), torch.ones(2))], "no tensors by name"),
        ([{"tokens": [[1, 2]], "labels": [0]}], "no tensors by name"),
        (iter([make_batch("one", 0)]), "read once only; .*a function"),
    ],
)
def test_rows_that_a_model_does_not_take_are_refused(
    method: Method, rows: Any, complaint: str
) -> None:
    toy = ToyTraining(method)
    toy.begin("one")
    with pytest.raises(Refused, match=complaint):
        toy.bound.end_task(rows)


def test_two_that_mix_the_same_weight_are_refused() -> None:
    model = net()
    first = bind(model, adamw(model), DPS(mix=True))
    with pytest.raises(Refused, match=r"^0\.weight: another Bound mixes it; unbind"):
        bind(model, adamw(model), DPS(mix=True))
    model(data(0))
    first.unbind()
    assert type(model[0]) is nn.Linear
    bind(model, adamw(model), DPS(mix=True))


def test_a_refusal_leaves_no_hook_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))
    optimizer = adamw(model)
    with pytest.raises(Refused, match=r"^1\..*LSTM cannot be mixed"):
        bind(model, optimizer, DPS(mix=True, modules="all"))
    with pytest.raises(Refused, match="matches no parameter"):
        bind(model, optimizer, DPS(modules=("x",)))
    assert hooks(optimizer) == 0
    bind(model, optimizer, DPS(modules="all"))  # Dense serves recurrent layers


# --- optimizers -----------------------------------------------------------------------------------


def trained(step: Callable[[torch.optim.Optimizer, Callable[[], Tensor]], Any]) -> nn.Sequential:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer, DPS(stage=2, drop=0.5), L2SP())
    for t in range(8):

        def closure(t: int = t) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(data(t)).square().sum()
            loss.backward()
            return loss

        step(optimizer, closure)
    assert bound.step == 8
    return model


def equal(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_closure_gives_the_same_result() -> None:
    def plain(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
        closure()
        optimizer.step()

    expected = trained(plain)
    assert equal(trained(lambda o, c: o.step(c)), expected)
    assert equal(trained(lambda o, c: o.step(closure=c)), expected)
    losses: list[Tensor] = []
    trained(lambda o, c: losses.append(o.step(c)))
    assert losses[0] == net()(data(0)).square().sum()


def test_accelerated_optimizers_are_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    inner = adamw(model)
    wrapped = accelerate.Accelerator(cpu=True).prepare(inner)
    bound = bind(model, wrapped, L2SP())
    assert bound.optimizer is inner and hooks(inner) == 2
    for value, skipped in ((1.0, False), (float("nan"), True), (1.0, False)):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        wrapped.step()
        assert wrapped.step_was_skipped is skipped
    assert (bound.step, bound.skipped) == (2, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_masks_do_not_depend_on_the_loss_scale(fused: bool) -> None:
    def run(scale: float | None) -> tuple[nn.Module, Bound]:
        model = net()
        optimizer = adamw(model, fused=fused)
        bound = Recipe(methods=[DPS(stage=2, drop=0.5)], max_grad_norm=0.5).bind(
            model, optimizer, total_steps=10
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for t in range(7):
            optimizer.zero_grad()
            scaler.scale(model(data(t)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return model, bound

    plain, _ = run(None)
    for scale in (1.0, 65536.0):
        model, bound = run(scale)
        assert equal(model, plain), scale  # powers of two scale exactly
        assert bound.norm is not None and bound.norm < 1000


def test_overflow_under_a_scaler_is_skipped_and_counted() -> None:
    model = net()
    optimizer = adamw(model, fused=True)
    bound = bind(model, optimizer, DPS(stage=2), L2SP())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(6):
        optimizer.zero_grad()
        scaler.scale(model(data(t)).square().sum()).backward()
        if t == 2:
            model[2].bias.grad.fill_(float("inf"))
        before = copy.deepcopy((model.state_dict(), bound.state_dict()["tensors"]))
        scaler.step(optimizer)
        scaler.update()
        now = (model.state_dict(), bound.state_dict()["tensors"])
        if t == 2:
            for old, new in zip(before, now, strict=True):
                same(new, old)
    assert (bound.step, bound.skipped) == (5, 1)
    assert scaler.get_scale() == 2.0


# --- models ---------------------------------------------------------------------------------------


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.weight

    model = Tied()
    bound = bind(model, adamw(model), L2SP())
    assert list(bound.weights) == ["table.weight"]
    assert bound.owners["table.weight"] == (model.table, model.out)
    assert bound.states["l2sp"].bytes() == 15 * 4


def test_two_models_share_an_encoder_and_keep_their_heads_apart() -> None:
    toy = ToyTraining(None)
    toy.begin("one")
    first = toy.bound
    assert list(first.weights)[-2:] == ["one/classifier.weight", "one/classifier.bias"]
    assert set(first.weights) - set(first.shared) == set(list(first.weights)[-2:])
    encoder = {k: id(v) for k, v in first.shared.items()}
    toy.begin("two")
    assert {k: id(v) for k, v in toy.bound.shared.items()} == encoder
    assert set(toy.bound.weights) - encoder.keys() == {
        "two/classifier.weight",
        "two/classifier.bias",
    }
    assert toy.bound.part_of["two/classifier.weight"] == "head"


def test_what_tasks_share_is_told_by_the_model() -> None:
    transformers = pytest.importorskip("transformers")
    tiny = {"vocab_size": 9, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4}
    config = transformers.GPT2Config(**tiny, pad_token_id=0)
    language = transformers.GPT2LMHeadModel(config)
    assert default_shared(language) is None  # its head is pre-trained
    classifier = transformers.GPT2ForSequenceClassification(config)
    assert default_shared(classifier) is classifier.transformer
    assert default_shared(net()) is None
    model = Classifier()
    assert default_shared(model) is model.encoder


def test_ending_a_task_leaves_each_module_in_its_mode() -> None:
    toy = ToyTraining(EWC(rows=2))
    toy.begin("one")
    frozen = toy.model.get_submodule("encoder.layers.0.norm").eval()
    seen: list[bool] = []

    def rows() -> list[dict[str, Tensor]]:
        seen.append(toy.model.training)
        return [make_batch("one", 0)]

    toy.bound.end_task(rows)
    assert seen == [False]
    assert toy.model.training and not frozen.training


def test_the_forward_pass_of_another_task_leaves_what_is_shared_in_its_mode() -> None:
    toy = ToyTraining(None)
    toy.begin("one")
    toy.begin("two")
    frozen = toy.model.get_submodule("encoder.layers.0.norm").eval()
    other = toy.bound.models["one"]
    for module in (other, other.get_submodule("classifier")):
        module.training = False  # as loaded
    seen: list[list[bool]] = []
    head, shared = other.get_submodule("classifier"), other.get_submodule("encoder")
    modules = (head, shared, frozen)
    head.register_forward_hook(lambda *_: seen.append([m.training for m in modules]))
    toy.bound.forward(make_batch("one", 0), task="one")
    assert seen == [[True, True, False]]  # as the model that is trained
    assert not other.training and not head.training  # and after it as they were
    assert toy.model.training and not frozen.training


def test_unbinding_twice_is_harmless() -> None:
    model = net()
    optimizer = adamw(model)
    bound = bind(model, optimizer, DPS(mix=True))
    bound.unbind()
    bound.unbind()
    assert hooks(optimizer) == 0 and type(model[0]) is nn.Linear
