"""A rank that is killed ends all in bounded time and tears no checkpoint (R5, R6, P19)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launch import HERE, torchrun

from holdfast.training.manifest import damage, newest_complete

LIMIT = 60  # seconds from the death of a rank until the launcher has ended


def newest(folder: Path) -> str:
    found = newest_complete(folder / "run", tell=lambda line: None)
    assert found is not None
    return found.name


def test_a_killed_rank_ends_all_and_tears_nothing(tmp_path: Path) -> None:
    """Killed in a step, killed again in a save while recovering; then the result is that of an
    undisturbed run, bit for bit, on both ranks."""
    for how, exists in (("step", "checkpoint-2"), ("save", "checkpoint-4")):
        done = torchrun(HERE / "victim.py", str(tmp_path), how, limit=180)
        assert done.returncode != 0
        assert time.time() - (tmp_path / f"died-{how}").stat().st_mtime < LIMIT
        assert "SIGKILL" in done.stderr, done.stderr  # by our hand, not by a mistake of the script
        assert (tmp_path / "run" / exists / "holdfast.json").exists()
        assert newest(tmp_path) == "checkpoint-2"
    torn = damage(tmp_path / "run" / "checkpoint-4")
    assert torn is not None and "not written to its end" in torn
    done = torchrun(HERE / "victim.py", str(tmp_path), "finish", limit=180)
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path) == "checkpoint-6"
    assert (tmp_path / "equal-0").exists() and (tmp_path / "equal-1").exists()


@pytest.mark.slow  # the launcher waits half a minute for a process that stands still
def test_a_rank_that_hangs_holds_the_others_no_longer_than_asked_for(tmp_path: Path) -> None:
    """8 seconds; on CPUs the group had torch's 30 minutes, whatever `ddp_timeout` said (R5)."""
    done = torchrun(HERE / "victim.py", str(tmp_path), "hang", limit=180)
    assert done.returncode != 0
    stopped = (tmp_path / "died-hang").stat().st_mtime
    assert float((tmp_path / "noticed").read_text()) - stopped < 30, done.stderr
    assert newest(tmp_path) == "checkpoint-2"
