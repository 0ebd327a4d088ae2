"""A recipe in PyTorch Lightning: bound in configure_optimizers, saved in its checkpoints.

python examples/lightning_module.py   (a tiny random-weight model; needs pytorch-lightning)
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import holdfast


class Tuned(pl.LightningModule):
    """Any model that returns a loss, with a recipe.

    Lightning's `gradient_clip_val` stays unset: the recipe clips, after the methods' work.
    """

    def __init__(self, model: torch.nn.Module, recipe: holdfast.Recipe) -> None:
        super().__init__()
        self.model, self.recipe = recipe.prepare(model), recipe
        self.saved: dict[str, Any] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self.recipe.param_groups(self.model, lr=5e-3, weight_decay=0.01)
        optimizer = torch.optim.AdamW(groups, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        self.bound = self.recipe.bind(self.model, optimizer, total_steps=steps)
        return optimizer

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        output = self.model(**batch)
        penalty = self.bound.penalty(batch, output) if self.bound.has_penalty else 0
        return output.loss + penalty

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["holdfast"] = self.bound.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["holdfast"]  # loaded below, when there is an optimizer to bind to

    def on_train_start(self) -> None:
        if self.saved is not None:
            self.bound.load_state_dict(self.saved)
        self.saved = None


def tiny_bert() -> BertForSequenceClassification:
    """Two layers of random weights, without dropout."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, num_labels=2, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertForSequenceClassification(config).train()


def batches(count: int = 12, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    """Generated rows: is the mean token id of a sentence above 27?"""
    draw = torch.Generator().manual_seed(0)
    words = [torch.randint(5, 50, (rows, 8), generator=draw) for _ in range(count)]
    return [{"input_ids": w, "labels": (w.float().mean(1) > 27).long()} for w in words]


def trainer(**more: Any) -> pl.Trainer:
    """Two micro-batches a step, on the CPU."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", **(quiet | settings | more))


def main() -> None:
    """Fine-tune with DPS, and print how many steps were made and skipped."""
    recipe = holdfast.Recipe(methods=[holdfast.DPS(drop=0.3, stage=2)], max_grad_norm=1.0)
    module = Tuned(tiny_bert(), recipe)
    trainer().fit(module, DataLoader(batches(), batch_size=None))
    print(f"{module.bound.step} steps, {module.bound.skipped} left out")


if __name__ == "__main__":
    main()
