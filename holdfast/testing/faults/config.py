"""Configurations: what is misspelt, given twice, of another type, or asks for the impossible."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.methods import DPS
from holdfast.network.rates import Rates
from holdfast.recipe import Recipe
from holdfast.testing.faults.place import (
    Loop,
    Place,
    check_refusal,
    equal,
    refuses,
    save_bert,
    weights,
)
from holdfast.testing.faults.suite import Wrong, tried, untried


def recipe(place: Place, text: str) -> Path:
    return place.write("recipe.yaml", text)


def refused_recipes(place: Place, texts: dict[str, str | tuple[str, ...]]) -> None:
    """Each is refused by the command line, with the file's name and what is said of it."""
    task = place.rows()
    for text, says in texts.items():
        words = (says,) if isinstance(says, str) else says
        place.refused(task, recipe=recipe(place, text), says=("recipe.yaml", *words))


def two_sided(place: Place, meta: str) -> Path:
    """A task's folder with another meta.json."""
    rows = "".join(json.dumps({"text": f"film {i}", "label": i % 2}) + "\n" for i in range(16))
    place.write("t/train.jsonl", rows)
    place.write("t/validation.jsonl", rows)
    place.write("t/meta.json", meta)
    return place / "t"


@tried("C1", "command line")
def c1(place: Place) -> None:
    refused_recipes(place, {
        "metods: {dps: {}}": "'methods'", "methods: {dsp: {}}": "'dps'",
        "methods: {dps: {dorp: 0.3}}": "'drop'", "rates: bertlc": "'bertcl'",
        "rates: {multiplyers: {head: 1.0}}": "'multipliers'",
    })  # fmt: skip
    task = place.rows()
    place.refused(task, epohcs=2, says="--epochs")
    place.refused(task, recipe="dsp", says="dps")
    place.refused(f"{task}?metrik=f1", says="'metric'")
    place.refused(two_sided(place, '{"labels": ["a", "b"], "metrik": "f1"}'), says="'metric'")
    check_refusal(*place.command("trian", "--task", task), "train")


@tried("C1", "plain loop")
def c1_loop(place: Place) -> None:
    refuses(lambda: Recipe.load(recipe(place, "methods: {ewc: {strenght: 1.0}}")), "'strength'")
    refuses(lambda: Rates.from_dict({"layrs": 1}, where="r.yaml"), "'layers'")


@tried("C2", "command line")
def c2(place: Place) -> None:
    refused_recipes(place, {
        "name: a\nname: b": ("line 2", "'name'"),
        "methods:\n  dps: {drop: 0.1, drop: 0.9}": ("line 2", "'drop'"),
        '{"name": "a", "name": "b"}': "'name'", "name: a\n? name\n: b": "'name'",
        "name: a\n---\nname: b": "document",
    })  # fmt: skip
    meta = '{"labels": ["a", "b"], "metric": "f1", "metric": "accuracy"}'
    place.refused(two_sided(place, meta), says="'metric'")
    line = '{"text": "a film", "label": "good", "label": "bad"}\n'
    place.refused(place.write("twice.jsonl", place.rows().read_text() + line), says="'label'")


@tried("C3", "command line")
def c3(place: Place) -> None:
    for text, value in (("1e-5", 1e-5), ("1E-5", 1e-5), ("5e-1", 0.5), ("+1e-5", 1e-5)):
        found = Recipe.load(recipe(place, f"methods: {{dps: {{drop: {text}}}}}"))
        equal(found.methods[0].to_dict()["drop"], value, "drop")
    refused_recipes(place, {f"methods: {{dps: {{drop: {text}}}}}": ("drop", text)
                            for text in ("'1e-5'", "1_000", "0x10")})  # fmt: skip


@tried("C4", "command line")
def c4(place: Place) -> None:
    refused_recipes(place, {f"methods: {{dps: {{{key}: {value}}}}}": key for key, value in (
        ("mix", "no"), ("mix", "1"), ("mix", "on"), ("drop", "12:30"), ("drop", "true"),
        ("stage", "2024-01-01"), ("stage", "yes"))})  # fmt: skip
    equal(Recipe.load(recipe(place, "name: no")).name, "no", "a name")


@tried("C5", "command line")
def c5(place: Place) -> None:
    task = place.rows()
    for option, values in {
        "lr": ("nan", "inf", "-1", "0", "1e400"), "epochs": ("nan", "0", "inf"),
        "weight_decay": ("nan", "-0.1"), "warmup": ("nan", "-1"), "batch_size": ("0", "2.5"),
        "selection": ("1.5", "nan"), "seed": ("-1",),
    }.items():  # fmt: skip
        for value in values:
            place.refused(task, says=option.replace("_", "-"), **{option: value})  # type: ignore[arg-type]
    refused_recipes(place, {f"methods: {{dps: {{drop: {value}}}}}": "drop"
                            for value in (".nan", "0", "1.0", "1.5", "-.3", "1e400")})  # fmt: skip
    refused_recipes(place, {
        "methods: {ewc: {strength: -1.0}}": "strength", "max_grad_norm: .inf": "max_grad_norm",
        "rates: {kind: rates, schema: 1, multipliers: [.nan]}": "multipliers",
    })  # fmt: skip


@tried("C5", "plain loop")
def c5_loop(place: Place) -> None:
    model = Loop().model
    for lr in (math.nan, math.inf, -1.0):
        refuses(lambda lr=lr: Recipe().param_groups(model, lr=lr), "lr")  # type: ignore[misc]
    for drop in (math.nan, 0.0, 1.0, -0.1):
        refuses(lambda drop=drop: DPS(drop=drop), "drop")  # type: ignore[misc]


@tried("C6", "command line")
def c6(place: Place) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    began = time.monotonic()
    refused_recipes(place, {bomb: "alias", "a: &a [*a]": "alias", "[" * 100_000: "deep",
                            "a: " + "9" * 10_000: "number",
                            "a: [" + "1, " * 2_000_000 + "]": "larger"})  # fmt: skip
    assert time.monotonic() - began < 20, "it took too long"


@tried("C7", "plain loop")
def c7(place: Place) -> None:
    loop = Loop()
    refuses(lambda: Recipe().param_groups(loop.model, lr=1.0, no_decay=["*.nosuch"]), "*.nosuch")
    refuses(lambda: Loop(DPS(modules=("*.nosuch",))), "*.nosuch")
    twice = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    twice.param_groups[0]["params"].append(loop.model[0].weight)
    refuses(lambda: Recipe().bind(loop.model, twice, total_steps=3), "0.weight")
    foreign = torch.optim.SGD([*loop.model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
    refuses(lambda: Recipe().bind(loop.model, foreign, total_steps=3))


@tried("C7", "command line")
def c7_command(place: Place) -> None:
    place.refused(place.rows(), says="*.nosuch", begun=True,
                  recipe=recipe(place, 'methods: {dps: {modules: ["*.nosuch"]}}'))  # fmt: skip


@tried("C8", "plain loop")
def c8(place: Place) -> None:
    model = nn.Sequential()
    model.add_module("a" * 200, nn.Linear(2, 2))
    began = time.monotonic()
    for pattern in ("*a" * 60 + "b", "*?" * 80 + "b", "(a+)+$"):
        refuses(lambda p=pattern: Recipe().param_groups(model, lr=1.0, no_decay=[p]))  # type: ignore[misc]
    assert time.monotonic() - began < 5, "a pattern takes for ever"


@tried("C9", "command line")
def c9(place: Place) -> None:
    task, model = place.rows(), place.copied_bert()
    assert place.train(task, model=model)[0] == 0
    changes: list[dict[str, Any]] = [
        {"lr": 1e-5},
        {"seed": 3},
        {"batch_size": 4},
        {"recipe": "dps"},
    ]
    for more in changes:
        code, said = place.train(task, model=model, **more)
        if code == 0:
            raise Wrong(f"old scores are told as those of {more}")
        check_refusal(code, said, "other settings")
    save_bert(model, seed=9)
    code, said = place.train(task, model=model)
    if code == 0:
        raise Wrong("old scores are told as those of other weights")
    check_refusal(code, said)


@tried("C9", "Trainer")
def c9_trainer(place: Place) -> None:
    from holdfast.testing.faults.checkpoints import RECIPE, stopped_trainer

    at = stopped_trainer(place, step=2)
    for key, value in (("seed", 7), ("lr_scheduler_type", "cosine"), ("adam_beta1", 0.5),
                       ("warmup_steps", 5), ("learning_rate", 1e-3)):  # fmt: skip
        trainer = place.trainer(recipe=RECIPE, **{key: value})
        name = {"learning_rate": "lr"}.get(key, key)
        refuses(lambda t=trainer: t.train(resume_from_checkpoint=str(at)), name)  # type: ignore[misc]
    trainer = place.trainer(recipe=Recipe(methods=[DPS(stage=3)]))
    refuses(lambda: trainer.train(resume_from_checkpoint=str(at)), "stage")


@tried("C9", "plain loop")
def c9_loop(place: Place) -> None:
    from holdfast.training.loop import load_checkpoint, save_checkpoint

    at = place / "checkpoint-2"
    save_checkpoint(at, Loop(DPS(stage=2)).steps(0, 2).bound, position={}, plan={"seed": 1})
    for loop in (Loop(DPS(stage=2), lr=0.5), Loop(DPS(stage=3)), Loop(DPS(stage=2), clip=1.0)):
        before = weights(loop.model)
        refuses(lambda b=loop.bound: load_checkpoint(at, b, plan={"seed": 1}))  # type: ignore[misc]
        assert all(torch.equal(v, before[n]) for n, v in weights(loop.model).items())
    refuses(lambda: load_checkpoint(at, Loop(DPS(stage=2)).bound, plan={"seed": 2}), "seed: 1 → 2")


@tried("C10", "command line")
def c10(place: Place) -> None:
    from holdfast.tasks.task import slug

    outside = {*place.home.iterdir()}
    for name in ("../../x", "x" * 300, "\U0001f600", "/etc/passwd", "$(touch x)", "a%00b", ".."):
        safe = slug(name)
        if not (safe and safe.isascii() and len(safe) <= 64 and not set("/.$\0") & set(safe)):
            raise Wrong(f"{name!r} becomes {safe!r}")
    path = place.rows()
    code, said = place.train(f"{path}?name=../../../x", out="o")
    assert code in (0, 2), said
    code, said = place.train(path, out="x" * 300)
    check_refusal(code, said)
    equal({*place.home.iterdir()} - outside, set(), "files beside the folder")


untried("C10", "Trainer", "its folder is TrainingArguments.output_dir, the user's own")
