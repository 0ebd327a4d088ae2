"""Merging against closed forms and stacked least squares in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layered import Net, batches, begin, copied, design, learn, merged, wander, weights_of
from models import bert, collate, gpt2, rows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast.engine.method import Method
from holdfast.errors import tell_once
from holdfast.methods import Merge
from holdfast.recipe import Recipe
from holdfast.testing.contract import same

# What the contract suite runs: configurations, and the bytes a weight each may remember.
CONTRACT: list[tuple[Method, float]] = [
    (Merge(rows=20), 4),
    (Merge(strength=3.0, rows=5, again=True, structure="block", width=4), 4),
    (Merge(rows=24, structure="low_rank", width=1, rank=3), 4),
]

TINY = 1e-9  # a ridge that is nothing: what is left must be exact


def outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.encoder(x)
        return y


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_tasks_of_orthogonal_inputs_both_keep_their_outputs(bias: bool) -> None:
    """x̃ᵀz̃ = 0 for every old x̃ and new z̃: with a bias the appended 1s must cancel too."""
    torch.manual_seed(0)
    draw, model = torch.randn(8, 4), Net(nn.Linear(6, 3, bias=bias))
    old = torch.cat([draw[:, :2], torch.zeros(8, 2), torch.full((8, 2), float(bias))], 1)
    new = torch.cat([torch.zeros(8, 2), draw[:, 2:], torch.full((8, 2), -0.5 * bias)], 1)
    said: list[Tensor] = []
    bound = Recipe(methods=[Merge(ridge=TINY)]).unbound(seed=0)
    for place, x in enumerate((old, new)):
        begin(bound, f"task{place}", model)
        wander(model, place)
        said.append(outputs(model, x))
        bound.end_task(batches(4, x=x))
    for x, before in zip((old, new), said, strict=True):
        torch.testing.assert_close(outputs(model, x), before, rtol=1e-5, atol=1e-5)


def test_layers_that_cannot_be_measured_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tell_once.cache_clear()

    class Last(nn.GRU):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    data = batches(7, x=torch.randn(20, 3, 4))
    learn(Merge(), Net(Last(4, 3, batch_first=True)), [data, data])
    assert "merge: 100% of the weights are in layers whose inputs" in caplog.text


@pytest.mark.parametrize(("strength", "share"), [(1.0, 1 / 2), (3.0, 1 / 4), (0.0, 1.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_inputs_give_the_weighted_mean(strength: float, share: float, bias: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(nn.Linear(4, 3, bias=bias)), torch.randn(20, 4)
    data = [batches(7, x=x), batches(3, x=x.flip(0))]
    _, start, end = learn(Merge(strength=strength, ridge=TINY), model, data)
    for name, w in model.encoder.named_parameters(prefix="encoder"):
        expected = torch.lerp(start[1][name], end[1][name], share)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-5, atol=1e-5)


def test_from_no_strength_to_all() -> None:
    """γ → 0: the new weights on new inputs; γ → ∞: the start weights on old ones."""
    torch.manual_seed(0)
    old, new = torch.randn(20, 6), torch.randn(20, 6)
    old[:, 4:], new[:, :2] = 0, 0
    for strength, x, like in ((0.0, new, "end"), (1e6, old, "start")):
        model = Net(nn.Linear(6, 3, bias=False))
        data = [batches(5, x=old), batches(5, x=new)]
        _, start, end = learn(Merge(strength=strength, ridge=1e-10), model, data)
        w = (start if like == "start" else end)[1]["encoder.weight"]
        torch.testing.assert_close(outputs(model, x), x @ w.T, rtol=1e-4, atol=1e-4)
        other = (end if like == "start" else start)[1]["encoder.weight"]
        assert (outputs(model, x) - x @ other.T).abs().max() > 0.1


def test_what_no_input_reaches_stays_as_it_began() -> None:
    model, x = Net(nn.Linear(4, 3, bias=False)), torch.randn(9, 4)
    x[:, 3] = 0
    _, start, _ = learn(Merge(), model, [batches(4, x=x), batches(4, x=x)])
    w = model.encoder.weight.detach()
    assert torch.equal(w[:, 3], start[1]["encoder.weight"][:, 3])
    assert not torch.equal(w[:, 0], start[1]["encoder.weight"][:, 0])


# --- the slow obvious reference -----------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (9, 5, 4)),
    "without bias": (lambda: nn.Linear(4, 3, bias=False), (9, 5, 4)),
    "transformers Conv1D": (lambda: Conv1D(3, 4), (9, 5, 4)),
    "1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (9, 2, 9)),
    "2d": (lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="reflect"), (9, 2, 4, 4)),
    "2d without bias": (lambda: nn.Conv2d(2, 3, 2, stride=2, bias=False), (9, 2, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("strength", "ridge"), [(1.0, 1e-4), (3.0, 1e-2)])
def test_layers_are_merged_as_least_squares_say(name: str, strength: float, ridge: float) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name][0](), LAYERS[name][1]
    old, new = torch.randn(shape), torch.randn(shape)[:6] * 2  # other numbers of rows
    model = Net(layer)
    _, start, end = learn(Merge(strength=strength, ridge=ridge), model,
                          [batches(4, x=old), batches(5, x=new)])  # fmt: skip
    before, after = (weights_of(layer, w[1]) for w in (start, end))
    expected = merged(design(layer, old), design(layer, new), before, after, strength, ridge)
    found = weights_of(layer, copied(model))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_an_embedding_is_the_layer_of_one_hot_inputs() -> None:
    torch.manual_seed(0)
    layer, old, new = nn.Embedding(9, 3), torch.randint(4, (6, 5)), torch.randint(2, 6, (4, 5))
    model = Net(layer)
    _, start, end = learn(Merge(strength=2.0), model, [batches(4, x=old), batches(4, x=new)])
    before, after = (matrix_of_embedding(w[1]) for w in (start, end))
    expected = merged(design(layer, old), design(layer, new), before, after, 2.0, 0.0)
    torch.testing.assert_close(layer.weight.detach().T.double(), expected, rtol=1e-5, atol=1e-5)
    unseen = [i for i in range(9) if i not in new]
    assert torch.equal(layer.weight[unseen], start[1]["encoder.weight"][unseen])


def matrix_of_embedding(weights: dict[str, Tensor]) -> Tensor:
    return weights["encoder.weight"].T


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_say(side: str) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[i < n for i in range(5)] for n in (3, 5, 1, 4)]).long()
    mask = mask.flip(1) if side == "left" else mask
    found = []
    for junk in (0.0, 50.0):
        torch.manual_seed(1)
        model, tasks = Net(nn.Linear(4, 3)), []
        for _ in range(2):
            x = torch.randn(4, 5, 4)
            x[mask == 0] = junk
            tasks.append(batches(2, x=x, attention_mask=mask))
        learn(Merge(), model, tasks)
        found.append(copied(model))
    same(found[0], found[1])


def test_neither_order_nor_batches_matter() -> None:
    torch.manual_seed(0)
    x, z, layer = torch.randn(12, 5, 4), torch.randn(12, 5, 4), nn.Linear(4, 3)
    found = []
    for size, order in ((12, range(12)), (5, range(11, -1, -1)), (1, range(12))):
        model = Net(copy.deepcopy(layer))
        model.head = nn.Linear(1, 1)
        data = [batches(size, x=t[list(order)]) for t in (x, z)]
        learn(Merge(), model, data)
        found.append(model.encoder.weight.detach())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [2, 3])
def test_blocks_are_the_reference_without_terms_between_them(width: int) -> None:
    torch.manual_seed(0)
    layer, old, new = nn.Linear(5, 3), torch.randn(9, 4, 5), torch.randn(9, 4, 5)
    model = Net(layer)
    _, start, end = learn(Merge(structure="block", width=width), model,
                          [batches(9, x=old), batches(9, x=new)])  # fmt: skip
    before, after = (weights_of(layer, w[1]).double() for w in (start, end))
    g = [torch.einsum("rpi,rpj->ij", d, d) / 9 for d in (design(layer, old), design(layer, new))]
    blocks = -(-5 // width)
    block = torch.arange(6) // -(-6 // blocks)
    g_old, g_new = (t * (block[:, None] == block) for t in g)
    both = g_new + g_old
    both = both + 1e-4 * both.diagonal().mean() * torch.eye(6)
    expected = before + torch.linalg.solve(both, ((after - before) @ g_new).T).T
    found = weights_of(layer, copied(model))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_low_rank_of_enough_rank_is_the_whole_and_of_less_is_near() -> None:
    torch.manual_seed(0)
    decay = 0.6 ** torch.arange(12)
    old, new = (torch.randn(40, 12) @ torch.linalg.qr(torch.randn(12, 12))[0] * decay
                for _ in range(2))  # fmt: skip
    found = {}
    for how in (None, 13, 8, 2):
        torch.manual_seed(1)
        model = Net(nn.Linear(12, 3))
        structure: Any = "low_rank" if how else "full"
        method = Merge(structure=structure, width=1, rank=how or 1)
        _, start, _ = learn(method, model, [batches(8, x=old), batches(8, x=new)])
        change = weights_of(model.encoder, copied(model)) - weights_of(model.encoder, start[1])
        found[how] = change @ torch.cat([torch.cat([old, new]).T, torch.ones(1, 80)])
    torch.testing.assert_close(found[13], found[None], rtol=1e-3, atol=1e-3)
    far = [float((found[k] - found[None]).norm() / found[None].norm()) for k in (8, 2)]
    assert far[0] < 0.1 < far[1]


@pytest.mark.parametrize("again", [False, True])
def test_three_tasks_are_held_by_the_sum_of_their_inputs(again: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    tasks = [torch.randn(n, 4) for n in (9, 5, 7)]
    data = [batches(4, x=x) for x in tasks]
    bound, start, end = learn(Merge(strength=2.0, again=again), Net(layer), data)
    # The first layer's inputs are the rows themselves, on any network.
    g = [torch.einsum("rpi,rpj->ij", d, d) / len(d) for d in (design(layer[0], x) for x in tasks)]
    kept = bound.states["merge"].tensors["gram"]["encoder.0.weight"][0]
    torch.testing.assert_close(kept.double(), sum(g), rtol=1e-5, atol=1e-5)
    before, after = (weights_of(layer[0], w[2], "encoder.0").double() for w in (start, end))
    both = g[2] + 2.0 * (g[0] + g[1])
    both = both + 1e-4 * both.diagonal().mean() * torch.eye(5)
    expected = before + torch.linalg.solve(both, ((after - before) @ g[2]).T).T
    now = weights_of(layer[0], copied(bound.models["task2"]), "encoder.0")
    torch.testing.assert_close(now.double(), expected, rtol=1e-4, atol=1e-4)
    # Those of the second are what the first makes of them: before the merge, or again after it.
    hidden = []
    for place, x in enumerate(tasks):
        after_merging = [end[0], start[2], copied(bound.models["task2"])][place]
        w = weights_of(layer[0], after_merging if again else end[place], "encoder.0")
        h = design(layer[0], x)[:, 0] @ w.double().T
        h = torch.cat([h, torch.ones(len(h), 1)], 1)
        hidden.append(h.T @ h / len(h))
    kept = bound.states["merge"].tensors["gram"]["encoder.1.weight"][0]
    torch.testing.assert_close(kept.double(), sum(hidden), rtol=1e-4, atol=1e-4)


# --- whole networks -------------------------------------------------------------------------------


def test_a_transformer_layer_by_layer() -> None:
    """BERT: query, key and value are solved for together, as each would be alone."""
    model: Any = bert()
    data = [[collate(rows(12, seed=s))] for s in range(2)]
    inputs: dict[str, list[Tensor]] = {}
    linear = {n: m for n, m in model.bert.named_modules() if isinstance(m, nn.Linear)}

    def watch(task: int) -> None:
        handles = [
            m.register_forward_pre_hook(
                lambda _, args, n=n: inputs.setdefault(n, []).append(args[0].detach())
            )
            for n, m in linear.items()
        ]
        with torch.no_grad():
            model.eval()(**data[task][0])
        for handle in handles:
            handle.remove()

    bound = Recipe(methods=[Merge(strength=2.0, ridge=1e-2)]).unbound(seed=0)
    for place in range(2):
        begin(bound, f"task{place}", model)
        start = copied(model)
        wander(model, place, 0.05)
        end = copied(model)
        watch(place)
        bound.end_task(data[place])
    for name, layer in linear.items():
        x, z = (t.reshape(12, -1, t.shape[-1]) for t in inputs[name])
        before, after = (weights_of(layer, w, f"bert.{name}") for w in (start, end))
        expected = merged(design(layer, x), design(layer, z), before, after, 2.0, 1e-2)
        found = weights_of(layer, copied(model), f"bert.{name}")
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4, msg=name)
    for name, now in copied(model).items():
        if "LayerNorm" in name:
            torch.testing.assert_close(now, (start[name] + end[name]) / 2)
        elif name.startswith("classifier"):
            assert torch.equal(now, end[name])  # the task's own


def test_tied_and_position_weights_of_gpt2() -> None:
    model: Any = gpt2()
    data = [[collate(rows(6, seed=s, labels="tokens"))] for s in range(2)]
    _, start, end = learn(Merge(strength=3.0), model, data)
    assert model.lm_head.weight is model.transformer.wte.weight
    old, new = (torch.bincount(d[0]["input_ids"].flatten(), minlength=38).float() for d in data)
    share = torch.where(new > 0, new / (new + 3.0 * old), 0.0)[:, None]
    place = torch.arange(64)[:, None].lt(8) / 4  # eight positions, in every row
    for name, by in {"transformer.wte.weight": share, "transformer.wpe.weight": place}.items():
        before, after = start[1][name], end[1][name]
        torch.testing.assert_close(copied(model)[name], before + by * (after - before))


@pytest.mark.parametrize("kind", ["LayerNorm", "without bias", "RMSNorm"])
def test_norms_by_least_squares_for_each_feature(kind: str) -> None:
    torch.manual_seed(0)
    norm: Any = {
        "LayerNorm": lambda: nn.LayerNorm(4),
        "without bias": lambda: nn.LayerNorm(4, bias=False),
        "RMSNorm": lambda: nn.RMSNorm(4, eps=1e-6),
    }[kind]()
    old, new = torch.randn(9, 5, 4) + 1, torch.randn(6, 5, 4) * torch.tensor([1, 2, 3, 4.0])
    model = Net(norm)
    bound, start, end = learn(Merge(norms="solve", strength=2.0, ridge=TINY), model,
                              [batches(4, x=old), batches(4, x=new)])  # fmt: skip
    plain = type(norm)(4, eps=norm.eps)
    ones = [1.0] if getattr(norm, "bias", None) is not None else []
    for i in range(4):
        mine, theirs = (torch.cat([plain(x)[..., i : i + 1].detach(),
                                   *(torch.ones(*x.shape[:2], 1) for _ in ones)], -1)
                        for x in (new, old))  # fmt: skip
        names = ["weight", "bias"][: 1 + len(ones)]
        before, after = (torch.stack([w[1][f"encoder.{n}"][i] for n in names])[None]
                         for w in (start, end))  # fmt: skip
        expected = merged(theirs, mine, before, after, 2.0, TINY)
        found = torch.stack([copied(model)[f"encoder.{n}"][i] for n in names])[None]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    # d blocks of two by two: tiny beside any layer's.
    assert bound.states["merge"].bytes() == 4 * 4 * (1 + len(ones)) ** 2


def test_norms_move_by_a_share_where_they_are_not_solved_for() -> None:
    model, x = Net(nn.LayerNorm(4)), torch.randn(6, 5, 4)
    _, start, end = learn(Merge(others=0.2), model, [batches(4, x=x)] * 2)
    for name in ("encoder.weight", "encoder.bias"):
        expected = start[1][name] + 0.2 * (end[1][name] - start[1][name])
        torch.testing.assert_close(copied(model)[name], expected)


# --- LoRA -----------------------------------------------------------------------------------------


class Above(nn.Module):
    """A layer that PEFT puts its factors on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def product(weights: dict[str, Tensor], a: str) -> Tensor:
    """B A of a pair of factors, inputs flattened."""
    b = a.replace("lora_A", "lora_B")
    return (weights[b].flatten(1) @ weights[a].flatten(1)).double()


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("exact", [True, False])
def test_lora_is_merged_as_its_product(kind: str, exact: bool) -> None:
    """The nearest product of rank r to the merged one, which has rank 2r; r where B₀ was 0."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(6, 5) if kind == "linear" else nn.Conv1d(2, 5, 3, padding=1)
    shape = (9, 4, 6) if kind == "linear" else (9, 2, 7)
    old, new = torch.randn(shape), torch.randn(shape)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], lora_dropout=0.3)
    model = Net(peft.get_peft_model(Above(layer), config))
    bound = Recipe(methods=[Merge(strength=2.0)]).unbound(seed=0)
    start, end = {}, {}
    for place, x in enumerate((old, new)):
        begin(bound, f"task{place}", model)
        start = copied(model)
        if place or not exact:
            draw = torch.Generator().manual_seed(place)
            for n, p in model.named_parameters():
                if "lora" in n:
                    p.data += torch.randn(p.shape, generator=draw)
        end = copied(model)
        bound.end_task(batches(4, x=x))
    (a,) = (n for n in start if "lora_A" in n)
    bare = nn.Linear(6, 5, bias=False) if kind == "linear" else nn.Conv1d(
        2, 5, 3, padding=1, bias=False)  # fmt: skip
    before, after = product(start, a), product(end, a)
    reference = merged(design(bare, old), design(bare, new), before, after, 2.0, 1e-4)
    u, s, vt = torch.linalg.svd(reference)
    assert (s[2] / s[0] < 1e-5) == exact
    nearest = u[:, :2] @ s[:2].diag() @ vt[:2]
    found = product(copied(model), a)
    torch.testing.assert_close(found, nearest, rtol=1e-3, atol=1e-3)
    for name, w in copied(model).items():
        if "lora" not in name:
            assert torch.equal(w, end[name]), name
    model.eval()
    said = outputs(model, new)
    model.encoder = model.encoder.merge_and_unload()
    torch.testing.assert_close(outputs(model, new), said, rtol=1e-4, atol=1e-4)


def test_lora_that_did_not_move_stays_bit_for_bit() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["layer"])
    model = Net(peft.get_peft_model(Above(nn.Linear(6, 5)), config))
    bound = Recipe(methods=[Merge()]).unbound(seed=0)
    for task in ("one", "two"):
        begin(bound, task, model)
        before = copied(model)
        bound.end_task(batches(4, x=torch.randn(6, 6)))
    same(copied(model), before)
