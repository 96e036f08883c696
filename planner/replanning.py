"""Replan: a new plan for a changed machine or workload that trades moved bytes against step time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ir.plan
from ir.constraints import Constraints, TableConstraint
from ir.errors import InfeasibleError, InputError
from ir.plan import EVERY_RANK, TablePlan, common_weights
from ir.program import Model
from ir.topology import Topology
from ir.workload import Workload
from planner.plan import Plan

DEFAULT_HORIZON = 10_000  # steps that the new plan will run: what a move must pay back in


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to go on.

    Attributes:
        name: "free" decides everything anew; "same types" keeps each table's sharding type; "stay" also
            keeps table-wise tables on the ranks that survive.
        plan: the plan.
        moved: bytes of weights and optimizer state that ranks receive.
        move_seconds: of the rank that receives most, over the link between hosts.
        total: seconds of the horizon's steps and the move.
    """

    name: str
    plan: Plan
    moved: int
    move_seconds: float
    total: float


@dataclass(frozen=True, slots=True)
class Replan:
    """The candidates, the best one first."""

    candidates: tuple[Candidate, ...]
    horizon: int

    @property
    def plan(self) -> Plan:
        """The chosen plan."""
        return self.candidates[0].plan


def replan(
    plan: ir.plan.Plan,
    topology: Topology | str,
    *,
    lost: Sequence[int] = (),
    workload: Workload | None = None,
    constraints: Constraints | None = None,
    model: Any = None,
    horizon: int = DEFAULT_HORIZON,
    **options: Any,
) -> Replan:
    """Plan for ``topology`` from what ranks hold under ``plan``.

    Args:
        plan: the plan in force.
        topology: the machine from now on. Surviving ranks keep their order and come first; ranks beyond
            them are new.
        lost: ranks of the old machine that are gone.
        workload: what the model is fed from now on; default the plan's.
        constraints: default the plan's.
        model: default what the plan says it was compiled from; tables may have more rows, or be new.
        horizon: steps over which a move must pay.
        options: for :func:`planner.compile`.

    Raises:
        InputError: ranks that the plan does not have, nobody left, or no model to plan with.
        InfeasibleError: no plan under the limits.
    """
    from planner.api import topology as machine_of

    bad = [rank for rank in lost if not 0 <= rank < plan.world_size]
    if bad:
        raise InputError(f"the plan has ranks 0..{plan.world_size - 1}, not {bad[0]}")
    if horizon < 1:
        raise InputError(f"the horizon must be at least one step, not {horizon}")
    machine = machine_of(topology)
    left = [rank for rank in range(plan.world_size) if rank not in set(lost)]
    if not left:
        raise InputError("no rank is left; start again with planner compile")
    survivors = tuple((left + [-1] * machine.world_size)[: machine.world_size])
    fed = workload or replace(plan.workload, dedup={}, dedup_ops={})
    limits = constraints or plan.constraints
    captured = grown_model(plan, model)
    found, refused = [], None
    for name, narrowed in _candidates(plan, survivors, limits):
        try:
            made = _compile(plan, captured, machine, fed, narrowed, survivors, limits, options)
        except InfeasibleError as error:
            refused = error
            continue
        moved, most = received(plan, made, survivors)
        seconds = most / machine.inter_link.bandwidth
        found.append(Candidate(name, made, moved, seconds, horizon * made.timeline.step + seconds))
    if not found:
        assert refused is not None
        raise refused
    return Replan(tuple(sorted(found, key=lambda c: (c.total, c.moved))), horizon)


def grown_model(plan: ir.plan.Plan, model: Any = None) -> Model:
    """The model to plan for: the plan's, or one in which its tables have more rows or others were added.

    Raises:
        InputError: no model, or one that lacks a table of the plan or has it narrower, shorter or of another type.
    """
    from planner.models import resolve
    from planner.what_if import model_of

    source = model or plan.provenance.get("model", "")
    captured = source if isinstance(source, Model) else resolve(source).model if source else None
    if captured is None or captured.digest == plan.model.digest:
        return model_of(plan, model)
    now = {table.name: table for table in captured.tables}
    for table in plan.table_plans:
        other = now.get(table.name)
        if other is None or (other.dim, other.dtype) != (table.dim, table.dtype) or other.rows < table.rows:
            found = "no such table" if other is None else f"{other.rows} x {other.dim} {other.dtype}"
            raise InputError(
                f"table {table.name!r} is {table.rows} x {table.dim} {table.dtype} in the plan, the model has {found}; "
                "tables may only have gained rows"
            )
    return captured


def received(old: ir.plan.Plan, new: ir.plan.Plan, survivors: Sequence[int]) -> tuple[int, int]:
    """Bytes that all ranks, and the rank that receives most, hold under ``new`` and did not hold before."""
    total = most = 0
    for rank in range(new.world_size):
        was = survivors[rank]
        mine = 0
        for table in new.table_plans:
            before = old.tables.get(table.name)
            held = before.on_rank(was) if before is not None and was >= 0 else ()
            item = _bytes_per_weight(table) if table.tiers is None else _tiered_bytes(new, table)
            for shard in table.on_rank(rank):
                kept = sum(common_weights(shard, other) for other in held)
                mine += round((shard.rows * shard.cols - kept) * item)
        total += mine
        most = max(most, mine)
    return total, most


def _bytes_per_weight(table: TablePlan) -> float:
    """Bytes of weight and optimizer state behind one weight."""
    stored = table.memory.get("weights", 0) + table.memory.get("optimizer", 0)
    copies = sum(s.rows * s.cols for s in table.shards)
    if table.shards[0].rank == EVERY_RANK:
        copies = table.memory.get("weights", 0) // 4 or copies
    return stored / copies if copies else 0.0


def _tiered_bytes(plan: ir.plan.Plan, table: TablePlan) -> float:
    """As :func:`_bytes_per_weight` for a table in tiers, whose memory on the device is not all of it."""
    from cost_models.embedding import state_bytes, stored_bytes

    row = stored_bytes(table.format or table.dtype, table.dim)
    if plan.mode == "train":
        row += state_bytes(plan.workload.optimizer, table.dim, table.state_format or "fp32")
    return row / table.dim


def _candidates(
    plan: ir.plan.Plan, survivors: tuple[int, ...], limits: Constraints
) -> list[tuple[str, Constraints]]:
    place = {was: now for now, was in enumerate(survivors) if was >= 0}
    types: dict[str, TableConstraint] = dict(limits.tables)
    stay: dict[str, TableConstraint] = dict(limits.tables)
    for table in plan.table_plans:
        kept = limits.for_table(table.name)
        if kept.sharding_types is None or table.sharding_type in kept.sharding_types:
            kept = replace(kept, sharding_types=(table.sharding_type,))
        types[_literal(table.name)] = kept
        ranks = kept.ranks
        if table.sharding_type == "table_wise" and ranks is None and table.shards[0].rank in place:
            ranks = (place[table.shards[0].rank],)
        stay[_literal(table.name)] = replace(kept, ranks=ranks)
    return [
        ("free", limits),
        ("same types", replace(limits, tables=types)),
        ("stay", replace(limits, tables=stay)),
    ]


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _compile(
    plan: ir.plan.Plan,
    model: Any,
    machine: Topology,
    workload: Workload,
    narrowed: Constraints,
    survivors: tuple[int, ...],
    limits: Constraints,
    options: dict[str, Any],
) -> Plan:
    from passes.pipeline import pipeline
    from passes.relabel import Relabel
    from planner.api import compile

    pinned = frozenset(t.name for t in plan.table_plans if narrowed.for_table(t.name).ranks is not None)
    passes = list(pipeline(options.get("calibration")))
    after = next(i for i, step in enumerate(passes) if step.name == "sharding") + 1
    passes.insert(after, Relabel(plan.table_plans, survivors, pinned))
    made = compile(
        model,
        machine,
        workload,
        constraints=narrowed,
        mode=plan.mode,
        passes=passes,
        name=plan.model.name,
        objective=plan.provenance.get("objective", "phases"),  # type: ignore[arg-type]
        **{name: value for name, value in options.items() if name != "calibration"},
    )
    source = plan.provenance.get("model", "")
    # what the user asked stays what the plan records; that options were narrowed is the candidate's name
    return replace(
        made,
        constraints=limits,
        provenance={**made.provenance, **({"model": source} if source else {})},
    )
