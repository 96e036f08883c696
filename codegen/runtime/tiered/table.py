"""A table over memory tiers: hot rows held in memory, a cache of the others, and files that hold every row.

Rows are numbered by popularity: the first ``ram`` rows stay in memory for good; the rest are fetched into slots
of a row cache, ahead of use, by one worker thread that takes batches in order (a batch that was not prefetched
is fetched by the caller itself, when no other is under way):

1. the rows of the batch that are cached are pinned, so that they stay until the batch is done;
2. for the others it takes the slots that come last in the policy's order, writes those that were changed
   back to their file, and reads the missing rows;
3. the caller computes on the slots, marks them changed, and lets the batch go.

Fetches never overlap, and a row is read only after it was written, so every batch sees all earlier updates, and
training gives the same result as with the whole table in memory, whatever the depth of the prefetch.

``flush`` writes all changed rows, makes them durable and commits (:mod:`codegen.runtime.tiered.commit`):
after a crash the table is opened as it was at the last flush that returned, or a later one.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from codegen.runtime.tiered import commit as commits
from codegen.runtime.tiered.native import DamagedPage, Ints, Slots
from codegen.runtime.tiered.opening import check_length, read_order
from codegen.runtime.tiered.pages import (
    BlockPages,
    Floats,
    MappedPages,
    PageFile,
    Traffic,
    create,
    records_per_page,
)
from ir.errors import InputError
from ir.reading import STRICT, dump_record, parse_record
from ir.workload import Optimizer

Kind = Literal["ram", "mapped", "block"]
Policy = Literal["lru", "lfu"]
Result = TypeVar("Result")

MAX_SLOTS = 2**31 - 1  # slots are numbered with 32 bits
_TICKS = np.uint64(40)  # bits of a key that order slots of equal counts; 2**40 row uses last for years


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive rows in order of popularity.

    Attributes:
        kind: "ram": held in memory, with a block file as their durable home; "mapped": a memory-mapped
            file; "block": a file read past the page cache.
        rows: how many.
        page_bytes: unit of transfer, a multiple of 512.
    """

    __pydantic_config__ = STRICT

    kind: Kind
    rows: int
    page_bytes: int = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """What a table holds; written to its manifest."""

    __pydantic_config__ = STRICT

    rows: int
    dim: int
    optimizer: Optimizer
    ranges: tuple[Range, ...]
    ordered: bool = False  # order.npy gives the rows by popularity

    def __post_init__(self) -> None:
        if min(self.rows, self.dim) < 1 or not self.ranges:
            raise InputError("a tiered table needs rows, columns and at least one range of rows")
        if sum(r.rows for r in self.ranges) != self.rows or any(r.rows < 1 for r in self.ranges):
            raise InputError(
                f"the ranges hold {sum(r.rows for r in self.ranges)} of {self.rows} rows; give each row to one range"
            )
        if any(r.kind == "ram" for r in self.ranges[1:]):
            raise InputError(
                "only the hottest rows can be held in memory: make the first range the one in ram"
            )

    @property
    def state(self) -> int:
        """Floats of optimizer state a row."""
        return {"sgd": 0, "adagrad": self.dim, "rowwise_adagrad": 1, "adam": 2 * self.dim}[self.optimizer]

    @property
    def record(self) -> int:
        """Floats of a row with its state."""
        return self.dim + self.state

    @property
    def held(self) -> int:
        """Rows in memory for good."""
        return self.ranges[0].rows if self.ranges[0].kind == "ram" else 0


@dataclass(slots=True)
class Counters:
    """What happened since the table was opened. An access is one id of a batch."""

    batches: int = 0
    accesses: int = 0
    distinct: int = 0  # distinct rows, added up over batches
    fetched: int = 0  # rows read from a file
    written_back: int = 0  # changed rows written because their slot was needed
    flushed: int = 0  # changed rows written by flush
    flushes: int = 0
    fetch_seconds: float = 0.0  # of all fetches, whoever ran them
    wait_seconds: float = 0.0  # the caller's time until its batch was there, fetches of its own included

    @property
    def hit_rate(self) -> float:
        """Fraction of accesses that needed no read: all but the first of each fetched row in its batch."""
        return 1 - self.fetched / self.accesses if self.accesses else 1.0


@dataclass(eq=False, slots=True)
class Batch:
    """Ids that are being fetched or are in use.

    Attributes:
        slots: of the distinct rows, in the order of their ids.
        inverse: (ids,) index into ``slots`` of each id.
    """

    ids: Ints
    slots: Ints = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    inverse: Ints = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    ready: Future[None] | None = None
    released: bool = False


class TieredTable:
    """An open table; use :meth:`create` or :meth:`open`. One caller's thread at a time.

    Attributes:
        weights: (slots, dim) and ``state``: (slots, state): what is in memory.
        counters: what happened since it was opened.
        tag, epoch: of the last flush; ``steps`` is kept across flushes for the optimizer.
    """

    def __init__(self, folder: Path, shape: Shape, cache_rows: int, policy: Policy) -> None:
        if policy not in ("lru", "lfu"):
            raise InputError(f"unknown cache policy {policy!r}; use 'lru' or 'lfu'")
        self.folder, self.shape, self.policy = folder, shape, policy
        outside = shape.rows - shape.held
        self.cache_rows = min(cache_rows, outside)
        if self.cache_rows < min(1, outside) or shape.held + self.cache_rows > MAX_SLOTS:
            raise InputError(
                f"a cache of {cache_rows} rows does not serve {outside} rows outside memory; give it at least 1"
            )
        self._lock = commits.lock(folder)
        slots = shape.held + self.cache_rows
        self.weights: Floats = np.zeros((slots, shape.dim), np.float32)
        self.state: Floats = np.zeros((slots, shape.state), np.float32)
        self._dirty = np.zeros(slots, dtype=bool)
        self._row_of = np.full(slots, -1, np.int64)
        self._slot_of = np.full(shape.rows, -1, np.int32)
        self._uses = np.zeros(shape.rows if policy == "lfu" else 0, np.uint32)
        self._slots = Slots.empty(slots)
        self._tick = slots  # larger than every key so far
        self._queue: deque[Batch] = deque()
        self._released: deque[Ints] = deque()
        self.counters = Counters()
        self._fault: Exception | None = None
        self._rank = read_order(folder / "order.npy", shape.rows) if shape.ordered else None
        self._files = self._open_files()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tiered")
        self._hold(shape.held)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        rows: int,
        dim: int,
        optimizer: Optimizer,
        ranges: Iterable[Range],
        *,
        init: Callable[[Ints], Floats],
        cache_rows: int,
        policy: Policy = "lru",
        order: npt.ArrayLike | None = None,
    ) -> TieredTable:
        """Make a table in a folder that is empty or does not exist, and open it.

        Args:
            rows, dim: of the table.
            optimizer: whose state is kept beside the weights.
            ranges: where rows live, hottest first.
            init: ids (n,) -> (n, dim + state) weights and state; each id is asked for once, hottest first.
            cache_rows: rows outside memory for good that are cached; all rows of the batches in flight must fit.
            order: (rows,) ids, the most popular first; default: ids are in that order already.

        Raises:
            InputError: ranges that do not fit, or a folder that is in use.
        """
        folder = Path(folder)
        ids = None if order is None else np.asarray(order, dtype=np.int64)
        shape = Shape(rows, dim, optimizer, tuple(ranges), ids is not None)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"the folder {folder} is not empty; choose a new one for the table")
        if ids is not None:
            if len(ids) != rows or not np.array_equal(np.sort(ids), np.arange(rows)):
                raise InputError(f"the order of a table must list each of its {rows} rows once")
            np.save(folder / "order.npy", ids, allow_pickle=False)
        pages, start = 0, 0
        for number, part in enumerate(shape.ranges):
            pages += create(
                folder / f"rows.{number}",
                part.rows,
                shape.record,
                part.page_bytes,
                functools.partial(_initial, init, ids, start),
            )
            start += part.rows
        commits.write_commit(folder, commits.Commit(0, -1, 0, np.zeros(pages, np.uint8)))
        commits.write_manifest(folder, dump_record(shape))
        return cls(folder, shape, cache_rows, policy)

    @classmethod
    def open(cls, folder: str | Path, *, cache_rows: int, policy: Policy = "lru") -> TieredTable:
        """Open a table as it was at its last flush; raises InputError or DamagedPage."""
        folder = Path(folder)
        shape = parse_record(Shape, commits.read_manifest(folder), f"{folder / commits.MANIFEST}")
        for number, part in enumerate(shape.ranges):
            pages = -(-part.rows // records_per_page(shape.record, part.page_bytes))
            check_length(folder / f"rows.{number}", 2 * part.page_bytes * pages)
        return cls(folder, shape, cache_rows, policy)

    # --- batches ---

    def prefetch(self, ids: Ints) -> Batch:
        """Start to fetch the rows of a batch; batches are used in the order in which they are prefetched."""
        batch = self._batch(ids)
        batch.ready = self._worker.submit(self._guarded, self._fetch, batch)
        self._queue.append(batch)
        return batch

    def _batch(self, ids: Ints) -> Batch:
        batch = Batch(np.ascontiguousarray(ids, np.int64).reshape(-1))
        if len(batch.ids) and (batch.ids.min() < 0 or batch.ids.max() >= self.shape.rows):
            raise InputError(f"an id lies outside 0..{self.shape.rows - 1}; check the rows of the table")
        return batch

    def take(self, ids: Ints) -> Batch:
        """The batch of these ids, in memory and pinned until :meth:`release`.

        Raises:
            InputError: another batch was prefetched first, or the cache is too small.
        """
        started = time.perf_counter()
        if not self._queue:
            batch = self._batch(ids)
            self._guarded(self._fetch, batch)
        else:
            batch = self._queue[0]
            if batch.ids is not ids and not np.array_equal(batch.ids, np.reshape(ids, -1)):
                raise InputError(
                    "batches must be used in the order in which they were prefetched, and this is not the next one"
                )
            self._queue.popleft()
            assert batch.ready is not None
            batch.ready.result()
        self.counters.wait_seconds += time.perf_counter() - started
        return batch

    def release(self, batch: Batch, *, changed: bool) -> None:
        """The caller is done with a batch, and has changed its rows or not."""
        if batch.released:
            raise InputError("this batch was released already")
        batch.released = True
        if changed:
            self._dirty[batch.slots] = True
        self._released.append(batch.slots)  # for the next fetch, which alone touches the order of eviction

    def _guarded(self, work: Callable[[Any], Result], argument: Any) -> Result:
        """After a failed read or write, what is in memory cannot be trusted any more."""
        if self._fault is not None:
            raise InputError(
                f"the table {self.folder} failed before ({self._fault}); close it and open it again"
            )
        try:
            return work(argument)
        except (OSError, DamagedPage) as error:
            self._fault = error
            raise

    def _fetch(self, batch: Batch) -> None:
        started = time.perf_counter()
        self._let_go()
        # in the order of ids: the sums of a backward pass are then added as for a whole table
        ids, batch.inverse = np.unique(batch.ids, return_inverse=True)
        rows = self._numbers(ids)
        slots = self._slots.take(rows, self._slot_of)
        missing = slots < 0
        wanted = rows[missing]
        if len(wanted) > self._slots.free:
            self._slots.release(slots[~missing])
            raise InputError(
                f"a cache of {self.cache_rows} rows cannot hold the batches in flight: {len(wanted)} more rows are "
                f"needed and {self._slots.free} are free; enlarge the cache or prefetch fewer batches"
            )
        slots[missing] = self._replace(wanted)
        self._slots.key[slots] = self._keys(rows)
        batch.slots = slots
        counters = self.counters
        counters.batches += 1
        counters.accesses += len(batch.ids)
        counters.distinct += len(rows)
        counters.fetched += len(wanted)
        counters.fetch_seconds += time.perf_counter() - started

    def _let_go(self) -> None:
        while self._released:
            self._slots.release(self._released.popleft())

    def _replace(self, wanted: Ints) -> Ints:
        """Slots for rows that are not cached, filled with them; the rows that had them go back to the files."""
        slots = self._slots.victims(len(wanted))
        gone = self._row_of[slots]
        changed = self._dirty[slots]
        self._write(gone[changed], slots[changed])
        self.counters.written_back += int(changed.sum())
        self._slot_of[gone[gone >= 0]] = -1
        self._slot_of[wanted] = slots
        self._row_of[slots] = wanted
        self._dirty[slots] = False
        self._read(wanted, slots)
        return slots

    def _keys(self, rows: Ints) -> npt.NDArray[np.uint64]:
        ticks = np.arange(self._tick, self._tick + len(rows), dtype=np.uint64)
        self._tick += len(rows)
        if self.policy == "lru":
            return ticks
        self._uses[rows] += 1
        return self._uses[rows].astype(np.uint64) << _TICKS | ticks

    def _numbers(self, ids: Ints) -> Ints:
        return ids if self._rank is None else self._rank[ids]

    # --- files ---

    def _open_files(self) -> tuple[PageFile, ...]:
        shape = self.shape
        counts = [-(-r.rows // records_per_page(shape.record, r.page_bytes)) for r in shape.ranges]
        state = commits.read_commit(self.folder, sum(counts))
        self.epoch, self.tag, self.steps = state.epoch, state.tag, state.steps
        self._starts = np.cumsum([0, *(r.rows for r in shape.ranges)])
        files: list[PageFile] = []
        for number, (part, count) in enumerate(zip(shape.ranges, counts, strict=True)):
            first = sum(counts[:number])
            kind = MappedPages if part.kind == "mapped" else BlockPages
            files.append(
                kind(
                    self.folder / f"rows.{number}",
                    part.rows,
                    shape.record,
                    part.page_bytes,
                    state.places[first : first + count].copy(),
                    state.epoch,
                )
            )
        return tuple(files)

    def _hold(self, count: int) -> None:
        """Read the hottest rows into the first slots for good."""
        rows = np.arange(count, dtype=np.int64)
        slots = self._slots.victims(count)
        self._slot_of[rows], self._row_of[slots] = slots, rows
        step = 1 << 16
        for start in range(0, count, step):
            self._read(rows[start : start + step], slots[start : start + step])

    def _parts(self, rows: Ints) -> Iterator[tuple[PageFile, npt.NDArray[np.bool_] | slice, Ints]]:
        """The files that hold some of the rows, which of them, and their numbers in the file."""
        if len(self._files) == 1:
            yield self._files[0], slice(None), rows
            return
        for number, file in enumerate(self._files):
            inside = (rows >= self._starts[number]) & (rows < self._starts[number + 1])
            if inside.any():
                yield file, inside, rows[inside] - self._starts[number]

    def _read(self, rows: Ints, slots: Ints) -> None:
        for file, which, numbers in self._parts(rows):
            records = file.read(numbers)
            self.weights[slots[which]] = records[:, : self.shape.dim]
            self.state[slots[which]] = records[:, self.shape.dim :]

    def _write(self, rows: Ints, slots: Ints) -> None:
        if len(rows):
            for file, which, numbers in self._parts(rows):
                mine = slots[which]
                file.write(numbers, np.concatenate([self.weights[mine], self.state[mine]], axis=1))

    def flush(self, tag: int | None = None) -> int:
        """Make every update of the batches released so far durable; returns the epoch.

        Args:
            tag: a number to find again as ``.tag`` when the table is opened, such as the step.

        Raises:
            OSError: the device refused; the table stays as it was at the flush before.
        """
        self._in_turn(self._flush, tag)
        return self.epoch

    def _in_turn(self, work: Callable[[Any], Result], argument: Any) -> Result:
        """Run after the batches that are being fetched: here if there are none, else by the worker."""
        if self._queue:
            return self._worker.submit(self._guarded, work, argument).result()
        return self._guarded(work, argument)

    def _flush(self, tag: int | None) -> None:
        slots = np.flatnonzero(self._dirty)
        rows = self._row_of[slots]
        order = np.argsort(rows)
        step = 1 << 16
        for start in range(0, len(slots), step):
            part = order[start : start + step]
            self._write(rows[part], slots[part])
        for file in self._files:
            file.sync()
        self.tag = self.tag if tag is None else tag
        places = np.concatenate([file.places for file in self._files])
        commits.write_commit(self.folder, commits.Commit(self.epoch + 1, self.tag, self.steps, places))
        self._dirty[slots] = False
        for file in self._files:
            file.committed()
        self.epoch += 1
        self.counters.flushed += len(slots)
        self.counters.flushes += 1

    def read_all(self, ids: Ints) -> Floats:
        """(n, dim + state) current weights and state of any rows, past the cache and its counters."""
        return self._in_turn(self._read_all, np.asarray(ids, np.int64))

    def _read_all(self, ids: Ints) -> Floats:
        rows = self._numbers(ids)
        found = np.empty((len(rows), self.shape.record), np.float32)
        slots = self._slot_of[rows]
        cached = slots >= 0
        found[cached] = np.concatenate([self.weights[slots[cached]], self.state[slots[cached]]], axis=1)
        outside, back = np.unique(rows[~cached], return_inverse=True)
        records = np.empty((len(outside), self.shape.record), np.float32)
        for file, which, numbers in self._parts(outside):
            records[which] = file.read(numbers)
        found[~cached] = records[back]
        return found

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """Pages moved by each range's file."""
        return tuple(file.traffic for file in self._files)

    def close(self) -> None:
        """Stop the worker and let go of the files; what was not flushed is lost."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        for file in self._files:
            file.close()
        self._lock.close()

    def __enter__(self) -> TieredTable:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _initial(init: Callable[[Ints], Floats], order: Ints | None, base: int, start: int, stop: int) -> Floats:
    """Records of the rows of one range, from an ``init`` that goes by id."""
    numbers = np.arange(base + start, base + stop, dtype=np.int64)
    return init(numbers if order is None else order[numbers])
