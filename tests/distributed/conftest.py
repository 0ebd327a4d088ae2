"""Two ranks for all checks of this folder, started once a test run."""

from __future__ import annotations

import fcntl
import json
import os

import pytest
from launch import run_checks


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | None]]:
    """`run_checks` of all modules: once, also where several workers share the tests."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "ranks"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = folder / "verdicts.json"
        if not kept.exists():
            kept.write_text(json.dumps(run_checks(folder)))
        found: dict[str, list[str | None]] = json.loads(kept.read_text())
    return found
