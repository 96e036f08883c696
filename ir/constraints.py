"""What the user pins, forbids or bounds; everything else is the planner's to decide."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.collective_plan import CollectiveRequest
from ir.compression import CompressionRequest
from ir.dedup import DedupRequest
from ir.dense_plan import DenseRequest
from ir.format_plan import FormatRequest
from ir.growth import GrowthRequest
from ir.parallelism import ParallelismConstraints
from ir.reading import STRICT, dump_record, parse_record
from ir.serving import ServingRequest
from ir.tier_plan import TierRequest
from ir.towers import TowerRequest

ShardingType = Literal[
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]
"""The seven sharding types, by TorchRec's names."""

SHARDING_TYPES: tuple[ShardingType, ...] = (
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
)


@dataclass(frozen=True, slots=True)
class TableConstraint:
    """What is allowed for the tables that a glob matches."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sharding_types: Annotated[tuple[ShardingType, ...], Field(min_length=1)] | None = None  # None: all seven
    min_column_width: Annotated[int, Field(ge=4, multiple_of=4)] | None = None  # narrowest column shard
    ranks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = (
        None  # table-wise only
    )


@dataclass(frozen=True, slots=True)
class Constraints:
    """Limits of a compilation.

    ``tables`` maps a glob over table names to a :class:`TableConstraint`; of several globs that match a
    table, the last one listed that sets a field decides it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    memory_reserve: Annotated[float, Field(ge=0, lt=1)] = 0.15  # of device memory, for what is not modelled
    memory_limit: Annotated[int, Field(gt=0)] | None = None  # bytes a device, instead of its capacity
    min_column_width: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    # Row-wise Adagrad keeps one state per row *of a shard*, so splitting columns changes the training
    # result. Off: such options are not offered, and the sharded run equals the unsharded one.
    allow_state_split: bool = False
    tables: dict[str, TableConstraint] = field(default_factory=dict)
    collectives: CollectiveRequest | None = None  # None: dense gradients by the library, buckets decided
    compression: CompressionRequest | None = None  # None: vectors travel in the workload's exchange type
    dedup: DedupRequest | None = None
    dense: DenseRequest | None = None  # None: replicated where it fits
    formats: FormatRequest | None = None  # None: every tensor keeps the type it is declared with
    growth: GrowthRequest | None = None  # None: the model keeps its size
    parallelism: ParallelismConstraints | None = None  # of a decoder; None: all of it is the planner's
    serving: ServingRequest | None = None  # of a decoder, mode inference; None: its defaults
    tiers: TierRequest | None = None  # None: tables stay in the device's first tier
    towers: TowerRequest | None = None  # None: lookups stay flat

    def for_table(self, name: str) -> TableConstraint:
        """The constraint in force for one table."""
        types, width, ranks = None, self.min_column_width, None
        for pattern, rule in self.tables.items():
            if fnmatch.fnmatchcase(name, pattern):
                types = rule.sharding_types if rule.sharding_types is not None else types
                width = rule.min_column_width if rule.min_column_width is not None else width
                ranks = rule.ranks if rule.ranks is not None else ranks
        return TableConstraint(sharding_types=types, min_column_width=width, ranks=ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :meth:`from_dict` reads it back."""
        return dump_record(self)

    @classmethod
    def from_dict(cls, data: object, what: str = "constraints") -> Constraints:
        """Read plain data; raises InputError that names each bad key."""
        return parse_record(cls, data, what)
