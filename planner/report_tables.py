"""Rows of the report's table explorer: decision, price, runner-up, geometry, and what else was decided of a table."""

from __future__ import annotations

from typing import Any

from ir.plan import Plan, TablePlan
from planner.storage_render import storage_lines

MOST_SHARDS = 2048  # blocks drawn of one table


def table_rows(plan: Plan) -> list[list[Any]]:
    """One row a table, in the plan's order; the script of the page knows the columns by position."""
    grouped, towers = _groups(plan), _towers(plan)
    return [_row(plan, table, grouped, towers.get(table.name)) for table in plan.table_plans]


def _row(plan: Plan, table: TablePlan, grouped: frozenset[str], tower: int | None) -> list[Any]:
    up = table.runner_up
    # geometry that follows from the type is not listed
    listed = table.sharding_type not in ("row_wise", "data_parallel")
    shards = [[s.rank, s.row, s.col, s.rows, s.cols] for s in table.shards] if listed else []
    return [
        table.name,
        table.rows,
        table.dim,
        table.format or table.dtype,
        table.option,
        len(table.ranks(plan.world_size)),
        sum(table.memory.values()),
        sum(table.terms.values()),
        up.option if up else "",
        up.delta if up and up.delta is not None else None,
        table.reason,
        shards[:MOST_SHARDS],
        {name: float(f"{seconds:.4g}") for name, seconds in table.terms.items()},
        [[band.tier, band.rows] for band in table.tiers.ranges] if table.tiers is not None else [],
        _notes(plan, table, grouped, tower),
    ]


def _notes(plan: Plan, table: TablePlan, grouped: frozenset[str], tower: int | None) -> list[str]:
    """What sections say of one table, a sentence each."""
    notes = [line.plain for line in storage_lines(plan, table)]
    if tower is not None:
        notes.append(f"tower {tower}")
    repeated = [feature for feature in table.features if feature in grouped]
    if repeated:
        notes.append(f"deduplicated: {', '.join(repeated)}")
    compression = plan.decisions.compression
    for found in compression.tables if compression is not None else ():
        if found.table == table.name and found.codec != "none":
            bound = f" within {found.bound:.3g} rms" if found.bound else ""
            notes.append(f"{found.direction}: {found.codec}{bound}, {found.ratio:.1f} times fewer bytes")
    return notes


def _groups(plan: Plan) -> frozenset[str]:
    section = plan.decisions.dedup
    return (
        frozenset(f for group in section.chosen for f in group.features)
        if section is not None
        else frozenset()
    )


def _towers(plan: Plan) -> dict[str, int]:
    section = plan.decisions.towers
    if section is None or not section.applied:
        return {}
    return {name: number for number, tower in enumerate(section.towers) for name in tower.tables}
