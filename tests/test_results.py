"""README gives the figures of the committed results, and each result has its command."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def percent(lowest: float, highest: float) -> str:
    return f"{lowest:.0f} to {highest:.0f} %"


def short(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def keeping() -> list[str]:
    """Of `default` and the two flat rates: pairs whose first task was learned, and chains."""
    import forgetting_page as page

    found = {s: a for s, a in page.cells(result("forgetting")["runs"]).items() if page.learned(a)}
    mean = statistics.fmean
    pairs = [arms for sequence, arms in found.items() if sequence.count(">") == 1]
    assert len(pairs) == 9 and {len(arms["default"].seeds) for arms in pairs} == {5}
    kept = [100 * mean(arms["default"].kept) for arms in pairs]
    flat = [100 * mean(mean(arms[f"flat {r}e-4"].kept) for arms in pairs) for r in (1, 2)]
    above = {
        sequence: 100 * (mean(arms["default"].average) - mean(arms["joint"].average))
        for sequence, arms in found.items()
        if sequence.count(">") in (1, 3)
    }
    chains = sorted(above[sequence] for sequence in above if sequence.count(">") == 3)
    joint = mean(above[sequence] for sequence in above if sequence.count(">") == 1)
    near = found["amazon5>sst2"]
    lost = page.best_flat(near, "new")[1] - mean(near["default"].new)
    return [
        "On nine pairs of real tasks (five seeds) it keeps "
        f"{mean(kept):.1f} % of the old task on average ({min(kept):.1f} % at least)",
        f"(+{short(joint, 1)} points)",
        "two chains of four (" + " and ".join(f"+{short(c, 1)}" for c in chains) + ")",
        f"which keep {percent(min(flat), max(flat))}",
        f"(Amazon → SST-2 by {100 * lost:.0f} points)",
    ]


def speed() -> list[str]:
    rows = result("step-overhead-quick")["rows"]

    def longer(kind: str, length: int) -> list[float]:
        return [
            100 * (row["whole"]["median"] - 1)
            for row in rows
            if re.match(kind, row["arm"]) and row["length"] == length
        ]

    dps = [percent(min(found), max(found)) for n in (32, 128) if (found := longer("dps|ret", n))]
    pulls = max(longer("ewc|l2sp", 32) + longer("ewc|l2sp", 128))
    saving = sorted(
        100 * row["more_than_trainer_at_100_steps"]
        for name in ("saving-quick", "saving-mix-quick")
        for row in result(name)["saving"]
        if row["kind"] == "holdfast"
    )
    return [
        f"takes {dps[0].removesuffix(' %')} % longer at 32 tokens and {dps[1]} at 128",
        f"EWC and L2-SP at most {pulls:.0f} %",
        f"{short(saving[0], 1)} to {short(saving[1], 1)} % more than Trainer's own",
    ]


def searching() -> list[str]:
    told = (RESULTS / "search-quick.md").read_text(encoding="utf-8")
    settings = result("search-quick")["settings"]
    shown = r"### trec6 → sst2\n.*?\| trial .*?\| \+0(\S+) \[\+0(\S+), \+0(\S+)\] "
    found = re.search(shown, told, re.S)
    assert found is not None
    gain, low, high = found.groups()
    steps = settings["train_size"] * settings["epochs"] / 16
    return [f"In runs of {steps:.0f} steps a task and 5 seeds, {settings['trials']} trials gained "
            f"{gain} [{low}, {high}] on TREC → SST-2"]  # fmt: skip


def prose() -> str:
    """README without code, tables, links' targets and paths, on one line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return " ".join(text.split())


@pytest.mark.parametrize("figures", [keeping, speed, searching])
def test_readme_gives_the_figures_of_the_results(figures: Any) -> None:
    text = prose()
    assert not [told for told in figures() if " ".join(told.split()) not in text]


def test_readme_gives_no_other_figures() -> None:
    text = prose()
    for told in (*keeping(), *speed(), *searching()):
        text = text.replace(told, "")
    assert not re.findall(r"[^ ]*(?<![\w.])\.\d+|\d[\d.]* (?:%|points)", text)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_a_result_names_the_command_that_makes_it(path: Path) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    if "command" not in body:  # runs of the harness itself, one command a pair
        assert all(pair["command"].startswith("holdfast compare ") for pair in body["pairs"])
        return
    words = body["command"].split()
    module = Path(*words[2].split("."), "__main__.py") if words[1] == "-m" else words[1]
    assert words[0] == "python" and (ROOT / module).is_file(), words[:3]
    assert f"docs/results/{path.name}" in words
    assert path.with_suffix(".md").read_text(encoding="utf-8")


def test_the_list_of_results_has_commands_and_hours() -> None:
    from results import listed

    found = {name: (hours, commands) for name, hours, commands in listed(RESULTS)}
    assert found.keys() == {path.stem for path in RESULTS.glob("*.json")}
    seconds = sum(run["seconds"] for run in result("low-resource")["runs"])
    assert found["low-resource"][0] == pytest.approx(seconds / 3600)
    assert found["search-flat-between"][1][1].startswith("holdfast compare ")
