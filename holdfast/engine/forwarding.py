"""Extra forward passes that leave training's random state, weights and gradients untouched."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import Refused
from holdfast.ops.distributed import sharded


@contextlib.contextmanager
def own_randomness(generator: torch.Generator) -> Iterator[None]:
    """Draw from `generator` within the block, and leave the global random state untouched."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def uncompiled() -> contextlib.AbstractContextManager[None]:
    """Run compiled models eagerly.

    Compiled code skips hooks added since it was compiled, such as those that measure the Fisher
    information, draws dropout in its own way, and would recompile for other batch sizes.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return eager


@contextlib.contextmanager
def in_mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Training or evaluation mode within the block; each module's own mode is restored after it."""
    before = [(module, module.training) for module in modules]
    for module, _ in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextlib.contextmanager
def returning(module: nn.Module, outputs: Any) -> Iterator[None]:
    """Within the block `module` returns `outputs`, whatever it is given, and computes nothing."""
    before = module.__dict__.get("forward")
    module.forward = lambda *_, **__: outputs
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@contextlib.contextmanager
def replaced(weights: Mapping[str, nn.Parameter], by: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, other values in place of some weights; only without gradients."""
    if by and torch.is_grad_enabled():
        raise RuntimeError("view.forward(weights=...) works only under torch.no_grad()")
    if any(sharded(weights[name]) for name in by):
        raise Refused("weights in shards cannot be replaced", where="view.forward",
                      remedy="train with DistributedDataParallel")  # fmt: skip
    kept = {name: weights[name].data for name in by}
    try:
        if by:  # autocast caches a low-precision copy of each weight
            torch.clear_autocast_cache()
        for name, w in by.items():
            weights[name].data = w
        yield
    finally:
        for name, w in kept.items():
            weights[name].data = w
        if by:
            torch.clear_autocast_cache()


def adapters(model: nn.Module) -> list[Any]:
    """The layers of a model that PEFT has put adapters on."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block, the model without PEFT's adapters; its own heads stay as they are.

    (PEFT's `disable_adapter` also undoes `modules_to_save`, and unfreezes what was frozen.)
    """
    layers = [layer for layer in adapters(model) if not layer.disable_adapters]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for p, learns in trained:
            p.requires_grad_(learns)


@contextlib.contextmanager
def untrained(model: nn.Module, held: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """No gradients for parameters that the optimizer does not hold: the heads of other tasks."""
    ours = {id(w) for w in held.values()}
    foreign = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    if any(sharded(w) for w in held.values()):
        # Between forward and backward FSDP2 shows whole weights in place of the held shards.
        foreign = [p for p in foreign if sharded(p)]
    for p in foreign:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in foreign:
            p.requires_grad_(True)
