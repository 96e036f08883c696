"""Units at the edge: parse what people write, print what people read.

Inside the planner everything is bytes, seconds, FLOP and bytes/s as plain numbers. ``parse_*`` turn
``"80 GiB"``, ``"400 Gbps"`` or ``"3 us"`` into those; ``format_*`` turn them back with three
significant digits.
"""

from __future__ import annotations

import math
import re

_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"B": 1, "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BITS = {"bps": 1 / 8, "Kbps": 1e3 / 8, "Mbps": 1e6 / 8, "Gbps": 1e9 / 8, "Tbps": 1e12 / 8}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_FLOPS = {"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15, "GFLOPS": 1e9, "TFLOPS": 1e12}

_MOST = 1e30  # no quantity is larger; products of a few stay finite
_LONGEST = 60  # characters of a quantity
_NUMBER = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-zµ/]*)\s*$")


def _parse(value: object, units: dict[str, float], what: str, example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        kind = type(value).__name__
        raise ValueError(f"{what} must be a number or text such as {example!r}, not a {kind}")
    if isinstance(value, str):
        match = _NUMBER.match(value) if len(value) <= _LONGEST else None
        if match is None:
            raise ValueError(f"{what} must be a number or text such as {example!r}, not {value[:_LONGEST]!r}")
        unit = match.group(2)
        if unit and unit not in units:
            raise ValueError(f"unknown unit {unit!r} in {value!r}; use one of {', '.join(units)}")
        number = float(match.group(1)) * (units[unit] if unit else 1.0)
    else:
        number = float(value) if abs(value) < _MOST else math.inf
    if not abs(number) < _MOST:
        raise ValueError(f"{what} must be finite and below {_MOST:g}, not {str(value)[:_LONGEST]}")
    return number


def parse_bytes(value: object) -> int:
    """Bytes from a number or text such as ``"80 GiB"``; raises ValueError."""
    return round(_parse(value, {**_BINARY, **_DECIMAL}, "a size in bytes", "80 GiB"))


def parse_bandwidth(value: object) -> float:
    """Bytes per second from a number or text such as ``"450 GB/s"`` or ``"400 Gbps"``; raises ValueError."""
    units: dict[str, float] = {f"{unit}/s": float(scale) for unit, scale in {**_BINARY, **_DECIMAL}.items()}
    return _parse(value, {**units, **_BITS}, "a bandwidth", "450 GB/s")


def parse_seconds(value: object) -> float:
    """Seconds from a number or text such as ``"3 us"``; raises ValueError."""
    return _parse(value, _SECONDS, "a time", "3 us")


def parse_flops(value: object) -> float:
    """FLOP/s from a number or text such as ``"989 TFLOP/s"``; raises ValueError."""
    return _parse(value, _FLOPS, "a compute rate", "989 TFLOP/s")


def _digits(number: float) -> str:
    """Three significant digits without an exponent for 0.001 <= number < 100000."""
    if number == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{min(decimals, 6)}f}"


def format_bytes(number: float) -> str:
    """``"80.0 GiB"``: binary multiples, three significant digits."""
    for unit, scale in reversed(_BINARY.items()):
        if abs(number) >= scale:
            return f"{_digits(number / scale)} {unit}"
    return f"{number:.0f} B"


def format_seconds(number: float) -> str:
    """``"1.91 ms"``: three significant digits in the unit that suits."""
    for unit in ("s", "ms", "us"):
        if abs(number) >= _SECONDS[unit]:
            return f"{_digits(number / _SECONDS[unit])} {unit}"
    return f"{_digits(number * 1e9)} ns"


def format_bandwidth(number: float) -> str:
    """``"450 GB/s"``: decimal multiples, three significant digits."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(number) >= _DECIMAL[unit]:
            return f"{_digits(number / _DECIMAL[unit])} {unit}/s"
    return f"{number:.0f} B/s"


def format_count(number: float) -> str:
    """``"26.1 B"``: counts of parameters, rows or FLOP with K, M, B, T."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= scale:
            return f"{_digits(number / scale)} {unit}"
    return f"{number:.0f}" if float(number).is_integer() else _digits(number)
