"""The faults suite: what it shows is survived here, and a guard that is gone is shown as a loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from holdfast import files
from holdfast.engine import plan, stepping
from holdfast.experiments import lease, memory, record, runs
from holdfast.ops import distributed
from holdfast.report import tables
from holdfast.search import storage
from holdfast.tasks import files as rows_of_files
from holdfast.tasks import load
from holdfast.testing.faults import GROUPS, MEANINGS, Outcome, Wrong, run_all
from holdfast.testing.faults.__main__ import main, table
from holdfast.testing.faults.suite import DOORS, Door, Try, by_fault, counted, tries
from holdfast.training import loop
from holdfast.training.rows import RowsMixin

# Those that take little: no training by the command line, no second model.
QUICK = ["D2", "D6", "D7", "D8", "D11", "C3", "C7", "C8", "N2", "N4", "N6", "N7", "N8", "N9", "N10",
         "N11", "N14", "P14", "P16", "S8", "S10", "S11", "S13"]  # fmt: skip


def told(found: list[Outcome]) -> str:
    return table([o for o in found if o.lost])


def test_the_quick_faults_are_survived() -> None:
    found = run_all(only=QUICK)
    assert not any(o.lost for o in found), told(found)
    assert {o.fault for o in found if o.came == "survived"} == {*QUICK}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.values())
def test_all_faults_are_survived(group: str) -> None:
    found = run_all(group, slow=True)
    assert not any(o.lost for o in found), told(found)


def test_every_fault_is_tried_or_said_not_to_be() -> None:
    assert len(MEANINGS) == 82
    assert {t.fault for t in tries()} == {*MEANINGS}
    assert all((t.run is None) == bool(t.why) and t.door in DOORS for t in tries())
    root = Path(__file__).parents[2]
    for each in tries():  # what is tried elsewhere is there
        for word in each.why.replace(",", " ").split():
            assert not word.startswith("tests/") or (root / word).is_file(), each.why


def nothing(*_: Any, **__: Any) -> None:
    """In the place of a guard."""


NOBODYS = SimpleNamespace(release=nothing, held=lambda: True)  # a lease that is none

# What is broken: where, what, by what; the fault and the door that have to notice, and how.
GUARDS: dict[str, tuple[Any, str, Any, str, Door, str]] = {
    "repeated rows": (load, "_repeated", lambda *_: 0, "D11", "command line", "silent wrong"),
    "classes": (RowsMixin, "_check_range", nothing, "D3", "Trainer", "failed"),
    "keys given twice": (files._Reader, "construct_mapping", yaml.SafeLoader.construct_mapping,
                         "C2", "command line", "silent wrong"),
    "other settings": (plan, "refuse_changed", nothing, "C9", "plain loop", "silent wrong"),
    "gradients": (stepping, "finite", lambda *_: True, "N1", "plain loop", "silent wrong"),
    "networks": (storage, "NETWORK", (), "P14", "command line", "silent wrong"),
    "schemas": (loop, "check_schema", nothing, "P16", "plain loop", "silent wrong"),
    "moments": (loop, "_unpack_optimizer", nothing, "P17", "plain loop", "silent wrong"),
    "checksums": (loop, "damage", nothing, "P2", "plain loop", "silent wrong"),
    "archives": (files, "ARCHIVES", ("nothing",), "S5", "command line", "failed"),
    "formulas": (tables, "cell", str, "S8", "command line", "silent wrong"),
    "passwords": (record, "scrub", str, "S11", "command line", "silent wrong"),
    "bytes": (rows_of_files, "_check_bytes", nothing, "D8", "command line", "failed"),
    "hidden gradients": (distributed, "refuse_unserved", nothing, "R4", "plain loop",
                         "silent wrong"),
    "torn lines": (storage, "_cut", nothing, "P6", "command line", "failed"),
    "whole numbers": (RowsMixin, "_check_labels", nothing, "D2", "Trainer", "silent wrong"),
    "leases": (lease, "take_patiently", lambda _: NOBODYS, "P15", "command line", "silent wrong"),
    "seals": (record, "check_seal", nothing, "P3", "command line", "silent wrong"),
    "configurations": (runs, "_check_config", nothing, "C9", "command line", "silent wrong"),
    "rows of a run": (runs, "_check_config", nothing, "D13", "command line", "silent wrong"),
    "memory": (memory, "out_of_memory", nothing, "P12", "command line", "failed"),
    "half the rows": (memory, "_halve", nothing, "P12", "command line", "failed"),
}  # fmt: skip
SLOW = {"leases", "seals", "configurations", "rows of a run", "memory", "half the rows"}


@pytest.mark.parametrize(
    "guard", [pytest.param(g, marks=[pytest.mark.slow] * (g in SLOW)) for g in GUARDS]
)
def test_a_guard_that_is_gone_is_a_loss(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name, instead, fault, door, came = GUARDS[guard]
    monkeypatch.setattr(home, name, instead)
    found = by_fault(run_all(only=[fault], door=door))[fault][door]
    assert found.came == came, found


def test_how_outcomes_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    def wrong(_: Any) -> None:
        raise Wrong("another result")

    def failed(_: Any) -> None:
        raise SystemExit(0)

    made = [Try("D1", "command line", nothing), Try("D2", "command line", nothing),
            Try("D2", "Trainer", wrong), Try("D2", "Trainer", nothing),
            Try("D3", "plain loop", failed), Try("D4", "Trainer", why="no GPU"),
            Try("D5", "Trainer", wrong, slow=True)]  # fmt: skip
    monkeypatch.setattr("holdfast.testing.faults.suite.tries", lambda *_: made)
    found = run_all()
    assert [o.came for o in found] == ["survived", "survived", "silent wrong", "survived",
                                       "failed", "not tried", "not tried"]  # fmt: skip
    assert counted(found) == (1, 1) and counted(run_all(slow=True)) == (1, 2)
    assert by_fault(found)["D2"]["Trainer"].why.startswith("another result (test_faults.py,")
    assert main(["--json", str(tmp_path / "f.json")]) == 1
    said = capsys.readouterr().out
    assert said.endswith("1 of 5 survived, silent wrongs 1\n") and "D4: no GPU" in said
    body = json.loads((tmp_path / "f.json").read_text())
    assert (body["survived"], body["of"], body["silent_wrongs"]) == (1, 5, 1)
    assert [o["came"] for o in body["outcomes"]][5] == "not tried"
    made[1:] = []
    assert main([]) == 0
    assert main(["--only", "D99"]) == 2 and "did you mean 'D9'" in capsys.readouterr().err
