"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, here and in the processes that tests start: sums depend on the number of
# threads in their last bits, and processes with more threads than cores stand in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell starts what runs in the background with Ctrl-C ignored, and the tests send it themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
