"""A model, three tasks as files, and an undisturbed run over them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import models
import pytest
from sequences import run


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model (`bert`) and three tasks as files."""
    folder = tmp_path_factory.mktemp("place")
    models.save_bert(folder / "bert")
    for topic in models.TOPICS:
        models.write_task(folder, topic)
    return folder


@pytest.fixture(scope="package")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    run(place, out, seed=5)
    return out


@pytest.fixture(scope="package")
def fork() -> Any:
    """Processes that start with torch imported, each a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_recovery", "test_stopping", "holdfast.experiments.learner"]
    )
    return context
