"""Prices of a placed plan: seconds by phase and bytes by purpose on every rank, from its shards.

The sharding pass prices options before it places them; these functions price what was placed, so that
the two can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration, default_calibration
from cost_models.embedding import PHASES, unit_seconds
from cost_models.memory import unit_memory
from cost_models.tiers import TieredUnit, host_link, row_fetch, tiered_unit, touched_rows
from ir.ops import EmbeddingTable
from ir.plan import TablePlan
from ir.program import Mode
from ir.sharding import ShardingOption, Unit, units
from ir.tier_plan import TierRequest
from ir.topology import Topology
from ir.workload import Workload


def table_of(plan: TablePlan) -> EmbeddingTable:
    """The table a decision is about; its ``dtype`` is the number format of the weights, if one was decided."""
    return EmbeddingTable(
        name=plan.name,
        rows=plan.rows,
        dim=plan.dim,
        features=plan.features,
        pooling=plan.pooling,
        dtype=plan.format or plan.dtype,
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
        for ranks, price in _placed_prices(plan, topology, workload, calibration, mode):
            for phase in PHASES:
                np.add.at(seconds[phase], list(ranks), price.seconds[phase])
    return seconds


def _placed_prices(
    plan: TablePlan, topology: Topology, workload: Workload, calibration: Calibration, mode: Mode
) -> Iterator[tuple[tuple[int, ...], TieredUnit]]:
    """Each unit's ranks and price; the fetches of a table in tiers are priced with its units."""
    table, option, state = table_of(plan), option_of(plan), plan.state_format or "fp32"
    touched = touched_rows(table, topology, workload) if plan.tiers else None
    for unit, ranks in placed_units(plan, topology):
        seconds = unit_seconds(table, option, unit, topology, workload, calibration, mode, state)
        memory = unit_memory(table, option, unit, topology, workload, mode, state)
        if plan.tiers is None or touched is None:
            yield ranks, TieredUnit(seconds, memory, {}, {}, 0.0)
            continue
        yield (
            ranks,
            tiered_unit(
                table,
                unit,
                plan.tiers,
                touched,
                seconds,
                memory,
                topology,
                workload,
                calibration.row_efficiency,
                state,
            ),
        )


def rank_tiers(
    plans: Sequence[TablePlan],
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    mode: Mode,
    request: TierRequest,
) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    """Use of each host tier by resource on every rank: ``bytes``, and seconds a step.

    Seconds are of ``bandwidth``, ``iops``, ``endurance`` and ``lookup`` (processors in the memory); the key
    "link" holds those of the link between host and device under ``bandwidth``.
    """
    world = topology.world_size
    kinds = ("bytes", "bandwidth", "iops", "endurance", "lookup")
    used = {tier.name: {kind: np.zeros(world) for kind in kinds} for tier in topology.host_tiers}
    used["link"] = {"bandwidth": np.zeros(world)}
    for plan in plans:
        if plan.tiers is None:
            continue
        for ranks, price in _placed_prices(plan, topology, workload, calibration, mode):
            where = list(ranks)
            for name, size in price.stored.items():
                np.add.at(used[name]["bytes"], where, size)
            for name, rows in price.fetched.items():
                fetch = row_fetch(
                    topology.tier(name), price.row_size, topology, request, train=mode == "train"
                )
                for kind in ("bandwidth", "iops", "endurance"):
                    np.add.at(used[name][kind], where, rows * getattr(fetch, kind))
                np.add.at(used["link"]["bandwidth"], where, rows * fetch.link)
            for name, pooled in price.pooled.items():
                np.add.at(used[name]["lookup"], where, pooled.seconds * topology.host_size)
                np.add.at(used["link"]["bandwidth"], where, pooled.sums / host_link(topology.device))
    return used


def rank_memory(
    plans: Sequence[TablePlan], topology: Topology, workload: Workload, mode: Mode
) -> list[dict[str, int]]:
    """Bytes of embedding memory by purpose, one mapping a rank."""
    used: list[dict[str, int]] = [{} for _ in range(topology.world_size)]
    for plan in plans:
        # what a unit weighs does not depend on the calibration
        for ranks, price in _placed_prices(plan, topology, workload, default_calibration(topology), mode):
            for rank in ranks:
                for purpose, size in price.memory.items():
                    used[rank][purpose] = used[rank].get(purpose, 0) + size
    return used
