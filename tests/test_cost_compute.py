"""Dense costs: the roofline by hand, published GEMM rates, views, and errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.calibration import GPU
from cost_models.compute import gemm_seconds, input_bytes, op_seconds, peak_flops
from ir.errors import InputError
from ir.ops import Op
from planner.presets import preset

H100 = preset("h100-1x8").device
IDEAL = replace(GPU, gemm_efficiency=1.0, stream_efficiency=1.0, kernel_seconds=0.0)


def test_a_large_gemm_is_bound_by_compute_and_a_thin_one_by_memory() -> None:
    assert gemm_seconds(8192, 8192, 8192, "bf16", H100, IDEAL) == pytest.approx(2 * 8192**3 / 989e12)
    weights = 8192 * 8192 * 2
    thin = gemm_seconds(1, 8192, 8192, "bf16", H100, IDEAL)
    assert thin == pytest.approx((weights + 2 * 8192 * 2) / 3350e9)


def test_the_largest_gemm_is_modelled_below_the_measured_maximum() -> None:
    """794.5 bf16 TFLOP/s is the most that was measured on H100 (stas00/ml-engineering)."""
    rate = 2 * 16384**3 / gemm_seconds(16384, 16384, 16384, "bf16", H100, GPU)
    assert 0.5 * 794.5e12 < rate < 794.5e12


def test_output_tiles_are_whole() -> None:
    full = gemm_seconds(2048, 65536, 2048, "bf16", H100, IDEAL)
    assert gemm_seconds(1921, 65536, 1921, "bf16", H100, IDEAL) == pytest.approx(full)


@given(st.integers(1, 10**5), st.integers(1, 10**4), st.integers(1, 10**4), st.floats(1.0, 10.0))
def test_more_of_anything_is_never_slower(m: int, k: int, n: int, factor: float) -> None:
    tier = H100.tiers[0]
    faster = replace(
        H100,
        flops={name: rate * factor for name, rate in H100.flops.items()},
        tiers=(replace(tier, read_bandwidth=tier.read_bandwidth * factor),),
    )
    assert gemm_seconds(m, k, n, "fp16", faster, GPU) <= gemm_seconds(m, k, n, "fp16", H100, GPU)
    assert gemm_seconds(m, k, n, "fp16", H100, GPU) <= gemm_seconds(2 * m, k, n, "fp16", H100, GPU)


def test_a_missing_rate_falls_back_to_the_nearest_type_or_says_so() -> None:
    volta = preset("v100-1x8").device
    assert peak_flops(volta, "bf16") == volta.flops["fp16"]
    assert peak_flops(volta, "tf32") == volta.flops["fp32"]
    with pytest.raises(InputError, match=r"V100-SXM.*fp4.*flops"):
        peak_flops(volta, "fp4")


def test_a_view_costs_nothing_and_passes_its_bytes_on() -> None:
    ops = [
        Op("fc", "gemm", out_shape=(16, 64), activation_bytes=256.0, gemm=(8, 64)),
        Op("half", "reshape", inputs=("fc",), out_shape=(16, 32)),
        Op("relu", "elementwise", inputs=("half",), out_shape=(16, 32), activation_bytes=128.0),
    ]
    fed = input_bytes(ops)
    assert fed == {"fc": 0.0, "half": 256.0, "relu": 128.0}
    assert op_seconds(ops[1], 1000, fed["half"], "fp32", H100, GPU) == 0.0
    moved = op_seconds(ops[2], 1000, fed["relu"], "fp32", H100, IDEAL)
    assert moved == pytest.approx(1000 * 256 / 3350e9)
    assert op_seconds(ops[2], 1000, fed["relu"], "fp16", H100, IDEAL) == pytest.approx(moved / 2)
