"""A recipe in TRL's SFTTrainer, which checkpoints activations by default.

python examples/sft.py        (a tiny random-weight model; nothing is downloaded; needs trl)
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import holdfast

TEXTS = ["one two three four five", "five four three two one", "two four one three five"] * 8


def main() -> None:
    """Train a tiny decoder with DPS and searched rates, and print the rate of each part."""
    torch.manual_seed(0)
    recipe = holdfast.Recipe(rates=holdfast.Rates.bertcl(), methods=[holdfast.DPS(stage=2)])
    tokenizer = word_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                    num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = holdfast.with_recipe(SFTTrainer)(
            model=model,
            args=SFTConfig(folder, num_train_epochs=1, report_to="none", disable_tqdm=True,
                           max_length=16, bf16=False),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
            recipe=recipe,
        )  # fmt: skip
        trainer.train()
    print(recipe.rates.of(holdfast.parts(model)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of `TEXTS`."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", "<eos>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


if __name__ == "__main__":
    main()
