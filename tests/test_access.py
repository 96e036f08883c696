"""Popularity recovered from reuse histograms, against the law that drew the trace and against LRU simulated on it."""

from __future__ import annotations

import numpy as np
import pytest

from cost_models.cache import Popularity, hit_rate, lru_hit_rate_of_trace, reuse_histogram
from ir.access import icdf_from_reuse, popularity_from_reuse
from ir.errors import InputError
from ir.workload import FeatureStats, icdf_from_zipf

ROWS, LENGTH = 1500, 30_000


def trace(exponent: float) -> np.ndarray:
    weights = np.arange(1, ROWS + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(4).choice(ROWS, size=LENGTH, p=weights / weights.sum())


@pytest.mark.parametrize("exponent", [0.4, 0.8, 1.1])
def test_the_law_behind_a_trace_is_found_without_its_ids(exponent: float) -> None:
    histogram, first = reuse_histogram(trace(exponent))
    found = FeatureStats(icdf=icdf_from_reuse(histogram, first, ROWS))
    law = FeatureStats(icdf=icdf_from_zipf(ROWS, exponent))
    for rows in (0.01, 0.03, 0.1, 0.3, 0.6):
        assert found.hit_rate(rows) == pytest.approx(law.hit_rate(rows), abs=0.03)


@pytest.mark.parametrize("exponent", [0.4, 0.8, 1.1])
def test_its_caches_hit_as_often_as_those_of_the_trace(exponent: float) -> None:
    ids = trace(exponent)
    popularity = Popularity(*popularity_from_reuse(*reuse_histogram(ids)))
    whole = reuse_histogram(ids)
    half = reuse_histogram(ids[: LENGTH // 2])
    for capacity in (20, 100, 400, 900):
        # hits of the second half alone: its cache is warm
        late = 2 * lru_hit_rate_of_trace(*whole, capacity) - lru_hit_rate_of_trace(*half, capacity)
        assert hit_rate("lru", popularity, capacity) == pytest.approx(late, abs=0.02)


def test_rows_never_seen_are_counted_but_receive_nothing() -> None:
    histogram, first = reuse_histogram(trace(1.1))
    counts, mass = popularity_from_reuse(histogram, first, 10 * ROWS)
    assert counts.sum() == pytest.approx(10 * ROWS)
    assert mass[-1] == 0
    assert mass.sum() == pytest.approx(1)
    assert counts[:-1].sum() == pytest.approx(ROWS, rel=0.03)


@pytest.mark.parametrize(
    ("histogram", "first", "rows", "message"),
    [
        ([], 1, None, "some of them positive"),
        ([1, -1], 1, None, "counts >= 0"),
        ([3], 0, None, "at least one first access"),
        ([3], 5, 4, "5 distinct rows but the table only 4"),
    ],
)
def test_unusable_histograms(histogram: list[int], first: int, rows: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        popularity_from_reuse(histogram, first, rows)
