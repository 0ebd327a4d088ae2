"""A Ray cluster of two nodes on one machine, to be harmed."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HEAD, FAR = "127.0.0.2", "127.0.0.3"  # two addresses of this machine alone
BEGIN = 120.0  # seconds that a node may take to begin


class Nodes:
    """A head of one CPU and a far node of two, for those who know their token.

    home: a folder for their logs. Linux only, where all of 127/8 is this machine.
    """

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind((HEAD, 0))
            port = str(free.getsockname()[1])
        self.home, self.address, self.token = home, f"{HEAD}:{port}", secrets.token_hex(32)
        self.head = self._begin(HEAD, "--head", "--port", port, "--num-cpus", "1",
                                "--include-dashboard", "false")  # fmt: skip
        self.far = self.join()

    @property
    def env(self) -> dict[str, str]:
        """The environment of those who may send tasks."""
        return os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def join(self) -> subprocess.Popen[bytes]:
        """Begin the far node, once more where it was killed."""
        self.far = self._begin(FAR, "--address", self.address, "--num-cpus", "2", "--resources",
                               '{"far": 1}')  # fmt: skip
        return self.far

    def _begin(self, at: str, *words: str) -> subprocess.Popen[bytes]:
        log = self.home / at
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address"]
        with log.open("wb") as file:
            made = subprocess.Popen([*ray, at, "--disable-usage-stats", *words], stdout=file,
                                    stderr=file, env=self.env, start_new_session=True)  # fmt: skip
        end = time.monotonic() + BEGIN
        while b"Ray runtime started" not in log.read_bytes():
            if made.poll() is not None or time.monotonic() > end:
                self.kill(made)
                raise RuntimeError(log.read_text(errors="replace"))
            time.sleep(0.2)
        return made

    @staticmethod
    def kill(node: subprocess.Popen[bytes]) -> None:
        """A node with all its processes, as when its power fails."""
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()

    def end(self) -> None:
        """Kill both."""
        self.kill(self.far)
        self.kill(self.head)
