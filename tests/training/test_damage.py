"""A damaged checkpoint is noticed, told of and passed over for the one before it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import same
from test_checkpoints import RECIPES, everything, two_tasks
from torch import Tensor

from holdfast import Refused
from holdfast.training import saving
from holdfast.training.checkpoints import META, TENSORS
from holdfast.training.manifest import MANIFEST, commit, damage, newest_complete, rotate

FILES = [
    "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin", META, TENSORS, MANIFEST,
]  # fmt: skip
SAVING = {"save_strategy": "steps", "save_steps": 3}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def tear(file: Path) -> None:
    """As long as before, but the end never reached the disk."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARMS = {"truncated": truncate, "torn": tear, "flipped": flip, "deleted": Path.unlink}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Where the run ends that the next fixture holds the checkpoints of."""
    return everything(two_tasks(tmp_path_factory.mktemp("whole"), RECIPES["dps"]))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at steps 3 and 6 of 9."""
    out = tmp_path_factory.mktemp("stopped")
    two_tasks(out, RECIPES["dps"], stop=6, **SAVING)
    assert sorted(p.name for p in (out / "two").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert sorted(p.name for p in (out / "two" / "checkpoint-6").iterdir()) == sorted(FILES)
    return out


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    file: str, harm: str, stopped: Path, undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    """Faults P1 to P4: the one before it is taken, and nothing changes but time."""
    shutil.copytree(stopped, tmp_path / "run")
    HARMS[harm](tmp_path / "run" / "two" / "checkpoint-6" / file)
    told: list[str] = []
    found = newest_complete(tmp_path / "run" / "two", told.append)
    assert found == tmp_path / "run" / "two" / "checkpoint-3"
    assert len(told) == 1 and told[0].startswith(f"checkpoint-6 is passed over: {file} ")
    again = two_tasks(tmp_path / "run", RECIPES["dps"], resume=str(found), **SAVING)
    assert same(everything(again), undisturbed)
    assert damage(tmp_path / "run" / "two" / "checkpoint-6") is None  # written again


@pytest.mark.parametrize("harm", HARMS)
def test_none_left_and_the_task_begins_anew(
    harm: str, stopped: Path, undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    for step, file in ((3, "model.safetensors"), (6, "optimizer.pt")):
        HARMS[harm](tmp_path / "run" / "two" / f"checkpoint-{step}" / file)
    assert newest_complete(tmp_path / "run" / "two") is None
    with pytest.raises(Refused, match="holds no whole checkpoint"):
        two_tasks(tmp_path / "run", RECIPES["dps"], resume=True, **SAVING)
    again = two_tasks(tmp_path / "run", RECIPES["dps"], **SAVING)
    assert same(everything(again), undisturbed)


def test_a_trainer_told_to_resume_does_the_same(
    stopped: Path,
    undisturbed: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    newest = tmp_path / "run" / "two" / "checkpoint-6"
    flip(newest / "optimizer.pt")
    with pytest.raises(Refused, match=r"checkpoint-6: optimizer\.pt is not as it was written"):
        two_tasks(tmp_path / "run", RECIPES["dps"], resume=str(newest), **SAVING)
    again = two_tasks(tmp_path / "run", RECIPES["dps"], resume=True, **SAVING)
    assert same(everything(again), undisturbed)
    assert "checkpoint-6 is passed over: optimizer.pt" in caplog.text


def test_the_last_good_one_stays_until_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def second_fails(folder: Path, *args: Any, **more: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        commit(folder, *args, **more)

    monkeypatch.setattr(saving, "commit", second_fails)
    with pytest.raises(KeyboardInterrupt):
        two_tasks(tmp_path, RECIPES["plain"], save_total_limit=1, **SAVING)
    assert newest_complete(tmp_path / "two") == tmp_path / "two" / "checkpoint-3"
    monkeypatch.undo()
    two_tasks(tmp_path, RECIPES["plain"], resume=True, save_total_limit=1, **SAVING)
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["checkpoint-9"]


def test_what_goes_to_the_hub_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer pushes a checkpoint before it returns from saving it."""
    pushed: list[str] = []

    def push(_: Any, folder: str) -> None:
        assert damage(folder) is None
        pushed.append(Path(folder).name)

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.args.push_to_hub = True  # set earlier, it asks for a network
        return original(self, *args, **kwargs)

    original = transformers.Trainer.train
    monkeypatch.setattr(transformers.Trainer, "train", train)
    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
    two_tasks(tmp_path, RECIPES["plain"], **SAVING)
    assert pushed == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_is_refused_and_not_run(name: str, stopped: Path, tmp_path: Path) -> None:
    """Faults S1: also where its manifest vouches for it."""
    out, mark = tmp_path / "out", tmp_path / "marker"
    shutil.copytree(stopped, out)
    checkpoint = out / "two" / "checkpoint-6"
    torch.save({"state": Payload(mark)}, checkpoint / name)
    commit(checkpoint)
    with pytest.raises(Refused, match="checkpoint-6: holds objects that could run code"):
        two_tasks(out, RECIPES["dps"], resume=True, **SAVING)
    assert not mark.exists()


def test_those_never_committed_go_first(tmp_path: Path) -> None:
    """After a fall back the abandoned ones have the higher numbers (faults P18)."""
    for step in (3, 6, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (3, 6):
        commit(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path / "checkpoint-6", None)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(tmp_path / "checkpoint-6", 2)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-6"}
    rotate(tmp_path / "checkpoint-6", 1, best=str(tmp_path / "checkpoint-3"))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-6"}


def test_every_byte_counts(tmp_path: Path) -> None:
    """Cut anywhere, or one bit flipped anywhere, manifest included; empty files and folders too."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "shard").write_bytes(b"abc")
    (tmp_path / "empty").touch()
    commit(tmp_path)
    assert damage(tmp_path) is None
    for file in (tmp_path / "in" / "shard", tmp_path / MANIFEST):
        content = file.read_bytes()
        for at in range(len(content)):
            file.write_bytes(content[:at])
            assert damage(tmp_path) is not None
            for bit in range(8):
                changed = bytearray(content)
                changed[at] ^= 1 << bit
                file.write_bytes(changed)
                assert damage(tmp_path) is not None, (file, at, bit)
        file.write_bytes(content)
    (tmp_path / "more").touch()  # what came later is none of its business
    assert damage(tmp_path) is None
