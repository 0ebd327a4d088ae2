"""Recorded trajectories of the published DPS."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The recordings beside the repository; they may not be committed into it."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "golden" / "dps"
    if not folder.is_dir():
        pytest.skip("no shared/golden beside the repository: recordings are not committed")
    return folder
