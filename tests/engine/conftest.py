"""What tests of the engine share."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from holdfast.errors import tell_once


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far."""
    tell_once.cache_clear()
    caplog.set_level(logging.WARNING, "holdfast")
    return lambda: [r.message for r in caplog.records if r.name == "holdfast"]
