"""The tables of one phase of a plan with a growth section: a plan that the other targets can emit or run."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ir.constraints import ShardingType
from ir.errors import InputError
from ir.growth import MovedTable
from ir.plan import Plan, Shard, TablePlan
from ir.sharding import ShardingOption, units


def phase_plan(plan: Plan, phase: int) -> Plan:
    """``plan`` with the tables and the exchange type of a phase; memory and timeline stay the full model's.

    Raises:
        InputError: the plan has no growth section, or no such phase.
    """
    section = plan.decisions.growth
    if section is None:
        raise InputError("the plan has no growth section; compile with constraints.growth")
    if not 0 <= phase < len(section.phases):
        raise InputError(f"the plan has phases 0..{len(section.phases) - 1}, not {phase}")
    chosen = section.phases[phase]
    moved = {entry.name: entry for entry in section.shardings[chosen.sharding - 1]} if chosen.sharding else {}
    tables = tuple(
        _moved(plan, table, moved[table.name]) if table.name in moved else table for table in plan.table_plans
    )
    return replace(
        plan,
        table_plans=tables,
        workload=replace(plan.workload, exchange_dtype=chosen.exchange_dtype),
        decisions=replace(plan.decisions, growth=None),
    )


def _moved(plan: Plan, table: TablePlan, entry: MovedTable) -> TablePlan:
    """A table under its other sharding."""
    kind = cast(ShardingType, entry.sharding_type)
    option = ShardingOption(kind, tuple(cols for _, cols, _ in entry.columns))
    shards = []
    made = units(option, table.rows, plan.world_size, plan.topology.host_size)
    for unit, (_, _, rank) in zip(made, entry.columns, strict=True):
        shards += [Shard(rank + i, b.row, b.col, b.rows, b.cols) for i, b in enumerate(unit.blocks)]
    copied = kind == "data_parallel"
    return replace(
        table, sharding_type=kind, compute_kernel="dense" if copied else "fused", shards=tuple(shards)
    )
