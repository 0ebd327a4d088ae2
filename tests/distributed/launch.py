"""Scripts on several processes of this machine, with an end in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = ("steps", "shards", "merging", "noises", "trainers")


def torchrun(script: Path | str, *words: str, limit: float) -> subprocess.CompletedProcess[str]:
    """A script, or a module after "-m", on two processes of this machine, at a free port, for at
    most `limit` seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), *words]
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        command, env=env, timeout=limit, capture_output=True, text=True, check=False
    )


def run_checks(folder: Path, modules: Sequence[str] = MODULES) -> dict[str, list[str | None]]:
    """What each rank says of each check: "" where it holds, a traceback, None if it was not run."""
    done = torchrun(HERE / "ranks.py", str(folder), *modules, limit=150)
    (folder / "log").write_text(done.stdout + done.stderr)
    said = [json.loads(p.read_text()) if p.exists() else {} for p in
            (folder / f"{rank}.json" for rank in range(2))]  # fmt: skip
    if not all(said):
        raise RuntimeError(f"the ranks said nothing:\n{done.stdout}\n{done.stderr}")
    return {name: [s.get(name) for s in said] for name in {**said[0], **said[1]}}
