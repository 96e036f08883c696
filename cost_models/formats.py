"""What a number format costs and what it keeps: bits, bytes, and bounds on its quantisation noise.

Pure functions of a format's identity; nothing here runs a quantizer. QSNR is the quantisation
signal-to-noise ratio of BDR (arXiv 2302.08007, equation 3), ``10 log10(sum x^2 / sum (Q(x) - x)^2)``, dB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ir.errors import InputError
from ir.formats import Element, Format, parse_format

SCALE_BITS = {"none": 0, "e8m0": 8, "e4m3": 8, "fp32": 32, "fp16_bias": 32, "fp32_bias": 64}
"""Bits of what elements share: E8M0 and E4M3 are bytes; a bias has the width of its scale."""

TENSOR_SCALE_BYTES = 4  # NVFP4's second level: one float32 for the tensor

TBE_GPU_ROW_ALIGNMENT = (
    16  # bytes; FBGEMM rounded_row_size_in_bytes, split_table_batched_embeddings_ops_inference
)

# QSNR in dB on 2^24 draws of a standard normal, rows of 128 elements (fp8_tensor: one tensor):
# measured with `python benchmarks/quantizers.py --table`, seed 0
QSNR_NORMAL: dict[str, float] = {
    "mx9": 46.524,
    "mx6": 28.298,
    "mx4": 15.715,
    "mxfp8_e4m3": 30.648,
    "mxfp8_e5m2": 25.363,
    "mxfp6_e3m2": 25.363,
    "mxfp6_e2m3": 30.938,
    "mxfp4_e2m1": 18.786,
    "mxint8": 41.664,
    "nvfp4": 20.436,
    "msfp12": 18.635,
    "msfp13": 24.691,
    "msfp14": 30.729,
    "msfp15": 36.759,
    "msfp16": 42.784,
    "fp8_row": 31.796,
    "fp8_row_e5m2": 25.800,
    "fp8_tensor": 31.541,
    "fp8_tensor_e5m2": 25.564,
    "int8": 44.631,
    "int4": 20.022,
    "int2": 6.013,
    "int8_fused": 44.632,
    "bf16": 55.588,
    "fp16": 73.650,
    "mxfp8_e4m3:even": 31.177,
    "mxfp8_e4m3:rceil": 31.517,
    "mxfp8_e4m3:ceil": 31.517,
    "mxfp8_e5m2:even": 25.545,
    "mxfp8_e5m2:rceil": 25.545,
    "mxfp8_e5m2:ceil": 25.545,
    "mxfp6_e3m2:even": 25.544,
    "mxfp6_e3m2:rceil": 25.544,
    "mxfp6_e3m2:ceil": 25.544,
    "mxfp6_e2m3:even": 30.984,
    "mxfp6_e2m3:rceil": 30.955,
    "mxfp6_e2m3:ceil": 28.765,
    "mxfp4_e2m1:even": 19.024,
    "mxfp4_e2m1:rceil": 18.753,
    "mxfp4_e2m1:ceil": 16.820,
    "mxint8:even": 41.641,
    "mxint8:rceil": 41.615,
    "mxint8:ceil": 35.646,
    "fp32": math.inf,
}


def bits_per_element(format: str | Format, row_length: int | None = None) -> float:
    """Stored bits per element, shares of scales included.

    Args:
        row_length: elements along the quantised axis. Without it rows are taken as long, so that what a
            row holds once counts for nothing; with it the last, short block and a row's padding count.
    """
    spec = parse_format(format)
    if row_length is not None:
        return 8 * _row_bytes(spec, row_length) / row_length
    bits = float(spec.element.bits)
    if spec.granularity == "block":
        bits += SCALE_BITS[spec.scale] / spec.block
    if spec.sub_block:
        bits += spec.sub_bits / spec.sub_block
    return bits


def storage_bytes(format: str | Format, shape: Sequence[int], axis: int | None = None) -> int:
    """Bytes of a tensor of ``shape`` in its packed layout, exactly.

    A short last block is stored whole; integer rows end with scale and bias and are padded to the format's
    row alignment (``int4:align=16`` for FBGEMM's tables on a GPU).

    Raises:
        InputError: a shape without axes or with a negative one, or an axis that it does not have.
    """
    spec = parse_format(format)
    along = spec.axis if axis is None else axis
    if not shape or min(shape) < 0:
        raise InputError(f"a tensor of shape {tuple(shape)} cannot be stored; give one or more lengths >= 0")
    if not -len(shape) <= along < len(shape):
        raise InputError(f"axis {along} does not exist in a tensor of {len(shape)} axes")
    elements = math.prod(shape)
    if elements == 0:
        return 0
    n = shape[along]
    total = elements // n * _row_bytes(spec, n)
    if spec.granularity == "tensor":
        total += SCALE_BITS[spec.scale] // 8
    return total + (TENSOR_SCALE_BYTES if spec.scale == "e4m3" else 0)


def _row_bytes(spec: Format, n: int) -> int:
    bits = spec.element.bits
    if spec.granularity == "block":
        sub = spec.block // spec.sub_block * spec.sub_bits if spec.sub_block else 0
        block = math.ceil(spec.block * bits / 8) + SCALE_BITS[spec.scale] // 8 + math.ceil(sub / 8)
        return math.ceil(n / spec.block) * block
    header = SCALE_BITS[spec.scale] // 8 if spec.granularity == "row" else 0
    size = math.ceil(n * bits / 8) + header
    return math.ceil(size / spec.row_alignment) * spec.row_alignment


def qsnr_lower_bound(format: str | Format, n: int) -> float | None:
    """A QSNR in dB that no vector of ``n`` finite elements goes below, or None where none is proved.

    BDR formats and MSFP: Theorem 1 of BDR, with ``beta = 2^d2 - 1`` (0 without sub-blocks) and ``k2 = k1``
    where there are none::

        QSNR >= 20 m log10(2) + 10 log10(2^(2 beta) / (min(n, k1) + (2^(2 beta) - 1) k2))

    Floating-point elements and MXINT8: the error of an element is at most ``r |x|`` while it is normal and
    at most half the subnormal spacing ``d`` otherwise, and the signal is at least the square of the block's
    largest magnitude ``A`` (all in units of the block's scale), so ::

        noise / signal <= r^2 + (min(n, k) - 1) (d / A)^2

    ``r`` is the larger of half a unit in the last place and of the saturation error that the scale mode
    permits. Integer rows have no such bound (a row far from zero loses its bias's precision), nor have
    NVFP4 (small blocks fall below its scale's range) and FP8 with a scale bound (it clips).

    The bound needs scales inside their range: block maxima of at least ``2^(emax - 126)``, and for FP8 rows
    of at least 1e-12.
    """
    spec = parse_format(format)
    if n < 1:
        raise InputError(f"a vector of {n} elements has no QSNR; give at least 1")
    element = spec.element
    if element.coding == "sign_magnitude":
        beta = 2**spec.sub_bits - 1 if spec.sub_block else 0
        gain = 4.0**beta
        spread = min(n, spec.block) + (gain - 1) * (spec.sub_block or spec.block)
        return 20 * (element.bits - 1) * math.log10(2) + 10 * math.log10(gain / spread)
    half_step = 2.0 ** (-element.mantissa - 1)  # half a unit in the last place, relative
    if spec.scale == "e8m0":
        saturation, least = _saturation(element, spec.scale_mode)
        return _bound(element, max(half_step, saturation), least, min(n, spec.block))
    if spec.scale == "fp32" and spec.scale_bound is None:
        # float32 rounds the multiplier, its product with x, the reciprocal and the result
        return _bound(element, half_step + 4 * 2.0**-24, element.max * (1 - 2.0**-22), n)
    if spec.base == "bf16":
        return -20 * math.log10(half_step)  # of normal numbers
    return math.inf if spec.base == "fp32" else None


def _saturation(element: Element, mode: str) -> tuple[float, float]:
    """The worst relative error of saturation, and the least block maximum, in units of the scale."""
    power = 2.0**element.emax
    if mode == "floor":  # maxima in [2^emax, 2^(emax + 1))
        return 1 - element.max / (2 * power), power
    if mode == "even":  # a maximum that rounds up to 2^(emax + 1) takes the next scale
        limit = (2 - 2.0 ** (-element.mantissa - 1)) * power
        return max(0.0, 1 - element.max / limit), limit / 2
    return 0.0, element.max / 2 if mode == "rceil" else power / 2


def _bound(element: Element, relative: float, least_maximum: float, n: int) -> float:
    """``-10 log10(r^2 + (n - 1) (d / A)^2)`` with d half the subnormal spacing."""
    return -10 * math.log10(relative**2 + (n - 1) * (element.min_subnormal / 2 / least_maximum) ** 2)


def qsnr_normal(format: str | Format) -> float | None:
    """Measured QSNR in dB on a standard normal, or None for an option that was not measured."""
    # neither the axis nor the padding of a row changes a value
    return QSNR_NORMAL.get(replace(parse_format(format), axis=-1, row_alignment=1).id)
