"""Fixed-rate bodies: the project's number formats, and a list of what they cannot hold.

::

    u32 exact, exact x (u32 position, f32), codes and scales

fp16 and bf16 are plain; fp8 is E4M3 with one fp32 scale a row; int8 FBGEMM's fused 8-bit rows; mx4 FBGEMM's
MX4 (E2M1 in blocks of 32 elements, across rows): all codes, then a scale byte for each block. The list holds elements that
are not finite, and those that would not stay finite.
"""

from __future__ import annotations

import struct
import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from codegen.runtime.codecs import compiled
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
    library = compiled.library() if format == "int8_fused" else None
    rows = compiled.int8_encode(library, values.numpy()) if library is not None else None
    if rows is not None:
        return rows, None
    largest = float(values.abs().max())
    if not largest < float("inf"):
        return b"", ~torch.isfinite(values)
    packed = pack(quantize(values.reshape(_layout(len(values), values.shape[1], format)), format))
    # a row whose scale overflows is lost whole
    lost = _not_finite(packed.dequantize().reshape(values.shape)) if largest > _DELICATE else None
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
        library = compiled.library()
        if library is not None:
            return torch.from_numpy(compiled.int8_decode(library, np.ascontiguousarray(data), rows, dim))
        return dequantize(unpack(Packed(*identity, held.reshape(rows, -1))))
    if format == "fp8_row":
        _expect(data, rows * (dim + 4))
        scales = held[rows * dim :].clone().view(torch.float32).reshape(rows, 1)
        return dequantize(unpack(Packed(*identity, held[: rows * dim].reshape(rows, dim), scales)))
    blocks = -(-rows * dim // 32)
    _expect(data, blocks * 17)
    codes, scales = held[: blocks * 16].reshape(1, blocks, 16), held[blocks * 16 :].reshape(1, blocks)
    flat = parse_format(format), torch.Size((1, rows * dim)), 1, torch.float32
    return dequantize(unpack(Packed(*flat, codes, scales))).reshape(rows, dim)


def _layout(rows: int, dim: int, format: str) -> tuple[int, int]:
    """Blocks of mx4 run on from row to row, as in FBGEMM's messages; other scales are of rows."""
    return (rows, dim) if format in ("fp8_row", "int8_fused") else (1, rows * dim)


def _expect(data: npt.NDArray[np.uint8], size: int) -> None:
    if len(data) != size:
        raise Corrupt
