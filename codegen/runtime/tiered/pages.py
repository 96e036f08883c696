"""Rows in a file of checksummed pages, each of which has two places so that its last durable form survives.

Page p of a file lies at place 2p or 2p + 1. The first write of an epoch goes to the place that does not hold
the committed form; later writes of the same epoch overwrite that one. Which place is current is part of
the table's commit record (:mod:`codegen.runtime.tiered.commit`), which is written after the pages are durable.
So whatever a killed process was doing, the pages of the last commit are whole, and a reader that follows
the commit record sees exactly that state (shadow paging: Lorie, ACM TODS 2(1), 1977). The price is twice the
space.

A page holds ``(page bytes - 16) // record bytes`` records; a record is a row's float32 weights followed by its
optimizer state.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from codegen.runtime.tiered import native
from codegen.runtime.tiered.native import HEADER, Bytes, Ints
from ir.errors import InputError

Floats = npt.NDArray[np.float32]
Init = Callable[[int, int], Floats]  # (start, stop) -> records of those rows

SECTOR = 512  # bytes: direct I/O moves whole sectors
CHUNK = 1 << 24  # bytes moved at a time: large against a request, small against memory


@dataclass(slots=True)
class Traffic:
    """Pages moved since the table was opened."""

    pages_read: int = 0
    pages_written: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


def page_bytes_for(record_bytes: int, granule: int) -> int:
    """The smallest page of whole granules (and sectors) that holds one record and the header."""
    unit = granule if granule % SECTOR == 0 else SECTOR * granule
    return -(-(HEADER + record_bytes) // unit) * unit


class PageFile(ABC):
    """Records of ``rows`` rows in pages.

    Args:
        path: the file, written by :func:`create`.
        rows: rows it holds.
        record: floats of a record.
        page_bytes: a multiple of 512.
        places: (pages,) 0 or 1: which place of each page is current.
        epoch: of the last commit.
    """

    def __init__(
        self, path: Path, rows: int, record: int, page_bytes: int, places: npt.NDArray[np.uint8], epoch: int
    ) -> None:
        self.path, self.rows, self.record, self.page_bytes = path, rows, record, page_bytes
        self.per_page = records_per_page(record, page_bytes)
        self.pages = -(-rows // self.per_page)
        self.places = places
        self.fresh = np.zeros(self.pages, dtype=bool)  # written since the last commit
        self.epoch = epoch
        self.traffic = Traffic()
        expected = 2 * self.pages * page_bytes
        if path.stat().st_size != expected or len(places) != self.pages:
            raise InputError(f"{path} is not {expected} bytes long: it was cut or is of another table")

    @abstractmethod
    def read(self, rows: Ints) -> Floats:
        """Records (n, record) of distinct rows; raises DamagedPage."""

    @abstractmethod
    def write(self, rows: Ints, records: Floats) -> None:
        """Replace the records of distinct rows; durable after :meth:`sync` and the table's commit."""

    @abstractmethod
    def sync(self) -> None:
        """Make all that was written durable; the caller then writes the commit record."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def committed(self) -> None:
        """The commit record is durable: a new epoch begins."""
        self.fresh[:] = False
        self.epoch += 1

    @abstractmethod
    def verify(self) -> None:
        """Check every current page; raises DamagedPage."""

    def _target(self, pages: Ints) -> npt.NDArray[np.uint8]:
        """The place where pages may be written: never the committed form."""
        return np.where(self.fresh[pages], self.places[pages], self.places[pages] ^ 1).astype(np.uint8)

    def _by_page(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Distinct pages, and for each row the index of its page among them and its index in the page."""
        page, inside = np.divmod(rows, self.per_page)
        pages, which = np.unique(page, return_inverse=True)
        return pages, which, inside

    def _records(self, pages: Bytes) -> Floats:
        """(n, records a page, record): a view of pages (n, page bytes)."""
        floats = pages.view(np.float32)[:, HEADER // 4 : HEADER // 4 + self.per_page * self.record]
        shape, (outer, inner) = (len(pages), self.per_page, self.record), floats.strides
        return np.lib.stride_tricks.as_strided(floats, shape, (outer, self.record * inner, inner))


def records_per_page(record: int, page_bytes: int) -> int:
    """Records of ``record`` floats in a page; raises InputError if none fits."""
    count = (page_bytes - HEADER) // (4 * record)
    if page_bytes % SECTOR or count < 1:
        raise InputError(
            f"pages of {page_bytes} bytes cannot hold records of {4 * record} bytes; use a multiple of {SECTOR} "
            f"of at least {page_bytes_for(4 * record, SECTOR)}"
        )
    return count


def create(path: Path, rows: int, record: int, page_bytes: int, init: Init) -> int:
    """Write a page file of epoch 0 with every page in place 0; returns its number of pages.

    Both places are written, so that no later write has to find space.
    """
    per_page = records_per_page(record, page_bytes)
    pages = -(-rows // per_page)
    step = max(1, CHUNK // (2 * page_bytes))
    with path.open("wb") as file:
        for first in range(0, pages, step):
            last = min(pages, first + step)
            start, stop = first * per_page, min(rows, last * per_page)
            payload = np.zeros((last - first, per_page * record), np.float32)
            payload.reshape(-1, record)[: stop - start] = init(start, stop)
            chunk = np.zeros((last - first, 2, page_bytes), np.uint8)
            floats = chunk[:, 0].view(np.float32)
            floats[:, HEADER // 4 : HEADER // 4 + per_page * record] = payload
            stamped = np.ascontiguousarray(chunk[:, 0])
            native.stamp(stamped, np.arange(first, last, dtype=np.int64), 0)
            chunk[:, 0] = stamped
            file.write(chunk.data)
        file.flush()
        native.fdatasync(file.fileno())
    return pages


class MappedPages(PageFile):
    """Pages of a memory-mapped file: byte-addressable, as persistent memory or CXL memory is used.

    A page is copied to its other place by the first write of an epoch, and gets its checksum in :meth:`sync`;
    all pages are verified when the file is opened.
    """

    def __init__(
        self, path: Path, rows: int, record: int, page_bytes: int, places: npt.NDArray[np.uint8], epoch: int
    ) -> None:
        super().__init__(path, rows, record, page_bytes, places, epoch)
        self._map = np.memmap(path, np.uint8, "r+", shape=(2 * self.pages, page_bytes))
        self._all: Floats = self._records(self._map)
        self.verify()

    def verify(self) -> None:
        pages = np.flatnonzero(~self.fresh)  # the others get their checksums in sync()
        native.check_mapped(self._map, 2 * pages + self.places[pages], pages, self.epoch, write=False)

    def read(self, rows: Ints) -> Floats:
        page, inside = np.divmod(rows, self.per_page)
        self.traffic.bytes_read += len(rows) * self.record * 4
        return self._all[2 * page + self.places[page], inside]

    def write(self, rows: Ints, records: Floats) -> None:
        pages, which, inside = self._by_page(rows)
        stale = pages[~self.fresh[pages]]
        now = 2 * stale + self.places[stale]
        self._map[now ^ 1] = self._map[now]
        self.places[stale] ^= 1
        self.fresh[stale] = True
        self._all[(2 * pages + self.places[pages])[which], inside] = records
        self.traffic.pages_written += len(stale)
        self.traffic.bytes_written += len(stale) * self.page_bytes + records.nbytes

    def sync(self) -> None:
        pages = np.flatnonzero(self.fresh)
        native.check_mapped(self._map, 2 * pages + self.places[pages], pages, self.epoch + 1, write=True)
        self._map.flush()

    def close(self) -> None:
        self._map.flush()
        del self._all, self._map


class BlockPages(PageFile):
    """Pages of a file that is read and written past the page cache, as a drive is used.

    Every page read is verified. A write of some rows of a page reads the others first.
    """

    def __init__(
        self, path: Path, rows: int, record: int, page_bytes: int, places: npt.NDArray[np.uint8], epoch: int
    ) -> None:
        super().__init__(path, rows, record, page_bytes, places, epoch)
        self.direct = hasattr(os, "O_DIRECT")
        try:
            self._fd = os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        except OSError:  # a file system without direct I/O, such as tmpfs before Linux 6.6
            self.direct = False
            self._fd = os.open(path, os.O_RDWR)
        self._queue = native.open_queue() if self.direct else 0  # only direct I/O is asynchronous
        self._scratch = native.aligned(0)

    def verify(self) -> None:
        step = max(1, CHUNK // self.page_bytes)
        for first in range(0, self.pages, step):
            pages = np.arange(first, min(self.pages, first + step), dtype=np.int64)
            self._load(pages, self._buffer(len(pages)))

    def _buffer(self, pages: int) -> Bytes:
        size = pages * self.page_bytes
        if len(self._scratch) < size:
            self._scratch = native.aligned(size)
        return self._scratch[:size].reshape(pages, self.page_bytes)

    def _load(self, pages: Ints, into: Bytes) -> None:
        offsets = (2 * pages + self.places[pages]) * self.page_bytes
        # what this epoch wrote carries the next epoch's number
        native.move_pages(self._fd, offsets, pages, into, self.epoch + 1, write=False, queue=self._queue)
        self.traffic.pages_read += len(pages)
        self.traffic.bytes_read += into.nbytes

    def read(self, rows: Ints) -> Floats:
        pages, which, inside = self._by_page(rows)
        found = np.empty((len(rows), self.record), np.float32)
        step = max(1, CHUNK // self.page_bytes)
        if len(pages) <= step:  # the usual case: one batch of requests
            buffer = self._buffer(len(pages))
            self._load(pages, buffer)
            return self._records(buffer)[which, inside]
        for first in range(0, len(pages), step):
            part = (which >= first) & (which < first + step)
            buffer = self._buffer(len(pages[first : first + step]))
            self._load(pages[first : first + step], buffer)
            found[part] = self._records(buffer)[which[part] - first, inside[part]]
        return found

    def write(self, rows: Ints, records: Floats) -> None:
        pages, which, inside = self._by_page(rows)
        step = max(1, CHUNK // self.page_bytes)
        for first in range(0, len(pages), step):
            part = (which >= first) & (which < first + step) if len(pages) > step else slice(None)
            self._write(pages[first : first + step], which[part] - first, inside[part], records[part])

    def _write(self, pages: Ints, which: Ints, inside: Ints, records: Floats) -> None:
        buffer = self._buffer(len(pages))
        held = np.minimum(self.per_page, self.rows - pages * self.per_page)
        partial = np.bincount(which, minlength=len(pages)) < held
        if partial.all():
            self._load(pages, buffer)
        elif partial.any():
            some = native.aligned(int(partial.sum()) * self.page_bytes).reshape(-1, self.page_bytes)
            self._load(pages[partial], some)
            buffer[partial] = some
        self._records(buffer)[which, inside] = records
        target = self._target(pages)
        offsets = (2 * pages + target) * self.page_bytes
        native.move_pages(self._fd, offsets, pages, buffer, self.epoch + 1, write=True, queue=self._queue)
        self.places[pages] = target
        self.fresh[pages] = True
        self.traffic.pages_written += len(pages)
        self.traffic.bytes_written += buffer.nbytes

    def sync(self) -> None:
        native.fdatasync(self._fd)

    def close(self) -> None:
        native.close_queue(self._queue)
        os.close(self._fd)
