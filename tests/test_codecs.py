"""Codecs of embedding traffic: the bound, exactness, damage, and the compiled path against the numpy one."""

from __future__ import annotations

import math
import struct
import tracemalloc
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.runtime.codecs import absolute_bound, compiled, decode, decode_at, encode
from codegen.runtime.codecs.frame import HEADER, MAX_BOUND, MIN_BOUND
from ir.compression import CODECS, fixed_row_bytes
from ir.errors import InputError

BOUNDED = tuple(name for name, codec in CODECS.items() if codec.bounded)
FIXED = tuple(name for name, codec in CODECS.items() if codec.format)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

needs_compiler = pytest.mark.skipif(compiled.library() is None, reason="no compiler")


@pytest.fixture(params=["compiled", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("no compiler")
    return str(request.param)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Bit patterns of every kind: repeated rows, normal draws of any scale, all of float32."""
    rows, dim = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "bits", "subnormal", "repeated", "wide", "constant"]))
    x = random.standard_normal((rows, dim)).astype(np.float32) * np.float32(
        2.0 ** draw(st.integers(-126, 120))
    )
    if kind == "bits":
        x = random.integers(0, 2**32, (rows, dim), np.uint32).view(np.float32)
    elif kind == "subnormal":
        x = (random.integers(0, 2**23, (rows, dim)) | random.integers(0, 2, (rows, dim)) << 31).astype(
            np.uint32
        )
        x = x.view(np.float32)
    elif kind == "repeated":
        x = x[random.integers(0, max(1, rows // 4), rows)]
    elif kind == "wide":
        with np.errstate(over="ignore"):
            x = (x.astype(np.float64) * 2.0 ** random.integers(-100, 100, (rows, dim))).astype(np.float32)
    elif kind == "constant":
        x[:] = x[0, 0]
    for value in draw(st.lists(st.sampled_from([np.inf, -np.inf, np.nan, -0.0, 3.4028235e38]), max_size=3)):
        x[random.integers(rows), random.integers(dim)] = value
    return torch.from_numpy(np.ascontiguousarray(x))


bounds = st.one_of(
    st.floats(MIN_BOUND, MAX_BOUND), st.integers(-159, 126).map(lambda e: 2.0**e), st.floats(1e-6, 1e-1)
)


def bits(x: Tensor) -> Any:
    return x.numpy().view(np.uint32)


@QUICK
@given(matrices(), st.sampled_from(BOUNDED), bounds)
def test_every_element_is_within_the_bound(x: Tensor, codec: str, bound: float) -> None:
    y = decode(encode(x, codec, bound), *x.shape)
    finite = torch.isfinite(x)
    assert bool(((y.double() - x.double()).abs()[finite] <= bound).all())
    assert (bits(y)[~finite.numpy()] == bits(x)[~finite.numpy()]).all()


@QUICK
@given(matrices(), st.sampled_from(sorted({"lz", "none"} | set(FIXED))))
def test_what_is_not_finite_is_carried_exactly(x: Tensor, codec: str) -> None:
    y = decode(encode(x, codec), *x.shape)
    finite = torch.isfinite(x)
    assert (bits(y)[~finite.numpy()] == bits(x)[~finite.numpy()]).all()
    assert bool(torch.isfinite(y[finite]).all())
    if codec in ("lz", "none"):
        assert (bits(y) == bits(x)).all()


@needs_compiler
@QUICK
@example(torch.tensor([[0.1257, -0.1321, 0.6404, 0.1049, -0.5357]]), "int8", 1.0)  # a header not aligned
@given(matrices(), st.sampled_from((*BOUNDED, "lz", "int8")), bounds)
def test_both_paths_write_and_read_the_same_bytes(x: Tensor, codec: str, bound: float) -> None:
    fast = encode(x, codec, bound)
    values = decode(fast, *x.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        assert encode(x, codec, bound).tobytes() == fast.tobytes()
        assert (bits(decode(fast, *x.shape)) == bits(values)).all()


@needs_compiler
@pytest.mark.parametrize("codec", [*BOUNDED, "lz"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])  # codes of few bits, of the escape range, carried exactly
def test_both_paths_agree_on_long_messages(codec: str, scale: float) -> None:
    random = np.random.default_rng(1)
    table = (random.standard_t(2, (900, 16)) * scale).astype(np.float32)
    x = torch.from_numpy(table[(random.pareto(1.0, 4000) * 20).astype(np.int64) % 900])
    fast = encode(x, codec, 1e-4)
    values = decode(fast, *x.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "library", lambda: None)
        assert encode(x, codec, 1e-4).tobytes() == fast.tobytes()
        assert (bits(decode(fast, *x.shape)) == bits(values)).all()


@pytest.mark.parametrize("codec", FIXED)
def test_fixed_rates_are_what_the_formats_say(codec: str) -> None:
    x = torch.randn(100, 48)
    assert len(encode(x, codec)) == HEADER.size + 4 + 100 * fixed_row_bytes(codec, 48)  # type: ignore[arg-type]


def test_fixed_rates_hold_what_fbgemm_holds() -> None:
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    x = torch.randn(64, 32)
    rows = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(
        torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(x)
    )
    assert torch.equal(decode(encode(x, "int8"), 64, 32), rows)
    assert torch.equal(decode(encode(x, "fp16"), 64, 32), x.half().float())
    from fbgemm_gpu.quantize_utils import fp32_to_mx4, mx4_to_fp32

    assert torch.equal(decode(encode(x, "mx4"), 64, 32), mx4_to_fp32(fp32_to_mx4(x, 32), 32).reshape(64, 32))


def test_the_entropy_coder_comes_near_the_entropy() -> None:
    """Shannon's entropy of the codes, counted here, is a floor that the message exceeds by little."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4096, 32)).astype(np.float32))
    for bound in (0.02, 0.1, 0.5):
        counts = Counter(np.rint(x.double().numpy() / (2 * bound)).astype(int).ravel().tolist())
        entropy = sum(-c / x.numel() * math.log2(c / x.numel()) for c in counts.values())
        size = 8 * len(encode(x, "eb_entropy", bound)) / x.numel()
        assert entropy <= size <= 1.01 * entropy + 0.03
        # Gaussian with uniform bins: log2(sigma sqrt(2 pi e) / bin)
        assert entropy == pytest.approx(math.log2(math.sqrt(2 * math.pi * math.e) / (2 * bound)), abs=0.06)


def test_repeated_vectors_are_sent_once() -> None:
    random = np.random.default_rng(0)
    table = random.standard_normal((500, 64)).astype(np.float32)
    x = table[random.integers(0, 500, 3000)]
    distinct = len({row.tobytes() for row in x})
    payload = encode(torch.from_numpy(x), "lz")
    reference_bits = math.ceil(math.log2(distinct + 1))
    # header, two counts, two array heads (least value and width), vectors in full, references
    assert len(payload) <= HEADER.size + 8 + 10 + distinct * 256 + math.ceil(3000 * reference_bits / 8)


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (1, 1), (3, 1)])
def test_small_and_empty(codec: str, shape: tuple[int, int], path: str) -> None:
    x = torch.randn(shape)
    y = decode(encode(x, codec, 1e-3), *shape)
    assert y.shape == x.shape
    assert float((y - x).abs().sum()) <= 1.0


def damaged(payload: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(payload)
    kind = random.integers(4)
    at = int(random.integers(len(data)))
    if kind == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = random.bytes(int(random.integers(1, 9)))
    else:
        size = int(random.integers(1, 40))
        data[at : at + size] = random.bytes(size)[: len(data) - at]
    return bytes(data)


@pytest.mark.parametrize("codec", list(CODECS))
def test_damage_is_an_error(codec: str, path: str) -> None:
    random = np.random.default_rng(3)
    x = torch.from_numpy(random.standard_normal((50, 6)).astype(np.float32)[random.integers(0, 20, 50)])
    payload = encode(x, codec, 1e-2).tobytes()
    for _ in range(150):
        broken = damaged(payload, random)
        if broken != payload:
            with pytest.raises(InputError):
                decode(broken, 50, 6)


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
def test_damage_with_a_right_checksum_never_crashes(codec: str, path: str) -> None:
    """A sender who lies: any answer must be an error or a tensor of the expected shape."""
    random = np.random.default_rng(4)
    x = torch.from_numpy(random.standard_normal((60, 5)).astype(np.float32)[random.integers(0, 20, 60)])
    x[3, 2] = math.inf
    payload = encode(x, codec, 1e-2).tobytes()
    refused = 0
    for _ in range(200):
        data = bytearray(payload)
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(HEADER.size, len(data)))] = int(random.integers(256))
        body = bytes(data[HEADER.size :])[: int(random.integers(1, len(data)))]
        head = bytearray(data[: HEADER.size])
        struct.pack_into("<I", head, 24, len(body))
        struct.pack_into("<I", head, 28, zlib.crc32(body, zlib.crc32(bytes(head[:28]))))
        try:
            assert decode(bytes(head) + body, 60, 5).shape == (60, 5)
        except InputError:
            refused += 1
    assert refused > 0


def test_a_hostile_header_takes_no_memory(path: str) -> None:
    """Counts in a message do not decide how much is allocated: the reader's own size does."""
    fields = (b"SWC1", CODECS["eb_lz_entropy"].number, 0, 0, 2**31, 2**31, 0.5)
    body = struct.pack("<II", 2**32 - 1, 2**32 - 1)
    head = HEADER.pack(*fields, len(body), 0)
    hostile = head[:-4] + struct.pack("<I", zlib.crc32(body, zlib.crc32(head[:-4]))) + body
    tracemalloc.start()
    with pytest.raises(InputError, match="4 x 4 are expected"):
        decode(hostile, 4, 4)
    head = HEADER.pack(*fields[:4], 4, 4, 0.5, len(body), 0)
    hostile = head[:-4] + struct.pack("<I", zlib.crc32(body, zlib.crc32(head[:-4]))) + body
    with pytest.raises(InputError, match="damaged"):
        decode(hostile, 4, 4)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_several_messages_in_one_buffer() -> None:
    x, y = torch.randn(7, 3), torch.randn(2, 5)
    buffer = np.concatenate([encode(x, "lz"), encode(y, "none")])
    first, at = decode_at(buffer, 0, 7, 3)
    second, end = decode_at(buffer, at, 2, 5)
    assert torch.equal(first, x)
    assert torch.equal(second, y)
    assert end == len(buffer)
    with pytest.raises(InputError, match="more"):
        decode(buffer, 7, 3)


def test_relative_bounds_follow_the_scale() -> None:
    x = torch.randn(1000, 8)
    for scale in (1e-30, 1e-3, 1.0, 1e30):
        rms = float(x.square().mean().sqrt())
        assert absolute_bound(x * scale, 0.1) == pytest.approx(0.1 * scale * rms, rel=1e-4)
    x[0, 0] = math.nan
    assert 0.09 < absolute_bound(x, 0.1) < 0.11
    assert absolute_bound(torch.zeros(3, 3), 0.1) == MIN_BOUND
    assert not decode(encode(torch.zeros(300, 3), "eb_lz", MIN_BOUND), 300, 3).any()


def test_unusable_input() -> None:
    x = torch.randn(3, 4)
    for tensor, codec, bound, message in (
        (x, "zip", 1.0, "codec 'zip' is not known"),
        (x, "eb_lz", 0.0, "needs a bound"),
        (x, "eb_lz", math.nan, "needs a bound"),
        (x[0], "lz", 0.0, r"takes a \(rows, dim\) tensor"),
        (x.double(), "lz", 0.0, "float64"),
        (x.to("meta"), "lz", 0.0, "run on the CPU"),
    ):
        with pytest.raises(InputError, match=message):
            encode(tensor, codec, bound)
