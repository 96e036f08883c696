"""Calibration: fits against formulae, constants against hand counts, links against the speed they were set to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from benchmarks.cluster import Cluster, ClusterUnavailable, check_machine
from cost_models.calibration import CPU
from cost_models.embedding import unit_seconds
from ir.compression import CODECS, CodecSpeed
from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.sharding import ShardingOption, units
from ir.topology import Level
from ir.workload import Workload
from planner.calibrate import (
    calibration_of,
    calibration_path,
    fit_link,
    load_calibration,
    measure_here,
    save,
    topology_of,
)
from planner.calibrate_cli import calibrate

SIZES = [4**power for power in range(13)]


@settings(max_examples=40, deadline=None)
@given(
    alpha=st.floats(1e-6, 1e-3),
    bandwidth=st.floats(1e6, 1e11),
    ramp=st.floats(0, 1e-6),
)
def test_a_fit_returns_the_line_it_was_drawn_from(alpha: float, bandwidth: float, ramp: float) -> None:
    points = [(float(size), alpha + size / bandwidth + ramp * size**0.5) for size in SIZES]
    fit = fit_link(points)
    for size, seconds in points:
        assert fit.seconds(size) == pytest.approx(seconds, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(bandwidth=st.floats(1e6, 1e9), burst=st.integers(2000, 60_000))
def test_a_fit_sees_through_a_token_bucket(bandwidth: float, burst: int) -> None:
    """An idle bucket lets ``burst`` bytes pass at once; the rest is paced."""
    points = [(float(size), 80e-6 + max(size - burst, 0) / bandwidth) for size in SIZES]
    assert fit_link(points).bandwidth == pytest.approx(bandwidth, rel=0.1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-6, 10.0), min_size=3, max_size=12))
def test_no_coefficient_is_negative(seconds: list[float]) -> None:
    points = list(zip([float(size) for size in SIZES], seconds, strict=False))
    try:
        fit = fit_link(points)
    except InputError:
        return
    assert fit.alpha >= 0
    assert fit.bandwidth > 0
    assert fit.ramp >= 0
    assert fit.credit >= 0


def test_links_that_cannot_be_fitted() -> None:
    with pytest.raises(InputError, match="at least two message sizes"):
        fit_link([(8.0, 1e-5), (8.0, 2e-5)])


def record() -> dict[str, Any]:
    """A measurement of 2 hosts of 2 ranks with round figures."""

    def level(alpha: float, bandwidth: float, flood: float) -> dict[str, Any]:
        points = [{"bytes": size, "seconds": alpha + size / bandwidth} for size in SIZES]
        return {"points": points, "flood": {"bytes": 10**7, "bandwidth": flood}}

    def exchange(level: str, ranks: int, size: int, seconds: float) -> dict[str, Any]:
        return {"op": "all_to_all", "level": level, "ranks": ranks, "bytes": size, "seconds": seconds}

    return {
        "world_size": 4,
        "host_size": 2,
        "threads": 1,
        "memory_bytes": 8 * 2**30,
        "repeats": 5,
        "memory": {"cache": 30e9, "read": 8e9, "write": 5e9, "copy": 6e9, "add": 10e9},
        "gemm": [
            {"dtype": "fp32", "m": 256, "k": 256, "n": 256, "flops": 40e9},
            {"dtype": "fp32", "m": 512, "k": 512, "n": 512, "flops": 50e9},
            {"dtype": "fp32", "m": 1024, "k": 1024, "n": 1024, "flops": 20e9},
            {"dtype": "bf16", "m": 512, "k": 512, "n": 512, "flops": 90e9},
        ],
        "kernel_seconds": 2e-6,
        "lookup": [
            {
                "kernel": "fbgemm",
                "optimizer": "sgd",
                "dim": 16,
                "rows": 2**16,
                "ids": 1024,
                "pooling": 1,
                "gather_seconds": 1e-4,
                "forward_seconds": 1e-3,
                "backward_seconds": 3e-3,
                "distinct": 1024,
            }
        ],
        "links": {"intra": level(50e-6, 2e9, 1e9), "inter": level(100e-6, 24e6, 12e6)},
        "collectives": [
            exchange("intra", 2, 1000, 1e-4),
            exchange("intra", 2, 10**6, 11e-4),
            exchange("inter", 4, 1000, 1e-3),
            exchange("inter", 4, 4 * 10**6, 251e-3),
        ],
        "codecs": {
            "own": [{"codec": "eb_lz", "encode": 2e8, "decode": 3e8, "message": 1e-4, "source": "here"}],
            "library": [{"codec": "fp16", "encode": 4e8, "decode": 5e8, "message": 1e-5, "source": "here"}],
        },
    }


def test_the_topology_says_what_was_measured() -> None:
    topology = topology_of(record(), "four")
    assert (topology.hosts, topology.host_size) == (2, 2)
    assert topology.device.flops == {"fp32": 50e9, "bf16": 90e9}
    assert topology.device.tiers[0].capacity == 8 * 2**30
    assert topology.device.tiers[0].read_bandwidth == 10e9
    assert topology.intra_link.bandwidth == 1e9
    assert topology.inter_link.bandwidth == 12e6
    assert topology.inter_link.latency == pytest.approx(100e-6, rel=0.01)


def test_constants_by_hand() -> None:
    topology = topology_of(record(), "four")
    found = calibration_of(record(), topology)
    assert found.cache_speedup == 3.0
    assert found.stream_efficiency == pytest.approx((6 + 10) / 2 / 10)
    assert found.gemm_efficiency == pytest.approx(40 / 50)
    # half of 1 MB leaves each rank in 1 ms, of 1 GB/s; half of 4 MB in 250 ms, of 12 MB/s
    assert found.fabric_efficiency == pytest.approx(0.5)
    assert found.network_efficiency == pytest.approx(8 / 12, rel=1e-3)
    assert found.collective_seconds == pytest.approx(1e-3 - 150e-6, rel=0.01)
    # the lookup model, given the constant, says what was measured: 1 ms forward, 3 ms backward
    table = EmbeddingTable("t", 2**16, 16, ("f",))
    option = ShardingOption("table_wise", (16,))
    work = Workload(global_batch=1024, optimizer="sgd")
    alone = replace(topology, levels=(Level("host", 1, topology.intra_link),))
    (unit,) = units(option, table.rows, 1, 1)
    seconds = unit_seconds(table, option, unit, alone, work, found, "train")
    assert seconds["lookup_forward"] + seconds["lookup_backward"] == pytest.approx(4e-3, rel=1e-3)
    assert found.bucket_bytes == CPU.bucket_bytes
    assert found.codec_speeds == (CodecSpeed("eb_lz", 2e8, 3e8, 1e-4, "here"),)
    assert found.library_codec_speeds == (CodecSpeed("fp16", 4e8, 5e8, 1e-5, "here"),)


def test_files_read_back(tmp_path: Path) -> None:
    file = tmp_path / "four.yaml"
    topology, constants = save(record(), file)
    assert topology.name == "four"
    assert planner.topology(str(file)) == topology
    beside = calibration_path(file)
    assert beside == tmp_path / "four.calibration.yaml"
    assert load_calibration(beside) == constants
    assert yaml.safe_load(beside.read_text())["link_fits"]["inter"]["bandwidth"] == pytest.approx(
        24e6, rel=0.01
    )
    first = file.read_bytes(), beside.read_bytes()
    save(record(), file)
    assert (file.read_bytes(), beside.read_bytes()) == first
    with pytest.raises(InputError, match="no `calibration` section"):
        load_calibration(file)
    beside.write_text("calibration: {row_efficiency: fast}")
    with pytest.raises(InputError, match="row_efficiency"):
        load_calibration(beside)
    with pytest.raises(InputError, match=r"must end in \.yaml"):
        save(record(), tmp_path / "four.json")


def test_ranks_that_cannot_be() -> None:
    with pytest.raises(InputError, match="1 to 256 ranks"):
        measure_here(0)
    run = CliRunner().invoke(calibrate, ["--ranks", "0", "-o", "none.yaml"])
    assert run.exit_code == 2
    assert "1 to 256 ranks" in run.output


def test_this_machine_with_two_ranks(tmp_path: Path) -> None:
    file = tmp_path / "local.yaml"
    run = CliRunner().invoke(calibrate, ["--ranks", "2", "-o", str(file), "--repeats", "3", "--json"])
    assert run.exit_code == 0, run.output
    topology = planner.topology(str(file))
    assert topology.world_size == topology.host_size == 2
    assert json.loads(run.stdout)["topology"] == topology.to_dict()
    measured = yaml.safe_load(calibration_path(file).read_text())["measured"]
    assert set(measured["links"]) == {"intra"}
    # what cannot be otherwise on any machine: a core's fp32 FMA rate, DRAM, loopback
    assert 1e8 < topology.device.flops["fp32"] < 1e13
    assert 1e8 < topology.device.tiers[0].read_bandwidth < 1e12
    assert measured["memory"]["cache"] > 0.5 * measured["memory"]["read"]
    points = {point["bytes"]: point["seconds"] for point in measured["links"]["intra"]["points"]}
    assert points[4**11] > min(seconds for size, seconds in points.items() if size <= 4096)
    # rows of 128 columns are eight times the bytes of rows of 16
    gathers = {row["dim"]: row["gather_seconds"] for row in measured["lookup"]}
    assert gathers[128] > gathers[16]
    own = {row["codec"]: row for row in measured["codecs"]["own"]}
    assert set(own) == set(CODECS)
    assert own["eb_lz"]["source"].startswith("measured, 2 ranks at once")
    assert {row["codec"] for row in measured["codecs"]["library"]} == {"fp16", "int8"}


def test_the_cluster_has_the_speed_it_was_set_to(tmp_path: Path) -> None:
    try:
        check_machine()
    except ClusterUnavailable as error:
        pytest.skip(str(error))
    file, card = tmp_path / "cluster.yaml", 25e6
    with Cluster(2, 2, "200Mbps") as cluster:
        run = cluster.run(
            "planner.calibrate_cli", ["-o", str(file), "--repeats", "3"], module=True, timeout=200
        )
    assert run.exit_code == 0, run.output
    topology = planner.topology(str(file))
    assert (topology.hosts, topology.host_size) == (2, 2)
    # two ranks share a host's card
    assert 2 * topology.inter_link.bandwidth == pytest.approx(card, rel=0.15)
    assert topology.intra_link.bandwidth > 4 * topology.inter_link.bandwidth
    beside = yaml.safe_load(calibration_path(file).read_text())
    # alone, a message has the whole card
    assert beside["link_fits"]["inter"]["bandwidth"] == pytest.approx(card, rel=0.15)
    assert load_calibration(calibration_path(file)).network_efficiency < 1.3


def test_a_folder_that_does_not_exist_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object, **__: object) -> None:
        pytest.fail("measured although the result could not be written")

    monkeypatch.setattr("planner.calibrate.measure_here", measured)
    done = CliRunner().invoke(calibrate, ["-o", str(tmp_path / "no" / "x.yaml")])
    assert done.exit_code == 2
    assert "does not exist" in done.output
