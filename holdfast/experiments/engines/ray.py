"""Ray: a task a run, on this machine or on a cluster whose nodes share the runs' folder."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import Busy, Refused
from holdfast.experiments.engines import Job
from holdfast.experiments.processes import ATTEMPTS, EVERY, check_workers
from holdfast.training import stopping

REACH = 10.0  # seconds in which a cluster has to be reached
END = 60.0  # seconds that tasks have to finish their step and save


@dataclass(frozen=True)
class Ray:
    """address: of a cluster (without: a Ray of its own, which only this machine reaches). jobs: how
    many run at once, at most. cpus, gpus: of one run; 0.5 GPUs let two runs share one."""

    address: str | None = None
    jobs: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    drawn = True

    def __post_init__(self) -> None:
        if self.jobs is not None:
            check_workers(self.jobs, "--jobs")

    @property
    def at_once(self) -> int | None:
        return self.jobs

    @property
    def far(self) -> bool:
        return self.address is not None

    def __call__(
        self, jobs: Sequence[Job], *, where: str, look: Callable[[], None] = lambda: None,
        attempts: int = ATTEMPTS,
    ) -> Generator[tuple[int, Any], None, None]:  # fmt: skip
        try:
            import ray
        except ImportError:
            raise Refused("is not installed", where="--engine ray",
                          remedy="pip install 'holdfast[ray]'") from None  # fmt: skip
        self._begin(ray)
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=attempts - 1)(_carry)
        here = os.getcwd(), sys.argv, max(1, int(self.cpus))
        waiting, open_ = list(range(len(jobs))), dict[Any, int]()
        try:
            while waiting or open_:
                while waiting and len(open_) < (self.jobs or len(jobs)):
                    number = waiting.pop(0)
                    open_[task.remote(jobs[number].work, *here)] = number
                ended, _ = ray.wait(list(open_), timeout=EVERY)
                stopping.check()
                look()
                for each in ended:
                    error, result = self._result(ray, each, where)
                    if error is not None:
                        raise error
                    yield open_.pop(each), result
        finally:
            for each in open_:
                ray.cancel(each, force=False)
            if open_:
                ray.wait(list(open_), num_returns=len(open_), timeout=END)
            ray.shutdown()

    def _begin(self, ray: Any) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if self.address is not None:
            try:
                if at := re.fullmatch(r"([\w.-]+):(\d+)", self.address):  # Ray tries for minutes
                    socket.create_connection((at[1], int(at[2])), timeout=REACH).close()
                ray.init(address=self.address, **quiet)
            except (OSError, ValueError, RuntimeError) as why:
                raise Refused(f"no Ray answers ({str(why).partition(chr(10))[0]})",
                              where=f"--address {self.address}",
                              remedy="begin one with `ray start`; where it asks for a token, set "
                              "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN") from None  # fmt: skip
            return
        # Who may send tasks runs code: nobody from elsewhere, and here who knows the token, which a
        # Ray of one's own asks for by default.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)

    @staticmethod
    def _result(ray: Any, ended: Any, where: str) -> tuple[Exception | None, Any]:
        try:
            found: tuple[Exception | None, Any] = ray.get(ended)
        except ray.exceptions.RayError as why:
            said = repr(getattr(why, "cause", None) or type(why).__name__)
            raise Refused(f"its processes were ended too often, or could not begin ({said})",
                          where=where,
                          remedy="the same command goes on; where memory is short, with more "
                          "--cpus a run") from None  # fmt: skip
        return found


def _carry(
    work: Callable[[], Any], folder: str, words: list[str], threads: int
) -> tuple[Exception | None, Any]:
    """Do one job in a worker of Ray: an error and the result, one of them None."""
    import torch

    try:
        os.chdir(folder)  # which relative names are of
    except OSError:
        return Refused("is not on this node", where=folder, remedy="share the folder"), None
    torch.set_num_threads(threads)
    sys.argv = words  # which records name as their command
    # Ray cancels a task by what stands for Ctrl-C, and ends a node's workers by SIGTERM.
    restore = stopping.install(only=(signal.SIGTERM, signal.SIGINT), patient=True)
    try:
        return None, work()
    except stopping.Stopped:
        return None, Busy("was stopped", where=folder)
    except (Refused, OSError) as error:
        return error, None
    finally:
        restore()
