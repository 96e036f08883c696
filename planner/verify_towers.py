"""Independent check of a plan's towers: read from the plan file, without the passes' code."""

from __future__ import annotations

from collections.abc import Iterator

from ir.plan import Plan
from ir.towers import TowerDecision


def check_towers(plan: Plan) -> Iterator[str]:
    """Partition, placement, widths and the verdict of the tower section; nothing where there is none."""
    if plan.decisions.towers is not None:
        yield from _partition(plan, plan.decisions.towers)
        yield from _verdict(plan, plan.decisions.towers)


def _partition(plan: Plan, section: TowerDecision) -> Iterator[str]:
    """Each table once, each rank once, and, where applied, each shard in its tower."""
    seen: dict[str, int] = {}
    next_rank = 0
    for number, tower in enumerate(section.towers):
        for name in tower.tables:
            if name in seen:
                yield f"table {name!r} is in towers {seen[name]} and {number}"
            elif name not in plan.tables:
                yield f"table {name!r} of tower {number} is not in the plan"
            seen[name] = number
        if tower.first_rank != next_rank or tower.ranks % plan.topology.host_size:
            yield f"tower {number} does not start where the one before it ends, or is not whole hosts"
        next_rank = tower.first_rank + tower.ranks
        yield from _widths(plan, section, number)
    if next_rank != plan.world_size:
        yield f"the towers end at rank {next_rank} of {plan.world_size}"
    for name in plan.tables:
        if name not in seen:
            yield f"table {name!r} is in no tower"
    if section.applied:
        yield from _placement(plan, section, seen)


def _verdict(plan: Plan, section: TowerDecision) -> Iterator[str]:
    """Figures that must agree with each other: steps, bound, accuracy budget."""
    named = "exchange" if section.module == "none" else "modules"
    if section.applied and abs(section.steps.get(named, -1.0) - plan.timeline.step) > 1e-12:
        yield f"the plan's step is not that of its towers' {named}"
    if section.affinity is not None and section.affinity.value > section.affinity.bound * (1 + 1e-9):
        yield "the towers claim more interaction than their proved bound"
    request = plan.constraints.towers
    budget = None if request is None or request.compression is not None else request.accuracy_budget
    if section.energy_lost is not None and budget is not None and section.energy_lost > budget + 1e-5:
        yield f"the modules lose {section.energy_lost:.4f} of the energy, the budget is {budget}"


def _widths(plan: Plan, section: TowerDecision, number: int) -> Iterator[str]:
    tower = section.towers[number]
    tables = [plan.tables[name] for name in tower.tables if name in plan.tables]
    features = [feature for table in tables for feature in table.features]
    if sorted(features) != sorted(tower.features):
        yield f"the features of tower {number} are not those of its tables"
    if sum(table.dim * len(table.features) for table in tables) != tower.width:
        yield f"tower {number} claims {tower.width} columns"
    out = tower.width if section.module == "none" else tower.vectors_out * tower.columns_out
    if out != tower.width_out or tower.width_out > tower.width:
        yield f"tower {number} claims to send {tower.width_out} columns"
    columns = tower.columns_out
    if section.module != "none" and not 0 < columns == section.towers[0].columns_out <= tower.dim:
        yield f"tower {number} sends vectors of {columns} columns, more than it reads or not as many as its peers"


def _placement(plan: Plan, section: TowerDecision, seen: dict[str, int]) -> Iterator[str]:
    for name, table in plan.tables.items():
        if name not in seen:
            continue
        tower = section.towers[seen[name]]
        outside = [s.rank for s in table.shards if not 0 <= s.rank - tower.first_rank < tower.ranks]
        if outside:
            yield f"table {name!r} of tower {seen[name]} has a shard on rank {outside[0]}, outside the tower"
