"""The compiled kernels: same bits as the torch path, safe to build, never needed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen.runtime import _native, mx_native
from codegen.runtime.mx import fake_quantize, qsnr_many, quantize
from codegen.runtime.mx_fake import quantize_dequantize
from codegen.runtime.mx_rowwise import from_rows, to_rows
from ir.formats import FORMATS, OCP_FORMATS, parse_format

needs_compiler = pytest.mark.skipif(bool(_native.reason()), reason=_native.reason() or "compiled")

SCALED = [name for name, format in FORMATS.items() if format.granularity != "element"]
OPTIONS = ["mxfp8_e5m2:rceil", "mxfp4_e2m1:even:away", "mxint8:ceil", "mx6:away", "mxfp6_e2m3:block=16"]
OPTIONS += ["fp8_row:bound=2", "msfp13:block=32"]


def torch_path(x: Tensor, name: str) -> Tensor:
    format = parse_format(name)
    return (
        quantize_dequantize(x, format)
        if format.granularity == "block"
        else from_rows(to_rows(x, format), format)
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a.view(torch.int32) == b.contiguous().view(torch.int32)) | (a.isnan() & b.isnan())).all())


def any_bits(shape: tuple[int, int], seed: int) -> Tensor:
    """Floats with uniformly random bits: every binade, subnormals, NaNs and infinities."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)


@needs_compiler
@pytest.mark.parametrize("name", SCALED + OPTIONS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40), n=st.integers(1, 200), seed=st.integers(0, 2**31), centre=st.integers(-140, 127)
)
def test_kernels_and_torch_give_the_same_bits(name: str, rows: int, n: int, seed: int, centre: int) -> None:
    wild = any_bits((rows, n), seed)
    assert mx_native.usable(wild, parse_format(name))
    # keep each row within some binades of a centre, so that most elements survive beside the row's largest
    exponent = wild.view(torch.int32) >> 23 & 15
    near = torch.ldexp(torch.rand_like(wild) - 0.5, exponent + max(-149, centre - 15))
    for x in (wild, near, wild.nan_to_num(0.0, 1.0, -1.0)):
        assert same_bits(fake_quantize(x, name), torch_path(x, name))


@needs_compiler
@pytest.mark.parametrize("name", [*OCP_FORMATS, "mx9", "mx4", "msfp14", "mxfp4_e2m1:rceil:away", "mx6:away"])
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 20), n=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_kernels_and_torch_give_the_same_codes_and_scales(name: str, rows: int, n: int, seed: int) -> None:
    wild = any_bits((rows, n), seed)
    for x in (
        wild,
        torch.ldexp(wild.sign(), wild.view(torch.int32) >> 7 & 7),
        wild.nan_to_num(0.0, 1.0, -1.0),
    ):
        ours = quantize(x, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx_native, "usable", lambda x, format: False)
            theirs = quantize(x, name)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scales, theirs.scales)
        assert ours.shifts is None or torch.equal(ours.shifts, theirs.shifts)


@needs_compiler
def test_codes_of_a_row_longer_than_a_piece() -> None:
    x = torch.randn(2, 2**20 + 77, generator=torch.Generator().manual_seed(0))
    for name in ("mxfp4_e2m1", "mx6"):
        assert torch.equal(quantize(x, name).dequantize(), fake_quantize(x, name))


@needs_compiler
@pytest.mark.parametrize("name", ["mxfp4_e2m1", "mx9", "nvfp4", "int4", "fp8_row", "fp8_tensor"])
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    try:
        for shape in ((70_001, 33), (2, 1_200_007)):  # pieces of rows, and pieces of a row
            x = torch.randn(shape, generator=generator)
            results = []
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append((fake_quantize(x, name), qsnr_many(x, OCP_FORMATS)))
            assert same_bits(results[0][0], results[1][0])
            assert results[0][1] == results[1][1]
            assert same_bits(results[0][0][:1], torch_path(x, name)[:1])
    finally:
        torch.set_num_threads(threads)


# --- building and loading, in processes that do not import torch ---

PROBE = """
from codegen.runtime import _native
library = _native.load()
print(library is not None, _native.reason())
"""


def probe(cache: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "SHARDWRIGHT_NATIVE": "1", "SHARDWRIGHT_CACHE": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE],
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@needs_compiler
def test_processes_that_build_at_once_share_one_whole_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    running = [probe(cache) for _ in range(4)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [out.strip() for out, _ in outputs] == ["True"] * 4, outputs
    files = sorted(path.name for path in cache.iterdir())
    assert len(files) == 1
    assert files[0].startswith("kernels-")
    before = hashlib.sha256((cache / files[0]).read_bytes()).hexdigest()
    assert probe(cache).communicate(timeout=120)[0].strip() == "True"
    assert hashlib.sha256((cache / files[0]).read_bytes()).hexdigest() == before


def test_without_a_compiler_the_reason_is_said(tmp_path: Path) -> None:
    out, _ = probe(tmp_path / "a", PATH=str(tmp_path), CC="").communicate(timeout=60)
    assert out.strip() == "False no C compiler (cc, gcc or clang) is on PATH"
    out, _ = probe(tmp_path / "b", SHARDWRIGHT_NATIVE="0").communicate(timeout=60)
    assert out.strip() == "False SHARDWRIGHT_NATIVE=0"


@needs_compiler
def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    cache = tmp_path / "open"
    cache.mkdir()
    cache.chmod(0o777)
    out, _ = probe(cache).communicate(timeout=60)
    assert out.startswith("False")
    assert "writable by no one else" in out
    assert not list(cache.iterdir())


def test_a_compiler_that_fails_is_no_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    cache = tmp_path / "cache"
    out, err = probe(cache, CC=str(broken)).communicate(timeout=60)
    assert out.strip().startswith("False")
    assert "does not compile" in out
    assert not err
    assert not list(cache.iterdir())


@pytest.fixture
def fresh_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A loader that has not loaded anything, with a source and a cache of its own."""
    source = tmp_path / "kernels.c"
    monkeypatch.setattr(_native, "SOURCE", source)
    monkeypatch.setattr(_native, "_state", {})
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "cache"))
    mx_native._library.cache_clear()
    yield source
    mx_native._library.cache_clear()


@needs_compiler
def test_kernels_that_differ_from_torch_are_found_out_and_not_used(fresh_loader: Path) -> None:
    text = Path(mx_native.__file__).with_name("_native").joinpath("kernels.c").read_text()
    wrong = text.replace(
        "(a - r) == h", "(a - r) > h"
    )  # wrong for ties only, and only for those away from zero
    assert wrong != text
    fresh_loader.write_text(wrong)
    x = torch.randn(4, 64)
    expected = torch_path(x, "mx9")
    assert _native.load() is not None
    assert same_bits(fake_quantize(x, "mx9"), expected)
    assert "differ from the torch path" in _native.reason()
    assert not mx_native.usable(x, parse_format("mx9"))


def test_the_torch_path_serves_where_nothing_is_compiled(fresh_loader: Path) -> None:
    fresh_loader.write_text("this is not C")
    x = torch.randn(4, 70)
    for name in SCALED:
        assert same_bits(fake_quantize(x, name), torch_path(x, name))
    assert _native.reason()
    assert qsnr_many(x, OCP_FORMATS)["mxint8"] > 35
