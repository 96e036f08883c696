"""UpDLRM's three ways to cut a table's rows into tiles for DPUs (arXiv 2406.13941, section 3).

  uniform       equal ranges of rows
  non-uniform   rows by falling frequency, each to the least loaded tile that has room (LPT)
  cache-aware   lists of rows that occur together are found in a trace, all sums of two or more of a list's
                rows are stored on its tile, and lists, then rows, are placed as above with the reads that
                remain

The time of a batch is that of the fullest tile, so the load of a tile is its reads. LPT is at most
4/3 - 1/(3 m) times the optimum on m tiles while no tile is full (Graham, SIAM J. Appl. Math. 17(2), 1969);
:class:`Balance` proves a bound for the case at hand: no partition has a fullest tile below the mean, nor
below the hottest item.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cost_models.pim import ID_BLOCK, PimLoad, PimSystem, PimTime, lookup_time, padded, reduce_bytes
from ir.errors import InfeasibleError, InputError
from ir.pim import (
    ELEMENT_BYTES,
    MAX_LIST,
    ElementType,
    IntArray,
    PimPartition,
    stored_sums,
    tile_entries,
)

MAX_HOT = 1024  # rows among which lists are sought: a 1024 x 1024 matrix of co-occurrences


@dataclass(frozen=True, slots=True)
class Balance:
    """How even the reads of a batch or trace are over the row tiles."""

    fullest: float
    mean: float
    lower_bound: float  # proved: no placement of the same items has a fullest tile below it

    @property
    def ratio(self) -> float:
        """Fullest tile over the proved bound; 1 is optimal."""
        return self.fullest / self.lower_bound if self.lower_bound else 1.0


def uniform(rows: int, cols: int, tile_cols: int, row_tiles: int) -> PimPartition:
    """Equal ranges of rows; the last tile may have fewer (or none)."""
    owner = np.arange(rows, dtype=np.int64) // -(-rows // row_tiles)
    return PimPartition("uniform", rows, cols, tile_cols, row_tiles, owner)


def non_uniform(
    frequency: IntArray, cols: int, tile_cols: int, row_tiles: int, *, tile_rows: int, host_rows: int = 0
) -> PimPartition:
    """Rows balanced by how often they are read.

    Args:
        frequency: (rows,) reads of each row in a trace.
        cols, tile_cols, row_tiles: of the partition.
        tile_rows: rows that fit on a tile.
        host_rows: this many hottest rows stay with the CPU.

    Raises:
        InfeasibleError: more rows than the tiles hold.
    """
    owner, _ = _place(frequency, row_tiles, tile_rows, host_rows=host_rows)
    return PimPartition("non_uniform", len(frequency), cols, tile_cols, row_tiles, owner)


def cache_aware(
    ids: IntArray,
    offsets: IntArray,
    rows: int,
    cols: int,
    tile_cols: int,
    row_tiles: int,
    *,
    tile_rows: int,
    max_items: int = 4,
    max_sums: int = 4096,
    hot: int = 512,
) -> PimPartition:
    """Rows balanced by reads, with stored sums of rows that occur together in a trace.

    Args:
        ids, offsets: the trace, bag after bag; bag b is ``ids[offsets[b]:offsets[b + 1]]``.
        rows, cols, tile_cols, row_tiles: of the partition.
        tile_rows: entries (rows and stored sums) that fit on a tile.
        max_items: rows of a list, 2 to 8.
        max_sums: stored sums of the whole table.
        hot: hottest rows among which lists are sought.

    Raises:
        InputError: bad sizes. InfeasibleError: more rows than the tiles hold.
    """
    frequency = np.bincount(ids, minlength=rows).astype(np.int64)
    fair = max(-(-len(ids) // row_tiles), int(frequency.max(initial=0)))  # a list must not make a hot tile
    mined = mine_lists(
        ids, offsets, frequency, max_items=max_items, max_sums=max_sums, hot=hot, max_reads=fair
    )
    owner, lists = _place(frequency, row_tiles, tile_rows, mined=mined)
    return PimPartition("cache_aware", rows, cols, tile_cols, row_tiles, owner, lists)


def mine_lists(
    ids: IntArray,
    offsets: IntArray,
    frequency: IntArray,
    *,
    max_items: int = 4,
    max_sums: int = 4096,
    hot: int = 512,
    max_reads: int | None = None,
) -> list[tuple[tuple[int, ...], int]]:
    """Lists of rows that occur together, with the reads that each saves on the trace.

    Pairs of hot rows are merged by falling count of bags that hold both, while a list has at most
    ``max_items`` rows and, with its sums stored, at most ``max_reads`` reads. Lists are then kept by falling
    saving per stored sum until ``max_sums`` are used. A bag with j >= 2 rows of a list saves j - 1 reads.
    """
    if not 2 <= max_items <= MAX_LIST or not 2 <= hot <= MAX_HOT:
        raise InputError(
            f"lists have 2 to {MAX_LIST} rows out of 2 to {MAX_HOT} hot ones, not {max_items}, {hot}"
        )
    hottest = np.argsort(-frequency, kind="stable")[:hot]
    hottest = hottest[frequency[hottest] > 0]
    column = np.full(len(frequency), -1, dtype=np.int64)
    column[hottest] = np.arange(len(hottest))
    bag = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    holds = np.zeros((len(offsets) - 1, len(hottest)), dtype=np.float32)
    inside = column[ids] >= 0
    holds[bag[inside], column[ids[inside]]] = 1

    together = np.triu(holds.T @ holds, 1)
    first, second = np.nonzero(together >= 2)  # a pair seen once says nothing about the next batch
    order = np.argsort(-together[first, second], kind="stable")
    group = {index: [index] for index in range(len(hottest))}
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        left, right = group[a], group[b]
        if left is right or len(left) + len(right) > max_items:
            continue
        if max_reads is None or _reads(holds, frequency[hottest], left + right) <= max_reads:
            left.extend(right)
            for member in right:
                group[member] = left
    found = []
    for index, members in group.items():
        if index == members[0] and len(members) >= 2:
            present = holds[:, members].sum(axis=1)
            saved = int(np.maximum(present - 1, 0).sum())
            found.append((tuple(sorted(hottest[members].tolist())), saved))
    return _within_budget(found, max_sums)


def _reads(holds: npt.NDArray[np.float32], frequency: IntArray, members: list[int]) -> int:
    """Reads of a list whose sums are stored: one a bag that holds any of its rows, and repeats."""
    present = holds[:, members].sum(axis=1)
    return int(frequency[members].sum() - np.maximum(present - 1, 0).sum())


def _within_budget(
    found: list[tuple[tuple[int, ...], int]], max_sums: int
) -> list[tuple[tuple[int, ...], int]]:
    kept, used = [], 0
    for members, saved in sorted(found, key=lambda item: (-item[1] / len(stored_sums(item[0])), item[0])):
        need = len(stored_sums(members))
        if used + need <= max_sums:
            kept.append((members, saved))
            used += need
    return kept


def _place(
    frequency: IntArray,
    row_tiles: int,
    tile_rows: int,
    *,
    host_rows: int = 0,
    mined: list[tuple[tuple[int, ...], int]] | None = None,
) -> tuple[IntArray, tuple[tuple[int, ...], ...]]:
    """Row tile of each row, and the lists that found room.

    Lists by falling reads, then rows by falling frequency, each to the least loaded tile with room. A list
    without room is dropped: its rows are placed one by one.
    """
    rows = len(frequency) - host_rows
    if rows > row_tiles * tile_rows:
        raise InfeasibleError(
            f"{rows} rows do not fit on {row_tiles} tiles of {tile_rows}",
            ("mram_capacity",),
            f"{-(-rows // tile_rows)} tiles",
        )
    owner = np.full(len(frequency), -2, dtype=np.int64)  # -2: not placed yet
    falling = np.argsort(-frequency, kind="stable")
    owner[falling[:host_rows]] = -1
    tiles = _Tiles(row_tiles, tile_rows, row_tiles * tile_rows - rows)
    kept = []
    weighed = [(int(frequency[list(members)].sum()) - saved, members) for members, saved in mined or ()]
    for reads, members in sorted(weighed, key=lambda item: (-item[0], item[1])):
        tile = tiles.take(reads, len(members), len(stored_sums(members)))
        if tile is not None:
            owner[list(members)] = tile
            kept.append(members)
    for row in falling[(owner[falling] == -2) & (frequency[falling] > 0)].tolist():
        place = tiles.take(int(frequency[row]), 1, 0)
        assert place is not None, "there is room for every row: checked above"
        owner[row] = place
    _fill(owner, tiles, frequency)
    return owner, tuple(kept)


class _Tiles:
    """Loads and room of the tiles; ``spare`` entries are left when every row has its place."""

    def __init__(self, count: int, size: int, spare: int) -> None:
        self.used = [0] * count
        self.size = size
        self.spare = spare
        self.heap = [(0, tile) for tile in range(count)]

    def take(self, reads: int, rows: int, sums: int) -> int | None:
        """The least loaded tile with room for an item, which then holds it; None if there is none."""
        if sums > self.spare:
            return None
        passed: list[tuple[int, int]] = []
        found = None
        while self.heap:
            load, tile = heapq.heappop(self.heap)
            if self.used[tile] + rows + sums <= self.size:
                found = tile
                self.used[tile] += rows + sums
                self.spare -= sums
                passed.append((load + reads, tile))
                break
            passed.append((load, tile))
        for entry in passed:
            if self.used[entry[1]] < self.size:  # a full tile takes nothing more
                heapq.heappush(self.heap, entry)
        return found


def _fill(owner: IntArray, tiles: _Tiles, frequency: IntArray) -> None:
    """Rows that the trace never read, so that their expected reads even out the tiles.

    Together they expect as many reads as there are rows read once (Good-Turing: Good, Biometrika 40, 1953).
    """
    rest = np.flatnonzero(owner == -2)
    if not len(rest):
        return
    used = np.asarray(tiles.used, dtype=np.int64)
    room = (tiles.size - used).astype(np.float64)
    each = max(int((frequency == 1).sum()), 1) / len(rest)
    loads = np.bincount(owner[owner >= 0], weights=frequency[owner >= 0], minlength=len(used)) / each

    def filled(level: float) -> npt.NDArray[np.float64]:
        return np.minimum(np.floor(np.maximum(level - loads, 0)), room)

    low, high = 0.0, float(loads.max() + room.max() + 1)
    for _ in range(100):  # the highest level that does not need more rows than there are
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle).sum() <= len(rest) else (low, middle)
    gets = filled(low).astype(np.int64)
    short = len(rest) - int(gets.sum())
    for tile in np.argsort(loads + gets, kind="stable").tolist():
        more = min(short, int(room[tile]) - int(gets[tile]), max(1, -(-short // len(used))))
        gets[tile] += more
        short -= more
    for tile in range(len(used)):  # what room alone can still take
        more = min(short, int(room[tile]) - int(gets[tile]))
        gets[tile] += more
        short -= more
    owner[rest] = np.repeat(np.arange(len(used)), gets)


def balance(partition: PimPartition, ids: IntArray, offsets: IntArray) -> Balance:
    """How even the reads of a batch or trace are. The bound is over placements of the same entries."""
    entries = tile_entries(partition, ids, offsets)
    reads = entries.reads(partition.row_tiles)
    key = entries.tile * (int(entries.place.max(initial=0)) + 1) + entries.place
    hottest = int(np.unique(key[entries.tile >= 0], return_counts=True)[1].max(initial=0))
    mean = float(reads.mean())
    return Balance(float(reads.max()), mean, max(float(np.ceil(mean)), float(hottest)))


def batch_load(
    partition: PimPartition, ids: IntArray, offsets: IntArray, element: ElementType = "int32"
) -> PimLoad:
    """What a batch asks of the DPUs under a partition: one push of bounds and ids, one pull of sums."""
    reads = tile_entries(partition, ids, offsets).reads(partition.row_tiles)
    bags, most = len(offsets) - 1, int(reads.max())
    row_bytes = padded(min(partition.tile_cols, partition.cols) * ELEMENT_BYTES)
    push = 64 + padded((bags + 4) * 4) + -(-most * 4 // ID_BLOCK) * ID_BLOCK
    return PimLoad(
        dpus=partition.dpus,
        row_bytes=row_bytes,
        max_reads=float(most),
        bags=bags,
        push_bytes=(float(push),),
        pull_bytes=float(bags * row_bytes),
        reduce_bytes=reduce_bytes(bags, partition.cols, partition.row_tiles),
        element=element,
    )


def batch_time(
    partition: PimPartition,
    ids: IntArray,
    offsets: IntArray,
    system: PimSystem,
    element: ElementType = "int32",
) -> PimTime:
    """Modelled seconds of a batch under a partition."""
    return lookup_time(batch_load(partition, ids, offsets, element), system)
