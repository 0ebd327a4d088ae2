"""Where texts come from that are no column: a template over columns, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from holdfast.errors import Refused, nearest
from holdfast.tasks.table import (
    ANSWER,
    MESSAGES,
    PAIR,
    PROMPT,
    TEXT,
    Columns,
    Table,
    only,
    pieces,
    shown,
)

SHAPE = 'as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'


def prompted(
    table: Table, columns: Columns, *, answered: bool = True
) -> tuple[Table, Columns]:  # fmt: skip
    """The table with a column of prompts or texts, if it has none, and the columns to read now.

    answered: whether each conversation has to end with an answer, which then gets a column too.
    """
    if columns.converses(table):
        made = _conversed(table, answered=answered)
        return made, Columns(text=PROMPT[0], answer=ANSWER[0] if answered else None)
    if columns.template is not None and columns.template not in table.columns:
        made = _filled(table, columns)
        pair = None if columns.prompt is not None else columns.pair
        return made, replace(columns, text=PROMPT[0], pair=pair, prompt=None)
    return table, columns


def _filled(table: Table, columns: Columns) -> Table:
    """Texts by `columns.template`: a blank names a column, in a prompt also text and pair by what
    they are.

    A row with nothing to put into one has no text.
    """
    parts = pieces(columns.template or "")
    named = {blank: _column(blank, table, columns) for _, blank in parts if blank}

    def prompt(number: int, cells: dict[str, Any]) -> str | None:
        found = {blank: cells.get(column) for blank, column in named.items()}
        for blank, value in found.items():
            if value is None or (isinstance(value, str) and not value.strip()):
                return None
            if not isinstance(value, str | int | float):
                raise Refused(f"{shown(named[blank])} is a {type(value).__name__}, not a text",
                              where=table.at(number))  # fmt: skip
        return "".join(before + str(found.get(blank, "")) for before, blank in parts)

    return _with(table, {PROMPT[0]: prompt})


def _column(blank: str, table: Table, columns: Columns) -> str:
    """The column that fills a blank of a template."""
    text = None if columns.text == columns.template else columns.text  # itself no column
    role = {"text": (text, TEXT), "pair": (columns.pair, PAIR)}.get(blank)
    if role is not None and role[0] is not None:
        blank = role[0]
    elif role is not None and blank not in table.columns:
        return only(role[1], table, blank) or ""
    if blank not in table.columns:
        raise Refused(f"no column {shown(blank)}", where=f"{table.name}, prompt",
                      remedy=nearest(blank, table.columns))  # fmt: skip
    return blank


def _conversed(table: Table, *, answered: bool) -> Table:
    """Prompts are the messages before the last answer, as JSON."""

    def prompt(number: int, cells: dict[str, Any]) -> str:
        messages, where = _messages(cells.get(MESSAGES), table.at(number)), table.at(number)
        last = messages[-1]["role"]
        if answered and last != "assistant":
            raise Refused(f"the last message is of {shown(last)}, not of 'assistant'", where=where,
                          remedy="end it with the answer, or leave it out")  # fmt: skip
        asked = messages[:-1] if last == "assistant" else messages
        if not asked:
            raise Refused("no message before the answer", where=where)
        return as_text(asked)

    def answer(_: int, cells: dict[str, Any]) -> str:
        return str(cells[MESSAGES][-1]["content"])

    return _with(table, {PROMPT[0]: prompt, **({ANSWER[0]: answer} if answered else {})})


def as_text(messages: list[dict[str, Any]]) -> str:
    """A conversation as the text of a row: the same for the same messages."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def _messages(cell: Any, where: str) -> list[dict[str, Any]]:
    """A conversation without the fields that are null, which Parquet writes."""
    if not isinstance(cell, list) or not cell:
        raise Refused(f"{MESSAGES!r} is {shown(cell)}, not a list of messages", where=where,
                      remedy=SHAPE)  # fmt: skip
    for place, message in enumerate(cell, 1):
        told = message if isinstance(message, dict) else {}
        for key in ("role", "content"):
            if not isinstance(text := told.get(key), str) or not text.strip():
                raise Refused(f"message {place} has no {key!r} of text", where=where, remedy=SHAPE)
    found = [{k: v for k, v in message.items() if v is not None} for message in cell]
    try:
        as_text(found).encode()
    except UnicodeEncodeError:
        raise Refused(f"{MESSAGES!r} holds half a character (a lone surrogate)", where=where,
                      remedy="write the file again as UTF-8") from None  # fmt: skip
    return found


def _with(table: Table, made: dict[str, Callable[[int, dict[str, Any]], str | None]]) -> Table:
    """The table with other columns, each a function of a record."""
    records = []
    for number, cells in table.records:
        try:
            new = {name: make(number, cells) for name, make in made.items()}
        except Refused as why:
            table.bad_row(number, why)
        else:
            records.append((number, cells | new))
    columns = [*(c for c in table.columns if c not in made), *made]
    return replace(table, columns=columns, records=records)
