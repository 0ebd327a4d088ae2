"""Recipes beside each other on the same tasks and seeds: each run is a sequence of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from holdfast.errors import Refused
from holdfast.experiments.record import Record
from holdfast.experiments.sequence import run_sequence
from holdfast.experiments.settings import Settings
from holdfast.recipe import Recipe
from holdfast.tasks.task import slug
from holdfast.training import stopping


def compare(
    model: str,
    tasks: Sequence[str | Path],
    recipes: Mapping[str, tuple[Recipe, Mapping[str, Any]]],
    *,
    seeds: Sequence[int],
    out: str | Path,
    workers: int = 1,
    progress: bool = True,
    **settings: Any,
) -> list[Record]:
    """Every recipe with every seed; finished runs are only read, killed ones go on.

    recipes: a label → the recipe and the settings in which it differs (`{"lr": 5e-5}`). Runs land
    in `out/<label>/seed-<n>`. workers > 1 runs that many processes
    of one thread each. Returns the records by label, then by seed.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise Refused(f"seeds must differ, and be some: {list(seeds)}", where="--seeds")
    folders = {label: Path(out) / slug(label) for label in recipes}
    if len(set(folders.values())) != len(folders):
        raise Refused(f"labels that name one folder: {sorted(recipes)}", where="--recipes")
    jobs = [
        {
            "model": model,
            "tasks": list(tasks),
            "recipe": recipe,
            "seed": seed,
            "out": folders[label] / f"seed-{seed}",
            "label": f"{label} · seed {seed}",
            "progress": progress,
            **settings,
            **own,
        }
        for label, (recipe, own) in recipes.items()
        for seed in seeds
    ]
    for _, own in recipes.values():  # before the first run is trained, not before the last
        Settings.from_dict({**settings, **own})
    if workers == 1:
        return [run_sequence(**job) for job in jobs]
    return _in_processes(jobs, workers, progress)


def _in_processes(jobs: Sequence[dict[str, Any]], workers: int, progress: bool) -> list[Record]:
    from tqdm.auto import tqdm

    before = {*active_children()}
    context = get_context("spawn")
    started = (context.RLock(), context.Value("i", 0))
    tqdm.set_lock(started[0])
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_alone, initargs=started
    ) as pool:
        try:
            # Processes start as jobs are handed in, and take over what is blocked: Ctrl-C, which
            # reaches all of a terminal's processes, is for this one to answer.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = {pool.submit(_job, **job): i for i, job in enumerate(jobs)}
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            records: dict[int, Record] = {}
            bar = tqdm(as_completed(futures), total=len(jobs), unit="run", disable=not progress)
            for future in bar:
                records[futures[future]] = future.result()
                bar.set_postfix_str(jobs[futures[future]]["label"])
        except BaseException:
            # One run was refused, or a signal: the others end too, each after the step it is at
            # and with a checkpoint, and go on when asked again.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in {*active_children()} - before:
                process.terminate()
            raise
    return [records[i] for i in range(len(jobs))]


def _job(**job: Any) -> Record:
    stopping.check()  # a job that was handed out before the signal came
    return run_sequence(**job)


def _alone(lock: Any, number: Any) -> None:
    """One thread for each process (two with two threads each would crawl), and a line for its bar.

    SIGTERM, by which the first process ends them, may reach them from elsewhere as well.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping.install(only=(signal.SIGTERM,), patient=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch
    from tqdm.auto import tqdm

    from holdfast.experiments import callbacks

    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    with number.get_lock():
        number.value += 1
        callbacks.BAR_LINE = number.value


def end_with_parent() -> None:
    """A killed first process must not leave others training into its folders."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
