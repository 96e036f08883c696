"""Integer rows against the FBGEMM operators and PyTorch's own kernels, on data of many magnitudes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from codegen.runtime.mx import fake_quantize, pack, quantize
from codegen.runtime.mx_rowwise import fused_multiply_add

pytest.importorskip("fbgemm_gpu", reason="the FBGEMM operators are not installed")

NAMES = ("int8_fused", "int8", "int4", "int2")


def fbgemm_bytes(x: Tensor, name: str) -> Tensor:
    if name == "int8_fused":
        return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(x)
    return torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(x, int(name[3:]))


def fbgemm_values(data: Tensor, name: str) -> Tensor:
    if name == "int8_fused":
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(data)
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(data, int(name[3:]))


def assert_equal_to_fbgemm(x: Tensor, name: str) -> None:
    data = fbgemm_bytes(x, name)
    assert torch.equal(pack(quantize(x, name)).data, data)
    if name != "int8":  # FBGEMM has no CPU reader of 8-bit rows with half-precision scales
        values = fbgemm_values(data, name)
        ours = fake_quantize(x, name)
        assert ((ours == values) | (ours.isnan() & values.isnan())).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 3e-8, 1e-30, 1e-42, 1e4, 1e6, 1e20, 1e35])
def test_rows_are_fbgemms_at_every_magnitude(name: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (64, 8, 200):
        x = torch.randn(3000, n, generator=generator) * scale
        assert_equal_to_fbgemm(x, name)
        assert_equal_to_fbgemm(x + 100 * scale, name)  # far from zero: the bias loses digits
        assert_equal_to_fbgemm(x.abs(), name)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(hnp.arrays("float32", (2, 16), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_rows_are_fbgemms_on_rows_sought_to_differ(name: str, rows: object) -> None:
    x = torch.from_numpy(rows) + 0.0  # one zero: which of two a row's minimum is, no library promises
    assert_equal_to_fbgemm(x, name)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("int8_fused", "embedding_bag_byte_rowwise_offsets"),
        ("int4", "embedding_bag_4bit_rowwise_offsets"),
        ("int2", "embedding_bag_2bit_rowwise_offsets"),
    ],
)
def test_pytorchs_embedding_kernels_read_the_packed_rows(name: str, operator: str) -> None:
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(50, 64, generator=generator)
    ids, offsets = torch.randint(0, 50, (200,), generator=generator), torch.arange(0, 200, 5)
    kernel = getattr(torch.ops.quantized, operator)
    bags = kernel(pack(quantize(table, name)).data, ids, offsets, False, 0, False, None, None, False)
    expected = torch.nn.functional.embedding_bag(ids, fake_quantize(table, name), offsets, mode="sum")
    torch.testing.assert_close(bags, expected, rtol=1e-5, atol=1e-5)


def test_fbgemm_tables_take_as_many_bytes_as_our_aligned_rows() -> None:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes

    from cost_models.formats import TBE_GPU_ROW_ALIGNMENT, storage_bytes

    for d in (4, 16, 20, 36, 64, 128, 132):
        x = torch.randn(3, d)
        for name, kind in (("int8", SparseType.INT8), ("int4", SparseType.INT4), ("int2", SparseType.INT2)):
            for alignment in (1, TBE_GPU_ROW_ALIGNMENT):
                format = f"{name}:align={alignment}"
                wanted = rounded_row_size_in_bytes(d, kind, alignment, 4)  # fp16 scale and bias
                assert storage_bytes(format, (1, d)) == wanted
                assert pack(quantize(x, format)).data.shape == (3, wanted)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=500, deadline=None)
@given(code=st.integers(0, 255), scale=floats, bias=floats)
def test_fused_multiply_add_rounds_once(code: int, scale: float, bias: float) -> None:
    from fractions import Fraction

    exact = Fraction(code) * Fraction(scale) + Fraction(bias)
    got = fused_multiply_add(*(torch.tensor([float(v)]) for v in (code, scale, bias))).item()
    largest = torch.finfo(torch.float32).max
    if abs(exact) > largest:
        assert abs(got) >= largest
        return
    # no float32 lies strictly nearer to the exact value
    value = torch.tensor([got])
    for towards in (float("inf"), float("-inf")):
        other = torch.nextafter(value, torch.tensor([towards])).item()
        if abs(other) <= largest:
            assert abs(Fraction(got) - exact) <= abs(Fraction(other) - exact)
