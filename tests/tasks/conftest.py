"""No test asks the network anything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.tasks import hub


@pytest.fixture(autouse=True)
def answering() -> Iterator[pytest.MonkeyPatch]:
    """The Hub answers, as far as the check before each download can tell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "answers", lambda _: True)
        yield patch
