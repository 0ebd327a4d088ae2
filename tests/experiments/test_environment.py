"""Variables of the environment must not train otherwise than the record says, nor fail late."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.errors import Refused
from holdfast.experiments.ranks import check_alone, join

SET = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
       "MASTER_PORT": "29500"}  # fmt: skip


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "told",
    ["ACCELERATE_MIXED_PRECISION=bf16", "ACCELERATE_MIXED_PRECISION=fp8",
     "ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_USE_DEEPSPEED=1", "ACCELERATE_USE_FSDP=True",
     "ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"],
)  # fmt: skip
def test_settings_of_accelerate_are_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, value = told.partition("=")
    monkeypatch.setenv(name, value)
    for begin in (join, check_alone):
        with pytest.raises(Refused, match=f"^{name}: is '{value}' .*; unset {name}$"):
            begin()


def test_what_accelerate_launch_sets_by_itself_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"MIXED_PRECISION": "no", "DYNAMO_BACKEND": "NO", "USE_CPU": "False",
             "GRADIENT_ACCUMULATION_STEPS": "1", "CPU_AFFINITY": "1"}  # fmt: skip
    for name, value in usual.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_alone()


@pytest.mark.parametrize(
    "told", [{"WORLD_SIZE": "2"}, {"LOCAL_RANK": "0"}, {"WORLD_SIZE": "two"},
             {**SET, "RANK": "first"}, {**SET, "MASTER_ADDR": ""}],
)  # fmt: skip
def test_half_of_a_launch_is_refused(
    told: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It would wait for processes that never come, or end in a traceback."""
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--task", "builtin:mood", "--out", str(tmp_path / "run")]) == 2
    assert "holdfast: torchrun: only part of what torchrun sets" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("told", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, SET])
def test_one_process_is_one(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    check_alone()
