"""Tiny models with random weights, a tokenizer of a few words, and rows to train them on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

WORDS = [
    "a", "the", "film", "book", "plot", "cast", "was", "is", "and", "not", "very", "good",
    "great", "fine", "warm", "bad", "poor", "dull", "cold", "red", "blue", "green", "who",
    "what", "where", "when", "city", "river", "man", "woman", "number", "year", "?",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *WORDS]
SIZE = len(VOCABULARY)


def tokenizer(*, template: bool = True) -> PreTrainedTokenizerFast:
    """Whole words; with BERT's template, or none for language models."""
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    if template:
        model.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        bos_token="[CLS]",
        model_max_length=64,
        model_input_names=["input_ids", *["token_type_ids"] * template, "attention_mask"],
    )


def bert_config(**more: Any) -> transformers.BertConfig:
    """Two layers of sixteen; no dropout unless asked for."""
    sizes = {
        "vocab_size": SIZE,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    return transformers.BertConfig(**sizes | more)


def bert(head: str = "SequenceClassification", *, seed: int = 0, **config: Any) -> nn.Module:
    """`BertFor<head>` with random weights."""
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, f"BertFor{head}")(bert_config(**config))
    return model


def gpt2(*, seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": SIZE,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "initializer_range": 0.2,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | config))


def llama(*, seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": SIZE,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "initializer_range": 0.2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | config))


def t5(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=SIZE,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )
    return transformers.T5ForConditionalGeneration(config)


class Plain(nn.Module):
    """A module that knows nothing of Transformers; its forward takes no **kwargs."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(SIZE, 16)
        self.layer = nn.Linear(16, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(torch.tanh(self.layer(self.embed(input_ids).mean(1))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int = 22, *, length: int = 8, seed: int = 0, **labels: str) -> list[dict[str, Any]]:
    """Rows of one length. `labels` maps a field to what it holds: see the branches."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        ids = [2, *(draw.randrange(5, SIZE) for _ in range(length - 2)), 3]
        row: dict[str, Any] = {"input_ids": ids}
        for field, kind in (labels or {"labels": "class"}).items():
            if kind == "class":
                row[field] = draw.randrange(2)
            elif kind == "number":
                row[field] = draw.uniform(-1, 1)
            elif kind == "several":
                row[field] = [float(draw.random() < 0.5) for _ in range(3)]
            elif kind == "position":
                row[field] = draw.randrange(length)
            elif kind == "tags":  # an uneven number counts, so that means of means are wrong
                kept = draw.randrange(1, length)
                row[field] = [draw.randrange(2) if i < kept else -100 for i in range(length)]
            elif kind == "tokens":
                kept = draw.randrange(2, length + 1)
                row[field] = [t if i < kept else -100 for i, t in enumerate(ids)]
        made.append(row)
    return made


def collate(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows of one length as tensors; nothing is drawn."""
    return {k: torch.tensor([row[k] for row in batch]) for k in batch[0]}


def arguments(out: str | Path, **more: Any) -> TrainingArguments:
    """Four rows a micro-batch, one epoch, AdamW at 1e-2, nothing saved or reported."""
    plain: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return TrainingArguments(**plain | more)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are equal bit for bit, NaN included."""
    return one.keys() == two.keys() and all(
        torch.equal(a.contiguous().view(torch.uint8), two[n].contiguous().view(torch.uint8))
        if a.dtype.is_floating_point and a.ndim
        else torch.equal(a, two[n])
        for n, a in one.items()
    )


def distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry."""
    return max(float((one[n] - two[n]).abs().max()) for n in one)


# --- tasks as files -----------------------------------------------------------------------------

TOPICS = {
    "mood": {"good": "good great fine warm", "bad": "bad poor dull cold"},
    "question": {
        "person": "who man woman",
        "place": "where city river",
        "count": "when year number",
    },
    "colour": {"red": "red", "blue": "blue"},
}


def write_task(folder: Path, topic: str, *, count: int = 40, seed: int = 0) -> Path:
    """A JSONL file of rows whose words give their label away."""
    draw = random.Random(f"{topic} {seed}")
    lines = []
    for i in range(count):
        label = list(TOPICS[topic])[i % len(TOPICS[topic])]
        words = draw.choices(
            ["a", "the", "film", "book", "plot", "was", "is"], k=draw.randrange(3, 7)
        )
        words.insert(draw.randrange(len(words)), draw.choice(TOPICS[topic][label].split()))
        lines.append(json.dumps({"text": " ".join(words) + f" {i}", "label": label}))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{topic}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_bert(folder: Path, *, dropout: float = 0.1) -> Path:
    """A folder as `--model` takes it: an encoder without a head, and its tokenizer."""
    torch.manual_seed(0)
    config = bert_config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pieces(values: Iterable[Any], size: int) -> list[list[Any]]:
    """`values` in lists of `size`, the last one shorter."""
    every = list(values)
    return [every[i : i + size] for i in range(0, len(every), size)]
