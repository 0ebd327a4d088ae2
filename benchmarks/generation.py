"""Does what keeps old tasks in classifiers keep them in language models? Two tasks of text.

    python benchmarks/generation.py --model decoder --json docs/results/generation-decoder.json

SNLI's premise → a sentence that follows from it, then QNLI's sentence → a question that it answers.
No pre-trained language model can be had offline, so a small one (a decoder of 2.6M parameters, or a
T5 of 3.1M) is first trained here on texts of other tasks: numbers are its, and of no real model.
Tables show negative log-likelihood per answer token, in nats; of sentences of other tasks (the
reference, rows that were not trained on) before and after both tasks; and KL(base ‖ end) on the
second task. An encoder-decoder scores no reference. The same command goes on with --runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import DATA, markdown, need_data, save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import trange
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    T5Config,
)

from holdfast import DPS, EWC, GPM, L2SP, KfacEWC, KLAnchor, Merge, Recipe, Replay, WiSE, compare

TEXTS = ("amazon5", "ag_news", "dbpedia14", "mnli", "qqp", "sst2", "trec6", "stsb")  # for the model
TASKS = {"snli": (0, False), "qnli": (0, True)}  # the label of pairs to take; second text first
BLOCK, ROWS, VOCABULARY = 64, 16, 4000
SETTINGS: dict[str, Any] = {"train_size": 1600, "evaluation_size": 500, "epochs": 2.0,
                            "max_length": 64, "save_steps": 0, "selection": 100}  # fmt: skip
LR = 3e-4
ARMS: dict[str, tuple[Recipe, float]] = {
    **{f"flat {lr:g}": (Recipe(), lr) for lr in (1e-4, 3e-4, 1e-3)},
    "merge": (Recipe(methods=[Merge()]), LR),
    "kfac_ewc": (Recipe(methods=[KfacEWC()]), LR),
    "gpm": (Recipe(methods=[GPM()]), LR),
    "kl_anchor": (Recipe(methods=[KLAnchor()]), LR),
    "ewc": (Recipe(methods=[EWC()]), LR),
    "l2sp": (Recipe(methods=[L2SP()]), LR),
    "wise": (Recipe(methods=[WiSE()]), LR),
    "replay 5 %": (Recipe(methods=[Replay()]), LR),
    "dps": (Recipe(methods=[DPS()]), LR),
}  # fmt: skip


def rows(name: str, split: str = "train") -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def task(name: str, folder: Path) -> Path:
    """Pairs of a task as prompt and answer, in a folder."""
    label, swapped = TASKS[name]
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        taken = [r for r in rows(name, split) if r["label"] == label]
        one, two = ("sentence2", "sentence1") if swapped else ("sentence1", "sentence2")
        lines = [{"prompt": r[one], "answer": r[two]} for r in taken]
        (home / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (home / "meta.json").write_text(json.dumps({"kind": "generation", "task": name}))
    return home


def reference(folder: Path) -> Path:
    """Running text like that of pre-training: evaluation rows of its tasks."""
    file = folder / "reference.txt"
    texts = [r[k] for name in TEXTS for r in list(rows(name, "validation"))[:100]
             for k in ("text", "sentence1") if k in r]  # fmt: skip
    file.write_text("\n".join(texts))
    return file


def pretrain(kind: str, home: Path, steps: int) -> Path:
    """A language model of our own, once: seeded, on texts of tasks that are not learned later."""
    if (home / "config.json").is_file():
        return home
    texts = [r[k] for name in TEXTS for r in rows(name) for k in ("text", "sentence1") if k in r]
    random.Random(0).shuffle(texts)
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.normalizer = normalizers.NFKC()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", "</s>"]
    words.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                        unk_token="<unk>", model_max_length=256)  # fmt: skip
    ids = [i for each in tokenizer(texts)["input_ids"] for i in [*each, tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2, "vocab_size": len(tokenizer)}
    if kind == "decoder":
        sizes = {"n_embd": 192, "n_layer": 4, "n_head": 4, "n_positions": 256}
        model: Any = AutoModelForCausalLM.from_config(GPT2Config(**sizes, **ends))
    else:
        sizes = {"d_model": 192, "d_ff": 384, "num_layers": 3, "num_heads": 4, "d_kv": 48}
        model = AutoModelForSeq2SeqLM.from_config(
            T5Config(**sizes, **ends, decoder_start_token_id=0)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    draws = torch.Generator()
    for step in (bar := trange(steps, desc=f"pre-training the {kind}")):
        draws.manual_seed(step)
        batch = blocks[torch.randint(len(blocks), (ROWS,), generator=draws)]
        half = BLOCK // 2  # an encoder-decoder reads the first half and writes the second
        inputs = {"input_ids": batch, "labels": batch} if kind == "decoder" else {
            "input_ids": batch[:, :half], "labels": batch[:, half:].contiguous()}  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


def main() -> None:
    """Make the model, run what is not done, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", choices=("decoder", "t5"), default="decoder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=1200, help="of pre-training")
    parser.add_argument("--quick", action="store_true", help="200 steps, three arms, one seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/generation"))
    chosen = parser.parse_args()
    need_data()
    if chosen.quick:
        chosen.steps, chosen.seeds, chosen.arms = 200, 1, ["flat 0.0003", "merge", "ewc"]
    source = pretrain(chosen.model, chosen.runs / f"{chosen.model}-{chosen.steps}", chosen.steps)
    tasks = [task(name, chosen.runs / "tasks") for name in TASKS]
    home = chosen.runs / f"{chosen.model}-{chosen.steps}-runs"
    recipes = {arm: (ARMS[arm][0], {"lr": ARMS[arm][1]}) for arm in chosen.arms}
    records = compare(str(source), tasks, recipes, seeds=range(chosen.seeds), out=home,
                      workers=chosen.workers, reference=reference(chosen.runs),
                      **SETTINGS)  # fmt: skip
    labels = [arm for arm in recipes for _ in range(chosen.seeds)]
    found = [{"arm": arm, "seed": r.seed, "scores": r.scores, "seconds": r.seconds,
              "general": r.general}
             for arm, r in zip(labels, records, strict=True)]  # fmt: skip
    save(chosen.json, {"model": chosen.model, "steps": chosen.steps, "runs": found}, _table(found))


def _table(found: list[dict[str, Any]]) -> str:
    lines = []
    for arm in dict.fromkeys(run["arm"] for run in found):
        runs = [run["scores"] for run in found if run["arm"] == arm]
        lost = [[[-math.log(v) if v else 0.0 for v in row] for row in scores] for scores in runs]
        columns = [[s[0][0] for s in lost], [s[1][0] for s in lost], [s[1][1] for s in lost],
                   [(s[1][0] + s[1][1]) / 2 for s in lost]]  # fmt: skip
        general = [run["general"] for run in found if run["arm"] == arm]
        ends = [g["after"][[*TASKS][-1]] for g in general]
        for measure, all_of in (("nll", [[g["base"] for g in general], ends]), ("kl", [ends])):
            columns += [[e[measure] for e in each] if measure in each[0] else [] for each in all_of]
        lines.append([arm, len(lost), *(_spread(c) if c else "–" for c in columns)])
    heads = ["arm", "seeds", "old before", "old after", "new", "mean at the end",
             "reference before", "reference after", "KL"]  # fmt: skip
    return markdown(heads, lines)


def _spread(values: list[float]) -> str:
    sd = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{sd}"


if __name__ == "__main__":
    main()
