"""Extra forward passes that leave training's random state, weights and gradients untouched."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.engine.batches import Batch, Whole, without_labels
from holdfast.errors import Refused
from holdfast.ops.distributed import sharded


class Hook:
    """A hook of a model in training; in copies of the model and in files it does nothing."""

    def __init__(self, run: Callable[..., None] | None = None) -> None:
        self.run = run

    def __call__(self, *given: Any) -> None:
        if self.run is not None:
            self.run(*given)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


@contextlib.contextmanager
def own_randomness(generator: torch.Generator) -> Iterator[None]:
    """Draw from `generator` within the block, and leave the global random state untouched."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def random_state() -> tuple[Tensor, ...]:
    """The global random state: of the CPU, and of the CUDA device in use."""
    cuda = (torch.cuda.get_rng_state(),) if torch.cuda.is_initialized() else ()
    return torch.get_rng_state(), *cuda


def draw_on(state: tuple[Tensor, ...]) -> None:
    """Go on drawing from a `random_state`."""
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda)


@contextlib.contextmanager
def gradients_on() -> Iterator[None]:
    """Gradients can be taken within the block, also by a caller that evaluates without any."""
    with torch.inference_mode(False), torch.enable_grad():
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
def returning(
    module: nn.Module, outputs: Any, drawn: tuple[Tensor, ...] | None = None
) -> Iterator[None]:
    """Within the block `module` returns `outputs`, whatever it is given, and computes nothing.

    With `drawn` it leaves this global random state, as if it had run.
    """

    def instead(*_: Any, **__: Any) -> Any:
        if drawn is not None:
            draw_on(drawn)
        return outputs

    before = module.__dict__.get("forward")
    module.forward = instead
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


# --- other values on the way ----------------------------------------------------------------------


def entrance(model: nn.Module, batch: Batch) -> str:
    """The name of the input by which text, pictures or numbers enter a model.

    It is `inputs_embeds`, or what a Hugging Face model calls its main input, or the first that is
    neither labels nor a mask.
    """
    found = [
        name
        for name, value in without_labels(batch).items()
        if isinstance(value, Tensor) and value.dtype is not torch.bool and "mask" not in name
    ]
    for name in ("inputs_embeds", getattr(model, "main_input_name", None)):
        if name in found:
            return str(name)
    if not found:
        raise Refused("a batch holds no inputs by name", remedy="pass what model(**batch) takes")
    return found[0]


@contextlib.contextmanager
def perturbed(
    model: nn.Module, batch: Batch, by: Mapping[nn.Module | str, Callable[[Tensor], Tensor]]
) -> Iterator[Batch]:
    """Within the block, other values on the way through a model; yields the batch to run it on.

    A module's output (its first tensor) becomes a function of it; for the name of an input, that
    input if it is of floats, and for tokens what the embedding table says of them, when it is first
    asked. Running statistics of norms stay as they were. `Refused` after a pass that did not come
    by one of these places, and for one within what is computed again (an activation checkpoint):
    there the backward pass would not see the change.
    """
    if isinstance(batch, Whole):
        raise Refused("only the trainer's loss takes this batch", where="view.forward",
                      remedy="take a method that changes no forward pass")  # fmt: skip
    batch, left, outside = dict(batch), dict(by), _checkpoint()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if module.training and getattr(module, "track_running_stats", False):
                stack.callback(module._buffers.update, dict(module._buffers))
                copies = {k: b.clone() for k, b in module._buffers.items() if b is not None}
                module._buffers.update(copies)
        for where, change in by.items():
            if isinstance(where, str) and batch[where].is_floating_point():
                batch[where] = change(batch[where])
                del left[where]
        table = _input_embeddings(model)
        inside = {*table.modules()} - {table} if table is not None else set()
        for module in model.modules():
            tokens = module is table or (isinstance(module, nn.Embedding) and module not in inside)
            if tokens or module in by:
                see = _changing(module, left, by, batch, outside, first=module is table)
                stack.callback(module.register_forward_hook(see, with_kwargs=True).remove)
        yield batch
    for where in left:
        what = where if isinstance(where, str) else type(where).__name__
        raise Refused(f"the forward pass did not come by {what}, so that it cannot be perturbed",
                      where="view.forward",
                      remedy="look up tokens by an nn.Embedding, or pass floats")  # fmt: skip


def _changing(
    module: nn.Module,
    left: dict[nn.Module | str, Callable[[Tensor], Tensor]],
    by: Mapping[nn.Module | str, Callable[[Tensor], Tensor]],
    batch: Batch,
    outside: Any,
    *,
    first: bool,
) -> Callable[..., Any]:
    """A forward hook that changes what a module returns, or an embedding table says of tokens."""

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Any) -> Any:
        for name in [each for each in left if isinstance(each, str)]:
            asked = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first or (asked is not None and _equal(asked, batch[name])):
                outputs = changed(outputs, left.pop(name))
        if module in by:
            left.pop(module, None)
            outputs = changed(outputs, by[module])
        return outputs

    def changed(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
        if _checkpoint() != outside:
            what = f"a {type(module).__name__}"
            raise Refused(f"{what} lies within an activation checkpoint, or runs without gradients",
                          where="view.forward", remedy="checkpoint by layers")  # fmt: skip
        now = change(first_tensor(outputs))
        return now if isinstance(outputs, Tensor) else type(outputs)([now, *outputs[1:]])

    return see


def _checkpoint() -> tuple[bool, Any]:
    """Tells passes within an activation checkpoint from those outside: a reentrant one runs
    without gradients, another packs what is saved."""
    packing = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return torch.is_grad_enabled(), packing(True) if packing else None


def _equal(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.shape == two.shape and torch.equal(one, two))


def first_tensor(outputs: Any) -> Tensor:
    """The tensor that a module returns, or the first of several."""
    found = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    if not isinstance(found, Tensor):
        raise Refused(f"a module returned {type(found).__name__}, no tensor", where="view.forward")
    return found


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    """What a Hugging Face model calls its input embeddings."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # models of several inputs have none
        return None
    return found if isinstance(found, nn.Module) else None


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
