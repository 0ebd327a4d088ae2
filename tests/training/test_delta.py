"""Delta files: exact both ways, of one base only, small where little moved."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import models
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.cli import main
from holdfast.errors import Refused
from holdfast.files import SMALL, inflated
from holdfast.training import delta
from holdfast.training.manifest import damage
from holdfast.training.tensors import NAMES
from holdfast.training.weights import digest, open_model

State = dict[str, Tensor]


def write(folder: Path, tensors: Mapping[str, Tensor], **files: str) -> Path:
    """A model's folder, by the library's writer; `files` are beside the weights."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors")
    for name, text in ({"config": "{}"} | files).items():
        (folder / f"{name}.json").write_text(text)
    return folder


def raw(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dtype, shape and bytes of each."""
    return {
        name: (t.dtype, tuple(t.shape), bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy()))
        for name, t in tensors.items()
    }


def weights(folder: Path) -> dict[str, Any]:
    return raw({k: t for f in sorted(folder.glob("model*.safetensors"))
                for k, t in load_file(f).items()})  # fmt: skip


def noise(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Bits by chance, so that NaNs of any payload, infinities and subnormals are among them."""
    made = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(2, shape, generator=made).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    count = torch.Size(shape).numel() * width
    content = torch.randint(256, (count,), generator=made, dtype=torch.uint8)
    return content.view(dtype).reshape(shape)


def moved(tensor: Tensor, share: float, seed: int) -> Tensor:
    """With about a share of the entries replaced."""
    made = torch.Generator().manual_seed(seed)
    other = noise(tensor.dtype, list(tensor.shape), seed + 1)
    return torch.where(torch.rand(tensor.shape, generator=made) < share, other, tensor)


tensors = st.tuples(
    st.sampled_from(list(NAMES)),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.sampled_from(["kept", "kept", "kept", "added", "removed", "other shape", "other dtype"]),
)


@settings(max_examples=60)
@given(st.lists(tensors, min_size=1, max_size=6), st.sampled_from(["", "bert.", "a.b."]),
       st.booleans(), st.integers(0, 2**31))  # fmt: skip
def test_there_and_back_is_exact(drawn: Any, prefix: str, swapped: bool, seed: int) -> None:
    one: State = {"both.weight": torch.ones(2)}  # without a tensor in both it is no base
    two: State = {f"{prefix}both.weight": torch.ones(2)}
    for i, (dtype, shape, share, fate) in enumerate(drawn):
        tensor, name = noise(dtype, shape, seed + 2 * i), f"t{i}.weight"
        if fate != "added":
            one[name] = tensor
        if fate in ("kept", "added"):
            two[prefix + name] = moved(tensor, share, seed + i)
        elif fate == "other shape":
            two[prefix + name] = noise(dtype, [*shape, 2], seed)
        elif fate == "other dtype":
            two[prefix + name] = tensor.to(torch.float64)
    if swapped:
        one, two = two, one
    with TemporaryDirectory() as place:
        base, tuned = write(Path(place, "base"), one), write(Path(place, "tuned"), two)
        file, there, back = (Path(place, name) for name in ("d.safetensors", "there", "back"))
        delta.save(base, tuned, file)
        delta.apply(base, file, there)
        delta.revert(there, file, back)
        assert weights(there) == raw(two)
        assert weights(back) == raw(one)


def test_signs_of_zero_and_payloads_of_nan_count_as_changes(tmp_path: Path) -> None:
    def floats(*patterns: int) -> Tensor:
        return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)

    plain = torch.zeros(100)
    quiet, other = floats(0x7FC00000), floats(0x7FC00001)
    one = {"w": torch.cat([quiet, plain])}
    two = {"w": torch.cat([other, plain, torch.empty(0)]).clone()}
    two["w"][7] = -0.0
    size = delta.save(write(tmp_path / "b", one), write(tmp_path / "t", two), tmp_path / "d")
    assert (size.moved, size.entries, size.whole) == (2, 101, 0)
    held = load_file(tmp_path / "d")
    assert held["gaps:w"].tolist() == [0, 7] and held["gaps:w"].dtype is torch.uint8
    assert held["xor:w"].tolist() == [1, -(2**31)]  # the payload's bit, the sign's


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.016), (torch.bfloat16, 0.021), (torch.int8, 0.031)]
)
def test_one_percent_costs_what_its_entries_take(
    tmp_path: Path, dtype: torch.dtype, most: float
) -> None:
    """Two bytes for a gap and the width of the dtype an entry; an index of 4 would not fit."""
    one = {f"layer.{i}": noise(dtype, [500, 400], i) for i in range(4)}
    two = {name: t.clone() for name, t in one.items()}
    for i, t in enumerate(two.values()):
        at = torch.randperm(t.numel(), generator=torch.Generator().manual_seed(i))[:2000]
        bits = t.view(-1).view(torch.uint8).view(t.numel(), -1)
        bits[at, 0] ^= 1
    base, tuned = write(tmp_path / "base", one), write(tmp_path / "tuned", two)
    size = delta.save(base, tuned, tmp_path / "d.safetensors")
    assert size.moved == 8000 and size.entries == 800_000
    dense = sum(t.nbytes for t in one.values())
    assert size.model == dense and size.file == (tmp_path / "d.safetensors").stat().st_size
    assert size.file < most * dense + 2000  # the header


def test_all_moved_costs_one_dense_copy(tmp_path: Path) -> None:
    one = {"w": torch.zeros(1000), "still": torch.ones(1000)}
    base, tuned = write(tmp_path / "b", one), write(tmp_path / "t", {**one, "w": torch.rand(1000)})
    delta.save(base, tuned, tmp_path / "d")
    assert {k: t.numel() for k, t in load_file(tmp_path / "d").items()} == {"xor:w": 1000}


def test_shards_are_one_model(tmp_path: Path) -> None:
    """The same weights in one file or three are the same base."""
    model = models.bert()
    model.save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")  # type: ignore[operator]
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    models.bert(seed=1).save_pretrained(tmp_path / "tuned", max_shard_size="8KB")  # type: ignore[operator]
    delta.save(tmp_path / "shards", tmp_path / "tuned", tmp_path / "d.safetensors")
    delta.apply(tmp_path / "whole", tmp_path / "d.safetensors", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "tuned")
    assert damage(tmp_path / "out") is None
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(Refused, match="is damaged"):
        delta.save(tmp_path / "shards", tmp_path / "tuned", tmp_path / "d.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """An encoder without a head, a classifier of three labels, and the delta between them."""
    torch.manual_seed(0)
    encoder = transformers.BertModel(models.bert_config())
    encoder.save_pretrained(tmp_path / "base")
    models.tokenizer().save_pretrained(tmp_path / "base")
    model: Any = models.bert(num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    model.bert.load_state_dict(encoder.state_dict())
    with torch.no_grad():  # sparse in one layer, biases of another
        model.bert.encoder.layer[0].output.dense.weight.view(-1)[::97] += 1
        model.bert.encoder.layer[1].output.dense.bias += 1
    model.save_pretrained(tmp_path / "tuned")
    models.tokenizer().save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "training_args.bin").write_bytes(b"pickle")
    file = tmp_path / "d.safetensors"
    size = delta.save(tmp_path / "base", tmp_path / "tuned", file)
    assert size.moved == len(range(0, 32 * 16, 97)) + 16
    assert size.whole == 2  # the head; bert.x of one is x of the other
    return {name: tmp_path / name for name in ("base", "tuned", "out", "d.safetensors")}


def test_what_is_made_loads_and_answers_as_the_tuned_model(saved: dict[str, Path]) -> None:
    """From a header-less encoder, its tokenizer taken over from the base's folder."""
    file = saved["d.safetensors"]
    with safe_open(file, "pt") as held:
        kept = {key for key in held.keys() if key.startswith("file:")}  # noqa: SIM118
        about = json.loads(held.metadata()["holdfast.delta"])
    assert about["tuned"]["prefix"] == "bert." and about["base"]["prefix"] == ""
    assert len(kept) == 2  # both configurations; the tokenizer is the base's
    assert set(about["tuned"]["files"]) >= {"config.json", "tokenizer.json"}
    assert "training_args.bin" not in about["tuned"]["files"]
    delta.apply(saved["base"], file, saved["out"])
    auto = transformers.AutoModelForSequenceClassification
    made, tuned = (auto.from_pretrained(saved[name]).eval() for name in ("out", "tuned"))
    assert made.config.id2label == {0: "a", 1: "b", 2: "c"}
    rows = models.tokenizer()(["the film was good", "a dull plot"], return_tensors="pt",
                              padding=True)  # fmt: skip
    assert torch.equal(made(**rows).logits, tuned(**rows).logits)
    transformers.AutoTokenizer.from_pretrained(saved["out"])
    delta.revert(saved["out"], file, saved["out"].with_name("back"))
    names = {path.name for path in saved["base"].iterdir()} | {"manifest.json"}
    assert {path.name for path in saved["out"].with_name("back").iterdir()} == names
    assert weights(saved["out"].with_name("back")) == weights(saved["base"])


def test_another_base_is_refused_in_one_line(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that differs in a single bit; nothing is left behind."""
    folder = saved["base"]
    file = str(saved["d.safetensors"])
    assert main(["delta", "revert", str(folder), file, str(saved["out"])]) == 2
    assert "other weights than those of 'tuned'" in capsys.readouterr().err
    state = load_file(folder / "model.safetensors")
    state["embeddings.word_embeddings.weight"].view(torch.int32).view(-1)[0] ^= 1
    save_file(state, folder / "model.safetensors")
    before = sorted(folder.parent.iterdir())
    assert main(["delta", "apply", str(folder), file, str(saved["out"])]) == 2
    said = capsys.readouterr().err
    assert "other weights than those of 'base'" in said and said.count("\n") == 1
    assert sorted(folder.parent.iterdir()) == before


def test_what_lies_beside_the_base_must_be_what_it_was(saved: dict[str, Path]) -> None:
    (saved["base"] / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match=r"tokenizer\.json is not the one"):
        delta.apply(saved["base"], saved["d.safetensors"], saved["out"])
    assert not list(saved["base"].parent.glob(".out*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, _: t["xor:w"].add_(1), "is damaged"),
        (lambda t, _: t["gaps:w"].add_(195), "is damaged"),  # beyond the end
        (lambda t, _: t.update({"xor:w": t["xor:w"][:1].clone()}), "is damaged"),
        (lambda t, _: t.update({"xor:w": t["xor:w"].short()}), "is damaged"),
        (lambda t, _: t.update({"gaps:w": t["gaps:w"].bfloat16()}), "is damaged"),
        (lambda t, _: t.pop("xor:w"), "is damaged"),
        (lambda _, a: a["tuned"].update(files=["config.json"]), "no delta file"),
        (lambda _, a: a["tuned"]["files"].update({"../x.json": "0"}), "no delta file"),
        (lambda _, a: a["tuned"]["files"].update({"/tmp/x": "0"}), "no delta file"),
        (lambda _, a: a["tuned"]["files"].update({"model.safetensors": "0"}), "no delta file"),
        (lambda _, a: a["tuned"].pop("sha256"), "no delta file"),
        (lambda _, a: a.update(schema=2), "format 2"),
    ],
)  # fmt: skip
def test_a_damaged_file_makes_nothing(tmp_path: Path, change: Any, says: str) -> None:
    one = {"w": torch.zeros(200), "v": torch.zeros(3)}
    two = {"w": one["w"].index_fill(0, torch.tensor([5, 9]), 1.0), "v": torch.zeros(3)}
    base, tuned = write(tmp_path / "base", one), write(tmp_path / "tuned", two)
    file = tmp_path / "d.safetensors"
    delta.save(base, tuned, file)
    held = {name: t.clone() for name, t in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["holdfast.delta"])
    change(held, about)
    save_file(held, file, metadata={"holdfast.delta": json.dumps(about)})
    with pytest.raises(Refused, match=says):
        delta.apply(base, file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "d.safetensors", "tuned"]


def test_a_file_that_unpacks_to_a_thousand_times_is_damage() -> None:
    """A megabyte of a stranger's delta would be a gigabyte here; a tokenizer packs ten to one."""
    bomb = zlib.compress(bytes(SMALL + 1), 9)
    assert inflated(bomb, delta.LARGEST) is None
    plain = b"tokenizer" * 1000
    assert inflated(zlib.compress(plain, 9), delta.LARGEST) == plain
    assert inflated(zlib.compress(b""), 10) == b""
    assert inflated(zlib.compress(plain)[:-1], 10**6) is None and inflated(b"x", 10) is None


def test_what_is_no_model_and_no_delta_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": torch.zeros(3)})
    with pytest.raises(Refused, match=r"no model\.safetensors"):
        delta.save(tmp_path, base, tmp_path / "d")
    with pytest.raises(Refused, match=r"has no tensor that .*base has; .* as BASE"):
        delta.save(base, write(tmp_path / "other", {"w": torch.zeros(4)}), tmp_path / "d")
    with pytest.raises(Refused, match="no such folder"):
        delta.save(base, base, tmp_path / "none" / "d")
    with pytest.raises(Refused, match="is no delta file"):
        delta.save(base, base, base / "model.safetensors")  # a model is not written over
    with pytest.raises(Refused, match="is no delta file"):
        delta.apply(base, base / "model.safetensors", tmp_path / "out")
    with pytest.raises(Refused, match="is no safetensors file"):
        delta.apply(base, base / "config.json", tmp_path / "out")
    with pytest.raises(Refused, match="no such file"):
        delta.apply(base, tmp_path / "d", tmp_path / "out")
    with pytest.raises(Refused, match="is not empty"):
        delta.save(base, base, tmp_path / "d")
        delta.apply(base, tmp_path / "d", base)


# --- merging --------------------------------------------------------------------------------------


def deltas(tmp_path: Path, one: State, *tuned: State) -> tuple[Path, list[Path]]:
    base = write(tmp_path / "base", one)
    files = []
    for i, state in enumerate(tuned):
        files.append(tmp_path / f"{i}.safetensors")
        folder = write(tmp_path / f"tuned{i}", state, config=json.dumps({"of": i}))
        delta.save(base, folder, files[-1])
    return base, files


def after_merge(base: Path, files: list[Path], rule: Any) -> State:
    """The merged delta's model, through the file and back to the base."""
    out, there = base.with_name(f"{rule}.safetensors"), base.with_name(f"out-{rule}")
    delta.merge(base, files, out, on_conflict=rule)
    delta.apply(base, out, there)
    delta.revert(there, out, base.with_name(f"back-{rule}"))
    assert weights(base.with_name(f"back-{rule}")) == weights(base)
    assert json.loads((there / "config.json").read_text()) == {"of": len(files) - 1}
    return load_file(there / "model.safetensors")


def test_entries_that_one_file_moved_are_united(tmp_path: Path) -> None:
    one = {"w": torch.arange(200.0), "v": torch.ones(4, dtype=torch.int64), "u": torch.zeros(3)}
    a = {**one, "w": one["w"].index_fill(0, torch.tensor([1, 3]), -0.0)}
    b = {**one, "w": one["w"].index_fill(0, torch.tensor([2, 7]), float("nan")),
         "v": torch.tensor([1, 1, 1, 9]), "head": torch.rand(2)}  # fmt: skip
    base, files = deltas(tmp_path, one, a, b)
    expected = {**b, "w": b["w"].index_fill(0, torch.tensor([1, 3]), -0.0)}
    for rule in ("refuse", "sum", "mean", "last"):
        assert raw(after_merge(base, files, rule)) == raw(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_files_differ_the_rule_decides(tmp_path: Path, dtype: torch.dtype) -> None:
    """The obvious twin: entry by entry, in Python."""
    start = torch.linspace(-2, 2, 120).to(dtype)
    tuned = []
    for i in range(3):
        made = torch.Generator().manual_seed(i)
        chosen = torch.rand(120, generator=made) < 0.4
        tuned.append(torch.where(chosen, (start.float() + 0.5 + i).to(dtype), start))
    tuned[1][:10] = tuned[0][:10]  # agreement is no conflict
    base, files = deltas(tmp_path, {"w": start}, *({"w": t} for t in tuned))
    with pytest.raises(Refused, match="entries are moved by several files"):
        delta.merge(base, files, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    for rule in ("sum", "mean", "last"):
        expected = []
        for k, w in enumerate(start.tolist()):
            to = [t[k].item() for t in tuned if t[k] != start[k]]
            steps = [value - w for value in to]
            new = w
            if to:
                mean = to[0] if len(set(to)) == 1 else w + sum(steps) / len(to)
                new = {"sum": w + sum(steps), "last": to[-1], "mean": mean}[rule]
            expected.append(new)
        found = after_merge(base, files, rule)
        assert torch.equal(found["w"], torch.tensor(expected, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(("start", "moved", "rule"), [
    (40000.0, (60000.0, 61000.0), "sum"),  # beyond float16
    (float("nan"), (1.0, 2.0), "sum"),
    (1.0, (float("inf"), -float("inf")), "mean"),
])  # fmt: skip
def test_what_would_not_be_finite_is_not_merged(
    tmp_path: Path, start: float, moved: tuple[float, ...], rule: Any
) -> None:
    tensors = [torch.full((40,), 1.0, dtype=torch.float16) for _ in range(3)]
    for tensor, value in zip(tensors, (start, *moved), strict=True):
        tensor[7] = value
    base, files = deltas(tmp_path, *({"w": t} for t in tensors))
    out = tmp_path / "m.safetensors"
    with pytest.raises(Refused, match=f"w: 1 entries are NaN or infinite as a {rule}; say --on"):
        delta.merge(base, files, out, on_conflict=rule)
    assert not out.exists()
    delta.merge(base, files, out, on_conflict="last")  # as somebody made it


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    one = {"w": torch.zeros(50), "n": torch.zeros(2, dtype=torch.int64), "head": torch.zeros(2)}
    count = {**one, "n": torch.tensor([0, 1])}
    more = {**one, "n": torch.tensor([0, 2])}
    three, other = {**one, "head": torch.ones(3)}, {**one, "head": torch.zeros(3)}
    moved = {**one, "head": torch.ones(2)}
    base, files = deltas(tmp_path, one, count, more, three, other, moved)
    out = tmp_path / "m.safetensors"
    with pytest.raises(Refused, match="say --on-conflict last"):
        delta.merge(base, files[:2], out, on_conflict="sum")
    with pytest.raises(Refused, match="head is another than in a file before"):
        delta.merge(base, files[2:4], out, on_conflict="mean")
    with pytest.raises(Refused, match="changed by one file and replaced by another"):
        delta.merge(base, [files[2], files[4]], out, on_conflict="last")
    held = files[1].read_bytes()
    with pytest.raises(Refused, match=r"1\.safetensors: is there already"):
        delta.merge(base, files[:1], files[1])  # as where OUT was forgotten
    assert files[1].read_bytes() == held
    delta.merge(base, files[2:4], out, on_conflict="last")
    assert digest(delta.open_delta(out).made(open_model(base), "tuned")) == digest(
        open_model(tmp_path / "tuned3")
    )
    shutil.rmtree(base)
    write(base, {**one, "w": torch.ones(50)})
    with pytest.raises(Refused, match="other weights than those of 'base'"):
        delta.merge(base, files[:1], tmp_path / "n.safetensors")


def test_the_command_says_how_small_the_file_is(
    saved: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, out = (str(saved[name]) for name in ("base", "tuned", "out"))
    file = str(saved["d.safetensors"])
    assert main(["delta", "save", base, tuned, file]) == 0
    said = capsys.readouterr().out
    entries = sum(t.numel() for t in load_file(f"{tuned}/model.safetensors").values())
    held = saved["d.safetensors"].stat().st_size
    assert f"22 of {entries:,} weights changed" in said and f"{held:,} bytes" in said
    assert main(["delta", "merge", base, file, file, f"{file}.2", "--on-conflict", "mean"]) == 0
    assert main(["delta", "apply", base, f"{file}.2", out]) == 0
    assert weights(Path(out)) == weights(Path(tuned))
    assert capsys.readouterr().out.endswith(f"{out}\n")
    assert main(["delta", "apply", base, f"{file}.2", out]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_out_needs_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, files = deltas(tmp_path, {"w": torch.zeros(9)}, {"w": torch.ones(9)})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", ""):
        assert main(["delta", "apply", str(base), str(files[0]), out]) == 2
        assert capsys.readouterr().err == (
            "holdfast: .: names no folder of its own; name a new folder\n"
        )
    assert not [*Path().iterdir()]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine leaves the delta of before or this one, never an empty file."""
    base, files = deltas(tmp_path, {"w": torch.zeros(9)}, {"w": torch.ones(9)})
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        fsync(handle)
        done.append(("sync", os.fstat(handle).st_ino))

    def replaced(one: Path, two: Path) -> None:
        replace(one, two)
        done.append(("name", os.stat(two).st_ino))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    delta.save(base, tmp_path / "tuned0", files[0])
    file, folder = files[0].stat().st_ino, files[0].parent.stat().st_ino
    assert done == [("sync", file), ("name", file), ("sync", folder)]


@pytest.mark.parametrize(("second", "says"), [
    ({"y": 1.0, "x": 1.0}, r"2\.safetensors: x is in another of the model's files too"),
    ({"z": 1.0}, r"y is not in the file that model\.safetensors\.index\.json names"),
])  # fmt: skip
def test_shards_that_are_not_as_their_index_says_are_refused(
    tmp_path: Path, second: dict[str, float], says: str
) -> None:
    """As where one of them is of another model: which weights are meant is not known."""
    base, tuned = write(tmp_path / "base", {"x": torch.zeros(9)}), tmp_path / "tuned"
    tuned.mkdir()
    save_file({"x": torch.zeros(9)}, tuned / "1.safetensors")
    save_file({n: torch.full((9,), v) for n, v in second.items()}, tuned / "2.safetensors")
    index = {"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match=says):
        delta.save(base, tuned, tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()
