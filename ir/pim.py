"""How one embedding table lies on the DPUs of a processing-in-memory system.

A table of R rows and C columns of 4-byte elements is cut into row tiles x column tiles. Tile (r, c) is on DPU
``r * column_tiles + c``. Which rows a row tile holds is free; column tiles are equal ranges of
``tile_cols`` columns, the last one possibly shorter. A row tile may also store partial sums of rows that
are often looked up together (UpDLRM, arXiv 2406.13941, section 3), so that one read serves several ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ir.errors import InputError, IRError

PartitionKind = Literal["uniform", "non_uniform", "cache_aware"]
ElementType = Literal["int32", "fp32"]

ELEMENT_BYTES = 4  # both element types
MAX_LIST = 8  # rows a co-occurrence list may have: 2**8 - 1 - 8 stored sums

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PimPartition:
    """Rows, columns and stored sums of one table, tile by tile.

    Attributes:
        kind: which of UpDLRM's partitions made it.
        rows, cols: of the table.
        tile_cols: columns of a tile; the last column tile may have fewer.
        row_tiles: number of row tiles.
        owner: (rows,) row tile of each row; -1 is a row that stays with the CPU.
        lists: co-occurrence lists, each of 2 to 8 distinct rows of one tile, disjoint. Every sum of two or
            more members is stored on the tile.
    """

    kind: PartitionKind
    rows: int
    cols: int
    tile_cols: int
    row_tiles: int
    owner: IntArray
    lists: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if min(self.rows, self.cols, self.tile_cols, self.row_tiles) < 1:
            raise IRError("a PIM partition needs at least one row, column and tile")
        if self.owner.shape != (self.rows,) or self.owner.min() < -1 or self.owner.max() >= self.row_tiles:
            raise IRError(f"owner must give one of {self.row_tiles} row tiles (or -1) for {self.rows} rows")
        seen: set[int] = set()
        for members in self.lists:
            owners = {int(self.owner[row]) for row in members}
            if not 2 <= len(members) <= MAX_LIST or len(set(members)) != len(members):
                raise IRError(f"a co-occurrence list has 2 to {MAX_LIST} distinct rows, not {members}")
            if seen & set(members) or len(owners) != 1 or -1 in owners:
                raise IRError(f"co-occurrence list {members} shares a row with another or spans tiles")
            seen |= set(members)

    @property
    def col_tiles(self) -> int:
        """Number of column tiles."""
        return -(-self.cols // self.tile_cols)

    @property
    def dpus(self) -> int:
        """DPUs in use."""
        return self.row_tiles * self.col_tiles

    def tile_rows(self, tile: int) -> IntArray:
        """Rows of a row tile, in the order in which they are stored."""
        return np.flatnonzero(self.owner == tile)

    def tile_lists(self, tile: int) -> tuple[tuple[int, ...], ...]:
        """Co-occurrence lists of a row tile, in the order in which their sums are stored."""
        return tuple(members for members in self.lists if self.owner[members[0]] == tile)

    @property
    def host_rows(self) -> IntArray:
        """Rows that the CPU keeps and reduces itself."""
        return np.flatnonzero(self.owner == -1)


def stored_sums(members: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The subsets of a list whose sums are stored, two rows or more, in the order of their bit masks."""
    return tuple(
        tuple(row for bit, row in enumerate(members) if mask >> bit & 1)
        for mask in range(1 << len(members))
        if mask.bit_count() >= 2
    )


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """What serves a batch of bags: stored rows and sums, sorted by tile, bag and order of addition.

    Attributes:
        tile: (n,) row tile; -1 is the CPU.
        bag: (n,) bag.
        place: (n,) position among the tile's entries (rows, then sums); the row's id for the CPU.
    """

    tile: IntArray
    bag: IntArray
    place: IntArray

    def reads(self, row_tiles: int) -> IntArray:
        """(row_tiles,) entries read on each row tile."""
        return np.bincount(self.tile[self.tile >= 0], minlength=row_tiles).astype(np.int64)


def tile_places(partition: PimPartition) -> IntArray:
    """(rows,) position of each row among its tile's rows; the row's own id when the CPU keeps it."""
    order = np.argsort(partition.owner, kind="stable")
    owners = partition.owner[order]
    starts = np.searchsorted(owners, owners, side="left")
    places = np.empty(partition.rows, dtype=np.int64)
    places[order] = np.arange(partition.rows) - starts
    kept = partition.host_rows
    places[kept] = kept
    return places


def sum_places(partition: PimPartition) -> IntArray:
    """(lists,) position of each list's first stored sum among its tile's entries."""
    following = np.bincount(partition.owner[partition.owner >= 0], minlength=partition.row_tiles)
    starts = np.zeros(len(partition.lists), dtype=np.int64)
    for index, members in enumerate(partition.lists):
        tile = partition.owner[members[0]]
        starts[index] = following[tile]
        following[tile] += len(stored_sums(members))
    return starts


def tile_entries(partition: PimPartition, ids: IntArray, offsets: IntArray) -> Entries:
    """The entries that add up to each bag.

    Where a bag holds two or more members of a list, one stored sum serves them (each once; repeats are read
    as rows). In a bag and tile, stored sums come first, in the order of the lists, then rows in the order of
    the ids.

    Args:
        partition: the table's.
        ids: (n,) rows, bag after bag.
        offsets: (bags + 1,) bag b is ``ids[offsets[b]:offsets[b + 1]]``.

    Raises:
        InputError: ids outside the table, or offsets that do not rise from 0 to n.
    """
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
        raise InputError(f"bag offsets must rise from 0 to the number of ids, {len(ids)}")
    if len(ids) and (ids.min() < 0 or ids.max() >= partition.rows):
        raise InputError(f"an id is outside 0..{partition.rows - 1}; check the table size")
    bag = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    tile, place = partition.owner[ids], tile_places(partition)[ids]
    order = np.arange(len(ids), dtype=np.int64)
    if partition.lists and len(ids):
        keep, sums = _with_sums(partition, ids, bag)
        tile, bag, place, order = (
            np.concatenate([old[keep], new]) for old, new in zip((tile, bag, place, order), sums, strict=True)
        )
    rank = np.lexsort((order, bag, tile))
    return Entries(tile[rank], bag[rank], place[rank])


def _with_sums(
    partition: PimPartition, ids: IntArray, bag: IntArray
) -> tuple[npt.NDArray[np.bool_], tuple[IntArray, IntArray, IntArray, IntArray]]:
    """Which ids stay rows, and (tile, bag, place, order) of the stored sums that replace the others."""
    list_of = np.full(partition.rows, -1, dtype=np.int64)
    bit_of = np.zeros(partition.rows, dtype=np.int64)
    for index, members in enumerate(partition.lists):
        list_of[list(members)] = index
        bit_of[list(members)] = np.arange(len(members))
    lists = len(partition.lists)
    listed = np.flatnonzero(list_of[ids] >= 0)
    pair = bag[listed] * lists + list_of[ids[listed]]
    _, first = np.unique(pair * MAX_LIST + bit_of[ids[listed]], return_index=True)
    groups, group, sizes = np.unique(pair[first], return_inverse=True, return_counts=True)
    masks = np.zeros(len(groups), dtype=np.int64)
    np.add.at(masks, group, 1 << bit_of[ids[listed[first]]])
    keep = np.ones(len(ids), dtype=bool)
    keep[listed[first[sizes[group] >= 2]]] = False

    served = sizes >= 2
    which = groups[served] % lists
    wide = np.asarray([mask.bit_count() >= 2 for mask in range(1 << MAX_LIST)])
    position = np.cumsum(wide) - 1  # of a mask among the masks of two rows or more
    heads = np.asarray([members[0] for members in partition.lists], dtype=np.int64)
    return keep, (
        partition.owner[heads[which]],
        groups[served] // lists,
        sum_places(partition)[which] + position[masks[served]],
        which - lists,
    )
