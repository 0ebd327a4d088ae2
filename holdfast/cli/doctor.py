"""`holdfast doctor`: what this machine gives holdfast to work with, and what could be better."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ABOUT = "tell versions, device, threads and precision, and what slows them down"
EXAMPLE = "holdfast doctor"
RESUMES = False


def options(_: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(_: argparse.Namespace) -> None:
    import torch

    from holdfast.experiments.record import versions

    print(" · ".join(f"{name} {version}" for name, version in versions().items()))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    free = shutil.disk_usage(Path.cwd()).free
    print(f"device {device} · {torch.get_num_threads()} threads on {_cores()} cores · "
          f"{free / 1e9:.0f} GB free here")  # fmt: skip
    for line in _advice(str(device)):
        print(f"! {line}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _advice(device: str) -> Iterator[str]:
    """What is worth changing, a line each."""
    import torch

    if device == "cpu":
        yield "no accelerator: a model of 22M parameters takes about .3 s a step of 16 short rows"
        if torch.version.cuda:
            yield f"torch, built for CUDA {torch.version.cuda}, finds no device: look at the driver"
        if torch.cpu._is_avx512_bf16_supported():
            yield "this processor multiplies in bfloat16: --bf16 is faster here"
        if torch.get_num_threads() > _cores():
            yield f"more threads than cores: OMP_NUM_THREADS={_cores()} is faster"
    elif not torch.cuda.is_available() or torch.cuda.is_bf16_supported():
        yield "--bf16 trains in half the memory here"
    from holdfast.errors import Refused
    from holdfast.experiments.heads import locate

    try:
        locate("minilm")
    except Refused as refusal:
        yield str(refusal)
