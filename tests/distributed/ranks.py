"""Runs checks on several ranks: `torchrun ranks.py FOLDER MODULE...` writes FOLDER/<rank>.json.

A check is a generator `check_*`. Up to its `yield` there is no process group: that is where it
learns what one process does. After it, all ranks of the group run the rest together. The first
check that fails on a rank ends the group, for its collectives no longer match.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from torch import distributed as dist

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(folder: str, *modules: str) -> int:
    rank = int(os.environ["RANK"])
    checks = {
        f"{module}.{name}": check
        for module in modules
        for name, check in vars(importlib.import_module(module)).items()
        if name.startswith("check_")
    }
    found: dict[str, str] = {}
    running: dict[str, Iterator[None]] = {}
    told = {k: os.environ.pop(k) for k in TOLD}
    for name, check in checks.items():
        running[name] = check()
        try:
            next(running[name])
        except BaseException:  # pytest.fail is no Exception
            found[name] = traceback.format_exc()
    os.environ |= told
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    for name, check in running.items():
        began = time.monotonic()
        if name not in found:
            try:
                for _ in check:
                    pass
                found[name] = ""
            except BaseException:  # pytest.fail is no Exception
                found[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        if found[name]:
            return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
