"""DPS against a slow reference, its freezing, its coverage; retention is in test_retention.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dps_reference import Reference
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method, View
from holdfast.errors import Refused
from holdfast.methods.common.mixing import noise_shape
from holdfast.methods.dps import DPS
from holdfast.recipe import Recipe
from holdfast.testing.toy import Encoder

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (DPS(stage=2), 4),
    (DPS(stage=3, modules="all", select="global", drop=0.5), 4),
    (DPS(stage=2, freeze="gradient"), 4),
    (DPS(stage=2, mix=True), 8.3),
    (DPS(stage=2, mix=True, freeze="gradient"), 8.3),
    (DPS(stage=2, mix=True, noise="weight", modules=("*.up.weight", "*.down.*")), 9.3),
    (DPS(stage=2, score="retention", drop=0.6, fisher_rows=5), 12),
]

STEPS = 23
ADAMW = {"lr": 0.05, "weight_decay": 0.3}


class Scripted(DPS):
    """Mix whose noise is a function of step and name, so that the reference can draw it too."""

    def draw(self, view: View, name: str) -> Tensor:
        return noise_of(view.step, name, noise_shape(view, name, self.noise), self.drop)


def noise_of(step: int, name: str, shape: list[int], p: float) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + len(name))
    return torch.rand(shape, generator=draw) >= p


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 10)).double()


def linear(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.ndim == 2}


def gradient(step: int, name: str, shape: torch.Size) -> Tensor:
    """Of very different sizes, so that a mean, a sum and a maximum rank differently."""
    draw = torch.Generator().manual_seed(1000 * step + len(name))
    g = torch.randn(shape, generator=draw, dtype=torch.float64)
    return g * torch.exp(torch.randn(shape, generator=draw, dtype=torch.float64))


def run(
    method: DPS, optimizer: type[torch.optim.Optimizer], steps: int = STEPS, **settings: Any
) -> tuple[nn.Sequential, Bound, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Weights and forward weights at each step, from scripted gradients of what is seen."""
    model = net()
    made = optimizer(model.parameters(), **settings)
    bound = Recipe(methods=[method]).bind(model, made, total_steps=steps)
    weights, seen = [], []
    for t in range(steps):
        made.zero_grad()
        modules = dict(model.named_modules())
        now = {n: modules[n.split(".")[0]].weight for n in linear(model)}
        torch.stack([(w * gradient(t, n, w.shape)).sum() for n, w in now.items()]).sum().backward()
        seen.append({n: w.detach().clone() for n, w in now.items()})
        made.step()
        weights.append({n: p.detach().clone() for n, p in linear(model).items()})
    return model, bound, weights, seen


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Any], what: str) -> None:
    for n in theirs:
        expected = torch.as_tensor(theirs[n])
        torch.testing.assert_close(ours[n], expected, atol=1e-11, rtol=0, msg=f"{what}: {n}")


@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("us", "p", "more", "reference"),
    [
        (4, 0.3, {}, {}),
        (1, 0.6, {}, {}),
        (3, 0.5, {"select": "global"}, {"everywhere": True}),
        (3, 0.3, {"mix": True}, {"mix": True}),
        (4, 0.6, {"mix": True, "noise": "weight"}, {"mix": True}),
        (4, 0.6, {"mix": True, "frequency_penalty": True}, {"mix": True, "penalty": True}),
        (5, 0.4, {"mix": True, "noise": "weight", "frequency_penalty": True},
         {"mix": True, "penalty": True}),
    ],
)  # fmt: skip
def test_trajectory_equals_the_references(
    us: int, p: float, more: dict[str, Any], reference: dict[str, Any], exact: bool, adamw: bool
) -> None:
    freeze = "exact" if exact else "gradient"
    method = Scripted(drop=p, stage=us, freeze=freeze, **more)
    settings = ADAMW if adamw else {"lr": 0.05}
    kind = torch.optim.AdamW if adamw else torch.optim.SGD
    _, _, weights, seen = run(method, kind, **settings)
    slow = Reference(
        {n: w.detach().numpy() for n, w in linear(net()).items()},
        p=p, us=us, exact=exact, adamw=adamw, **settings, **reference,
    )  # fmt: skip
    for t in range(STEPS):
        noise = {
            n: noise_of(t, n, [w.shape[0] if more.get("noise") == "weight" else 1, w.shape[1]], p)
            for n, w in slow.w.items()
        }
        drawn = {n: t.numpy() for n, t in noise.items()}
        slow.begin_step()
        compare(seen[t], slow.seen(drawn), f"seen in step {t}")
        slow.step(
            {n: gradient(t, n, torch.Size(w.shape)).numpy() for n, w in slow.w.items()}, drawn
        )
        compare(weights[t], slow.w, f"weights after step {t}")


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("us", "expected"), [(49, False), (50, True)])
def test_frequency_penalty_from_fifty_steps_on(us: int, expected: bool) -> None:
    """Scores of entries seen 1 and 40 times with equal means: only the penalty parts them."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = DPS(drop=0.5, stage=us, mix=True)
    bound = Recipe(methods=[method]).bind(model, optimizer, total_steps=1000)
    view = bound.views["dps"]
    view.state.slot("count")["weight"] = torch.tensor([[1, 40]], dtype=torch.uint8)
    score = method._score(view, "weight", torch.tensor([[2.0, 80.0]]))
    plain = torch.tensor([[2.0, 2.0]])
    decay = torch.exp(-torch.tensor([[1.0, 40.0]]) / us)
    torch.testing.assert_close(score, plain * decay if expected else plain)


@pytest.mark.parametrize(("us", "dtype"), [(255, torch.uint8), (300, torch.int32)])
def test_counts_do_not_overflow(us: int, dtype: torch.dtype) -> None:
    class Always(DPS):
        def draw(self, view: View, name: str) -> Tensor:
            return torch.ones(noise_shape(view, name, self.noise), dtype=torch.bool)

    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bound = Recipe(methods=[Always(stage=us, mix=True)]).bind(model, optimizer, total_steps=1000)
    for _ in range(us - 1):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    counts = bound.states["dps"].weights["count"]["weight"]
    assert counts.dtype is dtype
    assert counts.tolist() == [[us - 1, us - 1]]


def test_zero_gradients_freeze_nothing() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recipe(methods=[DPS(stage=1, drop=0.5)]).bind(model, optimizer, total_steps=4)
    for value in (0.0, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        before = {n: p.detach().clone() for n, p in linear(model).items()}
        optimizer.step()
    for n, p in linear(model).items():
        assert (p != before[n]).all()


# --- freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", ["exact", "gradient"])
@pytest.mark.parametrize("mix", [False, True])
def test_only_exact_freezing_keeps_masked_weights(freeze: Any, mix: bool) -> None:
    method = DPS(drop=0.5, stage=3, freeze=freeze, mix=mix)
    _, bound, weights, _ = run(method, torch.optim.AdamW, steps=5, **ADAMW)
    frozen = method.frozen(bound.views["dps"])  # steps 3 and 4 mask, the stage is not over
    for n, f in frozen.items():
        assert f.float().mean() == pytest.approx(0.5, abs=0.06)
        kept = (weights[4][n] == weights[2][n])[f]
        assert kept.all() if freeze == "exact" else not kept.any(), n
        assert not (weights[4][n] == weights[2][n])[~f].any()


def test_biases_are_not_covered_and_always_move() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[DPS(drop=0.9, stage=1)]).bind(model, optimizer, total_steps=4)
    assert bound.states["dps"].numbers["covered"] == ["0.weight", "2.weight"]
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    for name in ("0.bias", "2.bias"):
        assert (model.get_parameter(name) != before[name]).all()


# --- stages and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "total", "length"), [(0.05, 468, 23), (0.05, 10, 1), (0.5, 9, 4), (7, 100, 7)]
)
def test_stage_is_a_share_or_a_number_of_steps(stage: float | int, total: int, length: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[DPS(stage=stage)]).bind(model, optimizer, total_steps=total)
    assert bound.states["dps"].numbers["stage"] == length


def test_a_stage_longer_than_the_task_never_masks() -> None:
    _, _, plain, _ = run(DPS(stage=100), torch.optim.SGD, steps=4, lr=0.1)
    slow = {n: w.detach().clone() for n, w in linear(net()).items()}
    for t in range(4):
        for n, w in slow.items():
            w -= 0.1 * gradient(t, n, w.shape)
        compare(plain[t], slow, f"step {t}")


def test_dense_uses_one_buffer_for_sums_and_values() -> None:
    method = DPS(stage=2)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[method]).bind(model, optimizer, total_steps=9)
    weights, pointers = linear(model), set()
    state = bound.states["dps"]
    for t in range(9):
        for n, p in weights.items():
            p.grad = gradient(t, n, p.shape)
        optimizer.step()
        slots = [s for s, entries in state.weights.items() if entries]
        # Step 3 (from 1) is the last of the first masking stage: its buffer sums anew.
        assert slots == ["held" if (t + 1) // 2 % 2 else "sum"]
        pointers |= {x.data_ptr() for s in state.weights.values() for x in s.values()}
        assert state.bytes() == sum(p.numel() * p.element_size() for p in weights.values())
    assert len(pointers) == len(weights)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 4.0),
        ({"freeze": "gradient"}, 4.0),
        ({"mix": True}, 8.3),
        ({"mix": True, "freeze": "gradient"}, 8.3),
        ({"mix": True, "noise": "weight"}, 9.3),
        ({"mix": True, "noise": "weight", "freeze": "gradient"}, 9.3),
    ],
    ids=str,
)
def test_bytes_per_covered_weight(settings: dict[str, Any], limit: float) -> None:
    """In every step of a cycle, in layers wide enough that a row's last bits do not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(640, 64), nn.Linear(64, 320))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[DPS(stage=2, **settings)]).bind(model, optimizer, total_steps=100)
    state = bound.states["dps"]
    covered = sum(bound.weights[n].numel() for n in state.numbers["covered"])
    most = 0.0
    for _ in range(9):
        optimizer.zero_grad()
        model(torch.randn(8, 640)).square().sum().backward()
        most = max(most, state.bytes() / covered)  # between forward and step, and after it
        optimizer.step()
        most = max(most, state.bytes() / covered)
    assert limit - 0.4 < most <= limit


@pytest.mark.parametrize("freeze", ["exact", "gradient"])
def test_a_forward_pass_in_inference_mode_does_no_harm(freeze: Any) -> None:
    """Before the one that trains: noise is drawn there, bits are unpacked."""
    found = []
    for first in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Recipe(methods=[DPS(stage=1, mix=True, freeze=freeze)]).bind(
            model, optimizer, total_steps=9
        )
        for _ in range(4):
            with torch.inference_mode():
                model(torch.ones(2, 5).double()) if first else None
            model(torch.ones(2, 5).double()).square().sum().backward()
            optimizer.step()
        found.append(model.state_dict())
    for name, w in found[0].items():
        assert torch.equal(found[1][name], w)


@pytest.mark.parametrize("mix", [False, True])
def test_bits_and_marks_come_back_from_a_file(mix: bool, tmp_path: Path) -> None:
    """Saved in the middle of a masking stage: the mask is what it was, entry by entry."""
    method = DPS(stage=3, mix=mix, drop=0.4)
    _, bound, _, _ = run(method, torch.optim.SGD, steps=5, lr=0.1)
    before = method.frozen(bound.views["dps"])
    state = bound.state_dict()
    save_file(state["tensors"], tmp_path / "state")
    bound.load_state_dict(state | {"tensors": load_file(tmp_path / "state")})
    after = method.frozen(bound.views["dps"])
    for n, f in before.items():
        assert torch.equal(after[n], f) and f.any() and not f.all()


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(("mix", "left"), [(False, set()), (True, {"start"})])
def test_a_task_begins_with_nothing_of_a_stage_cut_short(
    steps: int, mix: bool, left: set[str]
) -> None:
    """The first task ends inside an accumulating or a masking stage."""
    model, bound, _, _ = run(DPS(stage=3, mix=mix), torch.optim.SGD, steps=steps, lr=0.1)
    assert set(bound.states["dps"].weights) > left
    bound.begin_task("two", torch.optim.SGD(model.parameters(), lr=0.1), 9, model=model)
    assert set(bound.states["dps"].weights) == left and not bound.states["dps"].tensors
    for name, start in bound.states["dps"].weights.get("start", {}).items():
        assert torch.equal(start, linear(model)[name])


# --- coverage -------------------------------------------------------------------------------------


def covered(model: nn.Module, **settings: Any) -> list[str]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[DPS(**settings)]).bind(model, optimizer, total_steps=10)
    names: list[str] = bound.states["dps"].numbers["covered"]
    return names


def test_globs_choose_parameters_and_each_must_match() -> None:
    assert covered(net(), modules=("0.*", "*.bias")) == ["0.weight", "0.bias", "2.bias"]
    assert covered(net(), modules="all") == [n for n, _ in net().named_parameters()]
    encoder = Encoder()
    norm = "layers.0.norm.weight"
    assert covered(encoder, modules="matrices")[:2] == ["embeddings.weight", "layers.0.up.weight"]
    assert norm not in covered(encoder, modules="matrices")
    layers = [n for n, _ in encoder.named_parameters() if n.startswith("layers.")]
    assert norm in layers and covered(encoder, modules="layers") == layers
    with pytest.raises(Refused, match=r"dps\.modules: 'x\.\*' matches no parameter"):
        covered(net(), modules=("0.*", "x.*"))
    with pytest.raises(Refused, match="nothing to select from"):
        covered(nn.LayerNorm(3))


def test_conv1d_of_gpt2_counts_as_linear_and_mixes_inputs() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2Model(config)
    names = covered(model)
    assert names == [f"h.0.{m}.weight" for m in
                     ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = DPS(mix=True)
    bound = Recipe(methods=[method]).bind(model, optimizer, total_steps=10)
    view = bound.views["dps"]
    # Conv1D stores inputs × outputs; columns of inputs are dropped, so its first axis.
    assert noise_shape(view, "h.0.mlp.c_fc.weight", "column") == [8, 1]
    assert noise_shape(view, "h.0.mlp.c_proj.weight", "column") == [32, 1]
    kinds = covered(nn.Linear(4, 3), mix=True)
    assert kinds == ["weight"]


def test_noise_keeps_the_share_it_should() -> None:
    model = nn.Linear(4000, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = DPS(mix=True, drop=0.3)
    view = Recipe(methods=[method]).bind(model, optimizer, total_steps=10).views["dps"]
    kept = method.draw(view, "weight")
    assert kept.shape == (1, 4000)
    assert kept.float().mean() == pytest.approx(0.7, abs=0.03)


def test_forward_after_the_last_step_does_not_spoil_the_next_task() -> None:
    """Noise drawn by a training forward pass without a step belongs to no other task."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    bound, previous = Recipe(methods=[DPS(mix=True)]).unbound(), None
    for task in ("one", "two"):
        model = transformers.BertForSequenceClassification(config)
        if previous is not None:
            model.bert = previous.bert
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bound.begin_task(task, optimizer, 10, model=model)
        model.train()
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
        previous = model


@pytest.mark.parametrize("evaluated", [0, 2])  # in an accumulating and in a masking stage
def test_mix_on_a_model_in_evaluation_mode_is_refused(evaluated: int) -> None:
    """As from_pretrained leaves it, it would be trained without noise."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = Recipe(methods=[DPS(mix=True, stage=2)]).bind(model, optimizer, total_steps=9)

    def learn(training: bool) -> None:
        model.train(training)
        optimizer.zero_grad()
        model(torch.ones(1, 5).double()).sum().backward()
        optimizer.step()

    for _ in range(evaluated):
        learn(True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(Refused, match=r"dps\.mix: .*evaluation mode.*model\.train\(\)"):
        learn(False)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    learn(True)
    assert bound.step == evaluated + 1
