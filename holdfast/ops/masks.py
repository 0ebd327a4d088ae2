"""Masks of weights: kept in bits or as NaN, and applied without a branch per entry.

On the CPU `masked_fill_` and `where` take a branch for every entry, which an irregular mask makes
unpredictable. `threshold_backward(x, h, t)`, 0 where h ≤ t and else x bit for bit, is one pass
without a branch: no NaN is ≤ ∞, so it picks what a mask marks. Accelerators use the plain
operations.

A mask says which entries move. It is either a tensor of bits (`pack`), or stored in the held
values themselves, as NaN where an entry moves (`mark_`); then `bits` is None below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from holdfast.ops.blocks import blocks, bunched, bunches, copy_, joined, workspace

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(mask: Tensor) -> Tensor:
    """A bool mask (…, n) as bits, uint8 (…, ⌈n/8⌉): bit k of byte j is entry 8j + k.

    Each row is packed separately, so that a slice of rows is a slice of the bits. A mask of fewer
    than two dimensions is kept as bytes of its own shape.
    """
    if mask.ndim < 2:
        return mask.to(torch.uint8)
    missing = -mask.shape[-1] % 8
    whole = torch.nn.functional.pad(mask, (0, missing)) if missing else mask.contiguous()
    eights = whole.view(torch.uint8).unflatten(-1, (-1, 8))
    bits = eights[..., 0].clone()
    for k in range(1, 8):
        bits |= eights[..., k] << k
    return bits


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`: bool, of `shape`."""
    if len(shape) < 2:
        return bits.bool()
    # A table maps each byte of bits to eight bytes of the mask, as one int64.
    place = workspace(0, bits.shape, torch.int32, bits.device).copy_(bits).flatten()
    eights = _table(bits.device).index_select(0, place)
    whole = eights.view(torch.bool).view(*shape[:-1], 8 * bits.shape[-1])
    return whole[..., : shape[-1]]


@functools.lru_cache
def _table(device: torch.device) -> Tensor:
    """For each byte value its eight bits as bytes 0 or 1, in one int64."""
    rows = [[byte >> k & 1 for k in range(8)] for byte in range(256)]
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int64).flatten().to(device)


def mark_(held: Tensor, moves: Tensor) -> None:
    """Write NaN into `held` where `moves` (bool, of its shape) is True."""
    for h, m in blocks(held, moves):
        if h.device.type == "cpu":
            stays = workspace(0, h.shape, h.dtype, h.device).copy_(m.view(torch.uint8))
            torch.sub(1, stays, out=stays)
            h.mul_(stays.div_(stays))  # 0/0 is NaN, and a product with 1 is exact
        else:
            h.masked_fill_(m, math.nan)


Tensors = Mapping[str, Tensor]
Bits = Mapping[str, Tensor] | None


def zero_(grads: Tensors, held: Tensors, bits: Bits = None) -> None:
    """Multiply finite gradients, by name, by their masks: 0 where an entry is held."""
    names = [n for n in held if n in grads]
    if names and bits is None and bunched(grads[names[0]]):
        for gs, hs in bunches([grads[n] for n in names], [held[n] for n in names]):
            if len(gs) == 1:
                _zero_(gs[0], hs[0], None)
                continue
            stay = joined(hs)
            copy_(gs, joined(gs).mul_(stay != stay))
        return
    for name in names:
        _zero_(grads[name], held[name], None if bits is None else bits[name])


def hold_(weights: Tensors, held: Tensors, bits: Bits = None) -> None:
    """weight ← held, by name and bit for bit, where the mask says that an entry is held."""
    if held and bits is None and bunched(next(iter(held.values()))):
        for ws, hs in bunches([weights[n].detach() for n in held], list(held.values())):
            if len(ws) == 1:
                _hold_(ws[0], hs[0], None)
                continue
            now, stay = joined(ws), joined(hs)
            copy_(ws, torch.where(stay == stay, stay.to(now.dtype), now))
        return
    for name, values in held.items():
        _hold_(weights[name].detach(), values, None if bits is None else bits[name])


def _zero_(grad: Tensor, held: Tensor, bits: Tensor | None) -> None:
    for g, h, b in blocks(grad, held, held if bits is None else bits):
        if bits is None and g.device.type == "cpu" and g.dtype == h.dtype:
            _pick(g, h, math.inf, out=g)
            continue
        moves = h != h if bits is None else unpack(b, h.shape)
        if g.device.type == "cpu":
            moves = workspace(1, g.shape, g.dtype, g.device).copy_(moves.view(torch.uint8))
        g.mul_(moves)


def _hold_(weight: Tensor, held: Tensor, bits: Tensor | None) -> None:
    for w, h, b in blocks(weight, held, held if bits is None else bits):
        if w.device.type != "cpu" or w.dtype != h.dtype:
            stays = h == h if bits is None else ~unpack(b, h.shape)
            torch.where(stays, h.to(w.dtype), w, out=w)
            continue
        kind, room = _INTEGERS[w.element_size()], workspace(1, w.shape, w.dtype, w.device)
        if bits is None:
            # On the bit patterns:  w ← (w where it moves, else 0) | (held where it is, else 0)
            _pick(w, h, math.inf, out=w)
            torch.nan_to_num(h, 0.0, math.inf, -math.inf, out=room)
            w.view(kind).bitwise_or_(room.view(kind))
        else:  # w ← held ^ (w ^ held where it moves, else 0)
            room.copy_(unpack(b, h.shape).view(torch.uint8))
            w.view(kind).bitwise_xor_(h.view(kind))
            _pick(w, room, 0.5, out=w)
            w.view(kind).bitwise_xor_(h.view(kind))


def _pick(x: Tensor, by: Tensor, above: float, *, out: Tensor) -> None:
    """out ← 0 where by ≤ above, else x with its bits; all of one type."""
    torch.ops.aten.threshold_backward.grad_input(x, by, above, grad_input=out)
