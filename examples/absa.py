"""Aspects and their sentiment as text, in the format of Hosseini-Asl et al. (arXiv 2204.05356).

python examples/absa.py [TASK]      (a folder or file of sentiment rows; default builtin:sentiment)

    <|review|> text <|endofreview|> <|term|> film positive , cast positive <|endofterm|>

The published rows (SemEval) name the aspects by hand. Here a word of `ASPECTS` is one, and has the
sentiment of its whole row: rows by rule, good for trying the format and not for its figures. The
paper's loss is on all of the text, holdfast's on what follows `<|term|>`. The model is tiny and
random: name a real one in its place, such as gpt2.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import holdfast
from holdfast.tasks import Row

ASPECTS = {
    "acting", "bar", "breakfast", "cast", "characters", "dialogue", "direction", "ending", "film",
    "food", "garden", "humor", "lobby", "menu", "movie", "music", "performances", "plot", "pool",
    "room", "script", "service", "soup", "staff", "story", "tour", "view", "wine",
}  # fmt: skip
START, MIDDLE, END = "<|review|>", "<|endofreview|> <|term|>", "<|endofterm|>"


def prompt(text: str) -> str:
    """A review up to where its aspects begin."""
    return f"{START} {text} {MIDDLE} "


def answer(text: str, sentiment: str) -> str | None:
    """The aspects of a review by rule; None if there is none."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    found = dict.fromkeys(word for word in words if word in ASPECTS)
    return " , ".join(f"{word} {sentiment}" for word in found) + f" {END}" if found else None


def written(rows: list[Row], labels: tuple[str, ...], file: Path) -> list[dict[str, str]]:
    """Prompts and answers of the rows that have an aspect, also as a file."""
    pairs = [(row.text, answer(row.text, labels[int(row.label)])) for row in rows]
    made = [{"prompt": prompt(text), "answer": said} for text, said in pairs if said is not None]
    file.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    return made


def tiny(rows: list[dict[str, str]], folder: Path) -> Path:
    """A random decoder that knows the words of the rows."""
    words = sorted({word for row in rows for text in row.values() for word in text.split()})
    ids = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *words])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(ids), n_embd=32, n_layer=2, n_head=2, n_positions=128,
                   bos_token_id=2, eos_token_id=2, pad_token_id=0)
    ).save_pretrained(folder)  # fmt: skip
    return folder


def main(source: str) -> None:
    """Write the rows, learn them, and answer one of them."""
    task = holdfast.load_task(source)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "absa.jsonl"
        rows = written(list(task.train[:2000]), task.labels or (), file)
        record = holdfast.run_sequence(
            str(tiny(rows, Path(folder) / "model")), [f"{file}?metric=token_f1"], "plain",
            out=Path(folder) / "run", train_size=min(200, len(rows) // 2), evaluation_size=20,
            epochs=2, lr=5e-3, batch_size=8, progress=False,
        )  # fmt: skip
        said = holdfast.load(Path(folder) / "run").predict("absa", [rows[0]["prompt"]])[0].label
    print(f"{len(rows)} rows with an aspect, token_f1 {record.scores[0][0]:.2f}")
    print(f"{rows[0]['prompt']}{said}\n  (by rule: {rows[0]['answer']})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "builtin:sentiment")
