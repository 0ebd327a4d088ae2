"""A model and tiny tasks as files, as the tests of experiments have them."""

from __future__ import annotations

from pathlib import Path

import models
import pytest


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model (`bert`, two layers of sixteen) and tasks as files."""
    folder = tmp_path_factory.mktemp("place")
    models.save_bert(folder / "bert")
    for topic in models.TOPICS:
        models.write_task(folder, topic, count=60)
    return folder
