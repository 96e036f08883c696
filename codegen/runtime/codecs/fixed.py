"""Fixed-rate bodies: the project's number formats, and a list of what they cannot hold.

::

    u32 exact, exact x (u32 position, f32), codes and scales

fp16 and bf16 are plain; fp8 is E4M3 with one fp32 scale a row; int8 FBGEMM's fused 8-bit rows; mx4 FBGEMM's
MX4 (E2M1 in blocks of 32): codes of all rows, then a scale byte for each block. The list holds elements that
are not finite, and those that would not stay finite.
"""

from __future__ import annotations

import struct
import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from codegen.runtime.codecs.portable import Corrupt
from codegen.runtime.mx_packing import Packed, pack, unpack
from codegen.runtime.mx_tensor import dequantize, quantize
from ir.formats import parse_format

_PLAIN = {"fp16": torch.float16, "bf16": torch.bfloat16}
_DELICATE = 1e37  # rows with magnitudes beyond may overflow their scale or range

Floats = npt.NDArray[np.float32]


def encode(x: Floats, format: str) -> bytes:
    """The body of ``x`` (rows, dim), at least one element."""
    values = torch.from_numpy(x)
    at: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    data, lost = _coded(values, format)
    while lost is not None:  # at most thrice: not finite, overflows the element, overflows the scale
        at = np.union1d(at, np.flatnonzero(lost.numpy()))
        values = values.masked_fill(lost, 0.0)
        data, lost = _coded(values, format)
    listed = np.empty(len(at), [("at", "<u4"), ("value", "<f4")])
    listed["at"], listed["value"] = at, x.reshape(-1)[at]
    return struct.pack("<I", len(at)) + listed.tobytes() + data


def _coded(values: Tensor, format: str) -> tuple[bytes, Tensor | None]:
    """Codes and scales, and where the result is not finite (None: nowhere)."""
    if format in _PLAIN:
        cast = values.to(_PLAIN[format])
        return cast.view(torch.uint8).numpy().tobytes(), _not_finite(cast)
    largest = float(values.abs().max())
    if not largest < float("inf"):
        return b"", ~torch.isfinite(values)
    packed = pack(quantize(values, format))
    # a row whose scale overflows is lost whole
    lost = _not_finite(packed.dequantize()) if largest > _DELICATE else None
    data = packed.data.contiguous().numpy().tobytes()
    if packed.scales is not None:
        data += packed.scales.contiguous().view(torch.uint8).numpy().tobytes()
    return data, lost


def _not_finite(values: Tensor) -> Tensor | None:
    finite = torch.isfinite(values)
    return None if bool(finite.all()) else ~finite


def decode(body: npt.NDArray[np.uint8], rows: int, dim: int, format: str) -> Floats:
    """The inverse of :func:`encode`; raises Corrupt."""
    if len(body) < 4:
        raise Corrupt
    (exact,) = struct.unpack("<I", body[:4].tobytes())
    start = 4 + 8 * exact
    if exact > rows * dim or start > len(body):
        raise Corrupt
    listed = np.frombuffer(body[4:start].tobytes(), [("at", "<u4"), ("value", "<f4")])
    if (listed["at"] >= rows * dim).any():
        raise Corrupt
    x = np.ascontiguousarray(_decoded(body[start:], rows, dim, format).numpy())
    x.reshape(-1)[listed["at"]] = listed["value"]
    return x


def _decoded(data: npt.NDArray[np.uint8], rows: int, dim: int, format: str) -> Tensor:
    with warnings.catch_warnings():  # torch warns of arrays that it must not write; nothing here writes
        warnings.simplefilter("ignore")
        held = torch.from_numpy(data)
    if format in _PLAIN:
        _expect(data, rows * dim * 2)
        return held.clone().view(_PLAIN[format]).reshape(rows, dim).float()
    identity = parse_format(format), torch.Size((rows, dim)), 1, torch.float32
    if format == "int8_fused":
        _expect(data, rows * (dim + 8))
        return dequantize(unpack(Packed(*identity, held.reshape(rows, -1))))
    if format == "fp8_row":
        _expect(data, rows * (dim + 4))
        scales = held[rows * dim :].clone().view(torch.float32).reshape(rows, 1)
        return dequantize(unpack(Packed(*identity, held[: rows * dim].reshape(rows, dim), scales)))
    blocks = -(-dim // 32)
    _expect(data, rows * blocks * 17)
    codes, scales = held[: rows * blocks * 16], held[rows * blocks * 16 :]
    return dequantize(
        unpack(Packed(*identity, codes.reshape(rows, blocks, 16), scales.reshape(rows, blocks)))
    )


def _expect(data: npt.NDArray[np.uint8], size: int) -> None:
    if len(data) != size:
        raise Corrupt
