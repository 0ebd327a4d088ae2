"""Pictures as a task: folders of scikit-learn's digits, and a small ViT."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits

from holdfast import Refused, load, run_sequence
from holdfast.cli import main
from holdfast.tasks import Task, load_task
from holdfast.tasks.kinds import evaluate, kind_named
from holdfast.tasks.kinds.images import _resized

KIND = kind_named("images")


def written(folder: Path, classes: tuple[int, ...], *, start: int = 0, count: int = 12) -> Path:
    """Pictures of some digits, 16 × 12, a folder a class."""
    digits = load_digits()
    for c in classes:
        (folder / f"of-{c}").mkdir(parents=True)
        for i, picture in enumerate(digits.images[digits.target == c][start : start + count]):
            made = Image.fromarray((picture * 15.9).astype("uint8")).resize((16, 12))
            made.save(folder / f"of-{c}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 8 × 8 pictures with its image processor, whose mean and spread are unusual."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    processor = transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(folder)
    return folder


def made(vit: Path, task: Task) -> tuple[Any, Any, Any]:
    source = str(vit)
    processor = KIND.load_processor(source)
    rows = KIND.encode(task.train, task, processor, max_length=1, config=KIND.load_config(source))
    return KIND.load_model(source, task, seed=0).eval(), processor, rows


def test_a_folder_a_class_with_and_without_splits(tmp_path: Path) -> None:
    flat = load_task(written(tmp_path / "flat", (3, 5)))
    assert flat.kind == "images" and flat.labels == ("of-3", "of-5") and flat.metric == "accuracy"
    assert sum(flat.rows.values()) == 24 and flat.rows["evaluation"] == 5
    written(tmp_path / "split" / "train", (3, 5))
    written(tmp_path / "split" / "test", (5,), start=12, count=4)
    split = load_task(tmp_path / "split")
    assert [row.label for row in split.evaluation] == [1] * 4


def test_a_folder_that_was_moved_is_the_same_task_and_a_changed_one_is_not(tmp_path: Path) -> None:
    one = load_task(written(tmp_path / "one", (3, 5)))
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "one")
    assert load_task(tmp_path / "two" / "one").hash == one.hash
    Image.new("RGB", (16, 12)).save(tmp_path / "one" / "of-3" / "0.png")
    assert load_task(tmp_path / "one").hash != one.hash


def test_what_is_not_read_is_told(tmp_path: Path) -> None:
    """Each of these was left out in silence: a test set, half of the pictures, a class."""
    home = written(tmp_path / "p", (3, 5))
    before = load_task(home)
    assert len(before.warnings) == 1  # of the evaluation rows that are carved
    shutil.copytree(home / "of-3", home / "of-3" / "2021")
    (home / "bird").mkdir()
    os.mkfifo(home / "of-5" / "x.png")
    for name in ("a.heic", "b.HEIC", "Thumbs.db", ".DS_Store", "c"):
        (home / "of-5" / name).write_bytes(b"")
    shutil.copy(home / "of-3" / "0.png", home)
    told = load_task(home)
    assert told.hash == before.hash
    assert [line.partition("not read, ")[2] for line in told.warnings[:-1]] == [
        "pictures beside them: 1",
        "pictures below the folders of classes: 12",
        "other files: 4 (.heic, .png, no ending)",
        "folders without a picture right in them: 'bird'",
    ]
    written(home / "test", (3,), start=12)
    with pytest.raises(Refused, match=r"'test' holds classes.*put the classes into train"):
        load_task(home)


def test_folders_beside_train_and_classes_that_look_alike_are_told(tmp_path: Path) -> None:
    home = tmp_path / "p"
    written(home / "train", (3, 5))
    for name in ("Of-3", "of-3 "):
        shutil.copytree(home / "train" / "of-3", home / "train" / name)
    written(home / "dev", (3, 5))
    said = load_task(home).warnings
    assert said[0].endswith("not read, beside train: 'dev'")
    assert said[1].endswith("each one of its own: 'Of-3', 'of-3', 'of-3 '")


def test_what_is_refused(tmp_path: Path, vit: Path) -> None:
    folder = written(tmp_path / "p", (3, 5))
    with pytest.raises(Refused, match="no option text"):
        load_task(f"{folder}?text=body")
    whole = (folder / "of-3" / "1.png").read_bytes()
    (folder / "of-3" / "1.png").write_bytes(whole[:60])
    with pytest.raises(Refused, match=r"1\.png.*no picture that can be read"):
        load_task(folder)
    with pytest.raises(Refused, match="no folder of a class"):
        load_task(folder / "of-5")
    with pytest.raises(Refused, match="no model of text"):
        kind_named("classification").check(str(vit), max_length=8)
    shutil.rmtree(folder / "of-5")
    with pytest.raises(Refused, match="1 classes"):
        load_task(folder)
    models.save_bert(tmp_path / "bert")
    with pytest.raises(Refused, match="no model of pictures"):
        KIND.check(str(tmp_path / "bert"), max_length=8)
    KIND.check(str(vit), max_length=8)
    with pytest.raises(Refused, match="no image processor"):
        KIND.load_processor(str(tmp_path / "bert"))


def test_a_batch_is_what_the_models_own_processor_makes(tmp_path: Path, vit: Path) -> None:
    """Resized once and scaled batch by batch, to the last bit; a row takes 8 · 8 · 3 bytes."""
    task = load_task(written(tmp_path / "p", (3, 5)))
    _, processor, rows = made(vit, task)
    files = [Image.open(row.file).convert("RGB") for row in task.train]  # type: ignore[attr-defined]
    whole = processor(images=files, return_tensors="pt")["pixel_values"]
    batch = KIND.collator(processor)([rows[i] for i in range(len(rows))])
    assert torch.equal(batch["pixel_values"], whole)
    assert batch["labels"].tolist() == [row.label for row in task.train]
    assert rows.nbytes == len(rows) * (8 * 8 * 3 + 8)


def test_pictures_stand_upright_and_have_16_bits_at_most(tmp_path: Path, vit: Path) -> None:
    """One picture lying down with its turn told, and with 16 bits; broken bytes are refused."""
    digit = load_digits().images[7]
    plain = Image.fromarray((digit * 15.9).astype(np.uint8))
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    told = turned.getexif()
    told[0x0112] = 6  # to be turned clockwise
    plain.save(tmp_path / "a.png")
    turned.save(tmp_path / "b.png", exif=told)
    Image.fromarray((digit * 15.9).astype(np.uint16) * 256 + 99).save(tmp_path / "c.png")
    processor = KIND.load_processor(str(vit))
    one, two, three = _resized([tmp_path / f"{n}.png" for n in "abc"], processor, "RGB")
    assert one.std() > 10 and np.array_equal(two, one) and np.array_equal(three, one)
    broken = (tmp_path / "a.png").read_bytes()
    (tmp_path / "d.png").write_bytes(broken[:40] + b"x" * 20 + broken[60:])
    with pytest.raises(Refused, match="no picture that can be read"):
        _resized([tmp_path / "d.png"], processor, "RGB")


def test_scores_and_predictions_are_those_of_single_pictures(tmp_path: Path, vit: Path) -> None:
    task = load_task(written(tmp_path / "p", (3, 5)))
    model, processor, rows = made(vit, task)
    files = [row.file for row in task.train]  # type: ignore[attr-defined]
    with torch.no_grad():
        alone = torch.cat([
            model(**processor(images=Image.open(f).convert("RGB"), return_tensors="pt")).logits
            for f in files
        ])  # fmt: skip
    truth = torch.tensor([row.label for row in task.train])
    score = evaluate(model, rows, task, KIND.collator(processor))
    assert score == pytest.approx((alone.argmax(-1) == truth).double().mean().item())
    found = KIND.predict(model, {"labels": task.labels}, files, None, processor, max_length=1,
                         batch=3)  # fmt: skip
    shares = np.array([list(each.probabilities.values()) for each in found])
    np.testing.assert_allclose(shares, alone.double().softmax(-1).numpy(), atol=1e-5)


def test_two_tasks_of_pictures_are_learned_kept_and_served(
    tmp_path: Path, vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [written(tmp_path / "low", (0, 1)), written(tmp_path / "high", (6, 7))]
    record = run_sequence(
        str(vit), tasks, "default", out=tmp_path / "run", epochs=2.0, lr=1e-3, progress=False
    )
    assert record.scores[1][0] is not None
    served = load(tmp_path / "run")
    low = load_task(tasks[0])
    files = [str(row.file) for row in low.evaluation]  # type: ignore[attr-defined]
    said = [each.label for each in served.predict("low", files)]
    assert low.labels is not None
    right = np.mean([s == low.labels[r.label] for s, r in zip(said, low.evaluation, strict=True)])
    assert right == pytest.approx(record.scores[1][0])
    out = tmp_path / "said.csv"
    words = [
        "predict",
        str(tmp_path / "run"),
        str(tasks[0] / "of-0"),
        "--task",
        "low",
        "--out",
        str(out),
    ]
    assert main(words) == 0 and capsys.readouterr().out == f"{out}: 12 rows\n"
