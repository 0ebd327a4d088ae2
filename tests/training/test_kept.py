"""State that does not change is stored once, and every checkpoint is complete by itself."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import same
from safetensors.torch import load_file
from test_checkpoints import everything, two_tasks
from test_damage import HARMS

from holdfast import DPS, EWC, L2SP, Bound, Recipe, Refused, Replay
from holdfast.training import checkpoints
from holdfast.training.checkpoints import load_state, save_state
from holdfast.training.manifest import commit, damage, newest_complete
from holdfast.training.tensors import write_tensors

RECIPE = Recipe(methods=[EWC(), L2SP(), Replay(memory=4), DPS(mix=True, stage=4)])


@pytest.fixture(autouse=True)
def every_slot_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "KEPT_FROM", 0)


def inodes(folder: Path) -> dict[int, int]:
    """Our files below a folder, each counted once however many names it has: inode -> bytes."""
    found = [p.stat() for p in folder.rglob("holdfast*.safetensors")]
    return {s.st_ino: s.st_size for s in found}


def slots(checkpoint: Path) -> dict[str, Path]:
    """The file of each slot."""
    found = {}
    for path in checkpoint.glob("holdfast-*.safetensors"):
        (slot,) = {"/".join(key.split("/", 3)[:3]) for key in load_file(path)}
        found[slot] = path
    return found


def test_checkpoints_of_a_run_store_it_once(tmp_path: Path) -> None:
    """Nine checkpoints at stage 4: what turns is written when it turns, the rest a single time."""
    whole = two_tasks(tmp_path, RECIPE, save_strategy="steps", save_steps=1)
    saved = sorted((tmp_path / "two").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    assert len(saved) == 9 and not [s for s in saved if damage(s)]
    names = {
        slot: len({slots(s)[slot].stat().st_ino for s in saved if slot in slots(s)})
        for slot in slots(saved[0]) | slots(saved[-1])
    }
    once = ["ewc/weights/anchor", "ewc/weights/fisher", "l2sp/weights/start",
            "dps/weights/start", "replay/tensors/one"]  # fmt: skip
    assert {slot: names[slot] for slot in once} == dict.fromkeys(once, 1)
    # After steps 1 to 4 a sum (at 4 it turns into the values held to 8), from 8 on a sum again.
    assert names["dps/weights/sum"] == 3 + 2 and "dps/weights/held" not in slots(saved[0])
    kept = inodes(tmp_path / "two")
    every = sum(p.stat().st_size for p in (tmp_path / "two").rglob("holdfast*.safetensors"))
    assert sum(kept.values()) < every / 3
    last = two_tasks(tmp_path / "again", RECIPE, resume=str(saved[4]))
    assert same(everything(last), everything(whole))


def test_a_folder_alone_is_whole_wherever_it_is_taken(tmp_path: Path) -> None:
    """No other folder is needed, and rotation takes nothing from those that stay."""
    whole = two_tasks(tmp_path, RECIPE, save_strategy="steps", save_steps=2, save_total_limit=2)
    saved = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert saved == ["checkpoint-8", "checkpoint-9"]
    shutil.copytree(tmp_path / "two" / "checkpoint-8", tmp_path / "elsewhere" / "checkpoint-8")
    shutil.rmtree(tmp_path / "two")
    assert damage(tmp_path / "elsewhere" / "checkpoint-8") is None
    moved = str(tmp_path / "elsewhere" / "checkpoint-8")
    again = two_tasks(tmp_path / "more", RECIPE, resume=moved, save_strategy="steps", save_steps=9)
    assert same(everything(again), everything(whole))
    # The checkpoint after it takes over what it was loaded from.
    read, written = (slots(Path(p)) for p in (moved, tmp_path / "more" / "two" / "checkpoint-9"))
    for slot in ("ewc/weights/fisher", "dps/weights/start"):
        assert read[slot].samefile(written[slot])
    assert damage(tmp_path / "more" / "two" / "checkpoint-9") is None


# --- a bound without a run ------------------------------------------------------------------------


def bound() -> Bound:
    model = models.Plain()
    made = Recipe(methods=[L2SP()]).bind(
        model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=2
    )
    state = made.states["l2sp"]
    state.tensors["rows"] = {"a": torch.arange(40.0), "b": torch.ones(3, dtype=torch.bool)}
    return made


def saved(of: Bound, folder: Path) -> Path:
    commit(folder, save_state(of, folder))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    assert damage(folder) is None
    return checkpoints.read_state(folder)["tensors"]


def links(one: Path, two: Path) -> set[str]:
    """Slots that two folders share the bytes of."""
    first, second = slots(one), slots(two)
    return {s for s in first.keys() & second.keys() if first[s].samefile(second[s])}


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "in place": lambda rows: rows["a"].add_(1),
    "one entry": lambda rows: rows["a"].__setitem__(7, 99.0),
    "two exchanged": lambda rows: rows["a"].copy_(rows["a"].flip(0)),  # of the same sum
    "another tensor": lambda rows: rows.update(a=rows["a"] + 1),
    "through .data": lambda rows: rows["a"].data.mul_(2),
    "through numpy": lambda rows: rows["a"].numpy().__setitem__(3, -1.0),
    "a mask": lambda rows: rows["b"].data.logical_not_(),
    "one more": lambda rows: rows.update(c=torch.zeros(1)),
    "one less": lambda rows: rows.pop("b"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_written_again(change: str, tmp_path: Path) -> None:
    made = bound()
    first = saved(made, tmp_path / "1")
    second = saved(made, tmp_path / "2")
    assert links(first, second) == {"l2sp/weights/start", "l2sp/tensors/rows"}
    before = read(first)
    CHANGES[change](made.states["l2sp"].tensors["rows"])
    third = saved(made, tmp_path / "3")
    assert links(second, third) == {"l2sp/weights/start"}
    assert same(read(third), made.state_dict()["tensors"])
    assert same(read(first), before) and same(read(second), before)


def test_a_freed_tensor_whose_place_another_takes_is_no_match(tmp_path: Path) -> None:
    """Were tensors told apart by id() alone, a new one at the old address would be taken for it."""
    made = bound()
    rows = made.states["l2sp"].tensors["rows"]
    first = saved(made, tmp_path / "0")
    for step in range(1, 20):
        rows.pop("a")
        rows["a"] = torch.arange(40.0).roll(step)  # of the same sum
        now = saved(made, tmp_path / str(step))
        assert torch.equal(read(now)["l2sp/tensors/rows/a"], rows["a"])
    assert links(first, now) == {"l2sp/weights/start"}


def test_a_folder_written_twice_keeps_its_slots_apart(tmp_path: Path) -> None:
    """A slot that comes between shifts the numbers of the files: none may be taken for another."""
    made = bound()
    tensors = made.states["l2sp"].tensors
    saved(made, tmp_path / "1")
    tensors["aaa"] = {"a": torch.arange(40.0) + 5, "b": torch.ones(3, dtype=torch.bool)}
    assert same(read(saved(made, tmp_path / "1")), made.state_dict()["tensors"])
    tensors.pop("aaa")
    assert same(read(saved(made, tmp_path / "1")), made.state_dict()["tensors"])
    assert len(slots(tmp_path / "1")) == 2


def test_a_file_that_another_run_wrote_over_is_not_linked(tmp_path: Path) -> None:
    made, other = bound(), bound()
    other.states["l2sp"].tensors["rows"]["a"].neg_()
    saved(made, tmp_path / "1")
    saved(other, tmp_path / "1")
    assert same(read(saved(made, tmp_path / "2")), made.state_dict()["tensors"])


def test_where_links_are_not_possible_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", fails)
    made = bound()
    first, second = saved(made, tmp_path / "1"), saved(made, tmp_path / "2")
    assert not links(first, second)
    assert same(read(first), read(second)) and same(read(first), made.state_dict()["tensors"])


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_kept_file_is_noticed(harm: str, tmp_path: Path) -> None:
    """Bytes that are stored once are lost once: only a deleted name leaves the others whole."""
    made = bound()
    for step in (1, 2):
        saved(made, tmp_path / f"checkpoint-{step}")
    file = slots(tmp_path / "checkpoint-2")["l2sp/weights/start"]
    HARMS[harm](file)
    told: list[str] = []
    found = newest_complete(tmp_path, told.append)
    assert told[0].startswith(f"checkpoint-2 is passed over: {file.name} ")
    assert found == (tmp_path / "checkpoint-1" if harm == "deleted" else None)
    if harm == "deleted":
        with pytest.raises(Refused, match=rf"{file.name} is missing"):
            load_state(Recipe(methods=[L2SP()]).unbound(), tmp_path / "checkpoint-2")


def test_a_state_that_names_files_elsewhere_is_refused(tmp_path: Path) -> None:
    made = bound()
    saved(made, tmp_path / "1")
    meta = tmp_path / "1" / checkpoints.META
    for name in ("../1/holdfast.safetensors", "/etc/passwd", "model.safetensors"):
        meta.write_text(meta.read_text().replace('"holdfast.safetensors"', f'"{name}"'))
        with pytest.raises(Refused, match="no file of a state"):
            load_state(Recipe(methods=[L2SP()]).unbound(), tmp_path / "1")
        saved(made, tmp_path / "1")


def test_slots_that_were_divided_otherwise_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another release, or in another order: a file is known by what is in it."""
    made, again = bound(), bound()
    first = saved(made, tmp_path / "1")
    load_state(again, first)
    monkeypatch.setattr(checkpoints, "KEPT_FROM", 4 * 40 + 4)  # "rows" comes before "start"
    second = saved(again, tmp_path / "2")
    assert links(first, second) == {"l2sp/weights/start"}
    assert same(read(second), made.state_dict()["tensors"])


def test_small_slots_share_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "KEPT_FROM", 4 * 40 + 3)
    made = bound()
    folder = saved(made, tmp_path / "1")
    assert set(slots(folder)) == {"l2sp/weights/start", "l2sp/tensors/rows"}
    monkeypatch.setattr(checkpoints, "KEPT_FROM", 4 * 40 + 4)
    folder = saved(made, tmp_path / "1")
    assert set(slots(folder)) == {"l2sp/weights/start"}
    assert same(read(folder), made.state_dict()["tensors"])


# --- the writer -----------------------------------------------------------------------------------


def test_the_writer_writes_what_the_library_reads(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "one": base,
        "shared": base,  # the library's writer refuses this
        "transposed": base.t(),
        "strided": base[:, ::2],
        "spread": torch.ones(1).expand(5),
        "none": torch.empty(0, 3),
        "number": torch.tensor(7, dtype=torch.int64),
        "odd": torch.ones(3, dtype=torch.uint8),
        "mask": torch.tensor([True, False, True]),
        "half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
        "grad": torch.ones(2, requires_grad=True),
    }
    size, sha = write_tensors(tmp_path / "x.safetensors", tensors)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (size, sha) == (len(content), hashlib.sha256(content).hexdigest())
    assert os.listdir(tmp_path) == ["x.safetensors"]
    found = load_file(tmp_path / "x.safetensors")
    assert {k: (t.dtype, t.shape) for k, t in found.items()} == {
        k: (t.dtype, t.shape) for k, t in tensors.items()
    }
    assert same(found, {k: t.detach() for k, t in tensors.items()})


def test_the_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(Refused, match="complex64"):
        write_tensors(path, {"a": torch.ones(2), "b": torch.ones(1, dtype=torch.complex64)})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
