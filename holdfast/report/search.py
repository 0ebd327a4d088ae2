"""What a search found: `search.json` -> a page, and a table for the terminal.

The facts are computed by the search; here they are put into words and pictures. Everything in them
may come from a stranger's file: names are cleaned, and the page runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import holdfast
from holdfast.errors import Refused
from holdfast.files import LARGEST, write_text_atomic
from holdfast.report.page import environment
from holdfast.report.words import DASH, clean, number, short

if TYPE_CHECKING:
    from rich.table import Table

FACTS = "search.json"
SCHEMA = 1
SHOWN = 10  # trials in the table of the best
NEEDED = ("study", "tasks", "config", "counts", "trials", "final", "gain", "steps", "importance",
          "front", "space")  # fmt: skip


def load_search(path: str | Path) -> dict[str, Any]:
    """The facts of a search from its folder or its `search.json`; `Refused` if they are none."""
    path = Path(path)
    path = path / FACTS if path.is_dir() else path
    where = str(path)
    try:
        if path.stat().st_size > 16 * LARGEST:
            raise Refused("too large for the facts of a search", where=where)
        body = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise Refused(error.strerror or str(error), where=where) from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON: {error}", where=where) from None
    if not isinstance(body, dict) or body.get("kind") != "search":
        raise Refused("not the facts of a search", where=where)
    if body.get("schema") != SCHEMA or (gone := [k for k in NEEDED if k not in body]):
        what = f"schema {body.get('schema')!r}" if body.get("schema") != SCHEMA else f"no {gone[0]}"
        raise Refused(f"{what}, this holdfast reads {SCHEMA}", where=where)
    return body


def write_search_report(body: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a search: one self-contained file."""
    target = Path(path)
    if target.is_dir():
        raise Refused("is a folder", where=str(path), remedy="name a file, such as report.html")
    write_text_atomic(target, render(body))
    return target


def render(body: Mapping[str, Any]) -> str:
    """The page as text."""
    from holdfast.report.search_draw import pictures

    body = _cleaned(body)
    template = environment().get_template("search.html.j2")
    return str(
        template.render(
            title=" → ".join(short(task["name"]) for task in body["tasks"]),
            body=body,
            sentences=sentences(body),
            pictures=pictures(body),
            counts=counts(body),
            best=best_trials(body),
            version=holdfast.__version__,
        )
    )


def _cleaned(value: Any) -> Any:
    """The facts with every text on one line and without what a terminal or a page would obey."""
    if isinstance(value, Mapping):
        return {clean(k): _cleaned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(v) for v in value]
    return clean(value) if isinstance(value, str) and value else value


def sentences(body: Mapping[str, Any]) -> list[str]:
    """Plain words: what was found, then what it cost."""
    spent = body["steps"]
    share = spent.get("share")
    cost = f"{spent['spent']:,} training steps on trials".replace(",", "\u202f")
    if share is not None:
        cost += f", {100 * share:.0f} % of what they take unpruned"
    return [clean(body["gain"]["sentence"]), f"{cost}; {spent['final']} on the final runs."]


def counts(body: Mapping[str, Any]) -> list[str]:
    """`23 complete`, `19 pruned`, … without what there is none of."""
    words = {"fail": "failed", "complete": "finished"}
    return [f"{n} {words.get(state, state)}" for state, n in body["counts"].items() if n]


def best_trials(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finished trials of the highest new + old, controls among them."""
    done = [t for t in body["trials"] if t["value"] is not None]
    done.sort(key=lambda t: (-t["value"], t["number"]))
    return done[:SHOWN]


def trial_label(trial: Mapping[str, Any]) -> str:
    """`trial 17`, or the control's name."""
    return clean(trial["control"] or f"trial {trial['number']}", width=40)


def spread(mean: float | None, sd: float | None) -> str:
    """`0.741 ± 0.012`."""
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd)}"


def search_table(body: Mapping[str, Any]) -> Table:
    """The final runs: the searched curve beside the controls, on evaluation rows."""
    from rich.table import Table
    from rich.text import Text

    title = "final runs, evaluation rows: " + ", ".join(counts(body))
    made = Table(title=Text(title), title_justify="left")
    for head in ("curve", "base rate", "seeds", "new", "old before", "old after", "new + old"):
        made.add_column(head, justify="left" if head == "curve" else "right")
    for f in body["final"]:
        scores = [spread(f[f"{k}mean"], f[f"{k}sd"]) for k in ("new_", "old_", "old_after_", "")]
        cells = [clean(f["label"]), f"{f['rate']:.3g}", str(len(f["seeds"])), *scores]
        made.add_row(*map(Text, cells))
    if not body["final"]:
        made.add_row(DASH, *[DASH] * 6)
    return made
