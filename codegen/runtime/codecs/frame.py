"""One message: a header with a checksum, and the body that a codec makes of a matrix.

::

    "SWC1", u8 codec, u8 0, u16 0, u32 rows, u32 dim, f64 bound, u32 bytes of the body, u32 CRC-32

all little endian; the CRC is over the header before it and the body. A message that no codec makes smaller
is carried as it is (codec "none"). The reader says how many rows and columns it expects, so that nothing in a
header decides how much memory is taken.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from codegen.runtime.codecs import compiled, fixed, portable
from codegen.runtime.codecs.portable import LOSSLESS, LZ, RANS, Corrupt
from ir.compression import CODECS, Codec, codec_of
from ir.errors import InputError

HEADER = struct.Struct("<4sBBHIIdII")
MAGIC = b"SWC1"
MIN_BOUND, MAX_BOUND = (
    2.0**-160,
    2.0**126,
)  # beyond, twice the bound or its reciprocal says nothing about float32
MAX_ELEMENTS = 2**31 - 1  # positions are 32 bits

_NAMES = {codec.number: name for name, codec in CODECS.items()}

Payload = npt.NDArray[np.uint8]


def absolute_bound(x: Tensor, relative: float) -> float:
    """``relative`` times the root mean square of the finite elements of ``x``, within what codecs accept.

    A tensor of zeros has no scale: any bound serves, and the least is used.
    """
    values = x.detach().float().reshape(-1)
    count, flat = len(values), values.numpy()
    with np.errstate(all="ignore"):
        power = float(np.dot(flat, flat))
    if not (math.isfinite(power) and power > 1e-30):  # squares of float32 overflow, or vanish
        values = values[torch.isfinite(values)].double()
        count, power = len(values), float(values.square().sum())
    return min(max(relative * math.sqrt(power / max(count, 1)), MIN_BOUND), MAX_BOUND)


def encode(x: Tensor, codec: str, bound: float = 0.0) -> Payload:
    """The message that carries ``x``.

    Args:
        x: (rows, dim), float32 or narrower, on the CPU.
        codec: a name of :data:`ir.compression.CODECS`.
        bound: of the error-bounded codecs, the largest error of any element, in the units of ``x``. Elements
            that are not finite are carried bit for bit by every codec; so are those that a bound cannot hold.

    Returns:
        uint8 (bytes of the message,).

    Raises:
        InputError: an unknown codec, a tensor of another shape or type, or a bound out of range.
    """
    out = np.empty(capacity(x), np.uint8)
    return out[: encode_into(out, x, codec, bound)]


def capacity(x: Tensor) -> int:
    """Bytes that a message of ``x`` takes at most."""
    return HEADER.size + 4 * x.numel()


def encode_into(out: Payload, x: Tensor, codec: str, bound: float = 0.0) -> int:
    """As :func:`encode`, into the first bytes of ``out``, at least :func:`capacity` long; the message's length."""
    known = codec_of(codec)
    values = _matrix(x)
    if known.bounded and not MIN_BOUND <= bound <= MAX_BOUND:
        raise InputError(
            f"codec {codec!r} needs a bound from {MIN_BOUND:g} to {MAX_BOUND:g}, not {bound!r}; it is the "
            "largest error of an element"
        )
    rows, dim = values.shape
    raw = values.nbytes
    room = out[HEADER.size : HEADER.size + raw]
    size = _body(values, known, bound, room) if raw else None
    number = known.number if size is not None else 0
    if size is None:
        size = raw
        room[:] = values.reshape(-1).view(np.uint8)
    fields = (
        MAGIC,
        number,
        0,
        0,
        rows,
        dim,
        bound if _NAMES[number] != "none" and known.bounded else 0.0,
        size,
    )
    _seal(out, size, fields)
    return HEADER.size + size


def _seal(out: Payload, size: int, fields: tuple[Any, ...]) -> None:
    """Write the header, whose checksum is over itself and the body."""
    head = HEADER.pack(*fields, 0)
    check = zlib.crc32(out[HEADER.size : HEADER.size + size].data, zlib.crc32(head[:-4]))
    out[: HEADER.size] = np.frombuffer(head[:-4] + struct.pack("<I", check), np.uint8)


def _matrix(x: Tensor) -> npt.NDArray[np.float32]:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(
            f"a codec takes a (rows, dim) tensor of float32, float16 or bfloat16, not {x.dtype} of shape "
            f"{tuple(x.shape)}; reshape or convert it"
        )
    if x.device.type != "cpu":
        raise InputError(f"codecs run on the CPU, the tensor is on {x.device}; copy it there")
    if x.numel() > MAX_ELEMENTS:
        raise InputError(f"a message holds at most {MAX_ELEMENTS} elements, not {x.numel()}; cut it")
    values: npt.NDArray[np.float32] = x.detach().float().contiguous().numpy()
    return values


def _body(x: npt.NDArray[np.float32], codec: Codec, bound: float, out: Payload) -> int | None:
    """Write the body into ``out``; its size, or None where it is no smaller than the matrix."""
    if codec.format:
        body = fixed.encode(x, codec.format)
    elif codec.number == 0:
        return None
    else:
        library = compiled.library()
        if library is not None:
            return compiled.encode(library, x, bound, _stages(codec), out[:-1])
        body = portable.encode(x, bound, _stages(codec))
    if len(body) >= len(out):
        return None
    out[: len(body)] = np.frombuffer(body, np.uint8)
    return len(body)


def _stages(codec: Codec) -> int:
    return LZ * codec.lz | RANS * codec.entropy | LOSSLESS * (not codec.bounded)


def decode(payload: bytes | Payload, rows: int, dim: int) -> Tensor:
    """The float32 (rows, dim) matrix of a message; raises InputError when it is damaged or another's."""
    x, used = decode_at(payload, 0, rows, dim)
    if used != len(payload):
        raise InputError(f"a message of {used} bytes came with {len(payload) - used} more; it was damaged")
    return x


def decode_at(payload: bytes | Payload, start: int, rows: int, dim: int) -> tuple[Tensor, int]:
    """The matrix of the message that begins at byte ``start``, and where it ends; raises InputError."""
    data = np.frombuffer(payload, np.uint8) if isinstance(payload, bytes) else payload
    if rows < 0 or dim < 0 or rows * dim > MAX_ELEMENTS:
        raise InputError(f"a message cannot hold {rows} x {dim} elements; give the size that was sent")
    if len(data) - start < HEADER.size:
        raise InputError(
            f"a message is cut short: {max(0, len(data) - start)} bytes where a header is expected"
        )
    head = data[start : start + HEADER.size].tobytes()
    magic, number, zero, zeros, sent_rows, sent_dim, bound, size, check = HEADER.unpack(head)
    body = data[start + HEADER.size : start + HEADER.size + size]
    if magic != MAGIC or number not in _NAMES or zero or zeros:
        raise InputError("the bytes received are not a message of the codecs; sender and receiver differ")
    if len(body) != size or zlib.crc32(np.ascontiguousarray(body).data, zlib.crc32(head[:-4])) != check:
        raise InputError("a message is cut short or damaged: its checksum does not match")
    if (sent_rows, sent_dim) != (rows, dim):
        raise InputError(
            f"a message holds {sent_rows} x {sent_dim} elements where {rows} x {dim} are expected; sender and "
            "receiver differ"
        )
    try:
        values = _values(body, CODECS[_NAMES[number]], rows, dim, bound)
    except Corrupt:
        raise InputError(
            f"a message of codec {_NAMES[number]!r} is damaged: its body cannot be read"
        ) from None
    return torch.from_numpy(values), start + HEADER.size + size


def _values(body: Payload, codec: Codec, rows: int, dim: int, bound: float) -> npt.NDArray[np.float32]:
    if codec.bounded != (MIN_BOUND <= bound <= MAX_BOUND) or not (codec.bounded or bound == 0):
        raise Corrupt
    if codec.number == 0:
        if len(body) != 4 * rows * dim:
            raise Corrupt
        return body.copy().view("<f4").reshape(rows, dim)
    if not rows * dim:
        raise Corrupt  # no codec makes an empty matrix smaller
    if codec.format:
        return fixed.decode(body, rows, dim, codec.format)
    library = compiled.library()
    if library is not None:
        return compiled.decode(library, np.ascontiguousarray(body), rows, dim, bound, _stages(codec))
    return portable.decode(body.tobytes(), rows, dim, bound, _stages(codec))
