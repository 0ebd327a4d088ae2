"""Adapters in a sequence: what trains, what lies in the folders, going on as if never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file
from sequences import run
from test_going_on import TOPICS, go_on, last_home, without_history
from test_recovery import stop_at
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from holdfast import EWC, PEFT, HeadFirst, KLAnchor, LoRA, LwF, Merge, Recipe, cli, load, load_task
from holdfast.engine.forwarding import without_adapters
from holdfast.engine.peft import adapt, adapter_weights
from holdfast.experiments import learner
from holdfast.experiments.record import Record
from holdfast.experiments.runs import CONFIG, RECORD
from holdfast.methods import GPM, L2SP, KfacEWC, Replay, WiSE
from holdfast.training.checkpoints import ADAPTERS, BEFORE, load_adapters
from holdfast.training.manifest import commit

SETTING = LoRA(rank=2, alpha=6.0, dropout=0.1)
RECIPES = {
    "head first, lwf, merge": Recipe(
        head_first=HeadFirst(), peft=SETTING, methods=[LwF(), Merge(rows=8)]
    ),
    "ewc, replay, l2sp": Recipe(
        peft=SETTING, methods=[EWC(rows=8), Replay(memory=4), L2SP(strength=0.01)]
    ),
    "gpm, kl_anchor": Recipe(peft=SETTING, methods=[GPM(rows=8), KLAnchor(anchor="base")]),
    "ia3: ewc, kl_anchor": Recipe(
        head_first=HeadFirst(), peft=PEFT("ia3"), methods=[EWC(rows=8), KLAnchor(anchor="base")]
    ),
    "shira and lora: lwf, merge": Recipe(
        peft=[PEFT("shira", r=2), PEFT("lora", r=2)], methods=[LwF(), Merge(rows=8)]
    ),
    "kfac_ewc, wise": Recipe(peft=SETTING, methods=[KfacEWC(rows=8, every=2), WiSE()]),
}
FAST: dict[str, Any] = {"seed": 3, "epochs": 1.0, "lr": 2e-2}


@pytest.fixture(scope="module")
def adapted(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over three tasks."""
    out = tmp_path_factory.mktemp("adapted")
    run(place, out, recipe=RECIPES["head first, lwf, merge"], **FAST)
    return out


def untimed(folder: Path) -> dict[str, Any]:
    record = without_history(folder)
    for fitted in record["head_first"].values():
        fitted.pop("seconds")
    return record


def product(held: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    a, b = (held[f"{layer}.lora_{x}.default.weight"] for x in "AB")
    return 3.0 * b @ a


def test_the_base_stays_and_every_folder_is_an_ordinary_model(place: Path, adapted: Path) -> None:
    """W in a folder is the pre-trained W + (α / r) B A, and all else is the pre-trained model's."""
    source = load_file(place / "bert" / "model.safetensors")
    for home in [*(adapted / "tasks").iterdir(), adapted / "final"]:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            home, output_loading_info=True
        )
        assert not any(told.values()), told
        held = load_file((adapted / "tasks" / home.name if home.name != "final" else
                          max((adapted / "tasks").iterdir())) / ADAPTERS)  # fmt: skip
        now, moved = model.bert.state_dict(), 0
        for name, before in source.items():
            layer = f"bert.{name.removesuffix('.weight')}"
            if f"{layer}.lora_A.default.weight" in held:
                assert torch.equal(held[f"{layer}.base_layer.weight"], before)
                change = product(held, layer)
                torch.testing.assert_close(now[name] - before, change, atol=1e-6, rtol=1e-4)
                moved += bool(change.abs().max() > 1e-3)
            else:
                assert torch.equal(now[name], before), name
        assert moved > 8  # of 13 layers
    assert not (adapted / "final" / ADAPTERS).exists()


def test_final_serves_what_was_scored(place: Path, adapted: Path, tmp_path: Path) -> None:
    served, record = load(adapted), Record.load(adapted)
    for j, topic in enumerate(TOPICS):
        task = load_task(place / f"{topic}.jsonl", seed=3)
        said = [p.label for p in served.predict(topic, [r.text for r in task.evaluation])]
        truth = [(task.labels or ())[int(r.label)] for r in task.evaluation]
        right = sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)
        assert right == pytest.approx(record.scores[-1][j])
    served.save(TOPICS[0], tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path / "m")("a good film", return_tensors="pt")
    given = served.predict(TOPICS[0], ["a good film"])[0].probabilities
    assert list(given.values()) == pytest.approx(model(**inputs).logits.softmax(1)[0].tolist())


@pytest.mark.parametrize("peft", [
    PEFT("ia3"), PEFT("ln_tuning", target_modules=["LayerNorm"]), PEFT("osf", effective_rank=8),
    [PEFT("shira", r=2), PEFT("lora", r=2)],
], ids=lambda p: getattr(p, "type", "two"))  # fmt: skip
def test_what_is_exported_answers_as_the_adapted_model(
    peft: Any, place: Path, tmp_path: Path
) -> None:
    run(place, tmp_path / "run", TOPICS[:1], recipe=Recipe(peft=peft), **FAST)
    home = next((tmp_path / "run" / "tasks").iterdir())
    assert cli.main(["export", str(tmp_path / "run"), "--task", TOPICS[0],
                     "--out", str(tmp_path / "m")]) == 0  # fmt: skip
    model, told = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(told.values()), told
    base, _ = AutoModelForSequenceClassification.from_pretrained(
        place / "bert", num_labels=model.num_labels, output_loading_info=True
    )
    base.classifier.load_state_dict(model.classifier.state_dict())
    adapted = adapt(base, peft)
    below = {n: w.clone() for n, w in adapter_weights(adapted, base=True).items()
             if n not in adapter_weights(adapted)}  # fmt: skip
    load_adapters(adapted, home, base=True)
    assert below and models.same(below, {n: adapter_weights(adapted, base=True)[n] for n in below})
    inputs = AutoTokenizer.from_pretrained(tmp_path / "m")("a good film", return_tensors="pt")
    with torch.no_grad():
        said, says = (m.eval()(**inputs).logits for m in (model, adapted))
        with without_adapters(adapted):
            before = adapted(**inputs).logits
    torch.testing.assert_close(said, says, atol=1e-5, rtol=0)
    assert (said - before).abs().max() > 1e-3


def test_a_run_of_the_older_key_is_gone_on_with(place: Path, tmp_path: Path) -> None:
    """`lora: {rank: …}` in its configuration, and its adapters in a file of the older name."""
    recipe = Recipe(peft=LoRA(rank=2, alpha=6.0), methods=[EWC(rows=8)])
    run(place, tmp_path / "a", TOPICS[:1], recipe=recipe, **FAST)
    go_on(tmp_path / "a", TOPICS[1], tmp_path / "b", place=place)
    for name in (CONFIG, RECORD):
        said = json.loads((tmp_path / "a" / name).read_text())
        said.pop("sha256", None)
        del said["recipe"]["peft"]
        said["recipe"]["lora"] = {"rank": 2, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear"}
        (tmp_path / "a" / name).write_text(json.dumps(said))
    home = next((tmp_path / "a" / "tasks").iterdir())
    (home / ADAPTERS).rename(home / BEFORE)
    commit(home)
    go_on(tmp_path / "a", TOPICS[1], tmp_path / "c", place=place)
    assert last_home(tmp_path / "b") == last_home(tmp_path / "c")


def test_state_is_that_of_what_is_trained(place: Path, tmp_path: Path) -> None:
    """EWC holds 8 bytes an adapter weight, not 8 a weight of the encoder."""
    record = run(place, tmp_path, TOPICS[:1], recipe=Recipe(peft=SETTING, methods=[EWC(rows=8)]),
                 **FAST)  # fmt: skip
    held = load_file(next((tmp_path / "tasks").iterdir()) / ADAPTERS)
    factors = sum(t.numel() for name, t in held.items() if ".lora_" in name)
    assert record.methods_state["ewc"]["bytes"] == 8 * factors


@pytest.mark.parametrize("name", [
    pytest.param(n, marks=[pytest.mark.slow] * n.startswith(("kfac_ewc", "ia3"))) for n in RECIPES
])  # fmt: skip
def test_three_commands_on_three_days_are_one_command(
    name: str, place: Path, adapted: Path, tmp_path: Path
) -> None:
    one, whole = {"recipe": RECIPES[name], **FAST}, adapted
    if name != "head first, lwf, merge":
        whole = tmp_path / "whole"
        run(place, whole, **one)
    run(place, tmp_path / "october", TOPICS[:1], **one)
    go_on(tmp_path / "october", TOPICS[1], tmp_path / "november", place=place)
    shutil.rmtree(tmp_path / "october")
    go_on(tmp_path / "november", TOPICS[2], tmp_path / "december", place=place)
    assert last_home(tmp_path / "december") == last_home(whole)
    assert untimed(tmp_path / "december") == untimed(whole)


@pytest.mark.parametrize("call", [4, 12])  # within the first task, and within the second
def test_stopped_between_checkpoints_it_goes_on_bit_for_bit(
    call: int, place: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"recipe": RECIPES["head first, lwf, merge"], **FAST}
    stop_at(monkeypatch, place, tmp_path, module=learner.Trainer, name="_save_checkpoint",
            call=call // 2, **one)  # fmt: skip
    assert list(tmp_path.rglob("checkpoint-*"))
    run(place, tmp_path, **one)
    assert last_home(tmp_path) == last_home(adapted) and untimed(tmp_path) == untimed(adapted)


@pytest.mark.parametrize("peft", [(), LoRA(rank=4, targets=("query", "value"))])
def test_another_setting_begins_on_the_folded_model(
    peft: Any, place: Path, adapted: Path, tmp_path: Path
) -> None:
    """Nothing is lost: the old tasks are tested as they were, and methods remember them anew."""
    models.write_task(tmp_path, "mood", seed=7)
    (tmp_path / "mood.jsonl").rename(tmp_path / "new.jsonl")
    recipe = Recipe(peft=peft, methods=[EWC(rows=8)])
    record = go_on(adapted, "new", tmp_path / "b", place=tmp_path, recipe=recipe, lr=1e-9)
    before, after = Record.load(adapted).scores[-1], record.scores[-1]
    assert after[:3] == pytest.approx(before)
    home = tmp_path / "b" / "tasks" / "4-new"
    assert (home / ADAPTERS).exists() == bool(peft)
    if peft:
        held = load_file(home / ADAPTERS)
        assert {n.split(".")[-4] for n in held if ".lora_" in n} == {"query", "value"}
        base = load_file(adapted / "final" / "model.safetensors")
        for name in (n for n in held if n.endswith("base_layer.weight")):
            assert torch.equal(held[name], base[name.replace(".base_layer", "")])


def test_adapters_are_found_by_name() -> None:
    model = adapt(models.bert(), SETTING)
    assert all(".lora_" in n for n in adapter_weights(model))
    assert len(adapter_weights(model, base=True)) == 2 * len(adapter_weights(model))
