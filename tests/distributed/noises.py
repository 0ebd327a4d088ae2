"""Checks of methods that put noise into a forward pass; run by `ranks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from learning import ddp, mine, rank
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from holdfast.engine.bound import Bound
from holdfast.engine.method import Method
from holdfast.errors import Refused
from holdfast.methods import LNSR, R3F, SMART
from holdfast.methods.common import noise
from holdfast.ops import distributed
from holdfast.recipe import Recipe
from holdfast.testing.toy import Classifier, make_batch

METHODS: dict[str, Method] = {
    "r3f": R3F(epsilon=0.3, strength=3.0),
    "r4f": R3F(epsilon=0.3, noise="normal", head="spectral", dropout="same"),
    "smart": SMART(epsilon=0.3, rate=0.3, start=0.1, proximal=1.0),
    "lnsr": LNSR(epsilon=0.3, strength=3.0),
    "lnsr below": LNSR(epsilon=0.3, layer=0),
}
SHARDED = METHODS.keys() - {"smart"}


def model() -> Any:
    torch.manual_seed(0)
    made = Classifier().double()
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


def fsdp(net: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for block in net.encoder.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def learn(method: Method, net: Any, called: Any) -> tuple[Bound, dict[str, Tensor]]:
    """Three steps, on this rank's rows, and the weights then."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    bound = Recipe(methods=[method]).bind(net, optimizer, total_steps=3, task="one")
    called = called(net)
    for step in range(3):
        optimizer.zero_grad()
        part = mine(make_batch("one", step))
        out = called(**part)
        (out.loss + bound.penalty(part, out)).backward()
        optimizer.step()
    return bound, {n: distributed.full(w.detach()).clone() for n, w in bound.weights.items()}


def level() -> Any:
    """Noise that does not depend on the rank: the place in a row alone."""

    def ones(x: Tensor, seed: int) -> Tensor:
        each = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64)
        return each.reshape(1, *x.shape[1:]).expand_as(x).clone()

    return patch.multiple(noise, normal=ones, uniform=ones)


def check_noise_on_ranks_is_that_of_one_process() -> Iterator[None]:
    """The same gradients where the noise is the same, with replicas and in shards."""
    with level():
        alone = {name: learn(m, model(), lambda net: net)[1] for name, m in METHODS.items()}
    yield
    with level():
        for name, method in METHODS.items():
            found = [learn(method, model(), ddp)[1]]
            if name in SHARDED:
                found.append(learn(method, fsdp(model()), lambda net: net)[1])
            for weights in found:
                for n, w in alone[name].items():
                    torch.testing.assert_close(weights[n], w, atol=1e-9, rtol=1e-7,
                                               msg=f"{name}: {n}")  # fmt: skip


def check_noise_differs_between_ranks_and_draws_do_not() -> Iterator[None]:
    """Five rows on one rank and three on the other: `end_task` compares weights and draws."""
    yield
    for method in METHODS.values():
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        bound = Recipe(methods=[method]).bind(net, optimizer, total_steps=3, task="one")
        called = ddp(net)
        for step in range(3):
            optimizer.zero_grad()
            cut = slice(0, 5) if rank() == 0 else slice(5, 8)
            part = {k: v[cut] for k, v in make_batch("one", step).items()}
            out = called(**part)
            (out.loss + bound.penalty(part, out)).backward()
            optimizer.step()
        seeds = distributed.gather([noise.seed(bound.views[method.name])], torch.device("cpu"))
        assert seeds[0] != seeds[1]
        bound.end_task([make_batch("one", 0)])


def check_smart_in_shards_is_refused() -> Iterator[None]:
    """Before a step."""
    yield
    net = fsdp(model())
    with pytest.raises(Refused, match="smart cannot differentiate twice with weights in shards"):
        Recipe(methods=[SMART()]).bind(
            net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=3, task="one"
        )
