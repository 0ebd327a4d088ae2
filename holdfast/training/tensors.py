"""Writing safetensors without copies: hashed while writing, and whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import Refused
from holdfast.files import sync_folder

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    read: Callable[[str], Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
) -> tuple[int, str]:
    """Write a safetensors file and return its size in bytes and its SHA-256 in hexadecimal.

    The library's own writer refuses tensors that share memory and copies all others; this one
    copies one tensor at a time, and no contiguous tensor on the CPU. Temporary file and rename: a
    hard link to an older file of this name keeps its content. Durable only if asked for: a
    checkpoint's files are so by `manifest.commit`.

    read: gives each tensor by its name when it is written; of `tensors`, which may be on the device
        meta, only dtypes and shapes are used then. metadata: for the file's header.
    """
    read = read or tensors.__getitem__
    # As the library does: the widest dtypes first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in NAMES:
            raise Refused(f"a tensor of {tensor.dtype} cannot be saved", where=key)
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), NAMES[tensor.dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 8 + len(text) + end
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb", buffering=0) as file:
            head = len(text).to_bytes(8, "little") + text
            for piece in chain([memoryview(head)], (bytes_of(read(key)) for key in order)):
                digest.update(piece)
                while len(piece):  # one call writes 2 GiB at most
                    piece = piece[file.write(piece) :]
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync_folder(path.parent)
    return size, digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's content as the format has it: row by row, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":  # the format is little-endian
        width = tensor.element_size()
        flat = flat.reshape(-1, width).flip(1).reshape(-1)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
