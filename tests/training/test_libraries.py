"""The trainers of TRL and Sentence Transformers: plain is the bare class, and methods act."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import llama, same, tokenizer, weights
from served_trainers import sentences, trl
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

import holdfast
from holdfast import DPS, EWC, LoRA, Merge, Recipe, Refused

MAKERS: dict[str, Callable[..., Any]] = {
    **{name: partial(trl, name) for name in ("SFT", "DPO", "Reward", "KTO", "GRPO", "RLOO")},
    **{n: partial(sentences, n) for n in ("SentenceTransformer", "CrossEncoder", "SparseEncoder")},
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    return partial(MAKERS[request.param], out=tmp_path)


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """The weights after each step."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.taken.append(weights(model))


def test_a_plain_recipe_is_the_bare_class_and_dps_holds_entries(make: Callable[..., Any]) -> None:
    trained = {}
    masked = Recipe(methods=[DPS(drop=0.5, stage=2)])
    for name, recipe in (("bare", None), ("plain", Recipe(name="plain")), ("dps", masked)):
        trainer, seen = make(recipe), Snapshots()
        trainer.add_callback(seen)
        trainer.train()
        trained[name] = seen.taken
    assert same(trained["bare"][-1], trained["plain"][-1])
    _, before, _, after = trained["dps"]  # the second stage is steps 3 and 4
    # All gradients of unused rows are 0, which leaves them alone in every run.
    moved = {n: trained["plain"][1][n] != trained["plain"][3][n] for n in before}
    held = sum(int((moved[n] & (before[n] == after[n])).sum()) for n in before)
    assert 0.3 < held / sum(int(m.sum()) for m in moved.values()) < 0.7


def test_losses_that_cache_their_gradients_are_refused_by_ewc(tmp_path: Path) -> None:
    """They return a loss without a graph: its Fisher information would be 0 everywhere."""
    import sentence_transformers

    losses = sentence_transformers.sentence_transformer.losses
    trainer = sentences("SentenceTransformer", Recipe(methods=[EWC()]), tmp_path)
    trainer.loss = losses.CachedMultipleNegativesRankingLoss(trainer.model, mini_batch_size=2)
    with pytest.raises(Refused, match=r"ewc runs .*there are no gradients"):
        trainer.train()


def test_rows_that_an_evaluation_could_not_read_are_refused(tmp_path: Path) -> None:
    trainer = trl("GRPO", Recipe(methods=[EWC()]), tmp_path)
    trainer.args.per_device_eval_batch_size = 3  # of two generations for each prompt
    with pytest.raises(Refused, match="set per_device_eval_batch_size as for evaluation"):
        trainer.train()


def test_sft_trains_the_adapters_of_a_recipe(tmp_path: Path) -> None:
    """Under activation checkpointing too, which SFTConfig turns on; and what it saves is plain."""
    trainer = trl("SFT", Recipe(peft=LoRA(rank=2), methods=[EWC(), Merge(rows=6)]), tmp_path)
    assert trainer.args.gradient_checkpointing
    before = weights(trainer.model)
    trainer.train()
    trainer.end_task()
    for name, now in weights(trainer.model).items():
        if ".lora_B." in name:
            assert now.abs().max() > 0, name
        elif ".lora_A." not in name:
            assert same({name: now}, {name: before[name]}), name
    trainer.save_model(tmp_path / "end")
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "end", output_loading_info=True)
    assert not any(told.values())
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits,
                               atol=1e-5, rtol=1e-5)  # fmt: skip


def test_the_script_for_two_tasks_in_the_documents_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands there, on a CPU."""
    import trl as library

    page = Path(__file__).parents[2] / "docs" / "language_models.md"
    code = re.search(r"```python\n(from trl import.*?)```", page.read_text(), re.DOTALL)
    assert code is not None
    here = partial(library.SFTConfig, bf16=False, use_cpu=True, disable_tqdm=True)
    monkeypatch.setattr(library, "SFTConfig", here)
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_dict({"prompt": ["the film was", "who is"] * 4,
                              "completion": [" good", " a man"] * 4})  # fmt: skip
    names = {"holdfast": holdfast, "model": llama(), "tokenizer": tokenizer(template=False),
             "rows": rows, "others": rows.select([0, 2])}  # fmt: skip
    exec(code[1], names)
    assert names["second"].bound.finished == ["first", "second"]  # type: ignore[attr-defined]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "first")


def two_tasks(make: Callable[..., Any], strength: float) -> tuple[Any, list[dict[str, Tensor]]]:
    """The second trainer, and the weights after the first task and before and after merging."""
    one = make(Recipe(methods=[EWC(strength=strength), Merge(rows=6)]))
    one.train()
    one.end_task()
    found = [weights(one.model)]
    two = make(one.recipe, model=one.model, bound=one.bound, task="second")
    two.train()
    found.append(weights(two.model))
    two.end_task()
    return two, [*found, weights(two.model)]


def test_ewc_pulls_and_merge_changes_weights(
    make: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["make"] == "SparseEncoder":
        # Its pooling writes in place, so that it has gradients in training mode only.
        trainer = make(Recipe(methods=[EWC()]))
        before = weights(trainer.model)
        with pytest.raises(Refused, match=r"ewc runs .*in evaluation mode there are no gradients"):
            trainer.train()
        assert same(before, weights(trainer.model))
        return
    free, (first, unheld, _) = two_tasks(make, 0.0)
    held, (again, pulled, merged) = two_tasks(make, 1e3)
    assert same(first, again)  # EWC has nothing to hold in a first task
    assert sum(float(f.sum()) for f in held.bound.states["ewc"].weights["fisher"].values()) > 0
    assert not same(unheld, pulled)
    assert not same(pulled, merged)
    assert free.bound.finished == held.bound.finished == ["task", "second"]
