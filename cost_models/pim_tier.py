"""A memory tier whose processors pool rows where they lie: what one table takes of it in inference.

The rows of a table's range stay in the tier; ids go in and one sum a bag and tile comes back, goes to the device, and is
added to what the device pooled of its own rows. Tables are looked up one after the other, each on as many of the
host's DPUs as its tiles take, with a push, a launch and a pull of its own (:mod:`cost_models.pim`, one launch a table
as :mod:`codegen.upmem` lays them out). With r ids read a step on a rank that holds the table,

    seconds = fixed + per_read r

where the largest of the three limits of a DPU is taken for its reads and for its bags apart, so that the sum is never
below the model's time. Reads are taken as even over row tiles; rows dealt out by popularity come close to that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cost_models.pim import (
    ID_BYTES,
    MRAM_BYTES,
    PimSystem,
    bag_cycles,
    host_bandwidth,
    padded,
    reduce_bytes,
    row_cycles,
)
from ir.pim import ELEMENT_BYTES
from ir.tier_plan import PimTile
from ir.topology import MemoryTier

HEADER_BYTES = 64  # of a batch, on every DPU (codegen/upmem.py)


@dataclass(frozen=True, slots=True)
class PooledUnit:
    """What a unit with rows in a tier with processors takes of it on its rank.

    Attributes:
        seconds: of the host's processors a step.
        stored: bytes in the tier.
        sums: bytes that go to the device a step.
    """

    seconds: float
    stored: float
    sums: float


@dataclass(frozen=True, slots=True)
class PoolPrices:
    """What rows in the tier take, ``fixed`` if there are any."""

    fixed: float  # seconds a step
    per_read: float  # seconds of an id
    row_bytes: int  # stored
    sums: float  # bytes to the device a step


def pools(tier: MemoryTier, *, train: bool) -> bool:
    """Rows in the tier are pooled there instead of being fetched: inference, in a memory with processors."""
    return tier.processors is not None and not train


def pool_prices(tier: MemoryTier, tile: PimTile, width: int, bags: float) -> PoolPrices:
    """Prices of a unit of ``width`` columns that writes ``bags`` sums a step.

    Rows are fixed point of 4 bytes a column, whatever format the table has elsewhere.
    """
    assert tier.processors is not None
    system = PimSystem(dpus=tier.processors)
    cols = min(tile.cols, width)
    row_bytes, col_tiles = padded(cols * ELEMENT_BYTES), math.ceil(width / cols)
    dpus = min(tile.row_tiles * col_tiles, system.dpus)
    count = math.ceil(bags)
    pushed = HEADER_BYTES + padded((count + 4) * ID_BYTES)  # and 4 bytes an id
    into, back = host_bandwidth("in", dpus, system), host_bandwidth("out", dpus, system)
    fixed = system.in_latency + system.launch + system.out_latency
    fixed += dpus * pushed / into + dpus * count * row_bytes / back
    fixed += count * max(bag_cycles(row_bytes, system.tasklets)) / system.clock
    fixed += reduce_bytes(count, width, tile.row_tiles) / system.host_bandwidth
    per_read = dpus * ID_BYTES / tile.row_tiles / into
    per_read += max(row_cycles(row_bytes, "int32", system.tasklets)) / tile.row_tiles / system.clock
    return PoolPrices(fixed, per_read, row_bytes * col_tiles, bags * width * ELEMENT_BYTES)


def buffers_fit(tile: PimTile, rows: float, bags: float, reads: float, reserve: float) -> bool:
    """A tile's rows, and the ids and sums of a step in the part of a DPU that is kept free, fit."""
    row_bytes = padded(tile.cols * ELEMENT_BYTES)
    moved = HEADER_BYTES + (bags + 4) * ID_BYTES + reads / tile.row_tiles * ID_BYTES + bags * row_bytes
    return rows / tile.row_tiles * row_bytes <= MRAM_BYTES * (1 - reserve) and moved <= MRAM_BYTES * reserve
