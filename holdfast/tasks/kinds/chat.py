"""Conversations: the tokenizer's chat template makes the prompt, the last answer is learned.

A row's text is the JSON of the messages before that answer. Otherwise as `generation`: the loss is
on the answer and the tokenizer's end of text, all tasks share the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from torch import nn

from holdfast.errors import Refused
from holdfast.tasks.kinds.generation import Generation
from holdfast.tasks.prompts import SHAPE, as_text
from holdfast.tasks.table import shown
from holdfast.tasks.task import Prediction


class Chat(Generation):
    """Messages and the answer to them."""

    def check(self, source: str, *, max_length: int) -> None:
        """Also refuse a model that no conversation has been made for."""
        super().check(source, max_length=max_length)
        if not self.load_processor(source).chat_template:
            raise Refused("its tokenizer has no chat template", where=source, remedy="name a chat "
                          "model, or give rows of prompt and answer")  # fmt: skip

    def prompts(self, texts: Sequence[str], tokenizer: Any, *, decoder: bool) -> list[list[int]]:
        """Each conversation by the template, up to where the assistant begins to answer."""
        try:
            found: list[list[int]] = tokenizer.apply_chat_template(
                [json.loads(text) for text in texts], add_generation_prompt=True,
                tokenize=True, return_dict=False,
            )  # fmt: skip
        except TemplateError as error:  # such as two messages of a user one after another
            for text in texts if len(texts) > 1 else ():
                self.prompts([text], tokenizer, decoder=decoder)  # refuses the one that it is
            raise Refused(f"the chat template takes no such conversation ({error})",
                          where=shown(texts[0])) from None  # fmt: skip
        return found

    def predict(
        self, model: nn.Module, about: Mapping[str, Any], texts: Sequence[Any],
        pairs: Sequence[str] | None, tokenizer: Any, *, max_length: int, batch: int,
    ) -> list[Prediction]:  # fmt: skip
        """The answer to each conversation: a list of messages, or its JSON."""
        asked = [text if isinstance(text, str) else as_text(text) for text in texts]
        for text in asked:
            if not _messages(text):
                raise Refused(f"{shown(text)} is no list of messages", where=about["name"],
                              remedy=SHAPE)  # fmt: skip
        return super().predict(model, about, asked, pairs, tokenizer, max_length=max_length,
                               batch=batch)  # fmt: skip


def _messages(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(m, dict) for m in found)


KIND = Chat()
