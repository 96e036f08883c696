"""Units: what people write is what the planner computes with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.units import (
    format_bytes,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("80 GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1e3", 1000), (4096, 4096), ("0.5 KiB", 512)],
)
def test_sizes(text: object, value: int) -> None:
    assert parse_bytes(text) == value


def test_bits_per_second_are_an_eighth_of_bytes() -> None:
    assert parse_bandwidth("400 Gbps") == parse_bandwidth("50 GB/s") == 50e9
    assert parse_seconds("3 us") == pytest.approx(3e-6)
    assert parse_flops("989 TFLOP/s") == 989e12


@pytest.mark.parametrize("bad", ["80 gigs", "", "GiB", "1 2", True, None, "inf", "1e999", float("nan")])
def test_bad_sizes_say_what_to_write(bad: object) -> None:
    with pytest.raises(ValueError, match=r"80 GiB|use one of|finite"):
        parse_bytes(bad)


@given(st.integers(1, 2**50))
def test_printed_sizes_read_back_within_half_a_percent(size: int) -> None:
    assert parse_bytes(format_bytes(size).replace(",", "")) == pytest.approx(size, rel=0.006)


@given(st.floats(1e-9, 1e4))
def test_printed_times_read_back_within_half_a_percent(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds).replace(",", "")) == pytest.approx(seconds, rel=0.006)
