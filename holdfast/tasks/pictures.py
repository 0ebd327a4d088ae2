"""Pictures as a task: one folder a class, or one folder a split with its classes below it."""

from __future__ import annotations

import hashlib
import os
import warnings as python_warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import Refused
from holdfast.tasks.files import label
from holdfast.tasks.labels import MAX_CLASSES, look_alike
from holdfast.tasks.table import listed
from holdfast.tasks.task import Row

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")  # others may run programs: Ghostscript
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
HELD = ("validation", "val", "test")  # names of a folder of evaluation pictures
LITTER = ("thumbs.db", "desktop.ini")  # what Windows leaves in folders of pictures


@dataclass(frozen=True, slots=True)
class Picture(Row):
    """A picture; `text` is the SHA-256 of its file, so that a moved folder is the same task."""

    file: Path = Path()


def has_pictures(folder: Path) -> bool:
    """Whether the folders in `folder`, or in its `train`, hold pictures."""
    return any(True for inner in _folders(_training(folder)) for _ in pictures_in(inner))


def pictures_in(folder: Path) -> Iterator[Path]:
    """The picture files right in a folder, by name."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    yield from (f for f in found if f.suffix.lower() in ENDINGS and f.is_file())


def read(folder: Path) -> tuple[tuple[str, ...], list[Row], list[Row] | None, list[str]]:
    """Classes by name, training pictures and, if there is a folder of them, evaluation pictures.

    Last come warnings, of what is not read among others. Every picture is read whole: `Refused`
    names the first that is none.
    """
    train = _training(folder)
    held = [folder / name for name in HELD if (folder / name).is_dir()]
    if train == folder:
        if found := [home.name for home in held if any(map(_holds, _folders(home)))]:
            raise Refused(f"{listed(found)} holds classes, and no folder train is beside it",
                          where=label(folder), remedy="put the classes into train")  # fmt: skip
        held = []
    if len(held) > 1:
        raise Refused(f"both {held[0].name} and {held[1].name} are there", where=label(folder),
                      remedy="leave one")  # fmt: skip
    names = tuple(inner.name for inner in _folders(train) if _holds(inner))
    if not 2 <= len(names) <= MAX_CLASSES:
        raise Refused(f"pictures of {len(names)} classes", where=label(train),
                      remedy="make one folder a class")  # fmt: skip
    warnings = [line for home in (train, *held) for line in _unread(home)]
    if train != folder and (
        beside := [i.name for i in _folders(folder) if i not in (train, *held) and has_pictures(i)]
    ):
        warnings.append(f"{label(folder)}: not read, beside train: {listed(beside)}")
    if alike := look_alike(names, loosely=True):
        warnings.append(f"classes that look alike, each one of its own: {listed(alike)}")
    if not held:
        return names, _pictures(train, names), None, warnings
    unknown = [i.name for i in _folders(held[0]) if i.name not in names and _holds(i)]
    if unknown:
        raise Refused(f"classes without training pictures: {listed(unknown)}",
                      where=label(held[0]))  # fmt: skip
    return names, _pictures(train, names), _pictures(held[0], names), warnings


def _training(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder


def _folders(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir())


def _holds(folder: Path) -> bool:
    return any(True for _ in pictures_in(folder))


def _unread(home: Path) -> list[str]:
    """What lies in a folder of classes and is no picture of one, counted."""
    others: Counter[str] = Counter()  # by ending
    lost: Counter[str] = Counter()  # pictures that are in no class
    for inner, folders, files in os.walk(home):
        folders[:] = [name for name in folders if not name.startswith(".")]
        depth = len(Path(inner).relative_to(home).parts)
        for file in (Path(inner, name) for name in files if not name.startswith(".")):
            pictured = file.suffix.lower() in ENDINGS and file.is_file()
            if pictured and depth != 1:
                lost["below the folders of classes" if depth else "beside them"] += 1
            elif not pictured and depth and file.name.lower() not in LITTER:
                others[file.suffix.lower() or "no ending"] += 1
    said = [f"pictures {where}: {count}" for where, count in sorted(lost.items(), reverse=True)]
    if others:
        said.append(f"other files: {others.total()} ({', '.join(sorted(others)[:10])})")
    if empty := [f.name for f in _folders(home) if not _holds(f) and not f.name.startswith(".")]:
        said.append(f"folders without a picture right in them: {listed(empty)}")
    return [f"{label(home)}: not read, {line}" for line in said]


def _pictures(folder: Path, names: tuple[str, ...]) -> list[Row]:
    found: list[Row] = [
        Picture(_checked(file), None, i, file)
        for i, name in enumerate(names) for file in pictures_in(folder / name)
    ]  # fmt: skip
    if not found:
        raise Refused("no pictures", where=label(folder))
    return found


def _checked(file: Path) -> str:
    """The hash of a file that can be decoded as a picture."""
    from PIL import Image

    try:
        content = file.read_bytes()
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as opened:
                opened.load()
    except Exception as error:  # decoders raise many kinds on broken bytes
        why = type(error).__name__
        raise Refused(f"no picture that can be read ({why})", where=label(file),
                      remedy="remove it or write it again") from None  # fmt: skip
    return hashlib.sha256(content).hexdigest()
