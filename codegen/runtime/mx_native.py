"""The compiled kernels behind tensors: same results as the torch path, one pass over the data.

Used for contiguous float32 CPU tensors. Work is cut into pieces of whole rows that do not depend on the
number of threads, so neither do the results.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from codegen.runtime import _native
from codegen.runtime.mx_blocks import MIN_TENSOR_SCALE, from_blocks, mode_offset, pad_to_blocks, to_blocks
from codegen.runtime.mx_elements import FRACTION_BITS, divide, encode
from codegen.runtime.mx_rowwise import affine_scales, fp8_scales, from_rows, to_rows
from ir.formats import ELEMENTS, Format, parse_format

Result = TypeVar("Result")

PIECE = 1 << 20  # elements; 4 MiB of input: large against a call, small against memory
LARGE_RESULT = 1 << 23  # bytes: results of four huge pages (2 MiB on x86-64 and Arm) or more
BLOCKS = (16, 32)  # block sizes that the kernels are built for
MAX_FORMATS = 8  # MAX_FORMATS of kernels.c


# one format for each kernel, compared with the torch path before the kernels are used
_CHECKED = (
    "mxfp8_e4m3",
    "mxfp4_e2m1:even:away",
    "mxint8:rceil",
    "mx9",
    "nvfp4",
    "msfp12",
    "int4",
    "int8_fused",
    "fp8_row",
)


class _Grid(ctypes.Structure):
    """``grid_t`` of kernels.c."""

    _fields_ = (
        ("pmin", ctypes.c_int32),
        ("magic", ctypes.c_float),
        ("half", ctypes.c_float),
        ("max", ctypes.c_int32),
        ("offset", ctypes.c_int32),
        ("emax", ctypes.c_int32),
        ("away", ctypes.c_int32),
    )


class _Codec(ctypes.Structure):
    """``codec_t`` of kernels.c."""

    _fields_ = (
        ("steps", ctypes.c_float),
        ("shift", ctypes.c_int32),
        ("rebias", ctypes.c_int32),
        ("sign", ctypes.c_int32),
        ("twos", ctypes.c_int32),
    )


def _bits(value: float) -> int:
    return ctypes.c_int32.from_buffer(ctypes.c_float(value)).value


@functools.lru_cache(maxsize=256)
def _grid(format: Format) -> _Grid:
    element = format.element
    return _Grid(
        _bits(2.0**element.emin),
        2.0 ** (FRACTION_BITS - element.mantissa),
        2.0 ** (-element.mantissa - 1),
        _bits(element.max),
        mode_offset(element, format.scale_mode),
        element.emax,
        format.rounding == "away",
    )


@functools.lru_cache(maxsize=256)
def _codec(format: Format) -> _Codec:
    element = format.element
    m = element.mantissa
    return _Codec(
        2.0 ** (m - element.emin),
        FRACTION_BITS - m,
        (126 + element.emin) << m,
        element.bits - 1,
        element.coding == "twos_complement",
    )


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The kernels, after a check against the torch path on values of every binade and on ties."""
    library = _native.load()
    if library is None:
        return None
    library.shardwright_finite_max.restype = ctypes.c_float
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (8, 333), generator=generator)
    wild = bits.to(torch.int32).view(torch.float32)
    ties = torch.randint(-128, 129, (8, 333), generator=generator) / 16
    sample = torch.cat([torch.randn(8, 333, generator=generator), wild, ties])
    for name in _CHECKED:
        format = parse_format(name)
        if format.granularity == "block":
            torch_path = from_blocks(to_blocks(pad_to_blocks(sample, format.block), format), format)
            expected = torch_path.reshape(len(sample), -1)[:, : sample.shape[1]]
        else:
            expected = from_rows(to_rows(sample, format), format)
        if not _same_bits(_run(library, sample, format), expected) or not _same_codes(
            library, sample, format
        ):
            _native.reject(f"they differ from the torch path for {name} on this machine")
            return None
    return library


def _same_codes(library: ctypes.CDLL, sample: Tensor, format: Format) -> bool:
    """Whether codes, scales and shifts are those of the torch path."""
    if format.scale != "e8m0":
        return True
    codes, scales, shifts = _codes(library, sample, format)
    blocks = to_blocks(pad_to_blocks(sample, format.block), format)
    expected = encode(blocks.grid, format.element).reshape(len(sample), -1)[:, : sample.shape[1]]
    same = torch.equal(codes, expected) and torch.equal(scales, blocks.scales)
    return same and (shifts is None or (blocks.shifts is not None and torch.equal(shifts, blocks.shifts)))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but that one NaN is as good as another."""
    return bool(((a.view(torch.int32) == b.contiguous().view(torch.int32)) | (a.isnan() & b.isnan())).all())


def usable(x: Tensor, format: Format) -> bool:
    """Whether :func:`quantize_dequantize` has a kernel for this tensor and format."""
    if x.device.type != "cpu" or format.granularity == "element":
        return False
    if format.granularity != "block":
        return _library() is not None
    if format.block not in BLOCKS:
        return False
    if format.sub_block and (format.sub_block, format.sub_bits, format.block) != (2, 1, 16):
        return False
    if format.scale == "e4m3" and format.block != 16:
        return False
    return _library() is not None


def quantize_dequantize(x_rn: Tensor, format: Format) -> Tensor:
    """Quantise and dequantise a contiguous float32 (rows, n) CPU tensor whose format is :func:`usable`."""
    library = _library()
    assert library is not None
    return _run(library, x_rn, format)


def block_codes(x_rn: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Codes uint8 (rows, n), E8M0 bytes (rows, blocks) and sub-exponents (rows, blocks, block / 2).

    Of a contiguous float32 tensor; None where there is no kernel.
    """
    if format.scale != "e8m0" or not usable(x_rn, format):
        return None
    library = _library()
    assert library is not None
    return _codes(library, x_rn, format)


def _codes(library: ctypes.CDLL, x_rn: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, n = x_rn.shape
    blocks = -(-n // format.block)
    codes = torch.empty(rows, n, dtype=torch.uint8)
    scales = torch.empty(rows, blocks, dtype=torch.uint8)
    shifts = torch.empty(rows, blocks, format.block // 2, dtype=torch.uint8) if format.sub_block else None
    layout = ctypes.c_int32(format.block), ctypes.byref(_grid(format)), ctypes.byref(_codec(format))

    def fill(at: int, count: int, width: int) -> int:
        first = at // n * blocks + at % n // format.block
        into = ctypes.c_void_p(scales.data_ptr() + first)
        sub = None if shifts is None else ctypes.c_void_p(shifts.data_ptr() + first * (format.block // 2))
        target = ctypes.c_void_p(codes.data_ptr() + at)
        return int(
            library.shardwright_codes(_at(x_rn, at), target, into, sub, _i64(count), _i64(width), *layout)
        )

    failed = _map(fill, _pieces(x_rn, format.block))
    assert not any(failed), format.id
    return codes, scales, shifts


def _run(library: ctypes.CDLL, x_rn: Tensor, format: Format) -> Tensor:
    out = torch.empty_like(x_rn)
    if out.nbytes >= LARGE_RESULT:
        library.shardwright_large_result(_at(out, 0), _i64(out.nbytes))
    if format.granularity != "block":
        _run_rows(library, x_rn, out, format)
        return out
    kernel: Callable[..., int] = (
        library.shardwright_qdq_pairs if format.sub_block else library.shardwright_qdq_mx
    )
    parameters: tuple[object, ...] = (ctypes.c_int32(format.block),)
    if format.scale == "e4m3":
        kernel, parameters = library.shardwright_qdq_nvfp4, _nvfp4_scales(library, x_rn, format)
    grid = ctypes.byref(_grid(format))

    def blocks(at: int, rows: int, n: int) -> int:
        return kernel(_at(x_rn, at), _at(out, at), _i64(rows), _i64(n), *parameters, grid)

    codes = _map(blocks, _pieces(x_rn, format.block))
    assert not any(codes), format.id
    return out


def _nvfp4_scales(
    library: ctypes.CDLL, x_rn: Tensor, format: Format
) -> tuple[ctypes.c_float, ctypes.c_float]:
    """The tensor's scale and its reciprocal, by the float32 operations of mx_blocks."""

    def finite_max(at: int, rows: int, n: int) -> float:
        return float(library.shardwright_finite_max(_at(x_rn, at), _i64(rows), _i64(n)))

    whole = torch.tensor(max(_map(finite_max, _pieces(x_rn, format.block))), dtype=torch.float32)
    scale = divide(whole, ELEMENTS["e4m3"].max * format.element.max).clamp(min=MIN_TENSOR_SCALE)
    return ctypes.c_float(scale.item()), ctypes.c_float(divide(1.0, scale).item())


def _run_rows(library: ctypes.CDLL, x_rn: Tensor, out: Tensor, format: Format) -> None:
    """Formats whose scale spans a row or the tensor: one read for the range, one for the values.

    Row scales are a few numbers and made by mx_rowwise itself. Pieces are whole rows, or for one scale per
    tensor whole pieces, which then all have the same scale.
    """
    whole_rows = format.granularity == "row"
    pieces = _row_pieces(x_rn) if whole_rows else _pieces(x_rn.reshape(1, -1), 1)

    def largest(at: int, rows: int, n: int) -> Tensor:
        found = torch.empty(rows, 1)
        library.shardwright_row_max(_at(x_rn, at), _i64(rows), _i64(n), _at(found, 0))
        return found

    tensor_scales = None
    if not whole_rows:
        tensor_scales = fp8_scales(torch.stack(_map(largest, pieces)).amax().reshape(1, 1), format)

    def fp8(at: int, rows: int, n: int) -> None:
        multiplier, scale = tensor_scales or fp8_scales(largest(at, rows, n), format)
        data = _at(x_rn, at), _at(out, at), _i64(rows), _i64(n)
        library.shardwright_row_fp8(*data, _at(multiplier, 0), _at(scale, 0), ctypes.byref(_grid(format)))

    def affine(at: int, rows: int, n: int) -> None:
        low, high = torch.empty(rows, 1), torch.empty(rows, 1)
        size = _i64(rows), _i64(n)
        library.shardwright_row_range(_at(x_rn, at), *size, _at(low, 0), _at(high, 0))
        scale, bias, inverse = (part.float() for part in affine_scales(low, high, format))
        scales = _at(scale, 0), _at(bias, 0), _at(inverse, 0)
        levels = ctypes.c_float(format.element.max)
        library.shardwright_row_affine(_at(x_rn, at), _at(out, at), *size, *scales, levels)

    _map(fp8 if format.scale == "fp32" else affine, pieces)


def qsnr_sums(x_rn: Tensor, formats: tuple[Format, ...]) -> tuple[list[float], float] | None:
    """Squared error of each format and squared signal, over a contiguous float32 (rows, n) CPU tensor.

    One read serves all formats. Returns None where there is no kernel (blocks other than 32, sub-blocks,
    more than 8 formats) or a value is not finite.
    """
    library = _library()
    alike = all(f.scale == "e8m0" and f.block == 32 and not f.sub_block for f in formats)
    if library is None or not alike or not 0 < len(formats) <= MAX_FORMATS or x_rn.device.type != "cpu":
        return None
    grids = (_Grid * len(formats))(*(_grid(format) for format in formats))
    doubles = ctypes.c_double * (len(formats) + 1)

    def sums(at: int, rows: int, n: int) -> list[float] | None:
        result = doubles()
        count = ctypes.c_int32(len(formats))
        failed = library.shardwright_qsnr32(_at(x_rn, at), _i64(rows), _i64(n), grids, count, result)
        return None if failed else list(result)

    parts = []
    for part in _map(sums, _pieces(x_rn, 32)):
        if part is None:
            return None
        parts.append(part)
    *noise, signal = (math.fsum(column) for column in zip(*parts, strict=True))
    return noise, signal


_i64 = ctypes.c_int64


def _at(x: Tensor, element: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr() + 4 * element)


def _pieces(x_rn: Tensor, block: int) -> list[tuple[int, int, int]]:
    """(first element, rows, elements of a row) of pieces of whole rows, or of whole blocks of one row."""
    rows, n = x_rn.shape
    if n <= PIECE:
        return _row_pieces(x_rn)
    wide = PIECE // block * block
    return [(row * n + at, 1, min(wide, n - at)) for row in range(rows) for at in range(0, n, wide)]


def _row_pieces(x_rn: Tensor) -> list[tuple[int, int, int]]:
    """(first element, rows, elements of a row) of pieces of whole rows."""
    rows, n = x_rn.shape
    step = max(1, PIECE // n)
    return [(row * n, min(step, rows - row), n) for row in range(0, rows, step)]


def _map(call: Callable[[int, int, int], Result], pieces: list[tuple[int, int, int]]) -> list[Result]:
    """``call`` on every piece, in order, on as many threads as torch uses; ctypes releases the GIL."""
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        return [call(*piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda piece: call(*piece), pieces))
