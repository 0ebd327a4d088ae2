"""A search whose database is restarted and drops connections: nothing is lost or made twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import curve, plan, take

from holdfast.search.study import Study
from holdfast.search.worker import work
from holdfast.testing.faults.servers import Server, postgresql
from holdfast.testing.faults.suite import Missing

psycopg = pytest.importorskip("psycopg", reason="the driver of PostgreSQL")
TRIALS = 24


@pytest.fixture
def server() -> Iterator[Server]:
    try:
        with postgresql() as made:
            yield made
    except Missing as needed:
        pytest.skip(str(needed))


def labour(place: str, out: str, url: str) -> None:
    """What a worker's process does: trials of a fifth of a second."""

    def slow(job: object, watch: object) -> object:
        time.sleep(0.2)
        return curve(job, watch)  # type: ignore[arg-type]

    work(Study(out, plan(Path(place), trials=TRIALS), url), slow)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_restart_and_dropped_connections_lose_no_trial(
    server: Server, place: Path, tmp_path: Path
) -> None:
    """Faults R9."""
    of = Study(tmp_path, plan(place, trials=TRIALS), server.url)
    words = [sys.executable, "-c", "import sys, test_postgres as t; t.labour(*sys.argv[1:])"]
    workers = [
        subprocess.Popen([*words, str(place), str(tmp_path), server.url], stderr=subprocess.PIPE,
                         text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        for _ in range(2)
    ]  # fmt: skip
    try:
        for share, harm in ((0.25, server.drop), (0.5, server.restart),
                            (0.75, server.drop)):  # fmt: skip
            end = time.monotonic() + 120
            while of.counts()["complete"] < share * TRIALS and time.monotonic() < end:
                time.sleep(0.1)
            harm()
        for worker in workers:
            said = worker.communicate(timeout=200)[1]
            assert worker.returncode == 0, said
    finally:
        for worker in workers:
            worker.kill()
    assert of.counts() == {"complete": TRIALS}
    assert [t.number for t in of.trials()] == list(range(TRIALS))
    assert len({tuple(t.params.values()) for t in of.trials()}) == TRIALS


@pytest.mark.slow
def test_a_deadlock_is_survived(server: Server, place: Path, tmp_path: Path) -> None:
    """Faults R9. A stranger has locked the trial's row, and asks for what the worker has begun to
    write: of the two, the server ends the worker, which waited first."""
    study = Study(tmp_path, plan(place), server.url)
    claim, errors = take(study), list[BaseException]()

    def note() -> None:
        try:
            claim._note({"steps": 7})
        except BaseException as error:
            errors.append(error)

    with psycopg.connect(host=str(server.home), user="ann", dbname="postgres") as stranger:
        of = (claim.identity,)
        stranger.execute("select 1 from trials where trial_id = %s for update", of)
        worker = threading.Thread(target=note)
        worker.start()
        waits = "select count(*) from pg_locks where not granted"
        while not stranger.execute(waits).fetchone()[0]:
            time.sleep(0.02)
        stranger.execute("insert into trial_user_attributes (trial_id, key, value_json) "
                         "values (%s, 'steps', '0')", of)  # fmt: skip
        stranger.rollback()
    worker.join(60)
    assert not errors and "deadlock detected" in (server.home / "log").read_text()
    assert study.storage.get_trial(claim.identity).user_attrs["steps"] == 7
