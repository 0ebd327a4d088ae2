"""A model's folder: its weights, one tensor at a time, what they hash to, the files beside them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdfast.errors import Refused
from holdfast.files import INDEX, MODEL, only_plain, weight_files
from holdfast.training.manifest import MANIFEST
from holdfast.training.tensors import NAMES, bytes_of

DTYPES = {name: dtype for dtype, name in NAMES.items()}
# Weights in other formats, and what a Trainer leaves beside: no part of the model.
OTHERS = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf"}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by width in bytes


class Weights(NamedTuple):
    """Tensors by name: dtypes and shapes (on the device meta), and a function that reads one."""

    specs: Mapping[str, Tensor]
    read: Callable[[str], Tensor]

    def only(self, names: Collection[str]) -> Weights:
        """Those of `names`."""
        return Weights({n: spec for n, spec in self.specs.items() if n in names}, self.read)


def open_model(folder: Path) -> Weights:
    """The weights in a model's folder: `model.safetensors`, or the files that its index names."""
    only_plain(folder)
    files = weight_files(folder)
    if not files[0].is_file():
        raise Refused(f"no {files[0].name}", where=str(folder),
                      remedy="name a saved model's folder; `hf download ID --local-dir DIR` "
                      "fetches one from the Hub")  # fmt: skip
    found = open_tensors(files)[0]
    if files != [folder / MODEL]:  # of an index, which `weight_files` could read
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if lost := sorted(named.keys() - found.specs.keys()):
            raise Refused(f"{lost[0]} is not in the file that {INDEX} names", where=str(folder),
                          remedy="save the model again")  # fmt: skip
    return found


def digest(weights: Weights) -> str:
    """SHA-256 of weights, in hexadecimal: over one line a tensor, in order of name, of its name,
    dtype, shape and the SHA-256 of its bytes, however they are spread over files.
    """
    lines = (f"{name} {print_of(weights, name)}\n" for name in sorted(weights.specs))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def bits(tensor: Tensor) -> Tensor:
    """A tensor's entries as integers of their width, flat; no copy."""
    return tensor.contiguous().view(-1).view(BITS[tensor.element_size()])


def print_of(weights: Weights, name: str) -> str:
    """Dtype, shape and the SHA-256 of the bytes of one tensor."""
    tensor = weights.read(name)
    sha = hashlib.sha256(bytes_of(tensor)).hexdigest()
    return f"{NAMES[tensor.dtype]} {list(tensor.shape)} {sha}"


def open_tensors(files: Sequence[Path]) -> tuple[Weights, dict[str, str]]:
    """The tensors in safetensors files, and the header's metadata of the last."""
    home: dict[str, Any] = {}
    specs: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
        except FileNotFoundError:
            raise Refused("no such file", where=str(file)) from None
        except (SafetensorError, OSError) as error:
            raise Refused(f"is no safetensors file ({error})", where=str(file)) from None
        metadata = handle.metadata() or {}
        for name in handle.keys():  # noqa: SIM118 - no mapping
            found = handle.get_slice(name)
            if (dtype := DTYPES.get(found.get_dtype())) is None:
                raise Refused(f"{name} is of {found.get_dtype()}", where=str(file),
                              remedy=f"known are {', '.join(DTYPES)}")  # fmt: skip
            if name in home:
                raise Refused(f"{name} is in another of the model's files too", where=str(file),
                              remedy="save the model again")  # fmt: skip
            home[name] = handle
            specs[name] = torch.empty(found.get_shape(), dtype=dtype, device="meta")
    return Weights(specs, lambda name: home[name].get_tensor(name)), metadata


def alike(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have one shape and dtype."""
    return one.shape == two.shape and one.dtype == two.dtype


def prefixes(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> tuple[str, str]:
    """What stands before each name in the base and in the tuned model; one of them is empty.

    A model with a head calls `bert.x` what its base model calls `x`: the prefix by which the most
    tensors find one of their shape and dtype.
    """
    found: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for longer, shorter in ((tuned, base), (base, tuned)):
        for name, spec in longer.items():
            for cut in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
                rest = name[cut:]
                if rest in shorter and alike(spec, shorter[rest]) and (cut or longer is tuned):
                    found[("", name[:cut]) if longer is tuned else (name[:cut], "")] += 1
    return max(found, key=found.__getitem__)  # the first of equals: no prefix


def belongs(path: Path) -> bool:
    """Whether a file beside the weights is part of the model; methods' state is not."""
    name = path.name
    weights = name.startswith("model") and ".safetensors" in name
    ours = name.startswith((".", "holdfast")) or name == MANIFEST
    return not (weights or ours or path.suffix in OTHERS)


def beside_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file beside the weights."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and belongs(path)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def contents_of(folders: Sequence[tuple[Path, dict[str, str]]]) -> Callable[[str], bytes | None]:
    """A function that finds files of folders by their SHA-256."""
    paths = {sha: folder / name for folder, files in folders for name, sha in files.items()}
    return lambda sha: paths[sha].read_bytes() if sha in paths else None
