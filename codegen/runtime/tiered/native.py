"""Moving pages and choosing victims: the compiled form, and the same in numpy where there is no compiler.

Both give the same files and the same victims; :mod:`codegen.runtime._native` says when a compiler is used.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from codegen.runtime import _native
from ir.errors import PlannerError

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

HEADER = 16  # bytes of a page's header: checksum, spare word, epoch

# the two ways to make bytes durable, in one place so that tests can watch and cut them
pwrite = os.pwrite
fdatasync = os.fdatasync


class DamagedPage(PlannerError):
    """A page whose checksum does not fit: the file was damaged or cut."""


class _Cache(ctypes.Structure):
    """``cache_t`` of pages.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("heap", "place", "key", "pins", "size"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled form of pages.c, or None."""
    found = _native.load_file(_native.SOURCE.with_name("pages.c"))
    if found is not None:
        found.move_pages.restype = found.check_pages.restype = ctypes.c_int64
        found.queue_open.restype = ctypes.c_uint64
        for name in ("queue_close", "cache_take", "cache_victims", "cache_release"):
            getattr(found, name).restype = None
    return found


@functools.cache
def keys(page_bytes: int) -> npt.NDArray[np.uint64]:
    """One odd 64-bit key a word of a page: splitmix64 (Steele, Lea, Flood, OOPSLA 2014) of its index."""
    z = np.arange(1, page_bytes // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def aligned(size: int) -> Bytes:
    """``size`` zero bytes that start on a page of memory, as direct I/O needs."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=np.uint8)[:size]


def _pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _checks(pages: npt.NDArray[np.uint32], numbers: Ints) -> npt.NDArray[np.uint32]:
    key = keys(pages.shape[1] * 4)
    total = (pages[:, 1:].astype(np.uint64) * key[1:]).sum(axis=1, dtype=np.uint64)
    total += key[0] * (numbers + 1).astype(np.uint64)
    return np.asarray(total >> np.uint64(32), dtype=np.uint32)


def stamp(pages: Bytes, numbers: Ints, epoch: int) -> None:
    """Give pages (n, page bytes) their headers."""
    words = pages.view(np.uint32)
    words[:, 1], words[:, 2], words[:, 3] = 0, epoch & 0xFFFFFFFF, epoch >> 32
    words[:, 0] = _checks(words, numbers)


def first_damaged(pages: Bytes, numbers: Ints, epoch: int) -> int | None:
    """Index of the first page that is not whole, or is newer than ``epoch``; None if all are well."""
    words = pages.view(np.uint32)
    written = words[:, 2].astype(np.uint64) | words[:, 3].astype(np.uint64) << np.uint64(32)
    bad = (_checks(words, numbers) != words[:, 0]) | (written > np.uint64(epoch))
    return int(np.argmax(bad)) if bad.any() else None


def open_queue() -> int:
    """A queue that keeps many requests of one thread in flight, or 0 where there is none."""
    compiled = library()
    return int(compiled.queue_open()) if compiled is not None else 0


def close_queue(queue: int) -> None:
    """Let go of :func:`open_queue`'s queue."""
    compiled = library()
    if compiled is not None:
        compiled.queue_close(ctypes.c_uint64(queue))


def move_pages(
    fd: int, offsets: Ints, numbers: Ints, pages: Bytes, epoch: int, *, write: bool, queue: int
) -> None:
    """Read and verify, or stamp and write, pages (n, page bytes) of an open file.

    Args:
        offsets, numbers: place in the file and number of each page.
        epoch: given to pages that are written; the newest that pages read may have.
        queue: from :func:`open_queue`; 0 moves one page at a time.

    Raises:
        DamagedPage: a page read is not whole.
        OSError: as the system says.
    """
    compiled = library()
    if compiled is None:
        _move_in_python(fd, offsets, numbers, pages, epoch, write)
        return
    fault = compiled.move_pages(
        fd,
        int(write),
        _pointer(offsets),
        _pointer(numbers),
        ctypes.c_int64(len(pages)),
        ctypes.c_int64(pages.shape[1]),
        _pointer(pages),
        _pointer(keys(pages.shape[1])),
        ctypes.c_uint64(epoch),
        ctypes.c_uint64(queue),
    )
    if fault < 0:
        raise OSError(-fault, os.strerror(-fault))
    if fault:
        raise damaged(int(numbers[fault - 1]))


def _move_in_python(fd: int, offsets: Ints, numbers: Ints, pages: Bytes, epoch: int, write: bool) -> None:
    if write:
        stamp(pages, numbers, epoch)
        for page, offset in zip(pages, offsets.tolist(), strict=True):
            pwrite(fd, page.data, offset)
        return
    for page, offset, number in zip(pages, offsets.tolist(), numbers.tolist(), strict=True):
        if os.preadv(fd, [page.data], offset) != len(page):
            raise damaged(number)
    bad = first_damaged(pages, numbers, epoch) if len(pages) else None
    if bad is not None:
        raise damaged(int(numbers[bad]))


def damaged(number: int) -> DamagedPage:
    """The error of a page that is not whole."""
    return DamagedPage(
        f"page {number} does not fit its checksum: the file was damaged or changed by another program; "
        "restore the table from a copy"
    )


def check_mapped(base: Bytes, slots: Ints, numbers: Ints, epoch: int, *, write: bool) -> None:
    """Stamp, or verify, pages in place: ``base`` is (slots, page bytes); raises DamagedPage."""
    compiled = library()
    if compiled is None:
        for start in range(0, len(slots), 1024):
            part = slice(start, start + 1024)
            pages = base[slots[part]]
            if write:
                stamp(pages, numbers[part], epoch)
                base[slots[part], :HEADER] = pages[:, :HEADER]
            elif (bad := first_damaged(pages, numbers[part], epoch)) is not None:
                raise damaged(int(numbers[part][bad]))
        return
    offsets = slots * base.shape[1]
    fault = compiled.check_pages(
        int(write),
        _pointer(base),
        _pointer(offsets),
        _pointer(numbers),
        ctypes.c_int64(len(slots)),
        ctypes.c_int64(base.shape[1]),
        _pointer(keys(base.shape[1])),
        ctypes.c_uint64(epoch),
    )
    if fault:
        raise damaged(int(numbers[fault - 1]))


@dataclass(slots=True)
class Slots:
    """Which slots of a cache batches need, and in which order the others are given up.

    Attributes:
        key: (slots,) order of eviction, smallest first; no two are equal.
        pins: (slots,) batches that need the slot.
    """

    key: npt.NDArray[np.uint64]
    pins: npt.NDArray[np.int32]
    _heap: Ints
    _place: Ints
    _size: Ints
    _c: _Cache | None = field(default=None, repr=False)

    @classmethod
    def empty(cls, count: int) -> Slots:
        """``count`` slots that nobody needs; slot 0 is given up first."""
        order = np.arange(count, dtype=np.int64)
        made = cls(
            order.astype(np.uint64),
            np.zeros(count, np.int32),
            order,
            order.copy(),
            np.array([count], np.int64),
        )
        if library() is not None:
            arrays = (made._heap, made._place, made.key, made.pins, made._size)
            made._c = _Cache(*(array.ctypes.data for array in arrays))
        return made

    @property
    def free(self) -> int:
        """Slots that no batch needs."""
        return int(self._size[0])

    def take(self, rows: Ints, slot_of: npt.NDArray[np.int32]) -> Ints:
        """Pin the slots of distinct ``rows``; -1 for those that have none."""
        slots = np.empty(len(rows), np.int64)
        if self._c is not None and (compiled := library()) is not None:
            count = ctypes.c_int64(len(rows))
            compiled.cache_take(
                ctypes.byref(self._c), _pointer(rows), count, _pointer(slot_of), _pointer(slots)
            )
            return slots
        slots[:] = slot_of[rows]
        held = slots[slots >= 0]
        self._size[0] -= int((self.pins[held] == 0).sum())
        self.pins[held] += 1
        return slots

    def victims(self, count: int) -> Ints:
        """Pin ``count`` slots that nobody needs, those with the smallest keys; at most ``free``."""
        slots = np.empty(count, np.int64)
        if self._c is not None and (compiled := library()) is not None:
            compiled.cache_victims(ctypes.byref(self._c), ctypes.c_int64(count), _pointer(slots))
            return slots
        idle = np.flatnonzero(self.pins == 0)
        slots[:] = idle[np.argsort(self.key[idle], kind="stable")[:count]]
        self.pins[slots] = 1
        self._size[0] -= count
        return slots

    def release(self, slots: Ints) -> None:
        """One batch less needs each of the distinct ``slots``."""
        if self._c is not None and (compiled := library()) is not None:
            compiled.cache_release(ctypes.byref(self._c), _pointer(slots), ctypes.c_int64(len(slots)))
            return
        self.pins[slots] -= 1
        self._size[0] += int((self.pins[slots] == 0).sum())
