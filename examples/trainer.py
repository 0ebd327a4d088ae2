"""A recipe in Hugging Face Trainer: one line.

python examples/trainer.py        (tiny random-weight models; nothing is downloaded)
"""

from __future__ import annotations

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import holdfast


def main() -> None:
    """Fine-tune a tiny BERT with DPS."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, num_labels=2)  # fmt: skip
    model = BertForSequenceClassification(config)
    rows = [{"input_ids": torch.randint(5, 50, (8,)), "labels": i % 2} for i in range(64)]
    recipe = holdfast.Recipe(rates=holdfast.Rates.bertcl(), methods=[holdfast.DPS(drop=0.3)])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, num_train_epochs=1, report_to="none",
                                      disable_tqdm=True)  # fmt: skip
        trainer = holdfast.Trainer(model=model, args=arguments, train_dataset=rows, recipe=recipe)
        trainer.train()


if __name__ == "__main__":
    main()
