"""Geometry of the seven sharding types: which blocks of a table an option makes, and where they may go.

An option splits a table's columns into widths and decides who holds the rows of each column block. A
:class:`Unit` is what is placed as a whole: a block on one rank (table- and column-wise), a block whose
rows are split over the ranks of one host (table-row-wise, grid), over all ranks (row-wise), or copied
to all ranks (data-parallel). Row splits are TorchRec's: ``ceil(rows / n)`` rows a rank, the last ones
shorter or empty; any other split runs in TorchRec and gives wrong results.

================== ========== ======================= ===================== ==========
sharding type      columns    rows                    a unit goes to        together
================== ========== ======================= ===================== ==========
data_parallel      whole      whole, copied           every rank            -
table_wise         whole      whole                   one rank              -
column_wise        split      whole                   one rank each         no
table_column_wise  split      whole                   one rank each         one host
row_wise           whole      split over all ranks    every rank            -
table_row_wise     whole      split over a host       one host              -
grid_shard         split      split over a host       one host each         no
================== ========== ======================= ===================== ==========
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ir.constraints import ShardingType

Scope = Literal["rank", "host", "all"]

COLUMN_MULTIPLE = 4  # FBGEMM kernels take widths that are multiples of 4

_SCOPE: dict[ShardingType, Scope] = {
    "data_parallel": "all",
    "table_wise": "rank",
    "column_wise": "rank",
    "table_column_wise": "rank",
    "row_wise": "all",
    "table_row_wise": "host",
    "grid_shard": "host",
}
COLUMN_SPLIT: frozenset[ShardingType] = frozenset({"column_wise", "table_column_wise", "grid_shard"})
ROW_SPLIT: frozenset[ShardingType] = frozenset({"row_wise", "table_row_wise", "grid_shard"})


@dataclass(frozen=True, slots=True)
class ShardingOption:
    """One way to shard one table."""

    sharding_type: ShardingType
    widths: tuple[int, ...]  # columns of each column block, adding up to the dim

    @property
    def scope(self) -> Scope:
        """Who receives one unit."""
        return _SCOPE[self.sharding_type]

    @property
    def together(self) -> bool:
        """All units must land in one host."""
        return self.sharding_type == "table_column_wise"

    @property
    def label(self) -> str:
        """``"column_wise x4"``."""
        return self.sharding_type if len(self.widths) == 1 else f"{self.sharding_type} x{len(self.widths)}"


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a table: ``rows`` x ``cols`` from ``(row, col)``."""

    row: int
    col: int
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class Unit:
    """A column block of an option, with the row block of each rank that shares it."""

    scope: Scope
    blocks: tuple[Block, ...]  # one for "rank" and for copies, else one a rank of the host or the world


def row_blocks(rows: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """``(start, count)`` of each rank's rows: ceil(rows / ranks) each, the last ones shorter or empty."""
    size = -(-rows // ranks)
    return tuple((min(r * size, rows), max(0, min(size, rows - r * size))) for r in range(ranks))


def even_widths(dim: int, parts: int) -> tuple[int, ...] | None:
    """``dim`` columns in ``parts`` blocks, each a multiple of 4 and as even as can be; None if impossible."""
    if parts == 1:
        return (dim,)
    quanta, rest = divmod(dim, COLUMN_MULTIPLE)
    if rest or quanta < parts:
        return None
    each, extra = divmod(quanta, parts)
    return tuple((each + (i < extra)) * COLUMN_MULTIPLE for i in range(parts))


def largest_units(
    option: ShardingOption, rows: int, world_size: int, host_size: int
) -> tuple[tuple[Unit, int], ...]:
    """The distinct units of an option with their number, each with its largest block only.

    Enough to price an option, at a cost that does not grow with the ranks: :func:`units` makes a block a
    rank. Equal column widths are adjacent, so the order is that of :func:`units`.
    """
    ranks = 1
    if option.sharding_type in ROW_SPLIT:
        ranks = world_size if option.scope == "all" else host_size
    made: list[tuple[Unit, int]] = []
    for width in dict.fromkeys(option.widths):
        block = Block(0, 0, -(-rows // ranks), width)
        made.append((Unit(option.scope, (block,)), option.widths.count(width)))
    return tuple(made)


def units(option: ShardingOption, rows: int, world_size: int, host_size: int) -> tuple[Unit, ...]:
    """The units an option makes of a table with ``rows`` rows, in column order."""
    made = []
    col = 0
    for width in option.widths:
        if option.sharding_type in ROW_SPLIT:
            ranks = world_size if option.scope == "all" else host_size
            blocks = tuple(Block(start, col, count, width) for start, count in row_blocks(rows, ranks))
        else:
            blocks = (Block(0, col, rows, width),)
        made.append(Unit(option.scope, blocks))
        col += width
    return tuple(made)
