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

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
class BatchTraffic:
    """Expected counts of one batch in the steady state."""

    ids: float
    distinct: float
    fetched: float
    mapped: float  # rows fetched from mapped files, of ``fetched``
    pages_read: float
    pages_written: float
    bytes_read: float  # of pages
    bytes_written: float

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
    pages, moved = [0.0, 0.0], [0.0, 0.0]  # read, written
    start = held
    for part in ranges[1 if held else 0 :]:
        of_part = fetched[start : start + part.rows]
        start += part.rows
        if part.kind == "mapped":
            mapped += float(of_part.sum())
            continue
        stay = np.log1p(-np.minimum(of_part, 1 - 1e-15))
        touched = float(-np.expm1(np.add.reduceat(stay, np.arange(0, part.rows, part.per_page))).sum())
        for way, times in enumerate((2 if part.per_page > 1 else 1, 1)):
            pages[way] += times * touched
            moved[way] += times * touched * part.page_bytes
    inside = -np.expm1(ids * np.log1p(-np.minimum(shares, 1 - 1e-15)))
    return BatchTraffic(ids, float(inside.sum()), float(fetched.sum()), mapped, *pages, *moved)


class Measured(Protocol):
    """One calibration run (codegen.runtime.tiered.measure.Sample)."""

    @property
    def kind(self) -> str: ...
    @property
    def trained(self) -> bool: ...
    @property
    def dim(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def ids(self) -> float: ...
    @property
    def distinct(self) -> float: ...
    @property
    def fetched(self) -> float: ...
    @property
    def pages_read(self) -> float: ...
    @property
    def pages_written(self) -> float: ...
    @property
    def main(self) -> float: ...
    @property
    def fetch(self) -> float: ...


@dataclass(frozen=True, slots=True)
class RuntimeRates:
    """Seconds of the runtime's work on one machine, fitted by :func:`fit` to its calibration runs."""

    main_step: float
    main_id: float
    main_row: float
    main_element: float  # a column of a distinct row
    fetch_step: float
    fetch_id: float
    fetch_row: float  # a row that is fetched
    fetch_element: float  # a column of it
    mapped_row: float  # on top, for a row of a mapped file
    read_batch: float  # of pages, however many
    page_read: float
    byte_read: float
    write_batch: float
    page_write: float
    byte_write: float

    def main(self, traffic: BatchTraffic, dim: int) -> float:
        """Seconds of forward, backward and update of a batch in memory."""
        row = self.main_row + self.main_element * dim
        return self.main_step + self.main_id * traffic.ids + row * traffic.distinct

    def fetch(self, traffic: BatchTraffic, dim: int) -> float:
        """Seconds until the missing rows of a batch are in memory."""
        rows = (
            self.fetch_row + self.fetch_element * dim
        ) * traffic.fetched + self.mapped_row * traffic.mapped
        # a batch that moves less than a page on average moves none at times
        reads = self.read_batch * min(1.0, traffic.pages_read) + self.page_read * traffic.pages_read
        writes = self.write_batch * min(1.0, traffic.pages_written) + self.page_write * traffic.pages_written
        reads += self.byte_read * traffic.bytes_read
        writes += self.byte_write * traffic.bytes_written
        return self.fetch_step + self.fetch_id * traffic.ids + rows + reads + writes

    def step(self, traffic: BatchTraffic, dim: int, depth: int, dense: float = 0.0) -> float:
        """Seconds of a step; ``dense`` are those of the rest of the model, ``depth`` batches are prefetched."""
        main, fetch = self.main(traffic, dim) + dense, self.fetch(traffic, dim)
        return max(main, fetch) if depth else main + fetch


def fit(runs: Sequence[Measured]) -> RuntimeRates:
    """Constants from calibration runs, by non-negative least squares of relative errors."""
    if len(runs) < 8:
        raise InputError(f"{len(runs)} calibration runs are too few; measure every kind at several sizes")
    trained = [r for r in runs if r.trained]
    main = [[1.0, r.ids, r.distinct, r.distinct * r.dim] for r in trained]
    fetch = []
    for r in runs:
        block = r.kind == "block"
        reads, writes = (pages * block for pages in (r.pages_read, r.pages_written))
        rows = [r.fetched, r.fetched * r.dim, r.fetched * (r.kind == "mapped")]
        moved = [[min(1.0, pages), pages, pages * r.page_bytes] for pages in (reads, writes)]
        fetch.append([1.0, r.ids, *rows, *moved[0], *moved[1]])
    found = [*_nonnegative(main, [r.main for r in trained]), *_nonnegative(fetch, [r.fetch for r in runs])]
    return RuntimeRates(**{f.name: value for f, value in zip(fields(RuntimeRates), found, strict=True)})


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
