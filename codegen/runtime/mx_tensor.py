"""A tensor of codes and scales, and the way there and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.runtime import mx_native
from codegen.runtime.mx_blocks import Blocks, from_blocks, pad_to_blocks, to_blocks
from codegen.runtime.mx_elements import decode, encode
from codegen.runtime.mx_rowwise import Rows, from_rows, to_rows
from ir.errors import InputError
from ir.formats import Format, parse_format

IEEE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised tensor, one code to a byte. In every field the quantised axis is moved last.

    With ``(..., n)`` the source's shape, its axis moved last, and ``b = ceil(n / block)``:

    * ``codes``: uint8 ``(..., n)``; for fp32, bf16 and fp16 the values themselves.
    * ``scales``: uint8 ``(..., b)`` E8M0 bytes or (NVFP4) E4M3 codes; float32 or float16 ``(..., 1)`` for
      rows; float32 ``(1,)`` for one scale per tensor; None for plain elements.
    * ``shifts``: uint8 ``(..., b, block / sub_block)`` sub-exponents of MX9, MX6 and MX4.
    * ``biases``: ``(..., 1)`` of integer rows. ``tensor_scale``: float32 scalar of NVFP4.
    """

    format: Format
    shape: torch.Size  # of the source
    axis: int  # of the source, >= 0
    dtype: torch.dtype  # of the source
    codes: Tensor
    scales: Tensor | None = None
    shifts: Tensor | None = None
    biases: Tensor | None = None
    tensor_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values, in the source's shape and type; see :func:`dequantize`."""
        return dequantize(self)


def check_tensor(x: Tensor, axis: int) -> int:
    """The axis counted from 0; raises InputError for a tensor or an axis that cannot be quantised."""
    if not isinstance(x, Tensor):
        raise InputError(f"only a torch tensor can be quantised, not {type(x).__name__}")
    if not x.is_floating_point():
        raise InputError(f"only a floating-point tensor can be quantised, not {x.dtype}; convert it first")
    if x.layout != torch.strided:
        raise InputError(
            f"only a dense tensor can be quantised, not one with layout {x.layout}; call to_dense()"
        )
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise InputError(f"an axis is a whole number, not {type(axis).__name__}")
    if x.dim() == 0:
        raise InputError("a tensor without axes cannot be quantised along one; reshape it to (1,)")
    if not -x.dim() <= axis < x.dim():
        raise InputError(
            f"axis {axis} does not exist in a tensor of {x.dim()} axes; use {-x.dim()}..{x.dim() - 1}"
        )
    return axis % x.dim()


def rows_of(x: Tensor, axis: int) -> Tensor:
    """A tensor with at least one element as contiguous float32 (rows, n), n along ``axis``."""
    moved = x.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1]).float().contiguous()


def like_source(rows: Tensor, shape: torch.Size, axis: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`rows_of`; float16 saturates, so that finite values stay finite."""
    moved = [*shape[:axis], *shape[axis + 1 :], shape[axis]]
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        rows = rows.clamp(-largest, largest)
    return rows.reshape(moved).movedim(-1, axis).to(dtype).contiguous()


def quantize(x: Tensor, format: str | Format, axis: int | None = None) -> Quantized:
    """Codes and scales of ``x``.

    Args:
        x: a floating-point tensor of at least one axis, on any device; read as float32 (float64 is rounded
            to it first).
        format: a format or its id, ``"mxfp8_e4m3:rceil"``.
        axis: blocks or rows run along it; by default the format's axis. Its length need not be a multiple
            of the block: the last block is then short.

    Raises:
        InputError: an unknown format, a tensor that is not floating-point, or an axis it does not have.
    """
    format = parse_format(format)
    axis = check_tensor(x, format.axis if axis is None else axis)
    if x.is_meta:
        raise InputError("a tensor on the meta device has no values to quantise; materialise it first")
    moved = x.detach().movedim(axis, -1)
    if format.granularity == "element":
        return Quantized(format, x.shape, axis, x.dtype, moved.to(IEEE_DTYPES[format.base]))
    if x.numel() == 0:
        return Quantized(format, x.shape, axis, x.dtype, torch.empty_like(moved, dtype=torch.uint8))
    lead, n = moved.shape[:-1], moved.shape[-1]
    rows = rows_of(x.detach(), axis)
    if format.granularity != "block":
        coded = to_rows(rows, format)
        biases = None if coded.biases is None else coded.biases.reshape(*lead, 1)
        scales = coded.scales.reshape(1) if format.granularity == "tensor" else coded.scales.reshape(*lead, 1)
        return Quantized(format, x.shape, axis, x.dtype, coded.codes.reshape(*lead, n), scales, None, biases)
    codes, scales, shifts, tensor_scale = _code_blocks(rows, format)
    scales = scales.reshape(*lead, -1)
    shifts = None if shifts is None else shifts.reshape(*scales.shape, -1)
    codes = codes.reshape(*lead, n)
    return Quantized(format, x.shape, axis, x.dtype, codes, scales, shifts, None, tensor_scale)


def _code_blocks(rows: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes (rows, n), scales (rows, blocks), shifts (rows, blocks, sub-blocks) and NVFP4's tensor scale."""
    compiled = mx_native.block_codes(rows, format)
    if compiled is not None:
        return *compiled, None
    blocks = to_blocks(pad_to_blocks(rows, format.block), format)
    codes = encode(blocks.grid, format.element).reshape(len(rows), -1)[:, : rows.shape[1]].contiguous()
    return codes, blocks.scales, blocks.shifts, blocks.tensor_scale


def dequantize(quantized: Quantized) -> Tensor:
    """The values that codes and scales stand for, in the source's shape and type.

    Equal to :func:`~codegen.runtime.mx.fake_quantize` of the source bit for bit, but that two's complement
    (mxint8) has no negative zero to store.
    """
    q = quantized
    format = q.format
    if format.granularity == "element" or q.scales is None:
        return q.codes.movedim(-1, q.axis).to(q.dtype).reshape(q.shape)
    codes = q.codes.reshape(-1, q.codes.shape[-1])
    if format.granularity != "block":
        biases = None if q.biases is None else q.biases.reshape(-1, 1)
        values = from_rows(Rows(codes, q.scales.reshape(-1, 1), biases), format)
        return like_source(values, q.shape, q.axis, q.dtype)
    grid = pad_to_blocks(decode(codes, format.element), format.block)
    scales = q.scales.reshape(len(codes), -1)
    shifts = None if q.shifts is None else q.shifts.reshape(*scales.shape, -1)
    values = from_blocks(Blocks(grid, scales, shifts, q.tensor_scale), format)
    return like_source(values.reshape(len(codes), -1)[:, : codes.shape[1]], q.shape, q.axis, q.dtype)
