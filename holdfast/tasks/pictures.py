"""Pictures as a task: one folder a class, or one folder a split with its classes below it."""

from __future__ import annotations

import hashlib
import warnings as python_warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import Refused
from holdfast.tasks.files import label
from holdfast.tasks.labels import MAX_CLASSES
from holdfast.tasks.table import listed
from holdfast.tasks.task import Row

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
HELD = ("validation", "val", "test")  # names of a folder of evaluation pictures


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


def read(folder: Path) -> tuple[tuple[str, ...], list[Row], list[Row] | None]:
    """Classes by name, training pictures and, if there is a folder of them, evaluation pictures.

    Every file is read whole: `Refused` names the first that is no picture.
    """
    train = _training(folder)
    held = [folder / name for name in HELD if (folder / name).is_dir()] if train != folder else []
    if len(held) > 1:
        raise Refused(f"both {held[0].name} and {held[1].name} are there", where=label(folder),
                      remedy="leave one")  # fmt: skip
    names = tuple(inner.name for inner in _folders(train) if any(pictures_in(inner)))
    if not 2 <= len(names) <= MAX_CLASSES:
        raise Refused(f"pictures of {len(names)} classes", where=label(train),
                      remedy="make one folder a class")  # fmt: skip
    if not held:
        return names, _pictures(train, names), None
    unknown = [i.name for i in _folders(held[0]) if i.name not in names and any(pictures_in(i))]
    if unknown:
        raise Refused(f"classes without training pictures: {listed(unknown)}",
                      where=label(held[0]))  # fmt: skip
    return names, _pictures(train, names), _pictures(held[0], names)


def _training(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder


def _folders(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir())


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
            with Image.open(file) as opened:
                opened.load()
    except Exception as error:  # decoders raise many kinds on broken bytes
        why = type(error).__name__
        raise Refused(f"no picture that can be read ({why})", where=label(file),
                      remedy="remove it or write it again") from None  # fmt: skip
    return hashlib.sha256(content).hexdigest()
