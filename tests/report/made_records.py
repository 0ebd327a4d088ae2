"""Records as runs leave them, made by hand."""

from __future__ import annotations

from typing import Any

from holdfast.experiments.record import Record

EXPOSURE = "The model card lists SNLI among the training data."
PARTS = ["embeddings", "layer.0", "layer.1", "head"]


def record(
    scores: list[list[float | None]],
    *,
    recipe: str = "plain",
    seed: int | None = 0,
    lr: float = 2e-5,
    names: list[str] | None = None,
    synthetic: bool = False,
    **more: Any,
) -> Record:
    names = names or ["trec6", "snli", "ag_news", "sst2"][: len(scores)]
    size = len(names)
    methods = {} if recipe.startswith("plain") else {"dps": {"drop": 0.3}}
    history = [
        {
            "learning": i, "step": 50 * i + step, "epoch": step / 25, "loss": 1 / step,
            "scores": [0.5 + step / 200 if j <= i else None for j in range(size)],
        }
        for i in range(size)
        for step in (10, 30, 50)
    ]  # fmt: skip
    given: dict[str, Any] = {
        "tasks": [
            {
                "name": name, "metric": "accuracy", "labels": ["no", "yes"], "hash": "sha256:00ff",
                "rows": {"train": 1000, "selection": 250, "evaluation": 500},
                "source": f"data/{j}", "synthetic": synthetic, "warnings": [],
            }
            for j, name in enumerate(names)
        ],
        "scores": scores,
        "model": {"name": "minilm", "parameters": 22713216, "hash": "sha256:aa"},
        "history": history,
        "recipe": {"name": recipe, "methods": methods, "max_grad_norm": 1.0},
        "rates": {"order": PARTS, "multiplier": [0.01, 0.1, 1, 2.5], "depth": [0, 0.3, 0.6, 1]},
        "settings": {"lr": lr, "epochs": 2, "seed": seed},
        "seed": seed,
        "commit": "0123abcd",
        "command": ["holdfast", "sequence", "--recipe", recipe],
        "seconds": [30.0] * size,
        "steps": [50] * size,
        "skipped_steps": [0] * size,
        "exposure": EXPOSURE,
    }  # fmt: skip
    return Record(**(given | more))


def two(new: float, before: float, after: float, **more: Any) -> Record:
    return record([[before, None], [after, new]], **more)


def study() -> list[Record]:
    """Two recipes over three seeds, with differences that are easy by hand."""
    plain = [two(0.80, 0.95, 0.70 + 0.01 * seed, seed=seed) for seed in range(3)]
    dps = [two(0.79, 0.95, 0.80 + 0.02 * s, seed=s, recipe="dps") for s in range(3)]
    return dps + plain


HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    "\"onerror='alert(3)' x=\"",
    "$x$ \\frac{1}{0} $",
    "{{ 7 * 7 }}{% raw %}",
    "\U0001f600 \u4e2d\u6587",
    "_hidden & <b>",
    "n" * 300,
]
