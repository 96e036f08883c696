"""Why not there: a unit of a table on another rank or host, everything else left where it is.

A place is asked about with everything else left because ranks are alike: with everything else free, names of
ranks can be exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import ir.plan
from cost_models.placed import placed_units
from ir.errors import InputError
from ir.plan import TablePlan
from ir.units import format_bytes
from planner.diff import moved_bytes
from planner.what_if import program_of
from planner.why_not_answer import SAME, Verdict, WhyNot

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.program import Model, Program
    from ir.topology import Topology

MOST_UNITS = 16  # units of a table that are tried in another place


def pinned(plan: ir.plan.Plan) -> frozenset[str]:
    """Tables whose ranks the user has named."""
    limits = plan.constraints
    return frozenset(t.name for t in plan.table_plans if limits.for_table(t.name).ranks is not None)


def why_not_there(
    plan: ir.plan.Plan,
    table: TablePlan,
    model: Model,
    asked: str,
    calibration: Calibration | None,
) -> WhyNot:
    """A unit of the table moved to a rank or host, all else left where it is."""
    ranks = _ranks_of(plan, asked)
    if any(rank in ranks for rank in table.ranks(plan.world_size)):
        return WhyNot(table.name, asked, table.option, "chosen", f"{table.option}: a part of it lies there")
    program = program_of(plan, model)
    base = _repriced(program, table, calibration)[0]
    found: tuple[float, TablePlan] | None = None
    lacking: list[int] = []
    for moved in _moves(table, _candidates(plan, ranks), plan.topology):
        step, short = _repriced(program, moved, calibration)
        if short > 0:
            lacking.append(short)
        elif found is None or step < found[0]:
            found = step, moved
    named = "" if pinned(plan) else "; ranks are alike: the same plan with its ranks renamed has it there"
    if found is None:
        reason = f"with all else left where it is, {format_bytes(min(lacking))} would lack there{named}"
        return WhyNot(table.name, asked, table.option, "does not fit", reason)
    verdict, reason = _verdict_of_move(found[0] - base, base)
    return WhyNot(
        table.name,
        asked,
        table.option,
        verdict,
        reason + named,
        step=found[0],
        step_change=found[0] - base,
        moved_bytes=moved_bytes(table, found[1], plan.world_size),
    )


def _verdict_of_move(change: float, base: float) -> tuple[Verdict, str]:
    if change < -SAME * base:
        return "better", "the search did not find it in its limit: the step is shorter with the table there"
    if change <= SAME * base:
        return "costs nothing", "with all else left where it is, the step is the same with the table there"
    return "costs", "with all else left where it is, others would wait for that rank"


def _ranks_of(plan: ir.plan.Plan, asked: str) -> tuple[int, ...]:
    place, _, number = asked.partition("=")
    topology = plan.topology
    count = {"rank": plan.world_size, "host": topology.hosts}.get(place)
    if count is None or not number.isdigit():
        raise InputError(f"--why-not {asked} names no place; write rank=5 or host=1")
    at = int(number)
    if at >= count:
        raise InputError(f"the plan has {place}s 0..{count - 1}, not {at}")
    size = topology.host_size
    return (at,) if place == "rank" else tuple(range(at * size, (at + 1) * size))


def _candidates(plan: ir.plan.Plan, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Of several ranks the one with the most free memory and the one with the least work on tables."""
    from cost_models.calibration import default_calibration
    from cost_models.placed import rank_seconds

    loads = rank_seconds(
        plan.table_plans, plan.topology, plan.workload, default_calibration(plan.topology), plan.mode
    )
    busy = sum(loads.values())
    emptiest = min(ranks, key=lambda rank: (plan.memory[rank].total, rank))
    idlest = min(ranks, key=lambda rank: (float(busy[rank]), rank))  # type: ignore[index]
    return tuple(dict.fromkeys((emptiest, idlest)))


def _moves(table: TablePlan, ranks: tuple[int, ...], topology: Topology) -> Iterator[TablePlan]:
    """The table with one of its units, or all where they stay in one host, moved to a rank."""
    size = topology.host_size
    placed = list(placed_units(table, topology))
    for rank in ranks:
        host = topology.host_of(rank)
        if table.sharding_type == "table_column_wise":
            shift = rank - table.shards[0].rank
            moved = [host * size + (shard.rank + shift) % size for shard in table.shards]
            yield _on(table, moved)
            continue
        for chosen in range(min(len(placed), MOST_UNITS)):
            where = [list(held) for _, held in placed]
            where[chosen] = (
                [rank] if placed[chosen][0].scope == "rank" else [host * size + i for i in range(size)]
            )
            yield _on(table, [held for unit in where for held in unit])


def _on(table: TablePlan, ranks: list[int]) -> TablePlan:
    shards = (replace(shard, rank=rank) for shard, rank in zip(table.shards, ranks, strict=True))
    return replace(table, shards=tuple(shards))


def _repriced(program: Program, table: TablePlan, calibration: Calibration | None) -> tuple[float, int]:
    """Modelled step with a table's shards as given, and the bytes that the fullest rank lacks (or has left: < 0)."""
    from passes.memory import MemoryAccounting
    from passes.step import StepTimeline

    assert program.tables is not None
    tables = tuple(table if kept.name == table.name else kept for kept in program.tables)
    made = StepTimeline(calibration).run(MemoryAccounting().run(replace(program, tables=tables)))
    assert made.memory is not None
    assert made.timeline is not None
    return made.timeline.step, max(rank.total - rank.limit for rank in made.memory)
