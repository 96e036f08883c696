"""Memory tiers: what is asked (:class:`TierRequest`) and what was decided (:class:`TableTiers`, :class:`TierPlan`).

The fastest tier of the device (HBM) comes first; the tiers of the host follow in the topology's order.
Host tiers are shared by the devices of one host: a rank may use its share, capacity and bandwidth
divided by the devices of the host. Rows are ordered by popularity, hottest first; where a table's rows
are split over ranks, each rank holds the same share of every range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.reading import STRICT

TierObjective = Literal["step", "nodes", "cost", "power"]
Fraction = Annotated[float, Field(ge=0, le=1)]

ENDURANCE_YEARS = 5.0  # the warranty period that DWPD ratings are stated for


@dataclass(frozen=True, slots=True)
class TierRequest:
    """What the tier pass shall do.

    Attributes:
        tiers: names of tiers that tables may use besides the device's first; None allows all.
        objective: "step" minimises the predicted step; "nodes", "cost" and "power" find the fewest hosts
            (the cheapest, the most frugal number of them) that keep ``throughput``.
        throughput: samples per second to keep, all ranks together.
        max_hosts: largest number of hosts tried; default four times the topology's.
        placements: "split" stores hot rows in fast tiers for good, "cache" keeps all rows in one tier
            behind a cache in the device's memory.
        cache_policy: of caches.
        prefetch_depth: most steps that rows are fetched ahead.
        endurance_years: how long drives must last at this load.
        write_amplification: bytes written to a drive per byte handed to the storage layer above it (DWPD
            counts bytes that the host writes, so the drive's own amplification is not counted).
        tables: glob over table names -> tiers that these may use.
        host_price, host_watt: US dollars and watts of a host without its listed tiers; "cost" and "power"
            choose which tiers a host is bought with, and need them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tiers: tuple[str, ...] | None = None
    objective: TierObjective = "step"
    throughput: Annotated[float, Field(gt=0)] | None = None
    max_hosts: Annotated[int, Field(ge=1)] | None = None
    placements: Annotated[tuple[Literal["split", "cache"], ...], Field(min_length=1)] = ("split", "cache")
    cache_policy: Literal["lru", "lfu"] = "lru"
    prefetch_depth: Annotated[int, Field(ge=1, le=64)] = 4
    endurance_years: Annotated[float, Field(gt=0)] = ENDURANCE_YEARS
    write_amplification: Annotated[float, Field(ge=1)] = 1.0
    tables: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] | None = None
    host_price: Annotated[float, Field(gt=0)] | None = None
    host_watt: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, slots=True)
class RowRange:
    """Consecutive rows in order of popularity, and the tier that stores them."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tier: str
    rows: Annotated[int, Field(ge=1)]
    accesses: Fraction  # of the table's accesses


@dataclass(frozen=True, slots=True)
class RowCache:
    """A cache in the device's memory in front of the rows of the other ranges."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rows: Annotated[int, Field(ge=1)]  # of the whole table, over all its ranks
    policy: Literal["lru", "lfu"]
    hit_rate: Fraction  # expected fraction of accesses


@dataclass(frozen=True, slots=True)
class PimTile:
    """How the rows in a tier with processors are cut into tiles, one processor each.

    Attributes:
        cols: columns of a tile; those of a narrower shard are one tile.
        row_tiles: of each rank's part of the table.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    cols: Annotated[int, Field(ge=1)]
    row_tiles: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class TableTiers:
    """Where the rows of one table live (``TablePlan.tiers``; None: all in the device's first tier).

    Attributes:
        ranges: hottest first; their rows add up to the table's. With a cache there is one range.
        cache: in front of the range.
        prefetch_depth: steps that rows outside the device's memory are fetched ahead.
        fetched_rows: distinct rows fetched from host tiers a step, expected, over all ranks.
        pim: of the rows that a tier's processors pool (inference); they are not fetched.
        reason: why, for people.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    ranges: Annotated[tuple[RowRange, ...], Field(min_length=1)]
    cache: RowCache | None = None
    prefetch_depth: Annotated[int, Field(ge=0)] = 0
    fetched_rows: Annotated[float, Field(ge=0)] = 0.0
    reason: str = ""
    pim: PimTile | None = None

    @property
    def hit_rate(self) -> float:
        """Expected fraction of accesses served by the first range's tier or by the cache."""
        return self.cache.hit_rate if self.cache is not None else self.ranges[0].accesses


@dataclass(frozen=True, slots=True)
class TierUse:
    """How far one tier is used on its busiest host (host tiers) or rank (the device's tier).

    Attributes:
        bytes, limit: stored there, and what may be.
        seconds: device time by resource ("bandwidth", "iops", "endurance", "lookup" by processors in the
            memory) that one step takes; each must stay below the step.
        binding: the resources whose price is not zero: "capacity" or one of those.
        price_per_gb: seconds of the step that a tier of 1e9 bytes more on every host (rank, for the device's tier)
            would save at most, by the prices of the linear program; ``memory_reserve`` of them stays free.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tier: str
    bytes: Annotated[float, Field(ge=0)]
    limit: Annotated[float, Field(ge=0)]
    seconds: dict[str, float]
    binding: tuple[str, ...]
    price_per_gb: float


@dataclass(frozen=True, slots=True)
class HostTrial:
    """One number of hosts that was tried."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    hosts: Annotated[int, Field(ge=1)]
    verdict: Literal["kept", "not found", "impossible"]  # "impossible" is proved
    step: float | None  # seconds; None without a plan
    why: str = ""


@dataclass(frozen=True, slots=True)
class TierPlan:
    """Summary of the tiers (section ``decisions.tiers``); where rows live is ``TablePlan.tiers``.

    Attributes:
        objective_name: what was minimised.
        objective, lower_bound: seconds for "step"; hosts, dollars or watts otherwise.
        step: modelled step, seconds: the longer of the overlapping main step and every tier's busy time.
        step_limit: what the throughput allows; None without one.
        tiers: use of each, the device's first.
        trials: numbers of hosts tried, for "nodes", "cost" and "power".
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    objective_name: TierObjective
    objective: float
    lower_bound: float
    step: float
    step_limit: float | None
    hosts: Annotated[int, Field(ge=1)]
    tiers: tuple[TierUse, ...]
    trials: tuple[HostTrial, ...] = ()
