"""The one store of runs: a folder per run, a lease while a process works on it, an atomic record.

A run's configuration is kept in `run.json`. The same configuration resumes where it stopped, with
tasks added at its end it goes on; a different one in the same folder is refused, naming what
differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import Busy, Refused, TrainingDiverged
from holdfast.experiments import lease
from holdfast.experiments.ranks import check_alone, first, follows
from holdfast.experiments.record import LARGEST, Record
from holdfast.experiments.settings import defaults
from holdfast.files import NotPlain, differences, must_be_utf8, read_plain, write_text_atomic
from holdfast.training.manifest import MANIFEST

CONFIG, RECORD, FINAL = "run.json", "record.json", "final"
REPORT = "report.html"
DIVERGED = "diverged"  # a file in the folder of a run that is not tried again: how it ended

_held: dict[Path, lease.Lease] = {}  # by this process


def digest(config: Mapping[str, Any]) -> str:
    """A name for a configuration: twelve hex digits of the SHA-256 of its sorted JSON."""
    named = {k: v for k, v in _training(config).items() if k != WEIGHTS}  # the path stands for them
    text = json.dumps(named, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def open_run(
    folder: str | Path, config: Mapping[str, Any], *, together: bool = False
) -> Iterator[Path]:
    """Hold a run's folder for as long as the block lasts.

    together: processes that `torchrun` started share the run, and the first holds the folder;
    otherwise they are refused. Raises `Busy` where another live process holds it; `Refused` where
    it belongs to another configuration, where a link lies in it, or where it cannot be written.
    """
    must_be_utf8(folder)
    if not together:
        check_alone()
    folder, held = Path(folder), list[lease.Lease]()

    def take() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_links(folder)
            held.append(lease.take_patiently(folder))
        except OSError as error:
            raise Refused(f"cannot be written: {error.strerror}", where=str(folder),
                          remedy="choose another --out") from None  # fmt: skip
        _held[folder] = held[0]
        _check_config(folder, json.loads(json.dumps(config)))

    try:
        first(take)
        yield folder
    finally:
        _held.pop(folder, None)
        for each in held:
            each.release()


def setting_of(folder: str | Path, name: str, otherwise: Any = None) -> Any:
    """A setting of the run that a folder holds; `otherwise` where there is no such run."""
    try:
        return config_in(Path(folder))["settings"][name]
    except (Refused, KeyError):
        return otherwise


def config_in(folder: Path) -> dict[str, Any]:
    """What a run's `run.json` says; `Refused` where it is missing or damaged."""
    try:
        body = json.loads(read_plain(folder / CONFIG))
        if all(isinstance(body.get(key, {}), dict) for key in ("settings", "recipe")):
            return dict(body)
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise Refused(f"its {CONFIG} is missing or damaged", where=str(folder),
                  remedy="choose another --out")  # fmt: skip


def _refuse_links(folder: Path) -> None:
    """Refuse links inside the folder, which could redirect our writes; it may be one itself."""
    for inner, folders, files in os.walk(folder):
        for path in (Path(inner, name) for name in (*folders, *files)):
            if path.is_symlink():
                raise Refused("is a symbolic link, and runs write through none", where=str(path),
                              remedy="remove it, or choose another --out")  # fmt: skip


WEIGHTS = "model files"  # the key of their hash in a configuration


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    path, now, begun = folder / CONFIG, _training(config), _begun(folder)
    try:
        before = _training(config_in(folder))
    except Refused:
        if begun:
            raise
        before = None
    if not begun:
        _refuse_strangers(folder, ours=before is not None)
    if before is not None and WEIGHTS not in before:  # of before they were noted
        now.pop(WEIGHTS, None)
    if before == now:
        return
    if begun and before is not None and _goes_on(folder, before, now):
        write_text_atomic(path, json.dumps(config, indent=1))
        return
    if begun and before is not None:
        raise other_settings(folder, before, now)
    # Nothing is lost: a setting that kept the run from its first checkpoint may be corrected.
    (folder / RECORD).unlink(missing_ok=True)
    write_text_atomic(path, json.dumps(config, indent=1))


def _refuse_strangers(folder: Path, *, ours: bool) -> None:
    """Refuse to begin where a run would delete or replace what none wrote. ours: it has a run.json.

    A run writes its run.json first of all, and a file is whole from the start.
    """
    tasks, final = folder / "tasks", folder / FINAL
    found = [] if ours else [folder / name for name in (CONFIG, REPORT) if (folder / name).exists()]
    inside = sorted(tasks.iterdir()) if tasks.is_dir() else [tasks] if tasks.exists() else []
    found += [e for e in inside if not (ours and e.is_dir() and re.match(r"\d+-", e.name))]
    if final.exists() and not (ours and (final / MANIFEST).is_file()):
        found.append(final)
    if found:
        raise Refused(f"holds files that no run wrote ({found[0].relative_to(folder)})",
                      where=str(folder), remedy="choose another --out")  # fmt: skip


def other_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> Refused:
    """The refusal of a folder whose work was begun as `before`, naming what differs."""
    told = ", ".join(differences(_whole(before), _whole(now)))
    return Refused(f"holds a run with other settings ({told})", where=str(folder),
                   remedy="choose another --out")  # fmt: skip


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the settings that `_training` left out: they have their defaults."""
    if not isinstance(settings := config.get("settings"), Mapping):
        return dict(config)
    return {**config, "settings": {**defaults(), **settings}}


def _goes_on(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether only tasks differ, and none of them that is learned, or begun."""
    old, new = before.get("tasks"), now.get("tasks")
    if not isinstance(old, list) or not isinstance(new, list):
        return False
    try:
        learned = len(Record.load(folder).seconds)
    except Refused:
        return False
    if any((folder / "tasks").glob(f"{learned + 1}-*.training/*/{MANIFEST}")):
        learned += 1
    same = old[:learned] == new[:learned] and len(new) >= learned
    return same and {**before, "tasks": None} == {**now, "tasks": None}


def _begun(folder: Path) -> bool:
    """Whether a task was finished here, or a checkpoint written to its end."""
    with contextlib.suppress(FileNotFoundError):
        try:
            record = json.loads(read_plain(folder / RECORD, LARGEST))
        except (NotPlain, ValueError, RecursionError):
            return True
        if not isinstance(record, dict) or record.get("seconds") != []:
            return True
    return any((folder / "tasks").rglob(MANIFEST))


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that affect training: not a recipe's name, nor whether tasks also run alone."""
    kept = dict(config)
    if isinstance(recipe := config.get("recipe"), Mapping):
        kept["recipe"] = {k: v for k, v in recipe.items() if k != "name"}
    if isinstance(settings := config.get("settings"), Mapping):
        # Only what is not the default: a setting that came later than a run changes nothing.
        usual = defaults()
        kept["settings"] = {
            k: v for k, v in settings.items() if k != "alone" and (k not in usual or v != usual[k])
        }
    return kept


def disagreement(config: Mapping[str, Any], record: Record) -> str | None:
    """What a run.json says otherwise than the record beside it, which has a checksum."""
    alike = record.settings.keys() & dict(config.get("settings", {})).keys() - {"alone"}

    def of(seed: Any, recipe: Any, settings: Any) -> dict[str, Any]:
        recipe = {k: v for k, v in recipe.items() if k != "name"}
        return {"seed": seed, "recipe": recipe, "settings": {k: settings[k] for k in alike}}

    before = of(record.seed, record.recipe, record.settings)
    now = of(config.get("seed"), config.get("recipe", {}), config.get("settings", {}))
    told = ", ".join(differences(before, now)) if record.recipe else ""
    return f"is not as its {RECORD} has it ({told})" if told else None


def runs_below(folder: Path) -> Iterator[tuple[Path, Record | None, str]]:
    """Every run at any depth, with its record and status.

    That is done, at work, stopped, diverged, or what is damaged.
    """
    if not folder.is_dir():
        raise Refused("no such folder", where=str(folder), remedy="name one that holds runs")
    for home, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in ("tasks", FINAL, "alone"))
        if CONFIG not in names and RECORD not in names:
            continue
        path, record = Path(home), None
        try:
            record = Record.load(path) if RECORD in names else None
            done = record is not None and record.status == "done"
        except Refused as refusal:
            yield path, None, refusal.what
            continue
        try:
            tasks = config_in(path)["tasks"]
            done = done and record is not None and len(tasks) == len(record.seconds)
            yield path, record, "done" if done else _status(path)
        except (Refused, KeyError, TypeError):
            yield path, record, "run.json is missing or damaged"


def _status(folder: Path) -> str:
    """How a run that is not done stands, asked without writing into its folder.

    Of another host's by the time of its last sign of life, for which clocks must agree.
    """
    if how_diverged(folder) is not None:
        return "diverged"
    try:
        number = lease.newest(folder)
        if not number or lease.holder(folder, number) is None:
            return "stopped"
        silent = time.time() - (folder / f"{lease.LEASE}.{number}").stat().st_mtime
    except OSError:
        return "stopped"
    return "at work" if silent < lease.STALE else "stopped"


def check_held(folder: Path) -> None:
    """Refuse to write into a run's folder that is ours no longer: `Busy` if it was taken over.

    A process that was paused may have been taken for dead; or the folder was deleted.
    """
    if follows():
        return
    if folder in _held and _held[folder].held():
        return
    if number := lease.newest(folder):
        owner = lease.holder(folder, number) or "another process"
        raise Busy(f"was taken over by {owner}: this process was not heard from",
                   where=str(folder), remedy="it goes on there")  # fmt: skip
    raise Refused("was deleted while it was worked on", where=str(folder),
                  remedy="remove what is left of it and start again")  # fmt: skip


def ended(folder: Path) -> bool:
    """Whether a run is over, by whichever process: its record says so, or it diverged."""
    try:
        return how_diverged(folder) is not None or Record.load(folder / RECORD).status == "done"
    except Refused:  # none yet, or a damaged one, which the run itself reports
        return False


def how_diverged(folder: Path) -> str | None:
    """What `note_diverged` wrote; None where it did not."""
    path = folder / DIVERGED
    return path.read_text(encoding="utf-8") if path.is_file() else None


def note_diverged(folder: Path, why: TrainingDiverged) -> None:
    """So that no process, now or later, tries it again; its weights are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / DIVERGED, str(why))
    drop_weights(folder)


def drop_weights(folder: Path) -> None:
    """Delete what a run learned; its record stays."""
    for name in ("tasks", FINAL):
        shutil.rmtree(folder / name, ignore_errors=True)


def check_disk(folder: Path, needed: int) -> None:
    """Refuse a run whose files will not fit; `needed` in bytes."""
    at = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(at).free
    if free < needed:
        raise Refused(
            f"{free / 1e9:.1f} GB free, the run needs about {needed / 1e9:.1f} GB",
            where=str(folder),
            remedy="free some space or choose another --out",
        )
