"""A PostgreSQL server of one's own, on a socket in a folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.testing.faults.suite import Missing


class Server:
    """Run as the user postgres where we are root, which it refuses to be."""

    def __init__(self, tools: Path, home: Path) -> None:
        self.tools, self.home, self.data = tools, home, home / "data"
        self.user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self.user:
            shutil.chown(home, "postgres")
        self._run("initdb", "-D", str(self.data), "-U", "ann", "-A", "trust", "-N")
        self.url = f"postgresql+psycopg://ann@/postgres?host={home}"

    def _run(self, tool: str, *words: str) -> None:
        subprocess.run([*self.user, str(self.tools / tool), *words], check=True, timeout=60,
                       stdout=subprocess.DEVNULL, cwd="/")  # fmt: skip

    def _control(self, what: str, *more: str) -> None:
        listening = f"-k {self.home} -c listen_addresses= -c fsync=off"
        self._run("pg_ctl", "-D", str(self.data), "-w", "-l", str(self.home / "log"), what,
                  "-o", listening, *more)  # fmt: skip

    def start(self) -> None:
        self._control("start")

    def stop(self) -> None:
        self._control("stop", "-m", "immediate")

    def restart(self) -> None:
        """As after a crash."""
        self._control("restart", "-m", "immediate")

    def drop(self) -> None:
        """End all connections."""
        self._run("psql", "-h", str(self.home), "-U", "ann", "postgres", "-qc",
                  "select pg_terminate_backend(pid) from pg_stat_activity "
                  "where pid <> pg_backend_pid() and backend_type = 'client backend'")  # fmt: skip


@contextmanager
def postgresql() -> Iterator[Server]:
    """A server that runs as long as the block; `Missing` where none is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        raise Missing("needs a PostgreSQL server in /usr/lib/postgresql")
    if importlib.util.find_spec("psycopg") is None:
        raise Missing("needs psycopg, the driver of PostgreSQL")
    # A socket's path is short: not below the folder of a try.
    with tempfile.TemporaryDirectory(prefix="pg.", dir="/tmp", ignore_cleanup_errors=True) as home:
        server = Server(found[-1].parent, Path(home))
        server.start()
        try:
            yield server
        finally:
            server.stop()
