"""The tables a terminal prints: the matrix itself, and recipes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.experiments.record import Record
from holdfast.report.facts import COLUMNS, Comparison, GroupFacts, comparisons, pool, run_facts
from holdfast.report.general import general_lines
from holdfast.report.protocol import elsewhere_lines
from holdfast.report.sentences import judge_sentences, noise_note, nothing, pool_sentences
from holdfast.report.terms import terms
from holdfast.report.words import DASH, clean, number, spread_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NAME_WIDTH = 28


def matrix_table(record: Record) -> Table:
    """Scores by task learned (down) and task tested (across), with rows, noise and forgetting."""
    from rich.table import Table
    from rich.text import Text

    facts = run_facts(record)

    def name(text: str) -> Text:
        return Text(clean(text, width=NAME_WIDTH))

    table = Table(title=name(facts.label), title_justify="left", title_style="bold")
    table.add_column("after learning")
    for task in facts.tasks:
        mark = " (synthetic)" if task.synthetic else ""
        table.add_column(name(task.name) + Text(mark), justify="right")
    for i, row in enumerate(facts.scores):
        cells = [Text(number(value), style="bold" if i == j else "") for j, value in enumerate(row)]
        table.add_row(name(facts.tasks[i].name), *cells)
    table.add_section()
    table.add_row("metric", *(name(task.metric) for task in facts.tasks))
    counts = [task.rows["evaluation"] for task in facts.tasks]
    table.add_row("rows", *(DASH if count is None else str(count) for count in counts))
    table.add_row(
        "noise of the last score",
        *(DASH if task.noise is None else f"± {number(task.noise)}" for task in facts.tasks),
    )
    notes = [noise_note(facts.tasks)]
    if len(facts.tasks) > 1:
        table.add_row("forgetting", *(number(t.forgetting, sign=True) for t in facts.tasks))
        shown = ("forgetting", "average", "plasticity", "new_plus_old", "forward_transfer")
        words = [f"{key.replace('_', ' ')} {number(facts.metrics[key])}" for key in shown]
        beside = [f"{m.name} {number(m.value)}" for m in facts.named if m.value is not None]
        notes = ["mean " + " · ".join(words), "forgetting: positive is worse",
                 *(["as others name them: " + " · ".join(beside)] if beside else []),
                 *([str(record.scenario)] if record.scenario else []), *notes]  # fmt: skip
    notes += [*general_lines(facts), *elsewhere_lines([facts])]
    table.caption = Text("\n".join(note for note in notes if note))
    table.caption_justify = "left"
    return table


def comparison_table(records: Sequence[Record]) -> RenderableType:
    """Recipes over seeds: one table for each sequence of tasks and model."""
    from rich.console import Group
    from rich.text import Text

    studies = comparisons(records)
    over = [Text(line) for line in pool_sentences(pool(studies))]
    return Group(*[_comparison(study) for study in studies], *over)


def _comparison(study: Comparison) -> Table:
    from rich.table import Table
    from rich.text import Text

    order = " → ".join(clean(task.name, width=NAME_WIDTH) for task in study.tasks)
    scenario = f" ({study.scenario})" if study.scenario else ""
    table = Table(title=Text(f"{study.model}: {order}{scenario}"), title_justify="left",
                  title_style="bold")  # fmt: skip
    single = len(study.tasks) == 1
    table.add_column("recipe")
    heads = ["score"] if single else ["new", "old before", "old after", "forgetting", "new + old"]
    for head in ("seeds", *heads, "vs control"):
        table.add_column(head, justify="right")
    for group in study.groups:
        mark = " (control)" if group.control else ""
        table.add_row(Text(clean(group.label, width=40) + mark), *_cells(group, single))
    lines = ["± is the standard deviation over seeds", *terms(study), *judge_sentences(study),
             *study.warnings]  # fmt: skip
    lines += [f"{clean(g.label)}, {line}" for g in study.groups for line in elsewhere_lines(g.runs)]
    if not single:
        lines.insert(1, "forgetting: positive is worse; vs control: new + old, paired by seed")
    if study.nothing_learned:
        lines.insert(0, nothing(study.tasks))
    table.caption = Text("\n".join(lines))
    table.caption_justify = "left"
    return table


def _cells(group: GroupFacts, single: bool) -> list[str]:
    columns = ("new",) if single else COLUMNS
    cells = [spread_text(group.spread[name], sign=name == "forgetting") for name in columns]
    cells = ["".join(cell.split()) for cell in cells]  # narrow, and never broken over two lines
    gap = group.difference.get("new" if single else "new_plus_old")
    if gap is None or gap.mean is None:
        cells.append(DASH)
    elif gap.low is None:
        cells.append(number(gap.mean, sign=True))
    else:
        low, high = number(gap.low, sign=True), number(gap.high, sign=True)
        cells.append(f"{number(gap.mean, sign=True)} [{low}, {high}]")
    return [f"{len(group.runs)}, {group.failed} failed" if group.failed else str(len(group.runs)),
            *cells]  # fmt: skip


def as_text(table: RenderableType, *, width: int = 120) -> str:
    """The table without colours, for a file, a pipe or a notebook's `print`."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False,
                      force_jupyter=False)  # fmt: skip
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]
