"""Element codecs: rounding to an element's grid, its bit codes, and back.

All arithmetic is on float32 tensors of any device and is exact, so the results do not depend on it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ir.formats import Element, Rounding

EXPONENT_MASK = 0x7F800000  # IEEE 754 binary32: sign 1, exponent 8, fraction 23
MAGNITUDE_MASK = 0x7FFFFFFF
FRACTION_BITS = 23


def magnitude_bits(x: Tensor) -> Tensor:
    """The bits of ``|x|`` as int32: they order as the magnitudes do; ``>= EXPONENT_MASK`` is not finite."""
    return x.view(torch.int32) & MAGNITUDE_MASK


def divide(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """The correctly rounded float32 quotient, on any device.

    Torch turns ``number / tensor`` (and, on CUDA, ``tensor / number``) into a multiplication by a
    reciprocal, which rounds twice; a number becomes a tensor here first.
    """
    device = next(x.device for x in (numerator, denominator) if isinstance(x, Tensor))
    above, below = (
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float32, device=device)
        for x in (numerator, denominator)
    )
    return above / below


def round_to_grid(magnitude: Tensor, element: Element, rounding: Rounding = "even") -> Tensor:
    """The nearest values of ``element`` (in units of its scale), saturating at its maximum.

    Args:
        magnitude: finite float32 values >= 0, below ``2^(emin + 1)`` for integer elements or arbitrary for
            floating-point ones, any shape.
        rounding: ties to the even code, or away from zero.

    Adding and subtracting ``2^23`` spacings lets the float32 adder do the rounding: the sum's unit in the
    last place is the spacing, and its ties go to even.
    """
    power = (magnitude.view(torch.int32) & EXPONENT_MASK).view(torch.float32)
    power = power.clamp_(min=2.0**element.emin)
    magic = power * 2.0 ** (FRACTION_BITS - element.mantissa)
    rounded = (magnitude + magic).sub_(magic)
    if rounding == "away":
        spacing = power.mul_(2.0**-element.mantissa)
        tie_down = (magnitude - rounded) == spacing * 0.5
        rounded = torch.where(tie_down, rounded + spacing, rounded)
    return rounded.clamp_(max=element.max)


def encode(values: Tensor, element: Element) -> Tensor:
    """Codes (uint8, in the low bits) of grid values.

    Args:
        values: float32, every one on the element's grid with its sign, any shape. A two's complement
            element has no negative zero, so it loses that sign.
    """
    magnitude = values.abs()
    if element.coding == "twos_complement":
        return (values * 2.0**element.mantissa).to(torch.int32).bitwise_and_(0xFF).to(torch.uint8)
    steps = (magnitude * 2.0 ** (element.mantissa - element.emin)).to(torch.int32)
    if element.coding == "float":
        bits = magnitude.view(torch.int32) >> (FRACTION_BITS - element.mantissa)
        normal = bits - (
            (126 + element.emin) << element.mantissa
        )  # rebias: the exponent field of 2^emin is 1
        steps = torch.where(magnitude < 2.0**element.emin, steps, normal)
    negative = torch.signbit(values).to(torch.int32) << (element.bits - 1)
    return (steps | negative).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def decode_table(element: Element) -> Tensor:
    """The value of every code, float32 ``(2^bits,)`` on the CPU; NaN and infinity codes included."""
    if element.coding == "twos_complement":
        signed = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.int8)
        return signed.float() * 2.0**-element.mantissa
    code = torch.arange(1 << (element.bits - 1), dtype=torch.int32)
    values = code.float() * element.min_subnormal
    if element.coding == "float":
        field, fraction = code >> element.mantissa, code & ((1 << element.mantissa) - 1)
        significand = 1 + fraction.double() * 2.0**-element.mantissa
        normal = significand * torch.pow(2.0, (field - 1 + element.emin).double())
        values = torch.where(field == 0, values, normal.float())
    if element.name == "e4m3":
        values[0x7F] = float("nan")  # OCP FP8: the only NaN, no infinity
    if element.name == "e5m2":
        values[0x7C] = float("inf")  # OCP FP8: as IEEE 754
        values[0x7D:] = float("nan")
    return torch.cat([values, -values])


def decode(codes: Tensor, element: Element) -> Tensor:
    """Float32 values of codes (uint8), in units of the scale."""
    table = decode_table(element).to(codes.device)
    return table[codes.long()]
