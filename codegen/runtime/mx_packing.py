"""Packed storage: the bytes a format occupies, as kernels and FBGEMM lay them out.

* Block formats keep three byte arrays: codes, scales and sub-exponents. The codes of a block are one
  little-endian bit string, so FP4 has the even element in the low nibble and four FP6 codes fill 3 bytes.
  A short last block is stored whole, padded with zero codes.
* Integer rows are FBGEMM's fused rows: packed codes, then scale and bias, then padding to the row alignment.
* FP8 rows and tensors keep codes and float32 scales; plain elements keep their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.runtime.mx_blocks import pad_to_blocks
from codegen.runtime.mx_tensor import IEEE_DTYPES, Quantized, dequantize
from ir.formats import Format

HEADER_DTYPES = {"fp16_bias": torch.float16, "fp32_bias": torch.float32}


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised tensor in its storage layout; the quantised axis is last in every array.

    ``data`` uint8 ``(..., blocks, bytes of a block)`` or ``(..., bytes of a row)``; ``scales`` uint8
    ``(..., blocks)`` or float32; ``shifts`` uint8 ``(..., blocks, bytes)``; ``tensor_scale`` float32.
    """

    format: Format
    shape: torch.Size
    axis: int
    dtype: torch.dtype
    data: Tensor
    scales: Tensor | None = None
    shifts: Tensor | None = None
    tensor_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        parts = (self.data, self.scales, self.shifts, self.tensor_scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantize(self) -> Tensor:
        """The values, in the source's shape and type."""
        return dequantize(unpack(self))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Little-endian bit string of each last axis: uint8 (..., k) of ``bits``-bit codes to (..., bytes)."""
    if bits == 8:
        return codes
    k = codes.shape[-1]
    if bits == 4 and k % 2 == 0:
        return codes[..., 0::2] | codes[..., 1::2] << 4
    string = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    string = torch.nn.functional.pad(string.flatten(-2), (0, -k * bits % 8))
    return _bytes_of(string.reshape(*string.shape[:-1], string.shape[-1] // 8, 8))


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: the first ``count`` codes of each last axis."""
    if bits == 8:
        return data[..., :count]
    if bits == 4:
        return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[..., :count]
    string = (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    return _bytes_of(string.flatten(-2)[..., : count * bits].reshape(*data.shape[:-1], count, bits))


def _bytes_of(string: Tensor) -> Tensor:
    """The numbers that the last axis writes in binary, least significant bit first."""
    digits = torch.arange(string.shape[-1], dtype=torch.uint8, device=string.device)
    return (string << digits).sum(-1, dtype=torch.uint8)


def pack(quantized: Quantized) -> Packed:
    """The storage layout of codes and scales."""
    q, format = quantized, quantized.format
    identity = (format, q.shape, q.axis, q.dtype)
    if format.granularity == "element":
        return Packed(*identity, q.codes.contiguous().view(torch.uint8))
    if q.scales is None:  # an empty tensor
        return Packed(*identity, q.codes)
    if format.scale == "fp32":
        return Packed(*identity, q.codes, q.scales)
    if q.biases is not None:
        header = torch.cat([q.scales, q.biases], dim=-1).contiguous().view(torch.uint8)
        row = torch.cat([pack_bits(q.codes, format.element.bits), header], dim=-1)
        return Packed(*identity, torch.nn.functional.pad(row, (0, -row.shape[-1] % format.row_alignment)))
    codes = pad_to_blocks(q.codes.reshape(-1, q.codes.shape[-1]), format.block)
    data = pack_bits(codes, format.element.bits).reshape(*q.scales.shape, -1)
    shifts = None if q.shifts is None else pack_bits(q.shifts, format.sub_bits)
    return Packed(*identity, data, q.scales, shifts, q.tensor_scale)


def unpack(packed: Packed) -> Quantized:
    """The inverse of :func:`pack`."""
    p, format = packed, packed.format
    identity = (format, p.shape, p.axis, p.dtype)
    n, bits = p.shape[p.axis], format.element.bits
    if format.granularity == "element":
        return Quantized(*identity, p.data.contiguous().view(IEEE_DTYPES[format.base]))
    if 0 in p.shape:
        return Quantized(*identity, p.data)
    if format.scale == "fp32":
        return Quantized(*identity, p.data, p.scales)
    if format.scale in HEADER_DTYPES:
        dtype = HEADER_DTYPES[format.scale]
        used = (n * bits + 7) // 8
        # a copy: the header of a single row is contiguous as it is, but seldom aligned to its type
        header = p.data[..., used : used + 2 * dtype.itemsize].clone(memory_format=torch.contiguous_format)
        header = header.view(dtype)
        codes = unpack_bits(p.data[..., :used], bits, n)
        return Quantized(*identity, codes, header[..., :1], None, header[..., 1:])
    assert p.scales is not None
    codes = unpack_bits(p.data, bits, format.block).flatten(-2)[..., :n]
    shifts = None
    if p.shifts is not None:
        shifts = unpack_bits(p.shifts, format.sub_bits, format.block // format.sub_block)
    return Quantized(*identity, codes, p.scales, shifts, None, p.tensor_scale)
