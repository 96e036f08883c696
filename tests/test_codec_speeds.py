"""Speeds of codecs on ranks that code at once: the arithmetic on a clock of our own, real ranks, and what uses them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import planner
from codegen.runtime.codecs import speeds
from codegen.runtime.codecs.sampling import measure_speeds
from cost_models.calibration import CPU, GPU, Calibration
from cost_models.codecs import default_speeds, library_speeds
from ir.compression import CODECS, CodecSpeed
from ir.errors import InputError
from ir.reading import dump_record, parse_record


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_speed_and_cost_of_a_message_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs that take 1 ms and 1 ns a byte, and 2 ms and 0.5 ns a byte, on a clock that they advance."""
    now = 0.0
    coded: list[tuple[int, int]] = []

    def encode(m: Tensor) -> Tensor:
        nonlocal now
        now += 1e-3 + m.nbytes * 1e-9
        coded.append((m.data_ptr(), m.nbytes))
        return m

    def decode(payload: Tensor, m: Tensor) -> None:
        nonlocal now
        now += 2e-3 + m.nbytes * 0.5e-9

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(speeds, "coder", lambda codec, relative: (encode, decode))
    messages = [torch.randn(4096, 64), torch.randn(2048, 64)]
    (found,) = speeds.at_once(messages, ("eb_lz",), repeats=2)
    # a message of one vector also has the bytes of a vector
    assert found["message"] == pytest.approx(3e-3, rel=1e-3)
    assert (found["encode"], found["decode"]) == pytest.approx((1e9, 2e9), rel=1e-2)
    assert "1 ranks at once" in found["source"]
    # no message is coded again before 16 MiB of others were
    first = [place for place, size in coded if size > 256]
    turn = len(set(first))
    assert first == first[:turn] * 3
    assert sum(size for _, size in coded[:turn]) >= 16 * 2**20


def test_ranks_that_share_this_machine() -> None:
    vectors = [torch.randn(512, 16), torch.randn(512, 16)]
    found = measure_speeds(vectors, ("fp16", "eb_lz"), repeats=1, ranks=2)
    assert [speed.codec for speed in found] == ["fp16", "eb_lz"]
    for speed in found:
        assert "2 ranks at once" in speed.source
        # what no machine does: less than a megabyte or more than a cache's bytes a second
        assert 1e6 < speed.encode < 1e12
        assert 1e6 < speed.decode < 1e12
        assert 1e-7 < speed.message < 0.1
    with pytest.raises(InputError, match="one rank or more, not on 0"):
        measure_speeds(vectors, ranks=0)


def measured(**changes: Any) -> Calibration:
    own = tuple(CodecSpeed(name, 3e8, 4e8, 1e-4, "here") for name in CODECS)
    known = replace(CPU, codec_speeds=own, library_codec_speeds=(CodecSpeed("fp16", 1e8, 2e8, 1e-5, "here"),))
    return replace(known, **changes)


def test_a_calibration_keeps_its_codecs() -> None:
    assert parse_record(Calibration, dump_record(measured()), "calibration") == measured()


def test_speeds_are_those_of_the_calibration_or_of_a_shared_core() -> None:
    topology = planner.topology("local-4")
    assert default_speeds(topology, measured()) == measured().codec_speeds
    one = {speed.codec: speed for speed in default_speeds(topology, CPU)}
    for speed in default_speeds(topology, replace(CPU, core_sharing=2.0)):
        known = one[speed.codec]
        assert (speed.encode, speed.decode) == (known.encode / 2, known.decode / 2)
        assert speed.message == 2 * known.message
    # TorchRec's casts as measured; what was not measured is modelled still
    library = {speed.codec: speed for speed in library_speeds(topology, measured())}
    assert library["fp16"].encode == 1e8
    modelled = {speed.codec: speed for speed in library_speeds(topology, CPU)}
    assert library["int8"] == modelled["int8"]
    assert set(library) == set(modelled) == {"fp16", "bf16", "fp8", "int8", "mx4"}
    gpu = planner.topology("h100-2x8")
    assert default_speeds(gpu, GPU) == library_speeds(gpu, GPU)
