"""Small text files: strict YAML in, plain YAML out, and writes that are whole or absent.

Recipes and rates are read from files that strangers send each other, so the reader takes the YAML
1.2 core schema and nothing more: no tags, no aliases, no merge keys, no duplicate keys, and every
key a string. `1e-5` is a float, `no` and `2024-01-01` are text, `010` is ten.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent

from holdfast.errors import Refused, nearest

LARGEST = 4 << 20  # bytes; a recipe is a few hundred
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
PLAINLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# A packed file may unpack to so many times its size, or to so many bytes. Text packs ten to one;
# a bomb a thousand to one (faults S6).
GROWTH, SMALL = 256, 64 * 2**20
SHOWN = 60  # letters of a value that an error shows

ARCHIVES = (
    ".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz",
    ".tar.zst",
)  # fmt: skip

_FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?[0-9]+$")


class _Reader(yaml.SafeLoader):
    """SafeLoader with only the core schema's scalars; refuses tags, aliases and odd keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, AliasEvent):
            raise Refused(f"line {line}: alias *{event.anchor}", remedy="write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise Refused(f"line {line}: tag {tag!r}", remedy="plain YAML needs no tags")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise Refused(f"line {line}: key {key!r} is not text", remedy="quote it")
            if key in seen:
                raise Refused(f"line {line}: key {key!r} given twice", remedy="keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node), 10)


class _Writer(yaml.SafeDumper):
    """SafeDumper that repeats shared values instead of aliasing, so that `_Reader` accepts it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Order matters: the first pattern that fits names the type, so integers come before floats.
for _tag, _pattern in (
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$")),
    ("int", _INT),
    ("float", _FLOAT),
):
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
_Reader.add_constructor("tag:yaml.org,2002:int", _Reader.construct_decimal)
# Text such as "1e-5" must be quoted on the way out, or it would come back as a number.
_Writer.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)


def no_archive(path: str | os.PathLike[str]) -> None:
    """Refuse an archive whole: what lies in one may lead anywhere, and unpack to anything (S5)."""
    if os.fspath(path).lower().endswith(ARCHIVES) and not os.path.isdir(path):
        raise Refused("is an archive, and none is unpacked here", where=str(path),
                      remedy="unpack it into an empty folder, and name that")  # fmt: skip


class NotPlain(OSError):
    """A pipe, a device or a folder where a file should be."""


def open_plain(path: str | os.PathLike[str], *, follow: bool = True) -> BufferedReader:
    """Open an ordinary file to read: a pipe would block for ever, a device might never end."""
    flags = PLAINLY if follow else PLAINLY | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags)
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        what = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "not an ordinary file"
        raise NotPlain(errno.EINVAL, what, str(path))
    return open(handle, "rb")


def read_plain(path: Path, most: int = LARGEST) -> str:
    """The UTF-8 text of an ordinary file; OSError or ValueError when it cannot be read."""
    with open_plain(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most >> 20} MiB")
    return content.decode("utf-8")


def read_text(path: Path, *, where: str | None = None) -> str:
    """The UTF-8 text of a small file; Refused when it cannot be read."""
    where = str(path) if where is None else where
    try:
        return read_plain(path, LARGEST)
    except OSError as error:
        raise Refused(error.strerror or str(error), where=where) from None
    except UnicodeDecodeError as error:
        raise Refused(f"not UTF-8 text (byte {error.start})", where=where) from None
    except ValueError as error:
        raise Refused(str(error), where=where) from None


def only_plain(folder: Path) -> None:
    """Refuse a folder with a pipe or a device in it; where there is no folder, nothing."""
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        if each.exists() and not (each.is_file() or each.is_dir()):
            raise Refused("not an ordinary file", where=str(each), remedy="remove it")


def weight_files(folder: Path) -> list[Path]:
    """Where a model's weights are to lie in its folder: in one file, or those its index names."""
    one, index = folder / MODEL, folder / INDEX
    if one.is_file() or not index.is_file():
        return [one]
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / Path(name).name for name in sorted(set(parts))] or [one]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused("is damaged", where=str(index)) from None


def read_yaml(source: Path | str, *, where: str | None = None) -> dict[str, Any]:
    """The mapping in a YAML file (`source` is a Path) or text (`source` is a str).

    Anything but one mapping with distinct text keys is Refused, with the line where possible.
    `where` names the source in errors; by default the path.
    """
    if isinstance(source, Path):
        where = str(source) if where is None else where
        source = read_text(source, where=where)
    try:
        data = yaml.load(source, Loader=_Reader)  # noqa: S506 - a stricter SafeLoader
    except Refused as error:
        raise Refused(error.what, where=where, remedy=error.remedy) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise Refused(f"{line}{error.problem or error.context}", where=where) from None
    except yaml.YAMLError as error:
        raise Refused(f"not YAML: {str(error).splitlines()[0]}", where=where) from None
    except RecursionError:
        raise Refused("nested too deeply", where=where) from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise Refused(f"not a number Python can read: {error}", where=where) from None
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        raise Refused(f"expected a mapping of keys to values, found {kind}", where=where)
    return data


def only_keys(
    data: Mapping[str, Any],
    known: Collection[str],
    *,
    required: Collection[str] = (),
    where: str | None = None,
    called: Callable[[str], str] = str,
) -> None:
    """Refuse a key outside `known`, naming the nearest, and a missing `required` one.

    `called` turns a key into what an error calls it: `drop` into `dps.drop`.
    """
    for key in data:
        if key not in known:
            remedy = nearest(str(key), list(known))
            raise Refused(f"unknown key {called(key)!r}", where=where, remedy=remedy)
    for key in required:
        if key not in data:
            raise Refused(f"missing key {called(key)!r}", where=where, remedy=f"add `{key}: …`")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Each value in which two mappings of plain data differ, as `key.key: old → new`.

    Of long values the common beginning is left out.
    """
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{at}{key}.")
        elif old is None and isinstance(new, Mapping):
            yield f"{at}{key} is new"
        elif new is None and isinstance(old, Mapping):
            yield f"{at}{key} is gone"
        elif old != new:
            yield f"{at}{key}: {' → '.join(_short(old, new))}"


def _short(*values: Any) -> Iterator[str]:
    texts = [_told(value) for value in values]
    if max(map(len, texts)) > SHOWN:
        same = next((i for i, letters in enumerate(zip(*texts)) if len({*letters}) > 1), 0)  # noqa: B905
        texts = [f"…{text[same - 10 :]}" if same > 10 else text for text in texts]
    for text in texts:
        yield text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _told(value: Any) -> str:
    """A value as JSON; a list of (name, hash) by name."""
    named = isinstance(value, list) and all(isinstance(v, list) and len(v) == 2 for v in value)
    if named and value:
        return ", ".join(f"{name} ({str(digest)[:6]})" for name, digest in value)
    return json.dumps(value, ensure_ascii=False)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """`data` as YAML text that `read_yaml` returns unchanged, tuples as lists.

    Refused unless it is plain data: text, numbers, true, false, null, lists, mappings by text.
    """
    try:
        data = _plain(data, "")
        text = _dump(data, readable=True)
        # PyYAML writes a few control characters that no YAML reader accepts; escape those.
        with suppress(Refused):
            if read_yaml(text) == data:
                return text
        return _dump(data, readable=False)
    except RecursionError:
        raise Refused("the data contains itself or is nested too deeply") from None


def _dump(data: Mapping[str, Any], *, readable: bool) -> str:
    """One call of PyYAML; `readable` keeps letters beyond ASCII as they are."""
    text = yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=readable, width=100)
    return str(text)


def _plain(value: Any, where: str) -> Any:
    """A copy of plain data; subclasses (NumPy's float64, enums of text) become the plain type."""
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise Refused(f"key {odd[0]!r} is not text and cannot be saved", where=where or None)
        return {str(k): _plain(v, f"{where}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise Refused(f"a {type(value).__name__} cannot be saved", where=where or None)


def write_yaml(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write `data` as YAML, atomically."""
    write_text_atomic(path, dump_yaml(data))


def must_be_utf8(name: object, where: str | None = None) -> None:
    """Refuse a name that no record could hold: Python reads bytes that are no UTF-8 as halves."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise Refused("a name that is not UTF-8", where=where or str(name),
                      remedy="rename it") from None  # fmt: skip


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text` (UTF-8) so that a reader or a crash sees the old or the new file.

    Temporary file in the same folder, fsync, rename. A symbolic link at `path` is replaced, never
    followed: it may have been planted there.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise Refused("no such folder", where=str(target.parent), remedy="create it first")
    if target.is_dir():
        raise Refused("is a folder", where=str(target), remedy="give a file name")
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise Refused(error.strerror or str(error), where=str(target)) from None
        raise
    sync_folder(target.parent)


def parse_json(text: str) -> Any:
    """Parsed JSON; `Refused` for keys that stand twice and what is no finite number."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise Refused(f"key {twice[:60]!r} stands twice")
        return made

    def finite(word: str) -> float:
        if not math.isfinite(value := float(word)):
            raise Refused(f"{word[:60]} is no finite number")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)


def unpacked(packed: int) -> int:
    """How many bytes a file of `packed` bytes may unpack to."""
    return max(GROWTH * packed, SMALL)


def inflated(packed: bytes | memoryview, most: int) -> bytes | None:
    """What zlib packed; None if it is broken, above `most` bytes, or out of proportion."""
    most = min(most, unpacked(len(packed)))
    try:
        found = (unpacking := zlib.decompressobj()).decompress(packed, most)
    except zlib.error:
        return None
    return found if unpacking.eof else None


def strictly(kind: Callable[[str], Any], text: str) -> Any:
    """What `kind` (int or float) reads in plain digits; to Python 1_0 and ١٠ are ten too."""
    if not text.isascii() or "_" in text:
        raise ValueError(f"{text!r} is no plain number")
    return kind(text)


SEAL = "sha256"  # the key of a checksum within what it vouches for


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with the SHA-256 of themselves, which `check_seal` asks for when they are read.

    It tells damage, not forgery: whoever edits a file on purpose can leave its seal out.
    """
    return {**body, SEAL: _digest(body)}


def check_seal(body: Mapping[str, Any], *, where: str | None = None) -> bool:
    """Whether `body` has a checksum; Refused where it is not as it was written."""
    if SEAL in body and body[SEAL] != _digest(body):
        raise Refused("is not as it was written: its checksum differs", where=where,
                      remedy="run it again; if you changed it, take out its sha256")  # fmt: skip
    return SEAL in body


def _digest(body: Mapping[str, Any]) -> str:
    """The SHA-256 of all but the seal, however it is spaced and ordered."""
    text = json.dumps({k: v for k, v in body.items() if k != SEAL}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, if folders can be opened (not on Windows)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
