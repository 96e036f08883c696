"""The PIM cost model against measurements that were not used to make it, and against exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.pim import (
    PimLoad,
    PimSystem,
    host_bandwidth,
    lookup_time,
    mram_read_cycles,
    mram_write_cycles,
    parallel_transfer,
    row_cycles,
)
from ir.errors import InfeasibleError, InputError
from passes.pim_tile import (
    TileProblem,
    best_tile,
    closed_form_columns,
    closed_form_tile,
    relaxed_seconds,
    shape_bound,
    split_reduction,
    widths,
)

SYSTEM = PimSystem()

# UBC PIM-Embedding-Lookup, upmem/PERF.md @1ad486d8: 30 tables x 64 columns, one column a DPU, 32 bags of 128 ids;
# the host code of that commit pushes ids, offsets and two 4-byte lengths, each to every DPU.
UBC_LOAD = PimLoad(
    dpus=1920,
    row_bytes=8,
    max_reads=32 * 128,
    bags=32,
    push_bytes=(4 * 32 * 128, 4 * 32, 8),
    pull_bytes=4 * 32,
)
UBC_BAND = (3.3e-3, 4.0e-3)

# upmem_communication_performance_test @6ed52e4, direct_interface_performance.xlsx, all ranks, stock SDK: MiB, GB/s
SEND = [(8, 10.638), (16, 12.626), (32, 14.693)]
RECEIVE = [(8, 6.690), (16, 8.032), (32, 8.264)]


def test_the_ubc_measurement_is_predicted() -> None:
    seconds = lookup_time(UBC_LOAD, PimSystem(dpus=1920)).total
    assert UBC_BAND[0] * 0.75 <= seconds <= UBC_BAND[1] * 1.25


@pytest.mark.parametrize(("direction", "rows"), [("in", SEND), ("out", RECEIVE)])
def test_measured_transfers_over_all_ranks_are_predicted(
    direction: str, rows: list[tuple[int, float]]
) -> None:
    for mib, measured in rows:
        sizes = [mib * 2**20 / 2560] * 2560
        predicted = mib * 2**20 / parallel_transfer(direction, sizes, SYSTEM) / 1e9  # type: ignore[arg-type]
        assert predicted == pytest.approx(measured, rel=0.2)


def test_mram_bandwidth_at_the_largest_dma_is_what_was_measured() -> None:
    # PrIM measured 628 MB/s reading and 633 MB/s writing in DMAs of 2,048 bytes
    assert 2048 / mram_read_cycles(2048) * 350e6 == pytest.approx(628e6, rel=0.05)
    assert 2048 / mram_write_cycles(2048) * 350e6 == pytest.approx(633e6, rel=0.05)


def test_a_short_row_waits_for_the_dma_and_a_long_one_for_the_adder() -> None:
    # 77 + 8/2, and a 64th of a 256-byte read of ids
    assert max(row_cycles(8, "int32", 16)) == pytest.approx(81 + 205 / 64)
    assert max(row_cycles(8, "int32", 1)) > 3 * max(row_cycles(8, "int32", 16))
    # fp32 is emulated at 4.9 MOPS: 64 columns take 64 / 4.9e6 s and more
    assert max(row_cycles(256, "fp32", 16)) / 350e6 > 64 / 4.9e6


def test_bandwidth_goes_through_the_published_points() -> None:
    assert host_bandwidth("in", 1, SYSTEM) == pytest.approx(0.33e9)
    assert host_bandwidth("in", 64, SYSTEM) == pytest.approx(6.68e9)
    assert host_bandwidth("out", 64, SYSTEM) == pytest.approx(4.74e9)
    assert host_bandwidth("out", 2560, SYSTEM) == pytest.approx(8.44e9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=300))
def test_a_parallel_transfer_costs_as_much_as_if_all_were_the_largest(sizes: list[int]) -> None:
    padded = parallel_transfer("in", [max(sizes)] * len(sizes), SYSTEM)
    assert parallel_transfer("in", sizes, SYSTEM) == padded
    if min(sizes) == max(sizes):
        assert padded < sum(parallel_transfer("in", [size], SYSTEM) for size in sizes)  # one after the other


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2555))
def test_more_dpus_never_lower_the_bandwidth(dpus: int) -> None:
    for direction in ("in", "out"):
        assert host_bandwidth(direction, dpus, SYSTEM) <= host_bandwidth(direction, dpus + 1, SYSTEM) * (
            1 + 1e-12
        )


def test_limits_are_named() -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        mram_read_cycles(12)
    with pytest.raises(InputError, match="tasklets"):
        PimSystem(tasklets=25)
    with pytest.raises(InfeasibleError, match="1920 DPUs"):
        lookup_time(UBC_LOAD, PimSystem(dpus=64))
    with pytest.raises(InfeasibleError, match="does not fit on 4 DPUs"):
        best_tile(TileProblem(10_000_000, 64, 32, 10, PimSystem(dpus=4)))


def random_problem(rng: np.random.Generator) -> TileProblem:
    return TileProblem(
        rows=int(10 ** rng.uniform(3, 7)),
        cols=int(rng.integers(1, 260)),
        batch=int(2 ** rng.uniform(3, 13)),
        pooling=float(10 ** rng.uniform(0, 2.6)),
        system=PimSystem(dpus=int(2 ** rng.uniform(8, 11.3)), tasklets=int(rng.integers(1, 25))),
        element="int32" if rng.random() < 0.7 else "fp32",
    )


def test_closed_form_equals_brute_force_on_200_random_problems() -> None:
    rng = np.random.default_rng(2024)
    for _ in range(200):
        problem = random_problem(rng)
        grid = np.geomspace(0.01, 4096, 1000)
        least = min(relaxed_seconds(problem, float(x)) for x in grid)
        assert relaxed_seconds(problem, closed_form_columns(problem)) <= least * (1 + 1e-12)
        allowed = widths(problem)
        assert relaxed_seconds(problem, closed_form_tile(problem)) == min(
            relaxed_seconds(problem, x) for x in allowed
        )


def every_time(problem: TileProblem, columns: int) -> np.ndarray:
    """Seconds with 1, 2, ... row tiles, infinite where they do not fit: the model written a second time."""
    system, batch = problem.system, problem.batch
    ids = batch * problem.pooling
    col_tiles = -(-problem.cols // columns)
    k = np.arange(1, min(system.dpus // col_tiles, problem.rows) + 1, dtype=np.float64)
    n, height = k * col_tiles, np.ceil(problem.rows / k)
    reads, stride = ids * height / problem.rows, 8 * ((4 * columns + 7) // 8)
    push, pull = 64 + 8 * ((4 * (batch + 4) + 7) // 8) + 4 * reads, batch * stride
    rates = []
    for one, rank, full in ((0.33e9, 6.68e9, 15.9e9), (0.12e9, 4.74e9, 8.44e9)):
        inside = one * n / (1 + (n - 1) * (64 * one / rank - 1) / 63)
        rates.append(np.where(n < 64, inside, rank * (n / 64) ** (np.log(full / rank) / np.log(40))))
    instructions = 20 + stride / 4 * 350 / (58.6 if problem.element == "int32" else 4.9)
    dma = 77 + stride / 2 + (77 + 128) / 64
    bag_instructions, bag_dma = 40 + 3 * stride / 4, 85 / 2 + 61 + stride / 2
    cycles = np.maximum(reads * instructions + batch * bag_instructions, reads * dma + batch * bag_dma)
    waiting = (
        11 * (reads * instructions + batch * bag_instructions) + reads * dma + batch * bag_dma
    ) / system.tasklets
    cycles = np.maximum(cycles, waiting)
    seconds = 1.46e-4 + n * push / rates[0] + 1.83e-4 + cycles / 350e6 + 1.83e-4 + n * pull / rates[1]
    seconds += batch * problem.cols * 4 * (k + 1) / 75e9
    return np.where(height * stride + push + pull > 64 * 2**20, np.inf, seconds)


def test_best_tile_equals_brute_force_on_200_random_problems() -> None:
    rng = np.random.default_rng(7)
    feasible = 0
    for _ in range(200):
        problem = random_problem(rng)
        least = np.inf
        for columns in range(2, min(512, 2 * -(-problem.cols // 2)) + 1, 2):
            buffers = problem.system.tasklets * (2 * 4 * columns + 256 + 16 + 1024) + 64 + 2048
            if buffers <= 65536 and (times := every_time(problem, columns)).size:
                assert shape_bound(problem, columns).least <= times.min()
                least = min(least, times.min())
        if np.isinf(least):
            with pytest.raises(InfeasibleError):
                best_tile(problem)
            continue
        feasible += 1
        assert best_tile(problem).time.total == pytest.approx(least, rel=1e-12)
    assert feasible > 120


def test_the_cpu_takes_the_hot_rows_only_when_that_helps() -> None:
    problem = TileProblem(20_000, 64, 512, 50, PimSystem(dpus=256, gather=2e9))
    tile = best_tile(problem)
    hot = np.arange(1, problem.rows + 1, dtype=np.float64) ** -1.2
    share = split_reduction(problem, hot, tile)
    assert 0 < share.rows < problem.rows
    assert share.seconds < share.alone
    fast_cpu = PimSystem(dpus=256, gather=1e12)
    assert split_reduction(TileProblem(20_000, 64, 512, 50, fast_cpu), hot, tile).accesses == 1
    slow_cpu = PimSystem(dpus=256, gather=1e6)
    assert split_reduction(TileProblem(20_000, 64, 512, 50, slow_cpu), hot, tile).rows == 0
