"""Quantisation signal-to-noise ratio: how much of a tensor a format keeps, in decibels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from codegen.runtime import mx_native
from codegen.runtime.mx_fake import fake_quantize
from codegen.runtime.mx_tensor import rows_of
from ir.errors import InputError
from ir.formats import Format, parse_format


def qsnr(x: Tensor, format: str | Format, axis: int | None = None) -> float:
    """QSNR of one format in dB; see :func:`qsnr_many`."""
    return qsnr_many(x, [format], axis)[parse_format(format).id]


def qsnr_many(x: Tensor, formats: Sequence[str | Format], axis: int | None = None) -> dict[str, float]:
    """QSNR of several formats by id: ``10 log10(sum x^2 / sum (Q(x) - x)^2)`` dB (BDR, equation 3).

    Formats of the OCP family that share an axis are measured together in one read of the tensor.

    Args:
        x: any floating-point tensor with at least one element; read as float32.
        axis: blocks run along it; by default each format's own axis.

    Returns:
        Decibels; ``inf`` for a format that keeps every value, ``nan`` if a value of ``x`` is not finite.
        Sums are float64, but the one-read kernel sums a block in float32: it agrees with the separate
        computation to about 1e-5 dB.

    Raises:
        InputError: an empty tensor, an axis it does not have, or an unknown format.
    """
    if x.numel() == 0:
        raise InputError("the QSNR of an empty tensor is not defined; pass at least one element")
    parsed = [parse_format(format) for format in formats]
    result: dict[str, float] = {}
    axes = {format.axis if axis is None else axis for format in parsed}
    for along in sorted(axes):
        mine = [format for format in parsed if (format.axis if axis is None else axis) == along]
        fused = [f for f in mine if f.scale == "e8m0" and f.block == 32 and not f.sub_block]
        for start in range(0, len(fused), mx_native.MAX_FORMATS):
            result |= _one_read(x, fused[start : start + mx_native.MAX_FORMATS], along)
        for format in mine:
            if format.id not in result:
                result[format.id] = _separate(x, format, along)
    return {format.id: result[format.id] for format in parsed}


def _one_read(x: Tensor, formats: list[Format], axis: int) -> dict[str, float]:
    if x.device.type != "cpu":
        return {}
    sums = mx_native.qsnr_sums(rows_of(x.detach(), axis), tuple(formats))
    if sums is None:
        return {}
    noise, signal = sums
    return {format.id: decibels(signal, error) for format, error in zip(formats, noise, strict=True)}


def _separate(x: Tensor, format: Format, axis: int) -> float:
    values = x.detach().float()
    error = (fake_quantize(values, format, axis).double() - values.double()).square().sum()
    return decibels(values.double().square().sum().item(), error.item())


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``: inf without noise, nan if either is nan."""
    if math.isnan(noise) or math.isnan(signal):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf
