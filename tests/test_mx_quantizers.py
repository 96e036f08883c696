"""The quantizers against exact rational arithmetic, against proved bounds, and at their edges."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from codegen.runtime.mx import Packed, dequantize, fake_quantize, pack, qsnr, qsnr_many, quantize, unpack
from cost_models.formats import qsnr_lower_bound, qsnr_normal, storage_bytes
from ir.errors import InputError
from ir.formats import FORMATS, OCP_FORMATS, parse_format

TABLES = np.load(Path(__file__).parent / "data" / "vectors" / "elem_tables.npz")
TABLE_NAMES = {
    "e4m3": "fp8_e4m3",
    "e5m2": "fp8_e5m2",
    "e3m2": "fp6_e3m2",
    "e2m3": "fp6_e2m3",
    "e2m1": "fp4_e2m1",
}

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
tame = st.floats(-8, 8, width=32)
vectors = st.lists(st.one_of(floats, tame), min_size=1, max_size=70)


# --- a second implementation, in rationals, from the specifications' sentences ---


def grid_of(element: str) -> list[Fraction]:
    """Magnitudes of an element in the order of their codes, from ml_dtypes' tables or the definition."""
    if element in TABLE_NAMES:
        table = TABLES[f"decode_{TABLE_NAMES[element]}"]
        return [Fraction(float(v)) for v in table[: len(table) // 2] if np.isfinite(v)]
    if element == "mxint8":
        return [Fraction(k, 64) for k in range(128)]
    m = int(element[1:])
    return [Fraction(k, 2 ** (m - 1)) for k in range(2**m)]


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def nearest(x: Fraction, grid: list[Fraction]) -> Fraction:
    """The nearest grid value, ties to the even code, saturating."""
    at = bisect_left(grid, x)
    if at == len(grid):
        return grid[-1]
    if grid[at] == x:
        return x
    low, high = grid[at - 1], grid[at]
    if x - low == high - x:
        return low if (at - 1) % 2 == 0 else high
    return low if x - low < high - x else high


def exact(x: list[float], name: str) -> list[float]:
    """Quantise and dequantise one row."""
    format = parse_format(name)
    grid = grid_of(format.element_name)
    power = Fraction(2) ** floor_log2(grid[-1])
    out: list[float] = []
    for start in range(0, len(x), format.block):
        block = [Fraction(v) for v in x[start : start + format.block]]
        largest = max(map(abs, block))
        exponent = -127
        if largest and format.scale_mode == "floor":
            exponent = max(-127, floor_log2(largest) - floor_log2(power))
        elif largest:  # rceil: the least scale under which nothing saturates
            while largest > grid[-1] * Fraction(2) ** exponent and exponent < 127:  # E8M0 ends at 2^127
                exponent += 1
        sub = format.sub_block or format.block
        for at in range(0, len(block), sub):
            pair = block[at : at + sub]
            below = all(abs(v) < Fraction(2) ** exponent for v in pair)
            scale = Fraction(2) ** (exponent - (1 if format.sub_block and below else 0))
            out += [math.copysign(float(nearest(abs(v) / scale, grid) * scale), v) for v in pair]
    return out


@pytest.mark.parametrize(
    "name", [*OCP_FORMATS, *(f"{n}:rceil" for n in OCP_FORMATS), "mx9", "mx6", "mx4", "msfp12"]
)
@settings(max_examples=40, deadline=None)
@given(x=vectors)
def test_values_are_the_nearest_by_exact_arithmetic(name: str, x: list[float]) -> None:
    limit = torch.finfo(torch.float32).max
    expected = [max(-limit, min(limit, v)) for v in exact(x, name)]
    ours = fake_quantize(torch.tensor([x]), name)[0]
    assert torch.equal(ours, torch.tensor(expected))


@settings(max_examples=60, deadline=None)
@given(x=vectors)
def test_fp8_rows_are_torchs_own_cast_between_two_scalings(x: list[float]) -> None:
    row = torch.tensor([x])
    largest = row.abs().amax().clamp(min=1e-12)
    multiplier = torch.tensor(448.0) / largest
    cast = (row * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    values = (cast * (torch.tensor(1.0) / multiplier)).clamp(
        *(torch.finfo(torch.float32).max * s for s in (-1, 1))
    )
    assert torch.equal(fake_quantize(row, "fp8_row"), values)
    q = quantize(row, "fp8_row")
    assert torch.equal(q.codes.view(torch.float8_e4m3fn).float(), cast)


def test_a_scale_bound_clips_what_lies_above_it_and_spares_the_rest() -> None:
    x = torch.tensor([[1.0, 100.0, 3e4, -5e4], [1.0, -2.0, 3.0, 4.0]])
    bounded, free = (fake_quantize(x, name) for name in ("fp8_row:bound=1200", "fp8_row"))
    assert bounded[0, 2] == pytest.approx(1200)
    assert bounded[0, 3] == pytest.approx(-1200)
    assert abs(bounded[0, 0] - 1) < abs(free[0, 0] - 1) + 1e-9  # small values keep their resolution
    assert torch.equal(bounded[1], free[1])


@settings(max_examples=60, deadline=None)
@given(x=st.lists(tame, min_size=16, max_size=64), exponent=st.integers(-60, 60))
def test_nvfp4_is_two_casts_of_torch_and_ml_dtypes(x: list[float], exponent: int) -> None:
    """The block scale is torch's own E4M3 cast, the element the nearest value in ml_dtypes' table."""
    row = torch.tensor(x[: len(x) // 16 * 16]) * 2.0**exponent
    blocks = row.reshape(-1, 16)
    largest = blocks.abs().amax(-1, keepdim=True)
    tensor_scale = (row.abs().max() / torch.tensor(448.0 * 6)).clamp(min=2.0**-120)
    wanted = largest / torch.tensor(6.0) / tensor_scale
    scale = wanted.clamp(2.0**-6, 448).to(torch.float8_e4m3fn).float()
    inverse = (torch.tensor(1.0) / tensor_scale) / scale
    grid = grid_of("e2m1")
    element = [
        [math.copysign(float(nearest(Fraction(abs(v)), grid)), v) for v in b]
        for b in (blocks * inverse).tolist()
    ]
    expected = torch.tensor(element) * (scale * tensor_scale)
    assert torch.equal(fake_quantize(row, "nvfp4"), expected.reshape(-1))


def test_nvfp4_equals_torchao() -> None:
    nvfp4 = pytest.importorskip(
        "torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed"
    )
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-3, 1e4):
        x = (
            torch.randn(64, 256, generator=generator)
            * torch.exp(torch.randn(64, 1, generator=generator))
            * scale
        )
        tensor_scale = x.abs().max() / torch.tensor(448.0 * 6)
        scales, data = nvfp4.nvfp4_quantize(x, 16, tensor_scale)
        ours = pack(quantize(x, "nvfp4"))
        assert torch.equal(ours.scales, scales.view(torch.uint8).reshape(ours.scales.shape))
        assert torch.equal(ours.data.flatten(-2), data.view(torch.uint8).reshape(64, 128))


# --- bounds that are proved ---


def worst_qsnr(x: Tensor, name: str) -> float:
    values = x.double()
    error = fake_quantize(x, name).double() - values
    noise = error.square().sum(-1)
    return float((10 * torch.log10(values.square().sum(-1) / noise)).min()) if noise.any() else math.inf


BOUNDED = ["mx9", "mx6", "mx4", "msfp12", "msfp16", "fp8_row", "mx6:block=32"]
BOUNDED += [f"{name}:{mode}" for name in OCP_FORMATS for mode in ("floor", "even", "rceil", "ceil")]


@pytest.mark.parametrize("name", ["mx9", "mx6", "mx4"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bdr_lower_bound_holds_on_blocks_sought_to_break_it(name: str, data: st.DataObject) -> None:
    """Theorem 1 of BDR; hypothesis steers towards small QSNR."""
    n = data.draw(st.integers(1, 16))
    leader = data.draw(st.floats(1, 2, exclude_max=True, width=32))
    rest = data.draw(st.lists(st.floats(-2, 2, width=32), min_size=n - 1, max_size=n - 1))
    exponent = data.draw(st.integers(-100, 100))
    x = torch.tensor([[leader, *rest]], dtype=torch.float64).mul(2.0**exponent).float()
    measured = worst_qsnr(x, name)
    bound = qsnr_lower_bound(name, n)
    assert bound is not None
    if math.isfinite(measured):
        target(-measured)
    assert measured >= bound


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_hold_on_a_hundred_thousand_blocks_of_midpoints(name: str) -> None:
    """Blocks with one large element and the others half way between grid values, where errors are worst."""
    format = parse_format(name)
    element, n = format.element, format.block or 32
    generator = torch.Generator().manual_seed(zlib.crc32(format.id.encode()))
    rows = 50_000

    def draw(high: int) -> Tensor:
        return torch.randint(0, high, (rows, 1), generator=generator).double()

    def uniform(columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=generator, dtype=torch.float64)

    # the leader near the bottom, near the top or anywhere in its binade
    leader = torch.stack([1 + uniform(1) / 256, 2 - uniform(1) / 8, 1 + uniform(1)]).gather(
        0, draw(3).long()[None]
    )[0]
    leader *= 2.0**element.emax
    # the others in one binade, on midpoints of the grid or of one twice as coarse; in half the rows all alike
    depth = draw(element.emax - element.emin + 2)
    spacing = torch.exp2((element.emax - depth).clamp(min=element.emin) - element.mantissa + draw(2))
    alike = draw(2) == 0
    count = torch.where(alike, uniform(1), uniform(n)) * 2 ** draw(element.mantissa + 2)
    x = (count.floor() + 0.5) * spacing
    x = torch.minimum(x, leader * (1 - 2.0**-20)) * torch.where(uniform(n) < 0.5, -1, 1)
    x[:, :1] = leader
    bound = qsnr_lower_bound(name, n)
    assert bound is not None
    measured = worst_qsnr(x.float(), name)
    assert measured >= bound
    # the search comes near the bound; Theorem 1 leaves a few dB that no block is known to reach
    assert measured < bound + (8 if format.sub_block else 3)


# --- QSNR ---

# dB on normal, Laplace and Student-t(4) data from an independent implementation of the formats
PUBLISHED = {
    "mx9": (46.5, 45.5, 45.2),
    "mx6": (28.3, 27.3, 27.1),
    "mx4": (15.7, 14.9, 14.7),
    "msfp16": (42.8, 41.4, 41.1),
    "msfp12": (18.6, 17.4, 17.0),
    "mxint8": (41.7, 40.0, 39.3),
    "mxfp8_e4m3": (30.6, 30.0, 29.8),
    "mxfp8_e4m3:even": (31.2, 30.8, 30.7),
    "mxfp8_e4m3:rceil": (31.5, 31.5, 31.5),
    "mxfp8_e5m2": (25.4, 25.2, 25.2),
    "mxfp6_e2m3": (30.9, 30.3, 30.0),
    "mxfp6_e3m2": (25.4, 25.2, 25.2),
    "mxfp4_e2m1": (18.8, 17.9, 17.6),
    "mxfp4_e2m1:even": (19.0, 18.1, 17.8),
    "mxfp4_e2m1:rceil": (18.8, 17.6, 17.1),
    "int8_fused": (45.6, 43.7, 43.2),
}


def test_qsnr_of_three_distributions_as_measured_elsewhere() -> None:
    generator = np.random.default_rng(1)
    size = (2**13, 64)
    samples = (generator.standard_normal(size), generator.laplace(size=size), generator.standard_t(4, size))
    for column, sample in enumerate(samples):
        x = torch.from_numpy(sample).float()
        measured = qsnr_many(x, list(PUBLISHED))
        for name, values in PUBLISHED.items():
            assert measured[name] == pytest.approx(values[column], abs=0.16), (name, column)


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "fp32"] + ["mxint8:ceil", "mxfp4_e2m1:rceil"])
def test_the_tabulated_qsnr_is_what_the_quantizer_does(name: str) -> None:
    x = torch.randn(2**13, 2**7, generator=torch.Generator().manual_seed(7))
    # one scale per tensor depends on the largest of more draws in the table
    assert qsnr(x, name) == pytest.approx(qsnr_normal(name), abs=0.15 if "tensor" in name else 0.03)


def test_one_read_gives_the_qsnr_of_separate_computations() -> None:
    generator = torch.Generator().manual_seed(3)
    scales = torch.exp2(torch.randint(-60, 60, (64, 1), generator=generator).float())
    for x in (torch.randn(64, 77, generator=generator), torch.randn(64, 77, generator=generator) * scales):
        for format, value in qsnr_many(x, [*OCP_FORMATS, "mxfp8_e4m3:rceil", "mxint8:away"]).items():
            error = (fake_quantize(x, format).double() - x.double()).square().sum()
            assert value == pytest.approx(10 * math.log10(x.double().square().sum() / error), abs=2e-5)


def test_qsnr_at_its_edges() -> None:
    assert qsnr(torch.zeros(4, 64), "mxfp4_e2m1") == math.inf
    assert math.isnan(qsnr(torch.tensor([1.0, math.nan]), "mxfp8_e4m3"))
    assert math.isnan(qsnr(torch.tensor([1.0, math.inf]), "mx9"))
    assert qsnr(torch.full((3, 40), 2.0), "mx4") == math.inf
    assert qsnr(torch.tensor([1e38, 1.1e38]), "mxint8") > 30  # squares overflow float32
    with pytest.raises(InputError, match="empty"):
        qsnr(torch.empty(0), "mx9")


# --- shapes, axes, types, storage ---


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_packed_bytes_stand_for_the_fake_quantised_values(name: str) -> None:
    x = torch.randn(5, 50, 3, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1, 2, -2):
        values = fake_quantize(x, name, axis=axis)
        q = quantize(x, name, axis=axis)
        packed = pack(q)
        assert isinstance(packed, Packed)
        assert torch.equal(q.dequantize(), values)
        assert torch.equal(packed.dequantize(), values)
        assert torch.equal(unpack(packed).codes, q.codes)
        assert packed.nbytes == storage_bytes(name, x.shape, axis)


@pytest.mark.parametrize("name", FORMATS)
def test_an_axis_is_quantised_as_the_last_one_of_the_moved_tensor(name: str) -> None:
    x = torch.randn(6, 37, 4, generator=torch.Generator().manual_seed(1))
    moved = fake_quantize(x.movedim(1, -1).contiguous(), name).movedim(-1, 1)
    assert torch.equal(fake_quantize(x, name, axis=1), moved)
    if name not in ("nvfp4", "fp8_tensor", "fp8_tensor_e5m2"):  # their scale spans the tensor
        assert torch.equal(fake_quantize(x, name, axis=1)[2, :, 3], fake_quantize(x[2, :, 3], name))
    strided = x.transpose(0, 2)[::2]
    assert torch.equal(fake_quantize(strided, name), fake_quantize(strided.contiguous(), name))


@pytest.mark.parametrize("name", ["mx9", "mxfp6_e2m3", "nvfp4", "mxfp4_e2m1:block=8", "mx6:block=6"])
def test_a_short_last_block_is_quantised_as_if_padded_with_zeros(name: str) -> None:
    block = parse_format(name).block
    for n in (1, block - 1, block + 1, 2 * block + 3):
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
        padded = torch.nn.functional.pad(x, (0, -n % block))
        assert torch.equal(fake_quantize(x, name), fake_quantize(padded, name)[:, :n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["mx6", "mxfp8_e5m2:rceil", "nvfp4", "int4", "fp8_tensor", "bf16"])
def test_other_types_are_computed_in_float32_and_keep_their_type(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    values = fake_quantize(x, name)
    assert values.dtype == dtype
    assert torch.equal(values, fake_quantize(x.float(), name).to(dtype))


def test_finite_halves_stay_finite() -> None:
    x = torch.full((32,), 65504.0, dtype=torch.float16)  # rounds up to 65536 in MXFP4 with the rceil scale
    assert torch.equal(fake_quantize(x, "mxfp4_e2m1:rceil"), x)
    huge = torch.full((32,), torch.finfo(torch.float32).max)
    assert torch.equal(fake_quantize(huge, "mxfp4_e2m1:rceil"), huge)


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].scale in ("none", "e8m0")])
def test_quantising_twice_changes_nothing(name: str) -> None:
    """Other scales are not powers of two and are rounded again."""
    once = fake_quantize(torch.randn(8, 96, generator=torch.Generator().manual_seed(4)), name)
    assert torch.equal(fake_quantize(once, name), once)


# --- gradient, tracing ---


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(4, 40, requires_grad=True)
    weight = torch.randn(4, 40)
    (fake_quantize(x, "mxfp4_e2m1") * weight).sum().backward()
    assert torch.equal(x.grad, weight)

    half = torch.randn(8, dtype=torch.bfloat16, requires_grad=True)
    fake_quantize(half, "int8").sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_a_quantised_linear_layer_learns() -> None:
    """Straight-through training must lower the loss of the quantised network itself."""
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(256, 32, generator=generator), torch.randn(32, 1, generator=generator)
    weight = torch.zeros(1, 32, requires_grad=True)
    losses = []
    for _ in range(60):
        prediction = fake_quantize(x, "mx6") @ fake_quantize(weight, "mx6").T
        loss = (prediction - x @ truth).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        weight.data -= 0.1 * gradient
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_tracing_sees_one_operation() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: fake_quantize(x, "mx9") + 1, tracing_mode="fake")(torch.randn(3, 20))
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["shardwright.fake_quantize.default", "aten.add.Tensor"]
    assert fake_quantize(torch.empty(3, 20, device="meta"), "mx9").shape == (3, 20)


# --- what the specifications leave open, as docs/formats.md decides it ---


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].granularity != "element"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_infinity_makes_what_shares_its_scale_nan(name: str, bad: float) -> None:
    format = parse_format(name)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(5))
    x[1, 40] = bad
    values = fake_quantize(x, name)
    expected = torch.zeros(3, 80, dtype=torch.bool)
    width = format.block or 80
    expected[1, 40 // width * width :][:width] = True
    if format.granularity == "tensor":
        expected[:] = True
    assert torch.equal(values.isnan(), expected)
    q = quantize(x, name)
    assert torch.equal(dequantize(q).isnan(), expected)
    assert torch.equal(pack(q).dequantize().isnan(), expected)
    if format.granularity == "block":  # and the rest is as it would be without it
        without = fake_quantize(x.masked_fill(expected, 0.0), name)
        assert torch.equal(values[~expected], without[~expected])


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_of_nothing_but_zeros_or_nans(name: str) -> None:
    assert torch.equal(fake_quantize(torch.zeros(2, 33), name), torch.zeros(2, 33))
    assert fake_quantize(torch.full((2, 33), math.nan), name).isnan().all()
    zeros = quantize(torch.zeros(1, 64), name)
    if zeros.scales is not None and zeros.format.scale == "e8m0":
        assert (zeros.scales == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_empty_tensors_stay_empty(name: str) -> None:
    for shape in ((0,), (0, 5), (5, 0)):
        x = torch.empty(shape)
        assert fake_quantize(x, name).shape == shape
        packed = pack(quantize(x, name))
        assert packed.nbytes == 0
        assert packed.dequantize().shape == shape


def test_a_tensor_without_values_keeps_its_shape() -> None:
    y = fake_quantize(torch.empty(3, 5, device="meta", dtype=torch.bfloat16), "mx9")
    assert (y.shape, y.dtype, y.device.type) == ((3, 5), torch.bfloat16, "meta")
    with pytest.raises(InputError, match="no values"):
        quantize(y, "mx9")


def test_what_cannot_be_quantised_is_refused_in_one_sentence() -> None:
    x = torch.randn(2, 3)
    for call in (fake_quantize, quantize):
        with pytest.raises(InputError, match="axis 2 does not exist in a tensor of 2 axes"):
            call(x, "mx9", axis=2)
        with pytest.raises(InputError, match="did you mean 'mx9'"):
            call(x, "mx99")
        with pytest.raises(InputError, match=r"not torch\.int64"):
            call(torch.arange(4), "mx9")
        with pytest.raises(InputError, match="without axes"):
            call(torch.tensor(1.0), "mx9")
        with pytest.raises(InputError, match="not list"):
            call([1.0], "mx9")
        with pytest.raises(InputError, match="whole number, not str"):
            call(x, "mx9", axis="0")
        with pytest.raises(InputError, match="to_dense"):
            call(x.to_sparse(), "mx9")
    with pytest.raises(InputError, match="axis"):
        fake_quantize(torch.randn(4), "mx9:axis=1")
