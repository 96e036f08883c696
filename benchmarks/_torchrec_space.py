"""TorchRec's search space of one case, priced once by TorchRec's own estimators.

The enumerator is TorchRec's; what is spared is pricing equal shards again. A shard's price depends on its
table, sharding type, kernel and size alone (``ShardPerfContext`` and ``calculate_shard_storages`` of
TorchRec 1.8 read nothing else of a shard), so each distinct one is priced once for all values of
``min_partition``. ``vs_torchrec.py --check-rival`` compares the plans with those of the untouched planner.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import Shard, ShardingOption
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

CHUNK = 32  # tables enumerated together; bounds the memory for shards of every option


class Unit(NamedTuple):
    """A priced shard: ``fields`` in the order in which ``Perf.total`` adds them, ms; ``storage`` bytes."""

    fields: tuple[float, float, float, float, float]
    total: float
    extra: float  # total plus input_dist_comms
    storage: tuple[int, int, int]  # hbm, ddr, ssd


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """One sharding option: its distinct shards, and which of them each shard is."""

    option: Any  # TorchRec's, without its shards
    units: tuple[Unit, ...]
    shards: tuple[int, ...]
    storage: tuple[int, int, int]  # of all shards
    min_partition: int | None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What distinguishes an option of a case, whatever ``min_partition`` led to it."""
        return (
            self.option.fqn,
            self.option.sharding_type,
            self.option.compute_kernel,
            self.shards,
            self.units,
        )

    def each(self) -> Iterator[Unit]:
        """The shards in TorchRec's order."""
        return (self.units[index] for index in self.shards)

    def ranked(self, case: Any, ranks: list[int]) -> Any:
        """A fresh ``ShardingOption`` with its shards on ``ranks``."""
        o = self.option
        sizes, offsets = calculate_shard_sizes_and_offsets(
            tensor=o.tensor,
            world_size=case.topology.world_size,
            local_world_size=case.topology.intra_group_size,
            sharding_type=o.sharding_type,
            col_wise_shard_dim=self.min_partition,
        )
        return ShardingOption(
            name=o.name,
            tensor=o.tensor,
            module=o.module,
            input_lengths=o.input_lengths,
            batch_size=o.batch_size,
            compute_kernel=o.compute_kernel,
            sharding_type=o.sharding_type,
            partition_by=o.partition_by,
            shards=[Shard(size=s, offset=p, rank=r) for s, p, r in zip(sizes, offsets, ranks, strict=True)],
            is_pooled=o.is_pooled,
        )


class Space:
    """The options in TorchRec's order, with the sums that its proposers read."""

    def __init__(self, options: list[Priced]) -> None:
        self.options = options
        by_table: dict[str, list[int]] = {}
        for number, priced in enumerate(options):
            by_table.setdefault(priced.option.fqn, []).append(number)
        self.tables = list(by_table.values())
        totals = [[unit.total for unit in priced.each()] for priced in options]
        self.depth = [max(t) for t in totals]
        self.breadth = [sum(t) for t in totals]
        self.perf = [functools.reduce(operator.add, t, 0.0) for t in totals]
        self.hbm = [priced.storage[0] for priced in options]
        # For bounds only, so the order of additions does not matter.
        self.deepest = np.array(self.depth)
        self.deepest_extra = np.array([max(u.extra for u in priced.units) for priced in options])
        self.sums = np.array(self.perf)
        self.sums_extra = np.array([sum(u.extra for u in priced.each()) for priced in options])
        self.storage = np.array([priced.storage for priced in options], dtype=np.int64)
        self.largest = np.array(
            [np.max([u.storage for u in p.units], axis=0) for p in options], dtype=np.int64
        )

    def signature(self) -> int:
        """Equal for spaces with the same options in the same order."""
        return hash(tuple(priced.identity for priced in self.options))


class _Some(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """The default sharder, for some of the tables."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def shardable_parameters(self, module: Any) -> dict[str, Any]:
        return {k: v for k, v in super().shardable_parameters(module).items() if k in self.names}


class _Enumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """TorchRec's enumerator; only distinct shards, unknown so far, reach its estimators."""

    known: dict[tuple[Any, ...], Unit]
    made: list[Priced]

    def populate_estimates(self, sharding_options: list[Any]) -> None:
        wanted = []
        for option in sharding_options:
            sizes = [(*shard.size,) for shard in option.shards]
            distinct = list(dict.fromkeys(sizes))
            keys = [(option.name, option.sharding_type, option.compute_kernel, size) for size in distinct]
            wanted.append((option, [distinct.index(size) for size in sizes], keys))
            option.shards = [Shard(size=list(key[3]), offset=[0, 0]) for key in keys if key not in self.known]
        unknown = [option for option in sharding_options if option.shards]
        super().populate_estimates(unknown)
        for option in unknown:
            for shard in option.shards:
                key = (option.name, option.sharding_type, option.compute_kernel, (*shard.size,))
                self.known[key] = _unit(shard)
        for option, indices, keys in wanted:
            option.shards = []
            units = tuple(self.known[key] for key in keys)
            limits = self._constraints or {}
            width = limits[option.name].min_partition if option.name in limits else None
            storage = np.sum([units[i].storage for i in indices], axis=0, dtype=np.int64)
            hbm, ddr, ssd = (int(amount) for amount in storage)
            self.made.append(Priced(option, units, tuple(indices), (hbm, ddr, ssd), width))


def _unit(shard: Any) -> Unit:
    perf, storage = shard.perf, shard.storage
    return Unit(
        (perf.fwd_compute, perf.bwd_compute, perf.fwd_comms, perf.bwd_comms, perf.prefetch_compute),
        perf.total,
        perf.total + perf.input_dist_comms,
        (storage.hbm, storage.ddr, storage.ssd),
    )


class Pricing:
    """Search spaces of one case; ``case`` is a ``_torchrec_rival.Case``."""

    def __init__(self, case: Any) -> None:
        self.case = case
        self.known: dict[tuple[Any, ...], Unit] = {}

    def space(self, constraints: dict[str, Any]) -> Space:
        """What TorchRec enumerates under ``constraints``, in its order."""
        case = self.case
        enumerator = _Enumerator(case.topology, case.batch_size, constraints)
        enumerator.known, enumerator.made = self.known, []
        (sharder,) = case.sharders
        names = list(sharder.shardable_parameters(case.module))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start in range(0, len(names), CHUNK):
                enumerator.enumerate(case.module, [_Some(set(names[start : start + CHUNK]))])
        return Space(enumerator.made)
