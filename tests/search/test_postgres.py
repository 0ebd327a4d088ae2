"""A search whose database is restarted and drops connections: nothing is lost or made twice."""

from __future__ import annotations

import os
import shutil
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

psycopg = pytest.importorskip("psycopg", reason="the driver of PostgreSQL")
FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
if not FOUND:
    pytest.skip("no PostgreSQL server is installed", allow_module_level=True)
TRIALS = 24


class Server:
    """A server of its own on a socket in a folder; as the user postgres where we are root."""

    def __init__(self, home: Path) -> None:
        self.home, self.data = home, home / "data"
        self.user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self.user:
            shutil.chown(home, "postgres")
        self._run("initdb", "-D", str(self.data), "-U", "ann", "-A", "trust", "-N")
        self.url = f"postgresql+psycopg://ann@/postgres?host={home}"

    def _run(self, tool: str, *words: str) -> None:
        subprocess.run([*self.user, str(FOUND[-1].with_name(tool)), *words], check=True,
                       timeout=60, stdout=subprocess.DEVNULL, cwd="/")  # fmt: skip

    def do(self, what: str) -> None:
        listening = f"-k {self.home} -c listen_addresses= -c fsync=off"
        more = [] if what == "start" else ["-m", "immediate"]  # as a crash
        self._run("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.home / "log"), what,
                  "-o", listening, *more)  # fmt: skip

    def drop(self) -> None:
        """End all connections."""
        self._run("psql", "-h", str(self.home), "-U", "ann", "postgres", "-qc",
                  "select pg_terminate_backend(pid) from pg_stat_activity "
                  "where pid <> pg_backend_pid() and backend_type = 'client backend'")  # fmt: skip


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = Path(subprocess.check_output(["mktemp", "-d", "/tmp/pg.XXXX"], text=True).strip())
    made = Server(home)
    try:
        made.do("start")
        yield made
    finally:
        made.do("stop")
        shutil.rmtree(home, ignore_errors=True)


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
        for share, harm in ((0.25, server.drop), (0.5, lambda: server.do("restart")),
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
