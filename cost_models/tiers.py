"""What rows below a device's own memory cost: fetches by tier, and rows touched by popularity.

Rows outside the device's first tier are fetched ahead of use from the input pipeline, updated in the
device's memory and written back (MTrainS, arXiv 2305.01515). A distinct row of ``b`` bytes (weights and
optimizer state) takes of a host tier with granule G, per step,

    bandwidth   ceil(b / G) G (1 / read + 1 / write) / eta          (inference: reads only)
    iops        ceil(b / G) (1 / read IOPS + 1 / write IOPS)        (block tiers)
    endurance   ceil(b / G) G WA 86400 / (DWPD capacity 5 / years)  (drives, training)

seconds, each times the devices that share the tier; fetches overlap the step, so the sum over rows of each
line must stay below the step. It also crosses the link between host and device, and stays in the
device's memory from its fetch to its write-back.

A tier with processors is different in inference: its rows are pooled where they lie (:mod:`cost_models.pim_tier`).

A block drive without write IOPS of its own is taken to write as many blocks less than it reads as its
bandwidths differ. Rows are touched independently (Poisson), scaled to the workload's distinct rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cost_models.cache import Popularity, characteristic_time
from cost_models.embedding import state_bytes, stored_bytes, traffic
from cost_models.pim_tier import PooledUnit, pool_prices, pools
from ir.ops import EmbeddingTable
from ir.sharding import ShardingOption, Unit, largest_units
from ir.tier_plan import ENDURANCE_YEARS, TableTiers, TierRequest
from ir.topology import Device, MemoryTier, Topology
from ir.workload import Workload

FloatArray = npt.NDArray[np.float64]

TIER_EFFICIENCY = 0.8  # of the peak: 75 to 85 % is what DDR4 and DDR5 servers are reported to reach
SECONDS_A_DAY = 86400.0
UNIFORM_GROUPS = (
    64  # split points offered for a table whose popularity is unknown, or among rows of equal popularity
)

# Bytes/s that a copy between host and device reaches: thresholds of Azure's node health checks, PCIe 4 and 5
PCIE4_COPY = 21e9
PCIE5_COPY = 48e9
_PCIE5_DEVICES = ("H100", "H200", "B200", "GB200", "B300", "MI300")


@dataclass(frozen=True, slots=True)
class RowFetch:
    """What one distinct row a step takes of a rank's share of a host tier."""

    bandwidth: float  # seconds
    iops: float  # seconds; 0 for tiers that state none
    endurance: float  # seconds; 0 for tiers that do not wear
    link: float  # seconds of the link between host and device


def host_link(device: Device) -> float:
    """Bytes/s between the host's memory and the device, one direction; infinite for CPU ranks."""
    if device.kind == "cpu":
        return math.inf
    return PCIE5_COPY if any(name in device.name.upper() for name in _PCIE5_DEVICES) else PCIE4_COPY


def row_fetch(
    tier: MemoryTier, size: float, topology: Topology, request: TierRequest, *, train: bool
) -> RowFetch:
    """The price of one row of ``size`` bytes (weights and optimizer state) in ``tier``."""
    sharers = topology.host_size
    blocks = math.ceil(size / tier.granule)
    moved = blocks * tier.granule
    seconds = moved / tier.read_bandwidth + (moved / tier.write_bandwidth if train else 0.0)
    operations = 0.0
    if tier.iops is not None:
        writes = tier.write_iops or tier.iops * min(1.0, tier.write_bandwidth / tier.read_bandwidth)
        operations = blocks / tier.iops + (blocks / writes if train else 0.0)
    wear = 0.0
    if tier.dwpd is not None and train:
        daily = tier.dwpd * tier.capacity * ENDURANCE_YEARS / request.endurance_years
        wear = moved * request.write_amplification * SECONDS_A_DAY / daily
    return RowFetch(
        bandwidth=seconds / TIER_EFFICIENCY * sharers,
        iops=operations * sharers,
        endurance=wear * sharers,
        link=size / host_link(topology.device),
    )


def prefetch_depth(tier: MemoryTier, step: float) -> int:
    """Steps that a fetch must start ahead: its latency, then at most one step of transfer.

    ceil((latency + transfer) / step) with transfer <= step, as the tier keeps up with the step.
    """
    return 1 + math.ceil(tier.latency / step)


@dataclass(frozen=True, slots=True, eq=False)
class Touched:
    """Rows of a table in groups, hottest first, and how many of each one step touches.

    ``rows`` counts all rows of the table; ``touched`` the distinct ones in one global batch; ``accesses``
    is each group's share of the accesses.
    """

    rows: FloatArray
    touched: FloatArray
    accesses: FloatArray


def touched_rows(table: EmbeddingTable, topology: Topology, workload: Workload) -> Touched:
    """Rows touched by one global batch, by popularity.

    Of several features that look the table up, the one with the most ids tells the popularity.
    """
    whole = ShardingOption("table_wise", (table.dim,))
    (unit, _), *_ = largest_units(whole, table.rows, topology.world_size, topology.host_size)
    moved = traffic(table, whole, unit, topology, workload)
    popularity = table_popularity(table, workload)
    touched = popularity.counts * -np.expm1(-max(moved.ids, 0.0) * popularity.mass / popularity.counts)
    stated = any(workload.stats(f).unique_fraction < 1 for f in table.features)
    if stated and touched.sum() > 0:
        touched = np.minimum(touched * moved.distinct / touched.sum(), popularity.counts)
    # whole rows in every group, so that splits fall between rows
    ends = np.round(np.cumsum(popularity.counts) * (table.rows / popularity.rows))
    first = np.unique(np.concatenate([[0.0], ends]), return_index=True)[1]
    edges = np.concatenate([[0.0], ends])[first]
    group = np.minimum(np.searchsorted(edges, ends, side="left") - 1, len(edges) - 2)
    group = np.maximum(group, 0)
    rows = np.diff(edges)
    return Touched(
        rows,
        np.minimum(np.bincount(group, touched, len(rows)), rows),
        np.bincount(group, popularity.mass, len(rows)).astype(np.float64),
    )


def table_popularity(table: EmbeddingTable, workload: Workload) -> Popularity:
    """Popularity of a table's rows; even where no feature has an ICDF.

    The last steps of an ICDF hold most rows of a skewed table, all taken as equally popular. Groups that hold more than
    1 / UNIFORM_GROUPS of the rows are cut, so that a split may fall inside.
    """
    busiest = max((workload.stats(f) for f in table.features), key=lambda s: s.pooling_factor, default=None)
    if busiest is None or not busiest.icdf:
        groups = min(UNIFORM_GROUPS, table.rows)
        return Popularity(np.full(groups, table.rows / groups), np.full(groups, 1 / groups))
    coarse = Popularity.from_icdf(busiest.icdf, table.rows)
    parts = np.ceil(coarse.counts * (UNIFORM_GROUPS / coarse.rows) - 1e-9).astype(np.int64)
    return Popularity(np.repeat(coarse.counts / parts, parts), np.repeat(coarse.mass / parts, parts))


def cached_misses(
    table: EmbeddingTable, touched: Touched, workload: Workload, policy: str, rows: float
) -> tuple[float, float]:
    """(distinct rows fetched a step, hit rate) behind a cache of ``rows`` rows.

    LRU by Che's approximation: a touched row is fetched unless the cache holds it when the batch starts.
    """
    popularity = table_popularity(table, workload)
    if policy == "lfu":
        before = np.cumsum(popularity.counts) - popularity.counts
        held = np.clip(rows - before, 0, popularity.counts) / popularity.counts
    else:
        time = characteristic_time(popularity, rows) if rows > 0 else 0.0
        held = (
            (popularity.mass > 0).astype(np.float64)
            if math.isinf(time)
            else -np.expm1(-popularity.mass / popularity.counts * time)
        )
    # groups of ``touched`` end at whole rows
    ends = np.concatenate([[0.0], np.cumsum(popularity.counts)]) * (table.rows / popularity.rows)
    total = np.concatenate([[0.0], np.cumsum(touched.touched)])
    asked = np.diff(np.interp(ends, np.concatenate([[0.0], np.cumsum(touched.rows)]), total))
    return float((asked * (1 - held)).sum()), float((popularity.mass * held).sum())


@dataclass(frozen=True, slots=True)
class TieredUnit:
    """A unit whose rows live in several tiers, on each rank that holds it.

    Attributes:
        seconds: by phase, staging in the device's memory included.
        memory: bytes of the device by purpose; ``staging`` holds rows from their fetch to their write-back.
        stored: bytes in each host tier.
        fetched: distinct rows fetched from each host tier a step.
        row_size: bytes of a row with its optimizer state.
        pooled: what rows take of tiers whose processors pool them.
    """

    seconds: dict[str, float]
    memory: dict[str, int]
    stored: dict[str, float]
    fetched: dict[str, float]
    row_size: float
    pooled: dict[str, PooledUnit] = field(default_factory=dict)


def range_touched(touched: Touched, start: float, stop: float) -> float:
    """Distinct rows that a step touches among rows ``start`` to ``stop`` in order of popularity."""
    edges = np.concatenate([[0.0], np.cumsum(touched.rows)])
    total = np.concatenate([[0.0], np.cumsum(touched.touched)])
    low, high = np.interp([start, stop], edges, total)
    return float(high - low)


def tiered_unit(
    table: EmbeddingTable,
    unit: Unit,
    placed: TableTiers,
    touched: Touched,
    seconds: dict[str, float],
    memory: dict[str, int],
    topology: Topology,
    workload: Workload,
    row_efficiency: float,
    state: str = "fp32",
) -> TieredUnit:
    """Price a unit whose table lives in ``placed``, from the prices it has in the device alone.

    Every rank holds its share of each range. A fetched row is written to the device's memory before the
    lookup and, in training, read from it for the write-back. Sums of rows that were pooled elsewhere arrive and are
    added.
    """
    device = topology.device.tiers[0]
    width = unit.blocks[0].cols
    share = unit.blocks[0].rows / table.rows
    train = "optimizer" in memory
    size = stored_bytes(table.dtype, width) + (state_bytes(workload.optimizer, width, state) if train else 0)
    kept = 0.0  # rows of the whole table that the device holds
    stored: dict[str, float] = {}
    fetched: dict[str, float] = {}
    pooled: dict[str, PooledUnit] = {}
    accesses = 0.0  # pooled elsewhere
    start = 0.0
    for piece in placed.ranges:
        if piece.tier == device.name:
            kept += piece.rows
        elif placed.pim is not None and pools(topology.tier(piece.tier), train=train):
            asked = traffic(table, ShardingOption("table_wise", (table.dim,)), unit, topology, workload)
            price = pool_prices(topology.tier(piece.tier), placed.pim, width, asked.outputs)
            before = pooled.get(piece.tier, PooledUnit(price.fixed, 0.0, price.sums))
            pooled[piece.tier] = PooledUnit(
                before.seconds + price.per_read * asked.ids * piece.accesses,
                before.stored + piece.rows * share * price.row_bytes,
                price.sums,
            )
            accesses += piece.accesses
        else:
            stored[piece.tier] = stored.get(piece.tier, 0.0) + piece.rows * share * size
            missed = range_touched(touched, start, start + piece.rows)
            if placed.cache is not None:
                kept += placed.cache.rows
                missed, _ = cached_misses(table, touched, workload, placed.cache.policy, placed.cache.rows)
            fetched[piece.tier] = fetched.get(piece.tier, 0.0) + missed * share
        start += piece.rows
    moved = sum(fetched.values())
    sums = sum(one.sums for one in pooled.values())
    stored |= {name: one.stored for name, one in pooled.items()}
    held = {
        purpose: math.ceil(used * kept / table.rows) if purpose in ("weights", "optimizer") else used
        for purpose, used in memory.items()
    }
    held["staging"] = math.ceil(placed.prefetch_depth * (moved * size + sums))
    taken = dict(seconds)
    taken["lookup_forward"] *= max(0.0, 1 - accesses)
    arrive, read = 1 / device.write_bandwidth, 1 / device.read_bandwidth
    taken["lookup_forward"] += (moved * size * arrive + sums * (arrive + read)) / row_efficiency
    if train:
        taken["lookup_backward"] += moved * size * read / row_efficiency
    return TieredUnit(taken, held, stored, fetched, size, pooled)
