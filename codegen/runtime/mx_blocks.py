"""Block scaling: one power of two for each block, an optional sub-exponent for each sub-block.

A block of ``k`` elements with scale ``2^s`` holds ``x = 2^s * 2^-t * p``: ``s`` comes from the largest
magnitude of the block, ``t`` (only with sub-blocks) from the largest of the sub-block, and ``p`` is on the
element's grid. Shapes: ``x_rbk`` is (rows, blocks of a row, elements of a block).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codegen.runtime.mx_elements import (
    EXPONENT_MASK,
    FRACTION_BITS,
    decode,
    divide,
    encode,
    magnitude_bits,
    round_to_grid,
)
from ir.formats import E8M0_NAN, ELEMENTS, Element, Format, ScaleMode

FLT_MAX = torch.finfo(torch.float32).max
MIN_TENSOR_SCALE = 2.0**-120  # the least whose reciprocal, divided by E4M3_MIN_SCALE, is a float32
E4M3_MIN_SCALE = 2.0**-6  # NVFP4: block scales stay normal E4M3 numbers, as torchao and NVIDIA's kernels do


class Blocks(NamedTuple):
    """A tensor on its grid: ``dq = sign(x) * grid * 2^-shifts * scale``."""

    grid: Tensor  # float32 (rows, blocks, k), signed, in units of the (sub-)scale
    scales: Tensor  # uint8 (rows, blocks): E8M0, or E4M3 codes for NVFP4
    shifts: Tensor | None  # uint8 (rows, blocks, k / k2): sub-exponents
    tensor_scale: Tensor | None  # float32 scalar: NVFP4's second level


def pad_to_blocks(x: Tensor, block: int) -> Tensor:
    """(rows, n) to (rows, ceil(n / block), block); the tail is filled with zeros, which change no scale."""
    rows, n = x.shape
    short = -n % block
    if short:
        x = torch.nn.functional.pad(x, (0, short))
    return x.reshape(rows, (n + short) // block, block)


def mode_offset(element: Element, mode: ScaleMode) -> int:
    """What to add to a maximum's float32 bits so that their exponent field is the one that ``mode`` picks.

    ========  ====================================================================
    floor     the exponent of the maximum
    even      that of the maximum rounded to the element's precision, half up
    rceil     the least that lets the maximum fit below the element's largest value
    ceil      the exponent of the next power of two at or above the maximum
    ========  ====================================================================
    """
    fraction_of_max = int((element.max / 2.0**element.emax - 1) * 2**FRACTION_BITS)
    all_ones = 2**FRACTION_BITS - 1
    offsets: dict[ScaleMode, int] = {
        "none": 0,
        "floor": 0,
        "even": 1 << (FRACTION_BITS - element.mantissa - 1),
        "rceil": all_ones - fraction_of_max,
        "ceil": all_ones,
    }
    return offsets[mode]


def scale_bytes(max_bits: Tensor, element: Element, mode: ScaleMode) -> Tensor:
    """E8M0 bytes (int32) from the bits of each block's largest magnitude; 255 where it is not finite.

    Clamped to byte 0 (2^-127) below: an all-zero block has byte 0.
    """
    # Below 2^-126 a float32 has no leading one; doubling puts 2^-127..2^-126 in the same form again.
    leading = torch.minimum(max_bits, 2 * max_bits.long() - (1 << FRACTION_BITS)).clamp_(min=0)
    byte = ((leading + mode_offset(element, mode)) >> FRACTION_BITS) - element.emax
    return torch.where(max_bits >= EXPONENT_MASK, E8M0_NAN, byte.clamp_(0, E8M0_NAN - 1)).to(torch.int32)


def power_bits(byte: Tensor) -> Tensor:
    """Float32 bits (int32) of ``2^(byte - 127)``; byte 255 gives NaN."""
    bits = torch.where(byte == 0, 1 << (FRACTION_BITS - 1), byte << FRACTION_BITS)  # 2^-127 is subnormal
    return torch.where(byte == E8M0_NAN, EXPONENT_MASK | 1 << (FRACTION_BITS - 1), bits).to(torch.int32)


def power(byte: Tensor) -> Tensor:
    """``2^(byte - 127)`` as float32, NaN for byte 255."""
    return power_bits(byte).view(torch.float32)


def sub_shifts(x_rbk: Tensor, byte: Tensor, format: Format) -> Tensor:
    """Sub-exponents, int32 (rows, blocks, k / k2): how far each sub-block's maximum lies below the block's.

    ``t = min(E - floor(log2 max|x of the sub-block|), 2^d2 - 1)``, counted in whole binades.
    """
    rows, blocks, k = x_rbk.shape
    sub_max = magnitude_bits(x_rbk).reshape(rows, blocks, k // format.sub_block, format.sub_block).amax(-1)
    shifts = torch.zeros_like(sub_max)
    scale = power(byte)
    for step in range(2**format.sub_bits - 1):
        threshold = (scale * 2.0**-step).view(torch.int32)  # 2^(E - step), exact down to 2^-149
        shifts += sub_max < threshold.unsqueeze(-1)
    return shifts.masked_fill_((byte == E8M0_NAN).unsqueeze(-1), 0)


def spread(shifts: Tensor, sub_block: int, sign: int) -> Tensor:
    """``2^(sign * shift)`` for each element: (rows, blocks, k / k2) to (rows, blocks, k)."""
    return power(127 + sign * shifts.int()).repeat_interleave(sub_block, dim=-1)


def to_blocks(x_rbk: Tensor, format: Format, tensor_max: Tensor | None = None) -> Blocks:
    """Quantise blocks.

    Args:
        x_rbk: float32 (rows, blocks, k).
        format: a block format.
        tensor_max: NVFP4 only: the largest magnitude in the finite blocks of the whole tensor, when
            ``x_rbk`` is a part of it.

    The grid of a block with a NaN or an infinity is zero and its scale NaN.
    """
    max_bits = magnitude_bits(x_rbk).amax(-1)
    if format.scale == "e4m3":
        return _to_nvfp4(x_rbk, format, max_bits, tensor_max)
    byte = scale_bytes(max_bits, format.element, format.scale_mode)
    # 2^-s; for a NaN block any finite value will do, since its grid is zeroed below
    inverse = power((254 - byte).clamp_(min=0))
    broken = (byte == E8M0_NAN).unsqueeze(-1)
    scaled = torch.where(broken, 0.0, x_rbk * inverse.unsqueeze(-1))
    shifts = sub_shifts(x_rbk, byte, format) if format.sub_block else None
    if shifts is not None:
        scaled *= spread(shifts, format.sub_block, 1)
    grid = round_to_grid(scaled.abs(), format.element, format.rounding).copysign_(scaled)
    small = None if shifts is None else shifts.to(torch.uint8)
    return Blocks(grid, byte.to(torch.uint8), small, None)


def from_blocks(blocks: Blocks, format: Format) -> Tensor:
    """Dequantise: float32 (rows, blocks, k), saturating at the largest float32."""
    if blocks.tensor_scale is not None:
        scale = decode(blocks.scales, ELEMENTS["e4m3"]) * blocks.tensor_scale
        return (blocks.grid * scale.unsqueeze(-1)).clamp_(-FLT_MAX, FLT_MAX)
    grid = blocks.grid
    if blocks.shifts is not None:
        grid = grid * spread(blocks.shifts, format.sub_block, -1)
    values = grid * power(blocks.scales.int()).unsqueeze(-1)
    return values.clamp_(-FLT_MAX, FLT_MAX)


def finite_max(x_rbk: Tensor) -> Tensor:
    """The largest magnitude (float32 scalar) in the blocks that hold no NaN or infinity."""
    max_bits = magnitude_bits(x_rbk).amax(-1)
    return torch.where(max_bits >= EXPONENT_MASK, 0, max_bits).amax().view(torch.float32)


def _to_nvfp4(x_rbk: Tensor, format: Format, max_bits: Tensor, tensor_max: Tensor | None) -> Blocks:
    """NVFP4: ``x = g * s * p`` with g fp32 for the tensor, s E4M3 for the block and p E2M1.

    ``g = max|tensor| / (448 * 6)``, ``s = E4M3(max|block| / 6 / g)``; the quotient ``x * ((1 / g) / s)`` is
    in the operation order of NVIDIA's and torchao's kernels, so that the bits agree.
    """
    e4m3, element = ELEMENTS["e4m3"], format.element
    maximum = max_bits.view(torch.float32)
    broken = max_bits >= EXPONENT_MASK
    whole = finite_max(x_rbk) if tensor_max is None else tensor_max
    tensor_scale = divide(whole, e4m3.max * element.max).clamp(min=MIN_TENSOR_SCALE)
    wanted = divide(divide(maximum, element.max), tensor_scale).clamp(E4M3_MIN_SCALE, e4m3.max)
    scale = round_to_grid(torch.where(broken, e4m3.max, wanted), e4m3)
    scaled = x_rbk * divide(divide(1.0, tensor_scale), scale).unsqueeze(-1)
    scaled = torch.where(broken.unsqueeze(-1), 0.0, scaled)
    grid = round_to_grid(scaled.abs(), element, format.rounding).copysign_(scaled)
    codes = torch.where(broken, 0x7F, encode(scale, e4m3))  # 0x7F is the NaN of E4M3
    return Blocks(grid, codes.to(torch.uint8), None, tensor_scale)
