"""Prices of a placed plan: seconds by phase and bytes by purpose on every rank, from its shards.

The sharding pass prices options before it places them; these functions price what was placed, so that
the two can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration
from cost_models.embedding import PHASES, unit_seconds
from cost_models.memory import unit_memory
from ir.ops import EmbeddingTable
from ir.plan import TablePlan
from ir.program import Mode
from ir.sharding import ShardingOption, Unit, units
from ir.topology import Topology
from ir.workload import Workload


def table_of(plan: TablePlan) -> EmbeddingTable:
    """The table a decision is about."""
    return EmbeddingTable(
        name=plan.name,
        rows=plan.rows,
        dim=plan.dim,
        features=plan.features,
        pooling=plan.pooling,
        dtype=plan.dtype,
        module=plan.module,
        parameter=plan.parameter,
    )


def option_of(plan: TablePlan) -> ShardingOption:
    """The sharding option that a decision's shards spell out."""
    widths = dict(sorted({shard.col: shard.cols for shard in plan.shards}.items()))
    return ShardingOption(plan.sharding_type, tuple(widths.values()))


def placed_units(plan: TablePlan, topology: Topology) -> Iterator[tuple[Unit, tuple[int, ...]]]:
    """Each unit of a decision with the ranks that hold it."""
    position = 0
    for unit in units(option_of(plan), plan.rows, topology.world_size, topology.host_size):
        if plan.sharding_type == "data_parallel":
            yield unit, plan.ranks(topology.world_size)
            continue
        holders = len(unit.blocks)
        yield unit, tuple(shard.rank for shard in plan.shards[position : position + holders])
        position += holders


def rank_seconds(
    plans: Sequence[TablePlan], topology: Topology, workload: Workload, calibration: Calibration, mode: Mode
) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds of embedding work by phase, an array of world-size entries each."""
    seconds = {phase: np.zeros(topology.world_size) for phase in PHASES}
    for plan in plans:
        table, option = table_of(plan), option_of(plan)
        for unit, ranks in placed_units(plan, topology):
            price = unit_seconds(table, option, unit, topology, workload, calibration, mode)
            for phase in PHASES:
                np.add.at(seconds[phase], list(ranks), price[phase])
    return seconds


def rank_memory(
    plans: Sequence[TablePlan], topology: Topology, workload: Workload, mode: Mode
) -> list[dict[str, int]]:
    """Bytes of embedding memory by purpose, one mapping a rank."""
    used: list[dict[str, int]] = [{} for _ in range(topology.world_size)]
    for plan in plans:
        table, option = table_of(plan), option_of(plan)
        for unit, ranks in placed_units(plan, topology):
            price = unit_memory(table, option, unit, topology, workload, mode)
            for rank in ranks:
                for purpose, size in price.items():
                    used[rank][purpose] = used[rank].get(purpose, 0) + size
    return used
