"""Hit rates of a cache of rows in front of a slower tier, from the popularity of the rows.

Under the independent reference model (each access picks row i with probability p_i):

  LRU   Che's approximation: the characteristic time T solves  sum_i (1 - exp(-p_i T)) = C;
        row i is hit with 1 - exp(-p_i T), the cache with  sum_i p_i (1 - exp(-p_i T)).
        (Che, Tung, Wang: "Hierarchical Web Caching Systems", IEEE JSAC 20(7), 2002.)
  LFU   in the steady state the C most popular rows stay:  sum of the C largest p_i.

Real streams need not be independent: :func:`reuse_histogram` gives the exact LRU curve of a trace (Mattson's
stack distances), and nothing that depends on order can be had from popularity alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ir.errors import InputError

FloatArray = npt.NDArray[np.float64]
Policy = Literal["lru", "lfu"]

EXACT_ROWS = 100_000  # ranks of a Zipf law kept one by one; beyond, groups of geometric width
TAIL_GROUPS = 2_000  # groups of the tail: 1.2 % apart for 1e15 rows, far below a point of hit rate


@dataclass(frozen=True, slots=True, eq=False)
class Popularity:
    """Rows in groups of equal popularity, hottest first.

    Attributes:
        counts: rows of each group; fractions are allowed.
        mass: fraction of all accesses that each group receives; sums to 1.
    """

    counts: FloatArray
    mass: FloatArray

    def __post_init__(self) -> None:
        if self.counts.shape != self.mass.shape or not len(self.counts):
            raise InputError("popularity needs as many row counts as masses, at least one")
        if (
            (self.counts <= 0).any()
            or (self.mass < 0).any()
            or not math.isclose(self.mass.sum(), 1, abs_tol=1e-6)
        ):
            raise InputError("popularity needs positive row counts and masses that add up to 1")

    @property
    def rows(self) -> float:
        """All rows, also those never accessed."""
        return float(self.counts.sum())

    @classmethod
    def from_counts(cls, counts: npt.ArrayLike) -> Popularity:
        """From accesses per row (any order; zeros are rows that are never accessed)."""
        values, rows = np.unique(np.asarray(counts, dtype=np.float64), return_counts=True)
        if not len(values) or values[0] < 0 or values.sum() <= 0:
            raise InputError("access counts must not be negative, and at least one must be positive")
        values, rows = values[::-1], rows[::-1]
        return cls(rows.astype(np.float64), values * rows / (values * rows).sum())

    @classmethod
    def from_zipf(cls, rows: int, exponent: float) -> Popularity:
        """p(rank) ~ rank**-exponent over ``rows`` rows."""
        if rows < 1 or exponent < 0 or not math.isfinite(exponent):
            raise InputError(
                f"a Zipf law needs rows >= 1 and a finite exponent >= 0, not {rows} and {exponent}"
            )
        exact = min(rows, EXACT_ROWS)
        weights = np.arange(1, exact + 1, dtype=np.float64) ** -exponent
        counts = np.ones(exact)
        if rows > exact:
            edges = np.unique(np.geomspace(exact, rows, TAIL_GROUPS + 1).round()) + 0.5
            tail = _power_integral(edges[1:], exponent) - _power_integral(edges[:-1], exponent)
            weights, counts = np.concatenate([weights, tail]), np.concatenate([counts, np.diff(edges)])
        return cls(counts, weights / weights.sum())

    @classmethod
    def from_icdf(cls, icdf: Sequence[float], rows: int) -> Popularity:
        """From an ICDF as in :mod:`ir.workload`: rows of one step are taken as equally popular.

        Rows beyond the last step are never accessed. Steps that share a row (a row hotter than a whole
        step) are merged until the group holds one row.
        """
        if len(icdf) < 2 or rows < 1:
            raise InputError("an ICDF needs at least two points and a table at least one row")
        steps = len(icdf) - 1
        counts: list[float] = []
        mass: list[float] = []
        held, gathered = 0.0, 0.0
        for width in np.diff(np.asarray(icdf, dtype=np.float64)) * rows:
            held, gathered = held + float(width), gathered + 1 / steps
            if held >= 1:
                counts.append(held)
                mass.append(gathered)
                held, gathered = 0.0, 0.0
        if gathered:
            counts.append(max(held, 1.0) if not counts else max(held, 1e-9))
            mass.append(gathered)
        cold = rows - sum(counts)
        if cold > 1e-6:
            counts.append(cold)
            mass.append(0.0)
        order = np.argsort(-np.asarray(mass) / np.asarray(counts), kind="stable")
        return cls(np.asarray(counts)[order], np.asarray(mass)[order])


def _power_integral(edge: FloatArray, exponent: float) -> FloatArray:
    if abs(exponent - 1) < 1e-12:
        return np.log(edge)
    return np.asarray(edge ** (1 - exponent) / (1 - exponent))


def characteristic_time(popularity: Popularity, capacity: float) -> float:
    """Accesses after which an LRU cache of ``capacity`` rows forgets a row; infinite if all touched rows fit."""
    touched = popularity.mass > 0
    counts, rate = popularity.counts[touched], popularity.mass[touched] / popularity.counts[touched]
    if capacity >= counts.sum():
        return math.inf
    low, high = 0.0, max(1.0, capacity)
    while float((counts * -np.expm1(-rate * high)).sum()) < capacity:
        low, high = high, high * 2
    for _ in range(80):
        middle = (low + high) / 2
        if float((counts * -np.expm1(-rate * middle)).sum()) < capacity:
            low = middle
        else:
            high = middle
    return high


def hit_rate(policy: Policy, popularity: Popularity, capacity: float) -> float:
    """Fraction of accesses that a cache of ``capacity`` rows serves in the steady state.

    >>> hit_rate("lfu", Popularity.from_counts([8, 1, 1]), 1)
    0.8

    Raises:
        InputError: a negative capacity or an unknown policy.
    """
    if capacity < 0:
        raise InputError(f"a cache cannot hold {capacity} rows")
    if policy == "lfu":
        held = np.minimum(
            popularity.counts, np.maximum(0, capacity - np.cumsum(popularity.counts) + popularity.counts)
        )
        return float((popularity.mass * held / popularity.counts).sum())
    if policy != "lru":
        raise InputError(f"unknown cache policy {policy!r}; use 'lru' or 'lfu'")
    if capacity == 0:
        return 0.0
    time = characteristic_time(popularity, capacity)
    if math.isinf(time):
        return 1.0
    return float((popularity.mass * -np.expm1(-popularity.mass / popularity.counts * time)).sum())


def reuse_histogram(ids: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], int]:
    """Stack distances of a trace: ``(histogram, first)``.

    ``histogram[d]`` accesses find their row after d other distinct rows were accessed; ``first`` accesses
    see their row for the first time. (Mattson et al., IBM Systems Journal 9(2), 1970.) O(n log n).
    """
    trace = np.asarray(ids).reshape(-1)
    size = len(trace)
    tree = [0] * (size + 1)  # Fenwick tree: 1 at the last access of each row
    last: dict[int, int] = {}
    distances: list[int] = []

    def add(position: int, value: int) -> None:
        while position <= size:
            tree[position] += value
            position += position & -position

    def below(position: int) -> int:
        total = 0
        while position:
            total += tree[position]
            position -= position & -position
        return total

    for now, row in enumerate(trace.tolist(), start=1):
        before = last.get(row)
        if before is not None:
            distances.append(len(last) - below(before))
            add(before, -1)
        add(now, 1)
        last[row] = now
    return np.bincount(np.asarray(distances, dtype=np.int64), minlength=1), len(last)


def lru_hit_rate_of_trace(histogram: npt.NDArray[np.int64], first: int, capacity: int) -> float:
    """Exact hit rate of an LRU cache of ``capacity`` rows that starts empty, from :func:`reuse_histogram`."""
    total = int(histogram.sum()) + first
    return float(histogram[:capacity].sum() / total) if total else 0.0
