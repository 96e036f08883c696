"""Number formats as identities: two tensors agree only if every field of their format agrees.

A name such as "MXFP4" is not enough: libraries differ in how they choose the block scale (floor, even,
rceil), in how they break ties and in what becomes of a NaN, and each difference changes the bits. A
:class:`Format` therefore spells out

    (element, block size, axis, scale type, scale mode, sub-block, rounding, non-finite policy)

and has a short id, ``mxfp4_e2m1:rceil``, that :func:`parse_format` reads back.

Families, with their sources:

* ``mx9 mx6 mx4``: two-level microexponents, Block Data Representations (Rouhani et al., ISCA 2023,
  arXiv 2302.08007): 16 elements share an 8-bit exponent, each pair shares a 1-bit sub-exponent.
* ``mxfp8_e4m3 mxfp8_e5m2 mxfp6_e3m2 mxfp6_e2m3 mxfp4_e2m1 mxint8``: OCP Microscaling Formats v1.0.
* ``nvfp4``: E2M1 in blocks of 16 with an E4M3 scale and one fp32 scale per tensor (NVIDIA).
* ``msfp12`` to ``msfp16``: Microsoft Floating Point, one exponent for 16 elements (Rouhani et al., 2020).
* ``fp8_row fp8_tensor`` and their ``_e5m2`` forms: one fp32 scale for a row or the tensor, optionally with
  an upper bound on the absolute maximum it is made from (Llama 3 uses 1200, arXiv 2407.21783, section 6.2).
* ``int8 int4 int2``: row-wise asymmetric integers with fp16 scale and bias in the row, as FBGEMM's
  inference tables store them; ``int8_fused`` has fp32 scale and bias, as FBGEMM's fused 8-bit rows do.
* ``fp32 bf16 fp16``: plain IEEE-style elements.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ir.errors import InputError, did_you_mean

Coding = Literal["float", "twos_complement", "sign_magnitude", "unsigned", "ieee"]
Granularity = Literal["element", "block", "row", "tensor"]
ScaleType = Literal["none", "e8m0", "e4m3", "fp32", "fp16_bias", "fp32_bias"]
ScaleMode = Literal["none", "floor", "even", "rceil", "ceil"]
Rounding = Literal["even", "away"]
NonFinite = Literal["ieee", "nan_block"]

E8M0_NAN = 255  # OCP MX v1.0, section 5.4.1; every element of such a block is NaN
# elements of a block and bytes that rows are padded to: hundreds of times what any format in use has, and small
# enough that a short row can be padded to it
MAX_BLOCK = 1 << 16
LLAMA3_SCALE_BOUND = 1200.0  # Llama 3, arXiv 2407.21783, section 6.2


@dataclass(frozen=True, slots=True)
class Element:
    """The grid an element is rounded to, in units of its scale.

    Magnitudes in ``[2^e, 2^(e+1))`` are spaced ``2^(max(e, emin) - mantissa)`` apart, up to ``max``.
    An integer is the case in which every magnitude lies below ``2^(emin+1)``.
    """

    name: str
    bits: int  # stored bits, sign included
    coding: Coding
    mantissa: int  # bits after the leading one
    emin: int  # exponent of the smallest normal; below it the spacing no longer shrinks
    emax: int  # exponent of the largest power of two
    max: float  # largest magnitude

    @property
    def min_subnormal(self) -> float:
        """The smallest magnitude above zero: the spacing below ``2^emin``."""
        return float(2.0 ** (self.emin - self.mantissa))


def _sign_magnitude(m: int) -> Element:
    # BDR, section 3: sign and m-bit magnitude, no leading one; values k * 2^(1 - m), |k| <= 2^m - 1
    return Element(f"s{m}", 1 + m, "sign_magnitude", m - 1, 0, 0, (2**m - 1) * 2.0 ** (1 - m))


_ELEMENTS = (
    Element("e4m3", 8, "float", 3, -6, 8, 448.0),  # OCP MX v1.0, table 1: no infinity, NaN S.1111.111
    Element("e5m2", 8, "float", 2, -14, 15, 57344.0),  # OCP MX v1.0, table 1: IEEE infinities and NaNs
    Element("e3m2", 6, "float", 2, -2, 4, 28.0),  # OCP MX v1.0, table 1
    Element("e2m3", 6, "float", 3, 0, 2, 7.5),  # OCP MX v1.0, table 1
    Element("e2m1", 4, "float", 1, 0, 2, 6.0),  # OCP MX v1.0, table 1
    Element("mxint8", 8, "twos_complement", 6, 0, 0, 127 / 64),  # OCP MX v1.0, 5.3.4: -2 stays unused
    *(_sign_magnitude(m) for m in range(2, 8)),
    Element("uint8", 8, "unsigned", 0, 0, 7, 255.0),
    Element("uint4", 4, "unsigned", 0, 0, 3, 15.0),
    Element("uint2", 2, "unsigned", 0, 0, 1, 3.0),
    Element("fp32", 32, "ieee", 23, -126, 127, (2 - 2.0**-23) * 2.0**127),  # IEEE 754 binary32
    Element("bf16", 16, "ieee", 7, -126, 127, (2 - 2.0**-7) * 2.0**127),  # fp32 with 7 fraction bits
    Element("fp16", 16, "ieee", 10, -14, 15, 65504.0),  # IEEE 754 binary16
)
ELEMENTS: dict[str, Element] = {element.name: element for element in _ELEMENTS}


@dataclass(frozen=True, slots=True)
class Format:
    """The identity of a number format; build one with :func:`parse_format`.

    Raises InputError when the fields contradict one another.
    """

    base: str  # the family member: "mx9", "mxfp4_e2m1", "int4"
    element_name: str
    granularity: Granularity  # what shares a scale
    scale: ScaleType
    block: int = 0  # elements that share a scale; 0 unless the granularity is "block"
    axis: int = -1  # the axis that blocks and rows run along: the reduction axis of a GEMM operand
    scale_mode: ScaleMode = "none"  # how a power-of-two scale is chosen from the block's maximum
    sub_block: int = 0  # elements that share a sub-exponent (k2 of BDR)
    sub_bits: int = 0  # bits of the sub-exponent (d2 of BDR)
    rounding: Rounding = "even"  # ties to the even code, or away from zero
    non_finite: NonFinite = "nan_block"  # one NaN or infinity makes all that shares its scale NaN
    scale_bound: float | None = None  # upper bound on the absolute maximum that the scale is made from
    row_alignment: int = 1  # bytes; stored rows are padded to a multiple

    def __post_init__(self) -> None:
        if self.element_name not in ELEMENTS:
            raise InputError(f"element {self.element_name!r} is not known; use one of {', '.join(ELEMENTS)}")
        if (self.granularity == "block") != (self.block > 0):
            raise InputError(f"format {self.base}: a block size of {self.block} does not suit its scale")
        if self.sub_block and self.block % self.sub_block:
            raise InputError(
                f"format {self.base}: block={self.block} is not a multiple of its sub-block of "
                f"{self.sub_block} elements; use a multiple"
            )
        bound = self.scale_bound
        if bound is not None and not 0 < bound < float("inf"):
            raise InputError(f"format {self.base}: bound={bound:g} must be positive and finite")
        if not 1 <= self.row_alignment <= MAX_BLOCK:
            raise InputError(f"format {self.base}: align={self.row_alignment} must be 1 to {MAX_BLOCK} bytes")

    @property
    def element(self) -> Element:
        """The element's grid."""
        return ELEMENTS[self.element_name]

    @property
    def id(self) -> str:
        """The short id: the base and every option that differs from it; :func:`parse_format` reads it."""
        default = FORMATS[self.base]
        parts = [self.base]
        if self.scale_mode != default.scale_mode:
            parts.append(self.scale_mode)
        if self.rounding != default.rounding:
            parts.append(self.rounding)
        if self.block != default.block:
            parts.append(f"block={self.block}")
        if self.axis != default.axis:
            parts.append(f"axis={self.axis}")
        if self.scale_bound != default.scale_bound:
            parts.append(f"bound={self.scale_bound:.17g}")
        if self.row_alignment != default.row_alignment:
            parts.append(f"align={self.row_alignment}")
        return ":".join(parts)

    def __str__(self) -> str:
        return self.id


def _mx(base: str, element: str) -> Format:
    # OCP MX v1.0, table 1: k = 32, E8M0 scale
    return Format(base, element, "block", "e8m0", 32, scale_mode="floor")


def _bdr(base: str, m: int, *, k2: int, d2: int) -> Format:
    # BDR, table 1: k1 = 16, d1 = 8 for MX and for MSFP
    return Format(base, f"s{m}", "block", "e8m0", 16, scale_mode="floor", sub_block=k2, sub_bits=d2)


_FORMATS = (
    _bdr("mx9", 7, k2=2, d2=1),
    _bdr("mx6", 4, k2=2, d2=1),
    _bdr("mx4", 2, k2=2, d2=1),
    _mx("mxfp8_e4m3", "e4m3"),
    _mx("mxfp8_e5m2", "e5m2"),
    _mx("mxfp6_e3m2", "e3m2"),
    _mx("mxfp6_e2m3", "e2m3"),
    _mx("mxfp4_e2m1", "e2m1"),
    _mx("mxint8", "mxint8"),
    Format("nvfp4", "e2m1", "block", "e4m3", 16),
    *(_bdr(f"msfp{9 + m}", m, k2=0, d2=0) for m in range(3, 8)),  # the name counts sign, m and the exponent
    Format("fp8_row", "e4m3", "row", "fp32"),
    Format("fp8_row_e5m2", "e5m2", "row", "fp32"),
    Format("fp8_tensor", "e4m3", "tensor", "fp32"),
    Format("fp8_tensor_e5m2", "e5m2", "tensor", "fp32"),
    Format("int8", "uint8", "row", "fp16_bias"),
    Format("int4", "uint4", "row", "fp16_bias"),
    Format("int2", "uint2", "row", "fp16_bias"),
    Format("int8_fused", "uint8", "row", "fp32_bias"),
    Format("fp32", "fp32", "element", "none", non_finite="ieee"),
    Format("bf16", "bf16", "element", "none", non_finite="ieee"),
    Format("fp16", "fp16", "element", "none", non_finite="ieee"),
)
FORMATS: dict[str, Format] = {format.base: format for format in _FORMATS}
"""Every base format with its default options, by short id."""

OCP_FORMATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1", "mxint8")
"""The six concrete formats of OCP MX v1.0."""

_OPTIONS = "floor, even, rceil, ceil, away, block=N, axis=N, bound=X, align=N"


@functools.lru_cache(maxsize=1024)
def parse_format(text: str | Format) -> Format:
    """The format that an id names.

    Args:
        text: ``base[:option]...``; options are a scale mode (``floor``, ``even``, ``rceil``, ``ceil``: the
            OCP formats), ``away`` (ties away from zero: OCP, MX and MSFP), ``block=N`` (elements), ``axis=N``,
            ``bound=X`` (fp8 with one scale per row or tensor) and ``align=N`` (bytes: integer rows).
            A :class:`Format` is returned as it is.

    Raises:
        InputError: an unknown base or option, or an option that the base does not have.
    """
    if isinstance(text, Format):
        return text
    if not isinstance(text, str):
        raise InputError(f"a number format is named by text such as 'mx9', not {type(text).__name__}")
    base, *options = text.strip().split(":")
    if base not in FORMATS:
        family = [name for name in FORMATS if base and name.startswith(f"{base.lower()}_")]
        hint = f" (one of {', '.join(family)}?)" if family else did_you_mean(base.lower(), FORMATS)
        raise InputError(f"number format {base!r} is not known{hint}; `planner formats` lists them")
    format = FORMATS[base]
    seen: set[str] = set()
    for option in options:
        key, changed = _apply(format, option)
        if key in seen:
            raise InputError(f"number format {text!r} sets its {key} twice; keep one")
        seen.add(key)
        format = changed
    return format


def _apply(format: Format, option: str) -> tuple[str, Format]:
    """``format`` with one option set, and the name of what it sets."""
    key, separator, value = option.partition("=")
    if not separator:
        return _apply_word(format, option)
    if key == "axis":
        return key, replace(format, axis=_integer(option, value))
    if key == "block" and format.granularity == "block":
        size = _integer(option, value)
        if not 1 <= size <= MAX_BLOCK:
            raise InputError(f"number format option {option!r}: a block has 1 to {MAX_BLOCK} elements")
        return key, replace(format, block=size)
    if key == "bound" and format.scale == "fp32":
        try:
            return key, replace(format, scale_bound=float(value))
        except ValueError:
            raise InputError(f"number format option {option!r} needs a number, such as bound=1200") from None
    if key == "align" and format.scale in ("fp16_bias", "fp32_bias"):
        return key, replace(format, row_alignment=_integer(option, value))
    raise _no_option(format, option, key in ("block", "bound", "align"))


def _apply_word(format: Format, option: str) -> tuple[str, Format]:
    known = option in get_args(ScaleMode) and option != "none"
    # BDR and MSFP define their exponent as the floor; only the OCP formats leave the mode open
    if known and format.base in OCP_FORMATS:
        return "scale mode", replace(format, scale_mode=option)  # type: ignore[arg-type]
    if option == "away" and format.scale == "e8m0":
        return "rounding", replace(format, rounding="away")
    raise _no_option(format, option, known or option == "away")


def _integer(option: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"number format option {option!r} needs an integer") from None


def _no_option(format: Format, option: str, known: bool) -> InputError:
    if known:
        return InputError(f"number format {format.base!r} has no option {option!r}; leave it out")
    words = ["floor", "even", "rceil", "ceil", "away"]
    return InputError(
        f"number format option {option!r} is not known{did_you_mean(option, words)}; options are {_OPTIONS}"
    )
