"""A plan's rows on processors in memory, as the partition that :mod:`codegen.upmem` lays out.

The plan says how many rows of a table a tier with processors pools, and the shape of their tiles; which rows these are
follows from an order by popularity. Rows are dealt out to the row tiles back and forth in that order, so that tiles
get nearly equal reads (the greedy balance of UpDLRM's non-uniform partition, arXiv 2406.13941, without a trace).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ir.errors import InputError
from ir.pim import PimPartition
from ir.plan import TablePlan
from ir.topology import Topology


def planned_partition(table: TablePlan, topology: Topology, order: npt.NDArray[np.int64]) -> PimPartition:
    """The partition of a whole table (one shard) whose plan has a tile.

    Args:
        table: the plan's decision.
        topology: of the plan; it says which tier has processors.
        order: (rows,) ids by popularity, hottest first.

    Returns:
        Tiles; rows that other tiers hold have owner -1 and are added by the CPU in emulation.

    Raises:
        InputError: no rows of the table are pooled, the table is split over ranks, or ``order`` is not a permutation.
    """
    if table.tiers is None or table.tiers.pim is None:
        raise InputError(f"table {table.name!r} has no rows on processors in memory in this plan")
    if len(table.shards) != 1:
        raise InputError(f"table {table.name!r} is split over ranks; lay out each shard's rows and columns")
    if order.shape != (table.rows,) or not np.array_equal(np.sort(order), np.arange(table.rows)):
        raise InputError(
            f"order must hold each of the {table.rows} rows of table {table.name!r} once, hottest first"
        )
    pooling = {tier.name for tier in topology.host_tiers if tier.processors is not None}
    tile = table.tiers.pim
    owner = np.full(table.rows, -1, dtype=np.int64)
    there = np.arange(tile.row_tiles)
    deal = np.concatenate([there, there[::-1]])
    start = 0
    for piece in table.tiers.ranges:
        if piece.tier in pooling:
            rows = order[start : start + piece.rows]
            owner[rows] = np.resize(deal, len(rows))
        start += piece.rows
    return PimPartition(
        "non_uniform", table.rows, table.dim, min(tile.cols, table.dim), tile.row_tiles, owner
    )
