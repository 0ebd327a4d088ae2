"""What a search found: `search.json` -> a page, and a table for the terminal.

The facts are computed by the search; here they are put into words and pictures. The file may come
from a stranger: names are cleaned, and the page runs no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import holdfast
from holdfast.errors import Refused
from holdfast.experiments.statistics import Difference, paired_difference
from holdfast.files import LARGEST, check_seal, parse_json, read_plain, write_text_atomic
from holdfast.report.page import check_page, environment
from holdfast.report.words import DASH, clean, number, short

if TYPE_CHECKING:
    from rich.table import Table

FACTS = "search.json"
SCHEMA = 1
SHOWN = 10  # trials in the table of the best
EDGE = 1.15  # a rate within this factor of an end of its range counts as at the end
NONE = type(None)
NUMBER, TEXT = (int, float, NONE), (str, NONE)
# The keys that the page reads, with their types; for lists, those of each entry.
NEEDED: dict[str, Any] = {
    "study": dict, "tasks": list, "shift": dict, "config": dict, "counts": dict, "reasons": dict,
    "trials": list, "front": list, "final": list, "gain": dict, "steps": dict, "importance": dict,
    "space": dict, "versions": dict, "command": list, "model": str, "planned": int,
    "winner": (int, NONE), "best_flat": (int, NONE), "commit": TEXT,
}  # fmt: skip
WITHIN: dict[str, dict[str, Any]] = {
    "study": {"name": str},
    "tasks": {"name": str, "metric": str, "labels": (list, NONE), "rows": dict, "synthetic": bool,
              "warnings": list},
    "config": {"shift": str, "settings": dict, "sampler": str, "pruner": str, "objective": str,
               "rungs": list, "replicates": int, "seed": int, "flat": list},
    "trials": {"number": int, "state": str, "control": TEXT, "kind": TEXT, "params": dict,
               "rate": NUMBER, "multipliers": (list, NONE), "value": NUMBER, "new": NUMBER,
               "old": NUMBER, "old_after": NUMBER, "steps": NUMBER},
    "final": {"label": str, "kind": str, "rate": (int, float), "seeds": list, "steps": int,
              **{f"{k}{s}": NUMBER for k in ("", "new_", "old_", "old_after_")
                 for s in ("mean", "sd")}},
    "gain": {"verdict": str, "sentence": str},
    "steps": {"spent": int, "final": int},
    "importance": {"shares": dict, "note": str},
    "confirmation": {"sentence": str, "seeds": list, "trials": list},
    "space": {"parts": list, "layers": (int, NONE), "rate": list, "multiplier": list,
              "tuned": dict},
}  # fmt: skip
REASONS = {"collapsed": "task one no better than one answer for all"}


def load_search(path: str | Path) -> dict[str, Any]:
    """The facts of a search from its folder or its `search.json`; `Refused` if it holds none."""
    path = Path(path)
    path = path / FACTS if path.is_dir() else path
    where = str(path)
    try:
        body = parse_json(read_plain(path, 16 * LARGEST))
    except OSError as error:
        raise Refused(error.strerror or str(error), where=where) from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON: {error}", where=where) from None
    if not isinstance(body, dict) or body.get("kind") != "search":
        raise Refused("not the facts of a search", where=where)
    if body.get("schema") != SCHEMA:
        raise Refused(f"schema {body.get('schema')!r}, this holdfast reads {SCHEMA}", where=where)
    check_seal(body, where=where)
    _check(body, NEEDED, "the facts", where)
    for key, inner in WITHIN.items():
        found = body.get(key)  # not every search has a confirmation
        for entry in found if isinstance(found, list) else [found] * (found is not None):
            _check(entry, inner, key, where)
    for entry in (seed for each in body["final"] for seed in each["seeds"]):
        _check(entry, {"seed": int, "new_plus_old": NUMBER}, "the seeds of final", where)
    space, sizes = body["space"], {len(t["multipliers"] or body["space"]["parts"])
                                   for t in body["trials"]}  # fmt: skip
    if sizes - {len(space["parts"])} or not len(space["rate"]) == len(space["multiplier"]) == 2:
        raise Refused("its parts, multipliers and ranges do not fit together", where=where)
    numbers = [*space["rate"], *space["multiplier"], *body["config"]["flat"],
               *(m for t in body["trials"] for m in t["multipliers"] or ()),
               *(count for task in body["tasks"] for count in task["rows"].values())]  # fmt: skip
    if not all(isinstance(number, int | float) for number in numbers):
        raise Refused("a text where a number belongs", where=where)
    for entry in (body.get("confirmation") or {}).get("trials", []):
        _check(entry, {"number": int, "mean": NUMBER, "value": NUMBER, "by_seed": dict},
               "confirmed trials", where)  # fmt: skip
    return body


def _check(found: Any, needed: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse what the page could not read."""
    if not isinstance(found, dict):
        raise Refused(f"{name} hold {type(found).__name__}", where=where)
    for key, kind in needed.items():
        if key not in found:
            raise Refused(f"no {key} in {name}", where=where)
        if not isinstance(found[key], kind):
            raise Refused(f"{key} of {name} is {type(found[key]).__name__}", where=where)


def write_search_report(body: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a search: one self-contained file."""
    target = check_page(path)
    write_text_atomic(target, render(body))
    return target


def render(body: Mapping[str, Any]) -> str:
    """The page as text."""
    from holdfast.report.search_draw import pictures

    body = _cleaned(body)
    (verdict, sentence), again, won = said(body), body.get("confirmation"), winner(body)
    template = environment().get_template("search.html.j2")
    return str(
        template.render(
            title=" → ".join(short(task["name"]) for task in body["tasks"]),
            body=body,
            verdict=verdict,
            sentences=[sentence, *confirmed(body), cost(body)],
            notes=notes(body),
            pictures=pictures(body),
            counts=counts(body),
            winner=won,
            to_use=to_use(body, won) if won else "",
            differences=differences(body),
            seeds=seeds,
            confirmation=again,
            seed_names=[f"seed {seed}" for seed in again["seeds"]] if again else [],
            learn_old=body["config"].get("learn_old", "each"),
            rungs=", ".join(f"{100 * share:.0f}" for share in body["config"]["rungs"]),
            reasons={REASONS.get(k, k): n for k, n in body["reasons"].items()},
            best=best_trials(body),
            version=holdfast.__version__,
        )
    )


def _cleaned(value: Any) -> Any:
    """The facts with every text on one line and without control characters."""
    if isinstance(value, Mapping):
        return {clean(k): _cleaned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(v) for v in value]
    return clean(value) if isinstance(value, str) and value else value


def said(body: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict in a word or two, and the sentence behind it with seeds and interval."""
    verdict = clean(body["gain"]["verdict"]).capitalize()
    sentence = clean(body["gain"]["sentence"]).removeprefix(f"{verdict}: ")
    final = body["final"]
    if final and final[0]["kind"] == "flat":  # a flat rate won: no pair, and so no interval
        sentence += f" {_plural(len(final[0]['seeds']), 'fresh seed')}."
    return verdict, sentence[:1].upper() + sentence[1:]


def confirmed(body: Mapping[str, Any]) -> list[str]:
    """Who led before and after further selection seeds, the lead and the noise; or nothing."""
    found = body.get("confirmation")
    return [clean(found["sentence"])] if found else []


def cost(body: Mapping[str, Any]) -> str:
    """What was spent, in training steps."""
    spent = body["steps"]
    share = spent.get("share")
    less = "" if share is None else f", {100 * share:.0f} % of what they take unpruned"
    told = {"spent": f"training steps on trials{less}", "first": "on task one, once a seed",
            "confirming": "on confirming runs", "final": "on the final runs"}  # fmt: skip
    shown = [f"{spent[key]:,}".replace(",", "\u202f") + f" {words}" for key, words in told.items()
             if spent.get(key) or key in ("spent", "final")]  # fmt: skip
    return "; ".join(shown) + "."


def notes(body: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the rest: nothing learned, a control at the edge."""
    made: list[str] = []
    trials, flat = body["trials"], body["config"].get("flat") or []
    by_number = {t["number"]: t for t in trials}
    searched = [t for t in trials if not t["control"]]
    won = by_number.get(body["winner"])
    ended = sum(t["state"] in ("complete", "pruned", "fail") for t in trials)
    if ended < body["planned"]:
        made.append(f"Not over: {ended} of {body['planned']} trials have ended.")
    if searched and not any(t["value"] is not None for t in searched):
        shown = "" if won is None else ": what is shown are controls"
        made.append(f"None of the {_plural(len(searched), 'searched trial')} was finished{shown}.")
    if won is not None and won["control"] and won["kind"] != "flat":
        made.append(f"The best trial is {clean(won['control'])}, a control that needs no search.")
    collapsed = body["reasons"].get("collapsed", 0)
    if searched and 2 * collapsed >= len(searched):
        made.append(f"{collapsed} of {_plural(len(searched), 'searched trial')} learned no more of "
                    f"{short(body['tasks'][0]['name'])} than one answer for all rows: train "
                    "longer, on more rows, or at other rates.")  # fmt: skip
    best = by_number.get(body["best_flat"])
    if best is not None and len(flat) > 1 and best["rate"] in (min(flat), max(flat)):
        end, way = ("lowest", "lower") if best["rate"] == min(flat) else ("highest", "higher")
        made.append(f"The best flat rate, {best['rate']:g}, is the {end} that was tried: a {way} "
                    "one may be a stronger control (--flat).")  # fmt: skip
    made += _ties(body)
    low, high = body["space"]["rate"]
    if won is not None and not won["control"] and not low * EDGE < won["rate"] < high / EDGE:
        made.append(f"The base rate of the best trial, {won['rate']:.3g}, lies at the end of what "
                    f"was searched, {low:.3g} to {high:.3g} (--flat).")  # fmt: skip
    made += [f"{short(task['name'])}: {clean(text)}"
             for task in body["tasks"] for text in task["warnings"]]  # fmt: skip
    return made


def _ties(body: Mapping[str, Any]) -> list[str]:
    """Flat rates whose scores on selection rows differ by no more than the seeds alone do.

    That is by 2 sqrt(2 / replicates) sd at most, with sd over the final seeds of the best flat one.
    """
    flat = [t for t in body["trials"] if t["kind"] == "flat" and t["value"] is not None]
    sd = next((f["sd"] for f in body["final"] if f["kind"] == "flat"), None)
    if len(flat) < 2 or sd is None:
        return []
    off = 2 * math.sqrt(2 / max(body["config"]["replicates"], 1)) * sd
    most = max(t["value"] for t in flat)
    ties = sorted(t["rate"] for t in flat if most - t["value"] <= off)
    if len(ties) < 2:
        return []
    rates = ", ".join(f"{rate:g}" for rate in ties)
    return [f"The flat rates {rates} tie: on selection rows their new + old is within {off:.3f}, "
            "which seeds alone make (two standard deviations of a difference)."]  # fmt: skip


def winner(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """What rates.yaml and recipe.yaml hold: its parts with their rates, and settings of methods."""
    won = next((t for t in body["trials"] if t["number"] == body["winner"]), None)
    if won is None or won["multipliers"] is None:
        return None
    curve = zip(body["space"]["parts"], won["multipliers"], strict=True)
    lr = found if isinstance(found := won.get("lr"), int | float) else won["rate"]
    return {
        "label": trial_label(won), "flat": won["kind"] == "flat", "rate": f"{won['rate']:.4g}",
        "lr": f"{lr:.4g}",
        "curve": [(part, m, won["rate"] * m) for part, m in curve],
        "tuned": {name: won["params"][name] for name in body["space"]["tuned"]},
    }  # fmt: skip


def to_use(body: Mapping[str, Any], won: Mapping[str, Any]) -> str:
    """The arguments of `holdfast sequence` that train with the winner's curve what it was for."""
    after = body["config"].get("learn_old") == "once"
    return f"{'--from RUN ' if after else ''}--recipe recipe.yaml --lr {won['lr']}"


def differences(body: Mapping[str, Any]) -> dict[str, Difference | None]:
    """new + old of every final contender minus the best flat rate's, paired by seed."""
    scores = {f["label"]: {s["seed"]: s["new_plus_old"] for s in f["seeds"]} for f in body["final"]}
    flat = next((f["label"] for f in body["final"] if f["kind"] == "flat"), None)
    if flat is None:
        return dict.fromkeys(scores)
    return {k: None if k == flat else paired_difference(v, scores[flat]) for k, v in scores.items()}


def counts(body: Mapping[str, Any]) -> list[str]:
    """`23 finished`, `19 pruned`, … without states that no trial is in."""
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


def mean_sd(mean: float | None, sd: float | None) -> str:
    """`0.741 ± 0.012`."""
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd)}"


def search_table(body: Mapping[str, Any]) -> Table:
    """The final runs: the searched curve beside the controls, on evaluation rows."""
    from rich.table import Table
    from rich.text import Text

    title = f"final runs, evaluation rows; {len(body['trials'])} trials: {', '.join(counts(body))}"
    made = Table(title=Text(title), title_justify="left", caption_justify="left")
    for head in ("curve", "base rate", "seeds", "new", "old before", "old after", "new + old"):
        made.add_column(head, justify="left" if head == "curve" else "right")
    for f in body["final"]:
        scores = [mean_sd(f[f"{k}mean"], f[f"{k}sd"]) for k in ("new_", "old_", "old_after_", "")]
        cells = [clean(f["label"]), f"{f['rate']:.3g}", seeds(f), *scores]
        made.add_row(*map(Text, cells))
    if not body["final"]:
        made.add_row(DASH, *[DASH] * 6)
    below = [*confirmed(body), *notes(body)]
    if won := winner(body):
        below.append(f"To use {won['label']}: {to_use(body, won)}")
        if won["lr"] != won["rate"]:
            below.append("Its rates change while it trains; those shown are their geometric means.")
    made.caption = Text("\n".join(below)) if below else None
    return made


def seeds(final: Mapping[str, Any]) -> str:
    """How many seeds, and how many of them diverged."""
    gone = sum(s["new_plus_old"] is None for s in final["seeds"])
    return str(len(final["seeds"])) + (f", {gone} diverged" if gone else "")


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
