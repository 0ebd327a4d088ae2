"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Shared machines stall; and where a change is judged, the same change gets the same verdict.
settings.register_profile("holdfast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("holdfast")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folders of real tasks beside the repository; they may not be committed into it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the repository: real data is not committed")
    return folder
