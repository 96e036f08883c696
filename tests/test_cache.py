"""Hit-rate curves against a cache that is driven by a trace."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.cache import Popularity, hit_rate, lru_hit_rate_of_trace, reuse_histogram
from ir.errors import InputError
from ir.workload import icdf_from_ids, icdf_from_zipf

ROWS = 2000


def zipf_trace(rows: int, exponent: float, length: int, seed: int) -> np.ndarray:
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    draws = np.random.default_rng(seed).choice(rows, size=length, p=weights / weights.sum())
    return np.random.default_rng(seed + 1).permutation(rows)[draws]  # hot rows anywhere in the table


def run_lru(trace: np.ndarray, capacity: int, warm: int) -> float:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for step, row in enumerate(trace.tolist()):
        if row in cache:
            cache.move_to_end(row)
            hits += step >= warm
            continue
        cache[row] = None
        if len(cache) > capacity:
            cache.popitem(last=False)
    return hits / (len(trace) - warm)


def run_lfu(trace: np.ndarray, capacity: int, warm: int) -> float:
    """Counts over the whole past, one row evicted at a time: the least counted of the cache."""
    counts = np.zeros(int(trace.max()) + 1)
    cached = np.zeros(len(counts), dtype=bool)
    inside = hits = 0
    for step, row in enumerate(trace.tolist()):
        counts[row] += 1
        if cached[row]:
            hits += step >= warm
            continue
        if inside < capacity:
            cached[row] = True
            inside += 1
            continue
        victim = int(np.argmin(np.where(cached, counts, np.inf)))
        if counts[victim] <= counts[row]:
            cached[victim], cached[row] = False, True
    return hits / (len(trace) - warm)


@pytest.mark.parametrize("exponent", [0.0, 0.6, 0.9, 1.05, 1.4])
def test_lru_curve_is_within_a_point_of_a_simulated_cache(exponent: float) -> None:
    trace = zipf_trace(ROWS, exponent, 60_000, seed=3)
    popularity = Popularity.from_zipf(ROWS, exponent)
    for capacity in (10, 50, 200, 800, 1600):
        simulated = run_lru(trace, capacity, warm=20_000)
        assert hit_rate("lru", popularity, capacity) == pytest.approx(simulated, abs=0.01)


@pytest.mark.parametrize("exponent", [0.6, 1.05, 1.4])
def test_lfu_curve_is_within_two_points_of_a_simulated_cache(exponent: float) -> None:
    trace = zipf_trace(ROWS, exponent, 60_000, seed=5)
    popularity = Popularity.from_zipf(ROWS, exponent)
    for capacity in (10, 200, 800):
        simulated = run_lfu(trace, capacity, warm=40_000)
        assert hit_rate("lfu", popularity, capacity) == pytest.approx(simulated, abs=0.02)


@pytest.mark.parametrize("exponent", [0.6, 1.05])
def test_popularity_measured_from_a_trace_predicts_the_next_trace(exponent: float) -> None:
    popularity = Popularity.from_counts(np.bincount(zipf_trace(ROWS, exponent, 60_000, 7), minlength=ROWS))
    fresh = zipf_trace(ROWS, exponent, 60_000, seed=7)[::-1]
    for capacity in (100, 600):
        assert hit_rate("lru", popularity, capacity) == pytest.approx(
            run_lru(fresh, capacity, 20_000), abs=0.015
        )


@pytest.mark.parametrize("exponent", [0.6, 1.05, 1.4])
def test_the_icdf_of_a_workload_gives_the_same_curve_within_two_points(exponent: float) -> None:
    trace = zipf_trace(ROWS, exponent, 60_000, seed=11)
    for icdf in (icdf_from_zipf(ROWS, exponent), icdf_from_ids(trace, ROWS)):
        popularity = Popularity.from_icdf(icdf, ROWS)
        assert popularity.rows == pytest.approx(ROWS)
        for capacity in (50, 200, 800):
            assert hit_rate("lru", popularity, capacity) == pytest.approx(
                run_lru(trace, capacity, 20_000), abs=0.02
            )


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_the_grouped_tail_of_a_zipf_law_agrees_with_every_rank_written_out(exponent: float) -> None:
    rows = 1_000_000
    every = Popularity.from_counts(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)
    grouped = Popularity.from_zipf(rows, exponent)
    assert grouped.rows == pytest.approx(rows)
    for policy in ("lru", "lfu"):
        for capacity in (1_000, 150_000, 600_000):
            assert hit_rate(policy, grouped, capacity) == pytest.approx(
                hit_rate(policy, every, capacity), abs=2e-4
            )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(1, 14))
def test_stack_distances_give_the_simulated_hit_rate_exactly(ids: list[int], capacity: int) -> None:
    histogram, first = reuse_histogram(ids)
    assert lru_hit_rate_of_trace(histogram, first, capacity) == run_lru(np.asarray(ids), capacity, warm=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=40).filter(any))
def test_laws_of_a_hit_rate_curve(counts: list[int]) -> None:
    popularity = Popularity.from_counts(counts)
    sizes = np.linspace(0, len(counts), 9)
    lru, lfu = ([hit_rate(policy, popularity, size) for size in sizes] for policy in ("lru", "lfu"))
    for curve in (lru, lfu):
        assert curve == sorted(curve)
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(1)
    assert all(a <= b + 1e-9 for a, b in zip(lru, lfu, strict=True))  # LFU holds the best rows there are


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Popularity.from_counts([0, 0]), "positive"),
        (lambda: Popularity.from_zipf(10, -1.0), "Zipf"),
        (lambda: Popularity.from_icdf((0.0,), 10), "two points"),
        (lambda: hit_rate("lru", Popularity.from_counts([1]), -1), "cannot hold"),
        (lambda: hit_rate("fifo", Popularity.from_counts([1]), 1), "unknown cache policy"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
