"""The compiled codecs behind arrays: one call a message, the bytes of :mod:`codegen.runtime.codecs.portable`."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys

import numpy as np
import numpy.typing as npt

from codegen.runtime import _native
from codegen.runtime.codecs import portable
from codegen.runtime.codecs.portable import LOSSLESS, LZ, RANS, Corrupt

SOURCE = _native.SOURCE.with_name("codecs.c")
_ABI = 1  # of codecs.c
_TOO_LARGE, _NO_MEMORY = -2, -3
_i64 = ctypes.c_int64
_log = logging.getLogger("shardwright.native")


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled codecs, after a check against the numpy path; None where there are none."""
    found = _native.load_file(SOURCE)
    if found is None or sys.byteorder != "little" or found.shardwright_codecs_abi() != _ABI:
        return None
    found.shardwright_codec_encode.restype = _i64
    found.shardwright_codec_decode.restype = _i64
    random = np.random.default_rng(0)
    table = random.standard_normal((40, 7)).astype(np.float32)
    x = table[random.integers(0, 40, 300)]
    x[5, 3], x[6, 2], x[7, 1] = np.inf, np.nan, 3e38
    for stages in (LZ | LOSSLESS, LZ, RANS, LZ | RANS):
        body = portable.encode(x, 0.01, stages)
        out = np.empty(2 * x.nbytes, np.uint8)
        size = encode(found, x, 0.01, stages, out)
        same = size is not None and out[:size].tobytes() == body
        if not same or decode(found, out[:size], 300, 7, 0.01, stages).tobytes() != _values(body, stages):
            _log.warning("the compiled codecs are not used: they differ from the numpy path")
            return None
    return found


def _values(body: bytes, stages: int) -> bytes:
    return portable.decode(body, 300, 7, 0.01, stages).tobytes()


def encode(
    found: ctypes.CDLL, x: npt.NDArray[np.float32], bound: float, stages: int, out: npt.NDArray[np.uint8]
) -> int | None:
    """Write the body of ``x`` (rows, dim; contiguous) into ``out``; its size, or None if it does not fit."""
    rows, dim = x.shape
    size: int = found.shardwright_codec_encode(
        _at(x),
        _i64(rows),
        _i64(dim),
        ctypes.c_double(bound),
        ctypes.c_int32(stages),
        _at(out),
        _i64(len(out)),
    )
    if size == _NO_MEMORY:
        raise MemoryError("no memory for the scratch arrays of a codec")
    return None if size == _TOO_LARGE else size


def decode(
    found: ctypes.CDLL, body: npt.NDArray[np.uint8], rows: int, dim: int, bound: float, stages: int
) -> npt.NDArray[np.float32]:
    """The inverse of :func:`encode`; raises Corrupt."""
    x = np.empty((rows, dim), np.float32)
    failed: int = found.shardwright_codec_decode(
        _at(body),
        _i64(len(body)),
        _at(x),
        _i64(rows),
        _i64(dim),
        ctypes.c_double(bound),
        ctypes.c_int32(stages),
    )
    if failed == _NO_MEMORY:
        raise MemoryError("no memory for the scratch arrays of a codec")
    if failed:
        raise Corrupt
    return x


def int8_encode(found: ctypes.CDLL, x: npt.NDArray[np.float32]) -> bytes | None:
    """FBGEMM's fused 8-bit rows of ``x`` (rows, dim); None where a row has no finite scale."""
    rows, dim = x.shape
    out = np.empty(rows * (dim + 8), np.uint8)
    failed: int = found.shardwright_int8_encode(_at(x), _i64(rows), _i64(dim), _at(out))
    return None if failed else out.tobytes()


def int8_decode(
    found: ctypes.CDLL, body: npt.NDArray[np.uint8], rows: int, dim: int
) -> npt.NDArray[np.float32]:
    """The inverse of :func:`int8_encode`."""
    x = np.empty((rows, dim), np.float32)
    found.shardwright_int8_decode(_at(body), _i64(rows), _i64(dim), _at(x))
    return x


def _at(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
