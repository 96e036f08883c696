"""The decision for one table from its chosen option and the places of its units."""

from __future__ import annotations

from cost_models.embedding import PHASES
from ir.ops import EmbeddingTable
from ir.plan import EVERY_RANK, Shard, TablePlan
from ir.program import Program
from ir.sharding import Unit, units
from passes.sharding_prices import PricedOption


def _shards(unit: Unit, place: int, host_size: int) -> list[Shard]:
    first = {"rank": place, "host": place * host_size, "all": 0}[unit.scope]
    return [
        Shard(first + i, block.row, block.col, block.rows, block.cols) for i, block in enumerate(unit.blocks)
    ]


def table_plan(
    program: Program, table: EmbeddingTable, priced: PricedOption, places: tuple[int, ...]
) -> TablePlan:
    """The plan of a table: shards, seconds by phase and bytes by purpose summed over ranks."""
    world, host_size = program.topology.world_size, program.topology.host_size
    copied = priced.option.sharding_type == "data_parallel"
    if copied:
        shards = [Shard(EVERY_RANK, 0, 0, table.rows, table.dim)]
    else:
        made = units(priced.option, table.rows, world, host_size)
        shards = [
            shard
            for unit, place in zip(made, places, strict=True)
            for shard in _shards(unit, place, host_size)
        ]
    seconds = dict.fromkeys(PHASES, 0.0)
    memory: dict[str, int] = {}
    holders = {"rank": 1, "host": host_size, "all": world}[priced.option.scope]
    for unit in priced.units:
        for phase in PHASES:
            seconds[phase] += unit.seconds[phase] * unit.count * holders
        for purpose, size in unit.memory.items():
            memory[purpose] = memory.get(purpose, 0) + size * unit.count * holders
    return TablePlan(
        name=table.name,
        rows=table.rows,
        dim=table.dim,
        dtype=table.dtype,
        features=table.features,
        pooling=table.pooling,
        module=table.module,
        parameter=table.parameter,
        sharding_type=priced.option.sharding_type,
        compute_kernel="dense" if copied else "fused",
        shards=tuple(shards),
        terms=seconds,
        memory=memory,
    )
