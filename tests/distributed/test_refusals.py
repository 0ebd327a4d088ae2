"""Sharded training that hides gradients or weights is refused at bind, with the remedy.

DeepSpeed is not installed here: stand-ins carry the marks it leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import arguments, bert, collate, rows
from tiny import adamw, net
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

import holdfast
from holdfast.cli import main
from holdfast.errors import Refused
from holdfast.experiments.runs import open_run
from holdfast.methods import L2SP
from holdfast.recipe import Recipe


def made_in(module: str, name: str, base: type = object, **body: Any) -> type:
    """A class as it would come from another package."""
    return type(name, (base,), {"__module__": module, **body})


def wrapped(optimizer: Any, cls: type) -> Any:
    cover = cls()
    cover.optimizer = optimizer
    return cover


def zero3_parameter(model: nn.Module) -> Any:
    model[0].weight.ds_id = 3  # type: ignore[index]
    return adamw(model)


def zero3_tensor(model: nn.Module) -> Any:
    model[2].bias.ds_tensor = torch.zeros(1)  # type: ignore[index]
    return adamw(model)


def zero2(model: nn.Module) -> Any:
    kind = made_in("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
    return wrapped(adamw(model), kind)


def accelerated(model: nn.Module) -> Any:
    kind = made_in("accelerate.utils.deepspeed", "DeepSpeedOptimizerWrapper")
    return wrapped(zero2(model), kind)


def derived(model: nn.Module) -> Any:
    """A user's own class on top of DeepSpeed's is DeepSpeed's."""
    kind = made_in("deepspeed.ops.adam.fused_adam", "FusedAdam", torch.optim.AdamW)
    return made_in("mine", "Mine", kind)(model.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (zero3_parameter, r"^0\.weight: DeepSpeed ZeRO-3.*fully_shard"),
        (zero3_tensor, r"^2\.bias: DeepSpeed ZeRO-3.*fully_shard"),
        (zero2, r"^optimizer: DeepSpeedZeroOptimizer.*sees no gradient.*DistributedDataParallel"),
        (accelerated, r"^optimizer: DeepSpeedOptimizerWrapper.*fully_shard"),
        (derived, r"^optimizer: Mine.*ZeRO"),
    ],
)
def test_deepspeed_is_refused(make: Callable[[nn.Module], Any], words: str) -> None:
    model = net()
    with pytest.raises(Refused, match=words):
        Recipe(methods=[L2SP()]).bind(model, make(model), total_steps=3)


def test_an_engine_is_refused() -> None:
    model = net()
    engine = made_in("deepspeed.runtime.engine", "DeepSpeedEngine", nn.Sequential)(model)
    with pytest.raises(Refused, match="DeepSpeed steps behind torch's optimizer"):
        Recipe().bind(engine, adamw(model), total_steps=3)


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A process group of this process alone: no port is opened."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_zero_redundancy_optimizer_is_refused() -> None:
    model = net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    with pytest.raises(Refused, match=r"^optimizer: ZeroRedundancy.*a part of the weights"):
        Recipe().bind(model, optimizer, total_steps=3)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_the_first_fsdp_is_refused(original: bool, whole: bool) -> None:
    model: Any = net()
    how = {"use_orig_params": original, "device_id": torch.device("cpu")}
    if whole:
        model = FullyShardedDataParallel(model, **how)
    else:
        model[0] = FullyShardedDataParallel(model[0], **how)
    with pytest.raises(Refused, match=r"FSDP1 flattens weights.*fully_shard \(FSDP2\)"):
        Recipe().bind(model, adamw(model), total_steps=3)


@pytest.mark.usefixtures("group")
def test_ddp_of_one_process_is_served() -> None:
    model = net()
    wrapped_ = nn.parallel.DistributedDataParallel(model)
    bound = Recipe(methods=[L2SP()]).bind(wrapped_, adamw(model), total_steps=3)
    assert bound.models["task"] is model
    wrapped_(torch.ones(2, 3)).sum().backward()
    bound.optimizer.step()
    assert bound.step == 1


@pytest.mark.parametrize("which", ["deepspeed", "fsdp"])
def test_trainer_over_them_is_refused(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There Trainer makes its scheduler elsewhere: the recipe would silently not be bound."""
    create = transformers.Trainer.create_accelerator_and_postprocess

    def enabled(trainer: Any) -> None:
        create(trainer)
        setattr(trainer, f"is_{which}_enabled", True)

    monkeypatch.setattr(holdfast.Trainer, "create_accelerator_and_postprocess", enabled)
    with pytest.raises(Refused, match=f"^{which}: Trainer over.*torchrun alone"):
        holdfast.Trainer(model=bert(), args=arguments(tmp_path), train_dataset=rows(4),
                         data_collator=collate)  # fmt: skip


@pytest.mark.parametrize("verb", ["selftrain", "compare", "search"])
def test_several_runs_under_torchrun_are_refused(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the ranks would take each other's runs for their own, and wait for each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    more = {"compare": "--tasks x --recipes plain", "search": "--tasks x",
            "selftrain": "--task x --unlabelled y"}[verb]  # fmt: skip
    assert main([verb, *more.split(), "--out", str(tmp_path / "out")]) == 2
    assert "torchrun: is of one process; train one model" in capsys.readouterr().err
    with pytest.raises(Refused, match="torchrun"), open_run(tmp_path / "out", {}):
        pass
    assert not (tmp_path / "out").exists()
