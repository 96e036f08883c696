"""What the tiered runtime does in one step: rows fetched, pages moved, seconds.

Hit rates follow Che's approximation (see :mod:`cost_models.cache`) taken batch by batch: a row with the share p
of n ids is in a batch with probability q = 1 - (1-p)^n. An LRU cache of C rows holds the rows of the last T
batches, where T solves sum_i 1 - (1-q_i)^T = C; row i is then fetched in a batch with probability
q_i (1-q_i)^T. An LFU cache holds the most popular rows, less the slots that the fetched rows pass through.

Rows share pages, and a page is moved once a batch: a page whose rows are fetched with probabilities f_i is read
with probability 1 - prod(1 - f_i). In the steady state rows leave the cache as often as they come, and in training
each has been changed: its page is written, and read before that unless the row is alone in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from ir.errors import InputError

FloatArray = npt.NDArray[np.float64]
Policy = Literal["lru", "lfu"]


@dataclass(frozen=True, slots=True)
class FileRange:
    """Rows of one tier, in order of popularity.

    Attributes:
        kind: "ram", "mapped" or "block" as in codegen/runtime/tiered.
        rows: how many; ``per_page`` of them share a page of ``page_bytes``.
    """

    kind: str
    rows: int
    per_page: int = 1
    page_bytes: int = 4096


@dataclass(frozen=True, slots=True)
class BlockTraffic:
    """Expected pages of one block file in a batch.

    Attributes:
        fetched: read because of missing rows; as many are written back.
        completed: read because some of their rows are written back, all at another time than the former.
    """

    page_bytes: int
    fetched: float
    completed: float


@dataclass(frozen=True, slots=True)
class BatchTraffic:
    """Expected counts of one batch in the steady state."""

    ids: float
    distinct: float
    fetched: float
    mapped: float  # rows fetched from mapped files, of ``fetched``
    blocks: tuple[BlockTraffic, ...]  # of each block file

    @property
    def pages_read(self) -> float:
        """Pages read, those of the rows that are fetched and those that are written back."""
        return sum(block.fetched + block.completed for block in self.blocks)

    @property
    def hit_rate(self) -> float:
        """Fraction of ids that need no read: all but the first of each fetched row in its batch."""
        return 1 - self.fetched / self.ids


def fetch_probabilities(
    shares: FloatArray, ids: float, cache_rows: float, policy: Policy, in_flight: int = 1
) -> FloatArray:
    """(rows,) probability that a batch of ``ids`` independent ids fetches each row.

    Args:
        shares: (rows,) fraction of all accesses that each row receives; they may add up to less than 1.
        ids: of a batch.
        cache_rows: rows that fit.
        in_flight: batches whose rows are pinned at a time: 1, and those that are prefetched.

    Raises:
        InputError: an unknown policy.
    """
    # rows that receive every access would give log(0)
    absent = np.exp(ids * np.log1p(-np.minimum(shares, 1 - 1e-15)))  # probability that a batch lacks the row
    inside = 1 - absent
    if cache_rows >= (shares > 0).sum():
        return np.zeros_like(shares)
    if policy == "lru":
        return np.asarray(inside * absent ** _window(absent, cache_rows))
    if policy != "lfu":
        raise InputError(f"unknown cache policy {policy!r}; use 'lru' or 'lfu'")
    order = np.argsort(-shares, kind="stable")
    tail = np.append(np.cumsum(inside[order][::-1])[::-1], 0.0)  # rows fetched when the first k are held
    needed = np.arange(len(tail)) + in_flight * tail  # slots, when the k most popular rows stay
    count = max(0, int(np.searchsorted(needed, cache_rows, side="right")) - 1)
    found = inside.copy()
    found[order[:count]] = 0.0
    return found


def _window(absent: FloatArray, cache_rows: float) -> float:
    """Batches that an LRU cache remembers."""
    low, high = 0.0, 1.0
    while float((1 - absent**high).sum()) < cache_rows:
        low, high = high, high * 2
        if high > 1e12:
            return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((1 - absent**middle).sum()) < cache_rows else (low, middle)
    return high


def expected_traffic(
    shares: FloatArray,
    ids: float,
    ranges: Sequence[FileRange],
    cache_rows: float,
    policy: Policy,
    in_flight: int = 1,
) -> BatchTraffic:
    """What one batch moves.

    Args:
        shares: (rows,) fraction of the accesses of each row, in the order of the ranges.
        ids: accesses of a batch.
        ranges: the tiers; a first one of kind "ram" is held in memory, the others share the cache.
        cache_rows, policy, in_flight: as :func:`fetch_probabilities`.
    """
    if sum(r.rows for r in ranges) != len(shares):
        raise InputError(
            f"the ranges hold {sum(r.rows for r in ranges)} rows but there are {len(shares)} shares"
        )
    held = ranges[0].rows if ranges[0].kind == "ram" else 0
    fetched = np.zeros_like(shares)
    fetched[held:] = fetch_probabilities(shares[held:], ids, cache_rows, policy, in_flight)
    mapped = 0.0
    blocks = []
    start = held
    for part in ranges[1 if held else 0 :]:
        of_part = fetched[start : start + part.rows]
        start += part.rows
        if part.kind == "mapped":
            mapped += float(of_part.sum())
            continue
        stay = np.log1p(-np.minimum(of_part, 1 - 1e-15))
        pages = float(-np.expm1(np.add.reduceat(stay, np.arange(0, part.rows, part.per_page))).sum())
        blocks.append(BlockTraffic(part.page_bytes, pages, pages if part.per_page > 1 else 0.0))
    inside = -np.expm1(ids * np.log1p(-np.minimum(shares, 1 - 1e-15)))
    return BatchTraffic(ids, float(inside.sum()), float(fetched.sum()), mapped, tuple(blocks))


class Point(Protocol):
    """Seconds of pages that are asked for together (codegen.runtime.tiered.measure.DevicePoint)."""

    @property
    def write(self) -> bool: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Run(Protocol):
    """One calibration run (codegen.runtime.tiered.measure.Sample)."""

    @property
    def kind(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def dense(self) -> bool: ...
    @property
    def ids(self) -> float: ...
    @property
    def distinct(self) -> float: ...
    @property
    def fetched(self) -> float: ...
    @property
    def pages_read(self) -> float: ...
    @property
    def main(self) -> float: ...
    @property
    def fetch(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by number of pages, for one page size and direction; straight between measured points."""

    page_bytes: int
    pages: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, pages: float) -> float:
        """Seconds of ``pages`` pages; beyond the last point at the rate of the last two."""
        if pages <= 0:
            return 0.0
        if pages > self.pages[-1]:
            rate = (self.seconds[-1] - self.seconds[-2]) / (self.pages[-1] - self.pages[-2])
            return self.seconds[-1] + rate * (pages - self.pages[-1])
        return float(np.interp(pages, (0.0, *self.pages), (0.0, *self.seconds)))


@dataclass(frozen=True, slots=True)
class RuntimeRates:
    """What the runtime's work takes on one machine, seconds; from :func:`fit`.

    Attributes:
        reads, writes: of block files, by page size, ascending.
        beside: how many times longer a fetch takes beside the step that it overlaps.
        main_cold, main_page: what a step takes longer after its rows were waited for, and for each page that came
            by: the processor's caches hold others.
    """

    reads: tuple[Curve, ...]
    writes: tuple[Curve, ...]
    beside: float
    main_step: float
    main_id: float
    main_row: float
    main_element: float  # a column of a distinct row
    main_cold: float
    main_page: float
    fetch_step: float
    fetch_id: float
    fetch_distinct: float  # a distinct row, fetched or not
    fetch_row: float  # a row that is fetched
    fetch_element: float  # a column of it

    def main(self, traffic: BatchTraffic, dim: int) -> float:
        """Seconds of forward, backward and update of a batch in memory."""
        row = self.main_row + self.main_element * dim
        cold = self.main_cold * min(1.0, traffic.pages_read) + self.main_page * traffic.pages_read
        return self.main_step + self.main_id * traffic.ids + row * traffic.distinct + cold

    def fetch(self, traffic: BatchTraffic, dim: int) -> float:
        """Seconds until the missing rows of a batch are in memory."""
        seconds = self.fetch_step + self.fetch_id * traffic.ids + self.fetch_distinct * traffic.distinct
        seconds += (self.fetch_row + self.fetch_element * dim) * traffic.fetched
        for block in traffic.blocks:
            seconds += _between(self.reads, block.page_bytes, block.fetched)
            seconds += _between(self.reads, block.page_bytes, block.completed)
            seconds += _between(self.writes, block.page_bytes, block.fetched)
        return seconds

    def step(self, traffic: BatchTraffic, dim: int, depth: int, dense: float = 0.0) -> float:
        """Seconds of a step; ``dense`` are those of the rest of the model, ``depth`` batches are prefetched."""
        main, fetch = self.main(traffic, dim) + dense, self.fetch(traffic, dim)
        return max(main, self.beside * fetch) if depth else main + fetch


def _between(curves: Sequence[Curve], page_bytes: int, pages: float) -> float:
    """Seconds at a page size between those that were measured."""
    sizes = [curve.page_bytes for curve in curves]
    return float(np.interp(page_bytes, sizes, [curve.at(pages) for curve in curves]))


def fit(device: Sequence[Point], runs: Sequence[Run]) -> RuntimeRates:
    """Constants from a calibration: curves as measured, the rest by least squares of relative errors.

    The runs on block files only give ``main_cold``, ``main_page`` and ``beside``, from pairs with and without
    prefetch; how long they fetch is left to judge the curves by.

    Raises:
        InputError: too few points or runs.
    """
    alone = [r for r in runs if not r.depth and not r.dense]
    quiet = [r for r in alone if r.kind != "block"]
    if len(quiet) < 6 or not device:
        raise InputError(f"{len(quiet)} calibration runs are too few; measure every kind at several sizes")
    main = _nonnegative(
        [[1.0, r.ids, r.distinct, r.distinct * r.dim, float(r.kind == "block"), r.pages_read] for r in alone],
        [r.main for r in alone],
    )
    fetch = _nonnegative(
        [[1.0, r.ids, r.distinct, r.fetched, r.fetched * r.dim] for r in quiet], [r.fetch for r in quiet]
    )
    ratios = [
        later.fetch / first.fetch for first, later in itertools.pairwise(runs) if later.depth > first.depth
    ]
    beside = max(1.0, float(np.median(ratios))) if ratios else 1.0
    curves = {way: _curves([p for p in device if p.write == way]) for way in (False, True)}
    return RuntimeRates(curves[False], curves[True], beside, *main, *fetch)


def _curves(points: Sequence[Point]) -> tuple[Curve, ...]:
    made = []
    for size in sorted({p.page_bytes for p in points}):
        line = sorted((p.pages, p.seconds) for p in points if p.page_bytes == size)
        made.append(Curve(size, tuple(float(n) for n, _ in line), tuple(s for _, s in line)))
    return tuple(made)


def _nonnegative(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients >= 0 that minimise the squared relative errors, by coordinate descent."""
    scale = np.asarray(seconds, dtype=np.float64)
    a = np.asarray(terms, dtype=np.float64) / scale[:, None]
    unit = np.maximum(np.linalg.norm(a, axis=0), 1e-300)
    a = a / unit
    gram, wanted = a.T @ a, a.T @ np.ones(len(scale))
    x = np.zeros(a.shape[1])
    for _ in range(20_000):
        before = x.copy()
        for j in np.flatnonzero(np.diag(gram) > 0):
            x[j] = max(0.0, x[j] + (wanted[j] - gram[j] @ x) / gram[j, j])
        if float(np.abs(x - before).max()) <= 1e-12 * max(1.0, float(x.max())):
            break
    return [float(value) for value in x / unit]
