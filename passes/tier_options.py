"""Row splits over memory tiers as options of the joint problem, made where prices ask for them.

The resources of a rank besides its own memory, by the names that errors and plans use: for each host tier
``bytes`` (its share of the capacity), ``bandwidth``, ``iops`` and ``endurance`` (seconds a step), or ``lookup``
where processors in the memory pool the rows; and for the link between host and device ``bandwidth``. Seconds
overlap the step, so each must stay below it.

At given prices a group of equally popular rows costs ``A_j rows + B_j touched`` in tier j (``A_j rows + B_j reads``
where it is pooled, and a fixed sum once), and the best tier of every group is found on its own: the split over
all tiers and all split points of the ICDF at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cost_models.embedding import traffic
from cost_models.pim import PimSystem
from cost_models.pim_tier import PooledUnit, PoolPrices, buffers_fit, pools
from cost_models.tiers import (
    TieredUnit,
    Touched,
    cached_misses,
    host_link,
    prefetch_depth,
    range_touched,
    row_fetch,
    touched_rows,
)
from ir.errors import InfeasibleError, InputError, did_you_mean
from ir.ops import EmbeddingTable
from ir.sharding import ShardingOption, largest_units
from ir.tier_plan import PimTile, RowCache, RowRange, TableTiers, TierRequest
from ir.topology import MemoryTier, Topology
from ir.workload import Workload
from passes.pim_tile import TileProblem, best_tile

FloatArray = npt.NDArray[np.float64]

LINK = "link"
CACHE_SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # of the rows
# without prices yet: shares of the accesses that the device serves
START_POINTS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
READ_SHARES = (1.0, 0.1, 0.01)  # of the ids, that shapes of tiles are made for


@dataclass(frozen=True, slots=True)
class Resource:
    """One limited resource of a rank besides its memory."""

    tier: str
    kind: str  # "bytes", "bandwidth", "iops", "endurance", "lookup"
    limit: float  # bytes; seconds have none of their own

    @property
    def stretched(self) -> bool:
        """It is seconds that must stay below the step."""
        return self.kind != "bytes"


def host_tiers(topology: Topology, request: TierRequest, step: float) -> tuple[MemoryTier, ...]:
    """The host tiers that tables may use, fastest first, and that rows can be fetched from in time.

    Raises:
        InputError: the request names a tier that the topology lacks.
    """
    known = [tier.name for tier in (*topology.device.tiers, *topology.host_tiers)]
    named = (request.tiers or ()) + tuple(itertools.chain(*(request.tables or {}).values()))
    for name in named:
        if name not in known:
            raise InputError(
                f"topology {topology.name!r} has no memory tier {name!r}{did_you_mean(name, known)}"
            )
    allowed = known if request.tiers is None else request.tiers
    return tuple(
        tier
        for tier in topology.host_tiers
        if tier.name in allowed and prefetch_depth(tier, step) <= request.prefetch_depth
    )


def resources(
    tiers: Sequence[MemoryTier], topology: Topology, reserve: float, train: bool
) -> tuple[Resource, ...]:
    """The resource rows of a rank: its share of every host tier, and its link to the host."""
    rows = []
    for tier in tiers:
        rows.append(Resource(tier.name, "bytes", tier.capacity * (1 - reserve) / topology.host_size))
        if pools(tier, train=train):
            rows.append(Resource(tier.name, "lookup", 0.0))
            continue
        rows.append(Resource(tier.name, "bandwidth", 0.0))
        if tier.iops is not None:
            rows.append(Resource(tier.name, "iops", 0.0))
        if tier.dwpd is not None and train:
            rows.append(Resource(tier.name, "endurance", 0.0))
    if tiers and topology.device.kind != "cpu":
        rows.append(Resource(LINK, "bandwidth", 0.0))
    return tuple(rows)


@dataclass(frozen=True, slots=True, eq=False)
class TierModel:
    """Tiers, resources and popularity of one program at a nominal step time."""

    topology: Topology
    workload: Workload
    request: TierRequest
    tiers: tuple[MemoryTier, ...]  # of the host
    rows: tuple[Resource, ...]
    depth: dict[str, int]  # steps ahead, by tier
    train: bool
    reserve: float  # share of every memory that is kept free

    @classmethod
    def build(
        cls,
        topology: Topology,
        workload: Workload,
        request: TierRequest,
        reserve: float,
        step: float,
        train: bool,
    ) -> TierModel:
        """The model for steps of about ``step`` seconds."""
        tiers = host_tiers(topology, request, step)
        rows = resources(tiers, topology, reserve, train)
        depth = {tier.name: prefetch_depth(tier, step) for tier in tiers}
        return cls(topology, workload, request, tiers, rows, depth, train, reserve)

    @property
    def device(self) -> str:
        """Name of the device's own tier."""
        return self.topology.device.tiers[0].name

    def touched(self, table: EmbeddingTable) -> Touched:
        """Popularity of the table's rows."""
        return touched_rows(table, self.topology, self.workload)

    def taken(self, unit: TieredUnit) -> tuple[float, ...]:
        """What a unit takes of each resource row on its rank."""
        used = dict.fromkeys(self.rows, 0.0)
        stored, fetched, size = unit.stored, unit.fetched, unit.row_size
        for row in self.rows:
            if row.tier == LINK:
                sums = sum(one.sums for one in unit.pooled.values())
                moved = sum(fetched.values()) * size + sums
                used[row] = moved / host_link(self.topology.device)
            elif row.kind == "bytes":
                used[row] = stored.get(row.tier, 0.0)
            elif row.kind == "lookup":
                busy = unit.pooled[row.tier].seconds if row.tier in unit.pooled else 0.0
                used[row] = busy * self.topology.host_size  # the host's ranks take turns
            elif fetched.get(row.tier, 0.0):
                tier = self.topology.tier(row.tier)
                used[row] = fetched[row.tier] * self._fetch(tier, size, row.kind)
        return tuple(used.values())

    def _fetch(self, tier: MemoryTier, size: float, kind: str) -> float:
        price = row_fetch(tier, size, self.topology, self.request, train=self.train)
        return float(getattr(price, kind))

    def per_touched(self, tier: MemoryTier, size: float) -> FloatArray:
        """What one fetched row of ``size`` bytes takes of each resource row."""
        return np.array(self.taken(TieredUnit({}, {}, {}, {tier.name: 1.0}, size)))

    def per_read(self, tier: MemoryTier, prices: PoolPrices) -> tuple[FloatArray, FloatArray]:
        """What one id pooled in the tier takes of each resource row, and what the first one takes besides."""
        one = self.taken(TieredUnit({}, {}, {}, {}, 0.0, {tier.name: PooledUnit(prices.per_read, 0.0, 0.0)}))
        pooled = PooledUnit(prices.fixed, 0.0, prices.sums)
        return np.array(one), np.array(self.taken(TieredUnit({}, {}, {}, {}, 0.0, {tier.name: pooled})))

    def pooling(self, tier: MemoryTier) -> bool:
        """The tier's processors pool rows where they lie."""
        return pools(tier, train=self.train)

    def tiles(self, table: EmbeddingTable) -> tuple[PimTile, ...]:
        """Shapes of tiles worth trying: the best for all ids, and for the few that a cold range gets.

        None where the table cannot be pooled by a tier: sequences, per-sample weights, or a step whose ids and
        sums exceed what ``memory_reserve`` keeps free on a processor.
        """
        weighted = table.weighted or any(self.workload.stats(f).weighted for f in table.features)
        tier = next((t for t in self.allowed(table.name) if self.pooling(t)), None)
        if tier is None or weighted or table.pooling == "none":
            return ()
        whole = ShardingOption("table_wise", (table.dim,))
        (unit, _), *_ = largest_units(whole, table.rows, self.topology.world_size, self.topology.host_size)
        asked = traffic(table, whole, unit, self.topology, self.workload)
        assert tier.processors is not None
        rows = min(table.rows, int(tier.capacity * (1 - self.reserve)) // (4 * table.dim + 4))
        held = math.ceil(rows / (1 - self.reserve))  # a tile of these leaves room for ids and sums
        batch, made = math.ceil(asked.outputs), []
        for share in READ_SHARES:
            problem = TileProblem(
                held, table.dim, batch, asked.ids * share / batch, PimSystem(dpus=tier.processors)
            )
            try:
                best = best_tile(problem)
            except InfeasibleError:
                continue
            tile = PimTile(best.cols, best.row_tiles)
            if buffers_fit(tile, rows, batch, asked.ids, self.reserve):
                made.append(tile)
        return tuple(dict.fromkeys(made))

    def bytes_row(self, tier: MemoryTier) -> int:
        """Position of the tier's capacity among the resource rows."""
        return next(i for i, row in enumerate(self.rows) if row.tier == tier.name and row.kind == "bytes")

    def allowed(self, name: str) -> tuple[MemoryTier, ...]:
        """The host tiers that one table may use."""
        import fnmatch

        chosen: tuple[str, ...] | None = None
        for pattern, names in (self.request.tables or {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                chosen = names
        return self.tiers if chosen is None else tuple(t for t in self.tiers if t.name in chosen)

    def split(
        self, table: EmbeddingTable, touched: Touched, place: Sequence[int], tile: PimTile | None = None
    ) -> TableTiers | None:
        """The split that puts group g into tier ``place[g]`` (0 the device, j the j-th host tier).

        None when every row stays in the device.
        """
        if not any(place):
            return None
        names = (self.device, *(tier.name for tier in self.tiers))
        ends = np.cumsum(touched.rows)
        ends = np.round(ends * (table.rows / ends[-1])).astype(np.int64)
        ranges: list[RowRange] = []
        start, served = 0, 0.0
        for at, (group, following) in enumerate(itertools.pairwise([*place, -1])):
            served += float(touched.accesses[at])
            if group == following:
                continue
            stop = int(ends[at])
            if stop > start:
                ranges.append(RowRange(names[group], stop - start, min(1.0, served)))
                start, served = stop, 0.0
        used = {piece.tier for piece in ranges} - {self.device}
        if not used:
            return None
        pooled = {tier.name for tier in self.tiers if tile is not None and self.pooling(tier)}
        starts = np.cumsum([0] + [piece.rows for piece in ranges])
        fetched = sum(
            range_touched(touched, float(a), float(b))
            for piece, a, b in zip(ranges, starts[:-1], starts[1:], strict=True)
            if piece.tier in used - pooled
        )
        depth = max(self.depth[name] for name in used)
        return TableTiers(tuple(ranges), None, depth, fetched, pim=tile if used & pooled else None)

    def start_splits(self, table: EmbeddingTable, touched: Touched) -> list[TableTiers | None]:
        """Splits to begin with: hot rows in the device, the rest in one host tier; or caches."""
        made: list[TableTiers | None] = [None]
        tiers = self.allowed(table.name)
        if "split" not in self.request.placements:
            fetched = [tier for tier in tiers if not self.pooling(tier)]
            return made + [c for tier in fetched for c in self._caches(table, touched, tier)]
        served = np.cumsum(touched.accesses)
        for tier, point in itertools.product(tiers, START_POINTS):
            hot = served <= point + 1e-9
            place = [0 if h else self.tiers.index(tier) + 1 for h in hot]
            tiles = self.tiles(table) if self.pooling(tier) else (None,)
            made += [self.split(table, touched, place, tile) for tile in tiles]
        return list(dict.fromkeys(made))

    def _caches(self, table: EmbeddingTable, touched: Touched, tier: MemoryTier) -> list[TableTiers]:
        made = []
        for part in CACHE_SIZES:
            rows = max(1, int(table.rows * part))
            policy = self.request.cache_policy
            fetched, hits = cached_misses(table, touched, self.workload, policy, rows)
            cache = RowCache(rows, policy, min(1.0, hits))
            whole = (RowRange(tier.name, table.rows, 1.0),)
            made.append(TableTiers(whole, cache, self.depth[tier.name], fetched))
        return made
