"""Scales that span a row or a tensor: FBGEMM's integer rows, and FP8 with an optional scale bound.

Integer rows repeat FBGEMM's float32 operations in FBGEMM's order, so that codes, scales and biases are the
ones that its CPU kernels store. Shapes: ``x_rn`` is (rows, elements of a row).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from codegen.runtime.mx_elements import decode, divide, encode, round_to_grid
from ir.formats import Format

FLT_MAX = torch.finfo(torch.float32).max
FUSED8_EPSILON = 1e-8  # FBGEMM, QuantUtils: added to the range before the reciprocal of an 8-bit row's scale
FP8_MIN_MAX = 1e-12  # FBGEMM, quantize_fp8_row: least absolute maximum that a scale is made from


class Rows(NamedTuple):
    """A quantised matrix: ``dq = code * scale + bias`` (bias is None for FP8)."""

    codes: Tensor  # uint8 (rows, n), unpacked
    scales: Tensor  # (rows, 1) in the stored type, or (1, 1) for one scale per tensor
    biases: Tensor | None  # (rows, 1)


class Affine(NamedTuple):
    """Row scales of an integer format, each (rows, 1): ``code = round((x - bias) * inverse)``."""

    scale: Tensor  # in the stored type
    bias: Tensor  # in the stored type
    inverse: Tensor  # float32


def affine_scales(low: Tensor, high: Tensor, format: Format) -> Affine:
    """Scales of rows with the least value ``low`` and the largest ``high``; NaN where one is not finite."""
    broken = ~(torch.isfinite(low) & torch.isfinite(high))
    if format.scale == "fp32_bias":
        scale, bias, inverse = _fused8_scale(low, high)
    else:
        scale, bias, inverse = _half_scale(low, high, format.element.max)
    nan = float("nan")
    return Affine(scale.masked_fill(broken, nan), bias.masked_fill(broken, nan), inverse)


def to_rows(x_rn: Tensor, format: Format) -> Rows:
    """Quantise rows. A row (for one scale per tensor: the tensor) with a NaN or infinity becomes all NaN."""
    if format.scale == "fp32":
        return _to_fp8(x_rn, format)
    scale, bias, inverse = affine_scales(x_rn.amin(-1, keepdim=True), x_rn.amax(-1, keepdim=True), format)
    steps = (x_rn - bias.float()) * inverse
    codes = steps.nan_to_num_(nan=0.0).clamp_(0, format.element.max).round_()
    return Rows(codes.to(torch.uint8), scale, bias)


def _fused8_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 scale and bias of FBGEMM's FloatToFused8BitRowwiseQuantized, and its reciprocal scale."""
    span = high - low
    return divide(span, 255.0), low, divide(255.0, span + FUSED8_EPSILON)


def _half_scale(low: Tensor, high: Tensor, levels: float) -> tuple[Tensor, Tensor, Tensor]:
    """float16 scale and bias of FBGEMM's FloatToFusedNBitRowwiseQuantizedSBHalf, and its reciprocal scale.

    A scale that rounds to zero, or whose reciprocal is not finite, is replaced by 1.
    """
    bias = low.half()
    span = high - bias.float()
    scale = torch.where(span == 0, 1.0, divide(span, levels)).half()
    inverse = divide(1.0, scale.float())
    unusable = (scale == 0) | torch.isinf(inverse)
    return scale.masked_fill(unusable, 1.0), bias, inverse.masked_fill(unusable, 1.0)


def fp8_scales(largest: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Multiplier and stored scale, as FBGEMM's quantize_fp8_row makes them: ``max / m`` and ``1 / (max / m)``.

    ``m`` is the largest magnitude, raised to 1e-12 and lowered to the scale bound; larger values saturate.
    The scale is NaN where ``largest`` is not finite.
    """
    multiplier = divide(format.element.max, largest.clamp(min=FP8_MIN_MAX, max=format.scale_bound))
    return multiplier, divide(1.0, multiplier).masked_fill(~torch.isfinite(largest), float("nan"))


def _to_fp8(x_rn: Tensor, format: Format) -> Rows:
    element = format.element
    whole = x_rn.abs().amax() if format.granularity == "tensor" else x_rn.abs().amax(-1, keepdim=True)
    multiplier, scale = fp8_scales(whole.reshape(-1, 1), format)
    scaled = torch.where(torch.isnan(scale), 0.0, x_rn * multiplier).clamp_(-element.max, element.max)
    grid = round_to_grid(scaled.abs(), element, format.rounding).copysign_(scaled)
    return Rows(encode(grid, element), scale, None)


def from_rows(rows: Rows, format: Format) -> Tensor:
    """Dequantise: float32 (rows, n), saturating at the largest float32."""
    scale = rows.scales.float()
    if rows.biases is None:
        return (decode(rows.codes, format.element) * scale).clamp_(-FLT_MAX, FLT_MAX)
    return fused_multiply_add(rows.codes.float(), scale, rows.biases.float())


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` rounded once to float32, as FBGEMM's kernels compute it, on any device.

    The product of two float32 is exact in float64. The sum is made exact enough by rounding it to odd
    (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008): TwoSum gives the error of the float64 sum; a
    sum that is not exact and whose last bit is even moves one unit towards the error. Rounding that to
    float32 is the correct rounding of the exact value.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & torch.isfinite(total) & (bits & 1 == 0)
    odd = torch.where(inexact, bits + towards, bits)
    return odd.view(torch.float64).float()
