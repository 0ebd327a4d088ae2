"""DSEE (Chen et al., arXiv 2111.00160): does a sparse part add anything to LoRA of equal size?

python examples/dsee.py [SEEDS]

    W ⊙ S₁ + S₂ + B A

S₂ and B A are PEFT's SHiRA and LoRA (recipes/dsee.yaml), the 0s of S₁ the 20 % of W that are
smallest, of all layers together (torch.nn.utils.prune), after which the adapters train on. The
control is LoRA alone with as many weights. A two-layer encoder learns the eight classes of
`builtin:intents`, after it was trained whole on the same rows with two classes taken for one.

What it can say is small: one tiny encoder, one task of templates, a few seeds. Unlike the paper's,
S₂'s places are random (there W ≈ U V + S chooses them) and its share of the weights is larger:
SHiRA has at least as many as a LoRA of rank 1.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import BertConfig, BertForSequenceClassification

import holdfast

ARMS = {
    "LoRA": holdfast.Recipe(
        peft=holdfast.LoRA(rank=8, alpha=16, targets=["query", "value"]), name="lora"
    ),
    "LoRA + S₂": holdfast.Recipe.load(Path(__file__).parent / "recipes" / "dsee.yaml"),
}
PRUNED = 0.2
LENGTH, BATCH, STEPS, RATE = 24, 32, 120, 3e-3


def main(seeds: int) -> None:
    """Both arms over some seeds, before and after pruning; prints their sizes and scores."""
    torch.set_num_threads(1)
    task = holdfast.load_task("builtin:intents")
    found = sorted({word for row in task.train for word in row.text.split()})
    words = {word: i for i, word in enumerate(found, start=2)}  # 0: padding, 1: unknown
    train, evaluation = (encoded(rows, words) for rows in (task.train, task.evaluation))
    print(f"{len(train[1])} training rows, {len(evaluation[1])} evaluation rows, {seeds} seeds; "
          "chance is 0.125")  # fmt: skip
    scores: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        start = network(len(words) + 2, 4, seed)
        learn(start, holdfast.Recipe(), (train[0], train[1] // 2), seed, steps=2 * STEPS)
        for arm, recipe in ARMS.items():
            model = network(len(words) + 2, 8, seed)
            model.bert.load_state_dict(start.bert.state_dict())
            recipe.prepare(model)
            learn(model, recipe, train, seed)
            dense = score(model, evaluation)
            pruned = prune_(model, PRUNED)
            learn(model, recipe, train, seed)
            scores[arm].append((dense, score(model, evaluation)))
            if seed == 0:
                sizes = [p.numel() for p in model.bert.parameters() if p.requires_grad]
                whole = sum(p.numel() for p in start.bert.parameters())
                print(f"{arm}: {sum(sizes):,} weights of an encoder of {whole:,} are trained; "
                      f"{pruned:,} are pruned")  # fmt: skip
    for when, said in enumerate(("dense", f"{PRUNED:.0%} pruned")):
        for arm, found in scores.items():
            print(f"{said:>10} {arm:<10}{shown([pair[when] for pair in found])}")
        control, ours = ([pair[when] for pair in scores[arm]] for arm in ARMS)
        added = [b - a for a, b in zip(control, ours, strict=True)]
        print(f"{said:>10} what S₂ adds: {shown(added)}")


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def encoded(rows: Sequence[Any], words: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Words by their numbers, (rows, LENGTH), 0 where a row has ended, and labels."""
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    for i, row in enumerate(rows):
        found = [words.get(word, 1) for word in row.text.split()][:LENGTH]
        ids[i, : len(found)] = torch.tensor(found)
    return ids, torch.tensor([int(row.label) for row in rows])


def network(words: int, labels: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=words, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=LENGTH, num_labels=labels,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def learn(
    model: Any, recipe: holdfast.Recipe, rows: tuple[Tensor, Tensor], seed: int, steps: int = STEPS
) -> None:
    """Some steps of AdamW at a falling rate."""
    optimizer = torch.optim.AdamW(recipe.param_groups(model, lr=RATE), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    bound = recipe.bind(model, optimizer, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        few = torch.randint(len(rows[1]), (BATCH,), generator=draw)
        ids, labels = (column[few] for column in rows)
        model(input_ids=ids, attention_mask=ids.ne(0), labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    bound.unbind()


def prune_(model: Any, amount: float) -> int:
    """Set the smallest weights of the encoder's layers to 0, for good: they do not train."""
    # W itself: its shape tells it from LoRA's factors.
    layers = [(module, "weight") for name, module in model.bert.encoder.named_modules()
              if isinstance(module, nn.Linear) and ".lora_" not in name]  # fmt: skip
    prune.global_unstructured(layers, prune.L1Unstructured, amount=amount)
    for module, name in layers:
        prune.remove(module, name)
    return sum(int(module.weight.eq(0).sum()) for module, _ in layers)


@torch.no_grad()
def score(model: Any, rows: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    ids, labels = rows
    said = model.eval()(input_ids=ids, attention_mask=ids.ne(0)).logits.argmax(-1)
    return float((said == labels).float().mean())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
