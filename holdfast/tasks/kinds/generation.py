"""Text from text: a prompt and its answer, by decoders and by encoder-decoders.

The loss is on the answer's tokens only, the end of text included. A decoder reads prompt, a line
break (unless the prompt ends in white space) and answer as one text; an encoder-decoder reads the
prompt and writes the answer. All tasks share the whole model: there is no head of a task's own.

Running text is an answer to an empty prompt, for decoders. It is read in windows of `max_length`
tokens that do not overlap, each begun as the tokenizer begins a text; every token but a window's
first is scored, and none ends a text that goes on.

likelihood is exp(−NLL per answer token), teacher-forced: the geometric mean of the probabilities,
1 / perplexity. The other metrics compare greedily generated text with the answer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from holdfast.engine.forwarding import in_mode
from holdfast.errors import Refused, TrainingDiverged
from holdfast.tasks.kinds.packed import Packed, alike, lengths
from holdfast.tasks.kinds.pretrained import (
    check_length,
    load_config,
    load_saved,
    load_tokenizer,
)
from holdfast.tasks.kinds.sharing import Whole
from holdfast.tasks.kinds.stored import check_ids, check_texts
from holdfast.tasks.labels import IGNORED
from holdfast.tasks.scores import text_scores
from holdfast.tasks.task import Prediction, Row, Task

ANSWER = "answer"  # of an encoded row: its bytes, which the collator leaves out
BATCH = 16  # rows a forward pass; logits take 4 bytes a token and word of the vocabulary


class Generation(Whole):
    """Prompts and answers; all tasks share the whole model."""

    load_config = staticmethod(load_config)
    load_processor = staticmethod(load_tokenizer)

    def check(self, source: str, *, max_length: int) -> None:
        """Refuse an encoder: it sees the answer while it reads, and its head would be random."""
        check_length(source, max_length)
        names = load_config(source).architectures or ()
        if not any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
                   for name in names):  # fmt: skip
            raise Refused(f"is no language model ({', '.join(names) or 'no architecture'})",
                          where=source, remedy="name one that generates text")  # fmt: skip

    def load_model(self, source: str, task: Task, *, seed: int) -> nn.Module:
        """A language model as it was saved, in float32."""
        torch.manual_seed(seed)
        return self.open_saved(source)

    def open_saved(self, folder: str, about: Mapping[str, Any] | None = None) -> Any:
        config = load_config(folder)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return load_saved(auto, folder)

    def prompts(
        self, texts: Sequence[str], tokenizer: Any, *, decoder: bool
    ) -> list[list[int]]:  # fmt: skip
        """The tokens that the answer to each text follows."""
        if decoder:
            texts = [t if not t or t[-1].isspace() else f"{t}\n" for t in texts]
        found: list[list[int]] = tokenizer(list(texts))["input_ids"]
        end = tokenizer.eos_token_id
        if decoder:  # some tokenizers end every text: here it goes on
            found = [ids[:-1] if ids[-1:] == [end] else ids for ids in found]
        return found

    def encode(
        self,
        rows: Sequence[Row],
        task: Task,
        tokenizer: Any,
        *,
        max_length: int,
        config: Any = None,
    ) -> Packed:
        """Prompt and answer of each row, cut at `max_length` tokens; see `_cut`.

        A row of running text becomes as many as it has windows.
        """
        if tokenizer.eos_token_id is None:
            raise Refused("its tokenizer has no token for the end of a text", where=task.name,
                          remedy="set its eos_token and save it again")  # fmt: skip
        pairs = bool(config is not None and config.is_encoder_decoder)

        def few(rows: Sequence[Row]) -> list[dict[str, Any]]:
            asked = self.prompts([row.text for row in rows], tokenizer, decoder=not pairs)
            answers = tokenizer([str(r.label) for r in rows], add_special_tokens=False)["input_ids"]
            found = []
            for row, prompt, answer in zip(rows, asked, answers, strict=True):
                if not row.text:
                    found += _windows(prompt, answer, max_length)
                    continue
                if pairs:
                    said = [*answer[: max_length - 1], tokenizer.eos_token_id]
                    made = _row(_cut(prompt, max_length, decoder=False), said)
                else:
                    said = [*answer[: max_length - 2], tokenizer.eos_token_id]
                    prompt = _cut(prompt, max_length - len(said), decoder=True)
                    made = _row([*prompt, *said], [*[IGNORED] * len(prompt), *said])
                if task.metric != "likelihood":  # the text itself: tokens may not give it back
                    made[ANSWER] = list(str(row.label).encode())
                found.append(made)
            return found

        made = Packed.of(rows, few)
        check_ids(max(made.largest("input_ids"), made.largest("labels")), config, task.name)
        return made

    def count_cut(
        self,
        rows: Sequence[Row],
        encoded: Sequence[dict[str, Any]],
        task: Task,
        tokenizer: Any,
        *,
        max_length: int,
    ) -> int:
        """How many rows have a prompt or an answer that was cut; no window of running text is."""
        if task.running:
            return 0
        full = [
            (r, e) for r, e in zip(rows, encoded, strict=True)
            if max_length in (len(e["input_ids"]), len(e["labels"]))
        ]  # fmt: skip
        count = 0
        for row, made in full:
            decoder = len(made["labels"]) == len(made["input_ids"]) and made["labels"][0] == IGNORED
            prompt = len(self.prompts([row.text], tokenizer, decoder=decoder)[0])
            said = 1 + len(tokenizer(str(row.label), add_special_tokens=False)["input_ids"])
            count += (prompt + said if decoder else max(prompt, said)) > max_length
        return count

    def collator(self, tokenizer: Any) -> Any:
        """Batches padded on the right, labels with -100."""
        right = copy.copy(tokenizer)
        right.padding_side = "right"
        return _Collator(right, label_pad_token_id=IGNORED)

    def measure(self, model: Any, rows: Sequence[dict[str, Any]], task: Task, collate: Any) -> Any:
        """For each row NLL and number of answer tokens, or its text's score and 1: (rows, 2)."""
        found = np.zeros((len(rows), 2))
        if task.metric == "likelihood":
            for chosen, losses, counts in _losses(model, rows, collate):
                found[chosen] = torch.stack([losses, counts], 1).cpu().double().numpy()
            if not np.isfinite(found).all():
                raise TrainingDiverged("diverged: the model's outputs are not finite",
                                       where=task.name, remedy="lower --lr")  # fmt: skip
            return found
        most = max(sum(i != IGNORED for i in row["labels"]) for row in rows)
        decoder = not model.config.is_encoder_decoder
        prompts = [_asked(row) if decoder else row["input_ids"] for row in rows]
        said = generate(model, prompts, collate.tokenizer, most=most)
        truth = [bytes(row[ANSWER]).decode() for row in rows]
        found[:, 0], found[:, 1] = text_scores(task.metric, truth, said), 1.0
        return found

    def total(self, task: Task, measured: Any) -> float:
        """exp(−ΣNLL / Σtokens), or the mean of the texts' scores."""
        mean = float(measured[:, 0].sum() / measured[:, 1].sum())
        return math.exp(-mean) if task.metric == "likelihood" else mean

    def predict(
        self, model: Any, about: Mapping[str, Any], texts: Sequence[str],
        pairs: Sequence[str] | None, tokenizer: Any, *, max_length: int, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """The answer to each text; a decoder's and its prompt have `max_length` tokens."""
        decoder = not model.config.is_encoder_decoder
        # An answer has a quarter or more.
        room = max_length - max_length // 4 if decoder else max_length
        prompts = [
            _cut(ids, room, decoder=decoder)
            for ids in self.prompts(texts, tokenizer, decoder=decoder)
        ]
        check_texts(prompts, model)
        longest = max(map(len, prompts), default=0) if decoder else 0
        said = generate(
            model, prompts, tokenizer, most=max_length - longest, batch=min(batch, BATCH)
        )
        return [Prediction(text, {}) for text in said]


def check_running(source: str, task: Task) -> None:
    """Refuse running text for an encoder-decoder, which only answers what its encoder reads."""
    if task.running and load_config(source).is_encoder_decoder:
        raise Refused("is running text, and an encoder-decoder answers prompts", where=task.name,
                      remedy="name a decoder, or rows with prompt and answer")  # fmt: skip


def _cut(prompt: list[int], most: int, *, decoder: bool) -> list[int]:
    """A decoder's prompt loses its beginning, as the answer follows its end; others their end."""
    if decoder or len(prompt) <= most:
        return prompt[-most:]
    return [*prompt[: most - 1], prompt[-1]]  # the token for the end of a text


def _asked(row: dict[str, Any]) -> list[int]:
    """A decoder's prompt: the tokens whose prediction is not scored."""
    told = zip(row["input_ids"], row["labels"], strict=True)
    return [i for i, label in told if label == IGNORED]


def _windows(begin: list[int], ids: list[int], most: int) -> list[dict[str, Any]]:
    """Running text in windows of up to `most` tokens, `begin` before each; never of one token."""
    room = most - len(begin)
    parts = (ids[at : at + room] for at in range(0, len(ids), room))
    return [_row([*begin, *part], [*[IGNORED] * len(begin), *part])
            for part in parts if len(begin) + len(part) > 1]  # fmt: skip


def _row(ids: list[int], labels: list[int]) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


class _Collator(DataCollatorForSeq2Seq):
    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        rows = [{k: v for k, v in row.items() if k != ANSWER} for row in features]
        return super().__call__(rows, return_tensors)


def _losses(
    model: Any, rows: Sequence[dict[str, Any]], collate: Any
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Places of rows, with the sum of −log p over each one's answer, and its tokens."""
    device = next(model.parameters()).device
    with in_mode(model.modules(), training=False):
        for chosen in alike(lengths(rows), BATCH):
            batch = collate([rows[i] for i in chosen]).to(device)
            with torch.no_grad():
                logits, labels = model(**batch).logits.float(), batch["labels"]
            if not model.config.is_encoder_decoder:  # the token before says the next one
                logits, labels = logits[:, :-1], labels[:, 1:]
            each = functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            yield chosen, each.sum(1), (labels != IGNORED).sum(1)


def generate(
    model: Any, prompts: Sequence[list[int]], tokenizer: Any, *, most: int, batch: int = BATCH
) -> list[str]:
    """Greedily generated text for each prompt of token ids, of at most `most` tokens."""
    device, decoder = next(model.parameters()).device, not model.config.is_encoder_decoder
    left, found = copy.copy(tokenizer), [""] * len(prompts)
    left.padding_side = "left"
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if decoder and places:  # prompt and answer share them
        most = min(most, places - 1)
        prompts = [_cut(ids, places - most, decoder=True) for ids in prompts]
    with in_mode(model.modules(), training=False):
        for chosen in alike([len(ids) for ids in prompts], batch):
            rows = left.pad({"input_ids": [prompts[i] for i in chosen]}, return_tensors="pt")
            begun = rows["input_ids"].shape[1] if decoder else 0
            made = model.generate(
                **{k: rows[k].to(device) for k in ("input_ids", "attention_mask")},
                max_new_tokens=most, do_sample=False, num_beams=1,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            texts = tokenizer.batch_decode(made[:, begun:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                found[i] = text.strip()
    return found


KIND = Generation()
