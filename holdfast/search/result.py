"""What a search found, as one mapping of plain values (`search.json`) and as files.

Everything that a table, the report or a sentence says is computed here, once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast import __version__
from holdfast.experiments.record import STRICT, Record, commit, versions, without_secrets
from holdfast.experiments.sequence import describe
from holdfast.experiments.statistics import Difference, mean_spread, paired_difference
from holdfast.files import sealed, write_text_atomic
from holdfast.network.rates import Rates
from holdfast.search.final import Contender, Result
from holdfast.search.plan import Plan
from holdfast.search.rows import TrialRow, as_trials, best, best_of, front, importance, noise
from holdfast.search.space import MULTIPLIER, Ancestor
from holdfast.search.trials import FACTS, NAME, part_names, write_trials

SCHEMA = 1
RATES, RECIPE = "rates.yaml", "recipe.yaml"
STATES = ("complete", "pruned", "fail", "running", "waiting")

Results = Mapping[tuple[str, int], Result]


def facts(
    plan: Plan,
    found: Sequence[TrialRow],
    finals: Sequence[Contender] = (),
    results: Results | None = None,
    *,
    name: str = "",
    storage: str = "",
    command: Sequence[str] = (),
    first: Sequence[Record] = (),
) -> dict[str, Any]:
    """All that is known of a search so far. Scores of trials are on selection rows.

    first: the runs of task one that trials of a seed share.
    """
    winner, flat = best(found), best(found, kind="flat")
    last = [_final(c, plan.fresh_seeds, results or {}) for c in finals]
    shares = importance(found, plan.space)
    told = [describe(task) for task in plan.tasks]
    body = {
        "schema": SCHEMA,
        "kind": "search",
        "holdfast": __version__,
        "commit": commit(Path(__file__).parent),
        "versions": versions(),
        "command": without_secrets(command),
        "study": {"name": name, "title": plan.title, "storage": storage},
        "model": plan.model,
        "tasks": told,
        "shift": dict(plan.facts) or {"shift": plan.shift},
        "config": plan.identity,
        "space": {
            "parts": part_names(plan.space.parts),
            "layers": plan.space.layers,
            "rate": [plan.space.rate.low, plan.space.rate.high],
            "multiplier": [MULTIPLIER.low, MULTIPLIER.high],
            "tuned": {k: [r.low, r.high] for k, r in plan.space.tuned.items()},
        },
        "planned": plan.searching + plan.population,
        "confirmation": confirmation(found),
        "first": [
            {
                "seed": r.seed,
                "rate": r.settings["lr"],
                "steps": r.steps[0],
                "old": (r.selection_scores or [[None]])[0][0],
            }
            for r in first
        ],
        "counts": {state: sum(r.state == state for r in found) for state in STATES},
        "reasons": dict(Counter(_kind(r.reason) for r in found if r.reason)),
        "trials": [r.to_dict() for r in found],
        "winner": None if winner is None else winner.number,
        "best_flat": None if flat is None else flat.number,
        "front": [r.number for r in front(found)],
        "importance": {"shares": dict(shares.shares), "note": shares.note},
        "final": last,
        "gain": gain(last, [task["constant"] for task in told]),
        "steps": steps(plan, found, last) | {"first": sum(n or 0 for r in first for n in r.steps)},
    }
    plain: dict[str, Any] = _finite(body)
    return plain


def gain(
    finals: Sequence[Mapping[str, Any]], constants: Sequence[float | None] = ()
) -> dict[str, Any]:
    """The searched curve against the better flat control, on evaluation rows and paired by seed.

    The controls are the best flat rate and the ablation (flat at the winner's own rate and
    settings); of those with the most seeds in common, the better is the one with the smaller gap to
    the winner. verdict: `gain` or `loss` if the 95 % interval of the mean difference excludes 0,
    else `no gain`; `not measured` if they share fewer than two seeds. If the winner diverged on a
    seed, the verdict is `no gain` unless it is `loss`.

    constants: what one answer for all rows scores on each task. `nothing learned` where no final
    run, the controls' included, did better on either.
    """
    if _nothing_learned(finals, constants):
        floors = " and ".join(f"{floor:.3f}" for floor in constants)
        said = (f"Nothing learned: no final run scores more than one answer for all rows does "
                f"({floors}).")  # fmt: skip
        return {"verdict": "nothing learned", "sentence": said}
    won = next((f for f in finals if f["kind"] == "searched"), None)
    controls = [f for f in finals if f["kind"] in ("flat", "ablation") and f["mean"] is not None]
    if not controls:
        said = "No flat control was finished: there is nothing to compare with."
        return {"verdict": "not measured", "sentence": said}
    if won is None:
        flat = controls[0]
        said = (f"No gain: of all trials the flat rate {_rate(flat)} did best on selection rows; "
                f"on evaluation rows it reaches {_spread(_scores(flat).values())}.")  # fmt: skip
        return {"verdict": "no gain", "mean": 0.0, "low": None, "high": None, "n": 0, "p": None,
                "control": flat["label"], "sentence": said}  # fmt: skip
    mine = _scores(won)
    gaps = [(paired_difference(mine, _scores(f)), f) for f in controls]
    gap, control = min(gaps, key=lambda found: (-found[0].n, found[0].mean))
    diverged = [s["seed"] for s in won["seeds"] if s["reason"]]
    verdict = "not measured"
    if gap.low is not None and gap.high is not None:
        verdict = "gain" if gap.low > 0 else "loss" if gap.high < 0 else "no gain"
    if diverged and verdict != "loss":
        verdict = "no gain"
    known = "" if gap.mean is None else f"; difference {gap.mean:+.3f}{_interval(gap)}"
    gone = f"; it diverged with seed {', '.join(map(str, diverged))}" if diverged else ""
    theirs = {s: v for s, v in _scores(control).items() if s in mine}
    ours = [v for s, v in mine.items() if s in theirs]
    about = {"flat": f"the best flat rate {_rate(control)}",
             "ablation": f"flat at its own rate {_rate(control)} and settings"}  # fmt: skip
    said = (
        f"{verdict.capitalize()}: {won['label']} reaches new + old {_spread(ours)} on evaluation "
        f"rows over {gap.n} fresh seeds, {about[control['kind']]} {_spread(theirs.values())}"
        f"{known}{gone}."
    )
    return {**gap._asdict(), "verdict": verdict, "control": control["label"], "sentence": said}


def confirmation(found: Sequence[TrialRow]) -> dict[str, Any] | None:
    """Who led before and after the best trials were trained with further selection seeds.

    lead: the winner's new + old minus the next one's, paired by all selection seeds of both.
    noise_sd: of one score, see `rows.noise`. None where nothing was confirmed.
    """
    again = sorted((r for r in found if r.confirming), key=lambda r: r.rank, reverse=True)
    if not again:
        return None
    (before,), (won, *others) = best_of(found, 1), again
    ended = Counter(c["state"] for r in again for c in r.confirming)
    body: dict[str, Any] = {
        "before": before.number,
        "after": won.number,
        "seeds": sorted({c["seed"] for r in again for c in r.confirming}),
        "trials": [{"number": r.number, "value": r.value, "mean": r.rank[1], "by_seed": r.by_seed}
                   for r in again],
        "counts": dict(ended),
        "lead": None,
        "noise_sd": noise(again),
    }  # fmt: skip
    if not won.further:
        return {**body, "sentence": f"Not confirmed: no run with further seeds ended; "
                                    f"{_named(before)} leads as before."}  # fmt: skip
    same = "led before and leads" if won is before else f"leads, before it {_named(before)} did,"
    said = f"{_named(won)} {same} after confirming, over {len(won.by_seed)} selection seeds"
    if others:
        gap = paired_difference(won.by_seed, others[0].by_seed)
        body["lead"] = {**gap._asdict(), "over": others[0].number}
        said += f": lead of {gap.mean:+.3f} over {_named(others[0])}{_interval(gap)}"
    sd = body["noise_sd"]
    known = "" if sd is None else f", noise sd {sd:.3f} of one score"
    return {**body, "sentence": f"{said[:1].upper()}{said[1:]}{known}."}


def _named(r: TrialRow) -> str:
    return r.control or f"trial {r.number}"


def _interval(gap: Difference) -> str:
    if gap.low is None or gap.high is None:
        return ""
    return f", 95 % interval [{gap.low:+.3f}, {gap.high:+.3f}]"


def _nothing_learned(
    finals: Sequence[Mapping[str, Any]], constants: Sequence[float | None]
) -> bool:
    if len(constants) != 2 or None in constants:
        return False
    found = [(seed.get(key), floor or 0.0) for final in finals for seed in final["seeds"]
             for key, floor in zip(("old", "new"), constants, strict=True)]  # fmt: skip
    known = [score <= floor for score, floor in found if score is not None]
    return bool(known) and all(known)


def steps(
    plan: Plan, found: Sequence[TrialRow], finals: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Training steps of trials, of those had none been pruned, of confirming and final runs."""
    spent = sum(r.steps or 0 for r in found)
    full = max((r.steps or 0 for r in found if r.state == "complete"), default=0)
    ended = sum(r.state in ("complete", "pruned", "fail") for r in found)
    return {
        "spent": spent,
        "of_a_trial": full or None,
        "unpruned": full * ended or None,
        "share": spent / (full * ended) if full and ended else None,
        "confirming": sum(c["steps"] or 0 for r in found for c in r.confirming),
        "final": sum(f["steps"] for f in finals),
        "seconds": math.fsum(r.seconds or 0.0 for r in found),
    }


def _final(contender: Contender, seeds: Sequence[int], results: Results) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"seed": seed, "new": r.new, "old": r.old, "old_after": r.old_after,
         "new_plus_old": r.new_plus_old, "steps": r.steps, "reason": r.reason}
        for seed in seeds
        if (r := results.get((contender.label, seed))) is not None
    ]  # fmt: skip
    body: dict[str, Any] = {
        "label": contender.label, "kind": contender.kind, "trial": contender.trial,
        "rate": contender.rate, "params": contender.params, "seeds": rows,
        "steps": sum(row["steps"] for row in rows),
    }  # fmt: skip
    for key in ("new_plus_old", "new", "old", "old_after"):
        spread = mean_spread(row[key] for row in rows)
        name = "" if key == "new_plus_old" else key + "_"
        body |= {f"{name}mean": spread.mean, f"{name}sd": spread.sd}
    return body


def _kind(reason: str | None) -> str:
    """A reason without its numbers, as tables count it."""
    words = (reason or "").split(":")[0]
    if words.startswith("pruned"):
        return words
    return "worker ended" if words.startswith("its worker") else words[:60]


def _rate(final: Mapping[str, Any]) -> str:
    return f"{final['rate']:.3g}"


def _scores(final: Mapping[str, Any]) -> dict[int, float]:
    """new + old by seed, of those that did not diverge."""
    return {s["seed"]: s["new_plus_old"] for s in final["seeds"] if s["new_plus_old"] is not None}


def _spread(values: Iterable[float]) -> str:
    found = mean_spread(values)
    if found.mean is None:
        return "nothing"
    return f"{found.mean:.3f}" + ("" if found.sd is None else f" ± {found.sd:.3f}")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


# --- files --------------------------------------------------------------------------------------


def rates_of(plan: Plan, body: Mapping[str, Any]) -> Rates | None:
    """The winner's curve with its provenance; None if no trial was finished."""
    if body["winner"] is None:
        return None
    won = next(t for t in body["trials"] if t["number"] == body["winner"])
    final = next((f for f in body["final"] if f["trial"] == won["number"]), None)
    evaluation = None
    if final is not None:
        evaluation = {
            "seeds": [s["seed"] for s in final["seeds"]],
            "new_plus_old": {"mean": final["mean"], "sd": final["sd"]},
            "new": {"mean": final["new_mean"], "sd": final["new_sd"]},
            "old_after": {"mean": final["old_after_mean"], "sd": final["old_after_sd"]},
            "against_flat": {k: v for k, v in body["gain"].items() if k != "p"},
        }
    provenance = {
        "source": f"holdfast search {__version__}",
        "study": {k: body["study"][k] for k in ("name", "title")},
        "model": {"name": body["model"], "weights": body["config"]["weights"]},
        "tasks": [{k: t[k] for k in ("name", "source", "metric", "hash", "evaluation_hash")}
                  for t in body["tasks"]],
        "shift": plan.shift,
        "trial": won["number"],
        "control": won["control"],
        "selection": {"new_plus_old": won["value"], "new": won["new"],
                      "old_after": won["old_after"], "replicates": plan.replicates,
                      "confirmed": _of_winner(body)},
        "evaluation": evaluation,
        "controls": [{"label": f["label"], "new_plus_old": f["mean"], "sd": f["sd"]}
                     for f in body["final"] if f["kind"] != "searched"],
        "tuned": {k: won["params"][k] for k in plan.space.tuned},
        "search": {"sampler": plan.sampler, "pruner": plan.pruner, "objective": plan.objective,
                   "counts": body["counts"], "steps": body["steps"]["spent"], "seed": plan.seed,
                   "learn_old": plan.learn_old},
        "settings": body["config"]["settings"],
        "commit": body["commit"],
        "versions": body["versions"],
    }  # fmt: skip
    if "lineage" in won:
        lineage = [Ancestor(**ancestor) for ancestor in won["lineage"]]
        curve = plan.space.in_pieces(lineage, name="searched")
    else:
        curve = plan.space.rates(won["params"])
    return replace(curve, provenance=_finite(provenance))


def _of_winner(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Its mean over all selection seeds, where it was confirmed."""
    found = (body["confirmation"] or {}).get("trials", [])
    return next(({"new_plus_old": t["mean"], "seeds": len(t["by_seed"])} for t in found
                 if t["number"] == body["winner"]), None)  # fmt: skip


def write(
    folder: Path, plan: Plan, found: Sequence[TrialRow], body: Mapping[str, Any]
) -> list[Path]:
    """`trials.csv`; once a trial is finished `rates.yaml` and `recipe.yaml`; then `search.json`.

    It comes last, with the SHA-256 of each file before it and of itself.
    """
    written = [folder / NAME]
    write_trials(written[0], as_trials(found, plan.space), study=plan.title,
                 layers=plan.space.layers)  # fmt: skip
    rates = rates_of(plan, body)
    if rates is not None:
        rates.save(folder / RATES)
        won = next(r for r in found if r.number == body["winner"])
        recipe = plan.space.recipe(plan.base, won.params, name="searched", lineage=won.lineage)
        recipe.save(folder / RECIPE)
        written += [folder / RATES, folder / RECIPE]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
    text = json.dumps(sealed({**body, "files": files}), **STRICT)
    write_text_atomic(folder / FACTS, text + "\n")
    return [folder / FACTS, *written]
