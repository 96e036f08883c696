"""Independent check of a plan's growth section, without the pass's prices or the runtime's shards."""

from __future__ import annotations

from collections.abc import Iterator

from ir.growth import Growth, MovedTable
from ir.plan import Plan


def check_growth(plan: Plan) -> Iterator[str]:
    """Phases add up, the last is whole, and each sharding of a phase covers its tables once and fits."""
    section, request = plan.decisions.growth, plan.constraints.growth
    if section is None:
        return
    if request is not None and section.steps != request.steps:
        yield f"the phases last {section.steps} steps, {request.steps} were asked for"
    whole = tuple(layer.units for layer in section.layers)
    for i, phase in enumerate(section.phases):
        if len(phase.kept) != len(whole) or any(k > n for k, n in zip(phase.kept, whole, strict=False)):
            yield f"phase {i} keeps more units than there are layers or units"
        if phase.sharding > len(section.shardings):
            yield f"phase {i} names sharding {phase.sharding} of {len(section.shardings)}"
    last = section.phases[-1]
    if last.kept != whole:
        yield "the last phase is not at full size"
    if last.exchange_dtype != plan.workload.exchange_dtype:
        yield f"the last phase exchanges {last.exchange_dtype}, the workload {plan.workload.exchange_dtype}"
    if last.gemm_format is not None:
        yield f"linear layers of the last phase compute in {last.gemm_format}, which is not the plan's own format"
    yield from _shardings(plan, section)
    yield from _fits(plan, section)


def _shardings(plan: Plan, section: Growth) -> Iterator[str]:
    for number, moved in enumerate(section.shardings, start=1):
        for entry in moved:
            table = plan.tables.get(entry.name)
            if table is None:
                yield f"sharding {number} moves {entry.name!r}, which is no table of the plan"
                continue
            reached = 0
            for col, cols, rank in sorted(entry.columns):
                if col != reached:
                    yield f"sharding {number}: columns of {entry.name!r} are not covered once at {col}"
                reached = col + cols
                if not -1 <= rank < plan.world_size or (rank < 0) != (entry.sharding_type == "data_parallel"):
                    yield f"sharding {number}: {entry.name!r} lies on rank {rank}"
            if reached != table.dim:
                yield f"sharding {number}: {reached} of the {table.dim} columns of {entry.name!r} are covered"


def _fits(plan: Plan, section: Growth) -> Iterator[str]:
    """Weights of the phase's tables alone, by rank, against the memory it claims and the limit."""
    limit = min(entry.limit for entry in plan.memory)
    for i, phase in enumerate(section.phases):
        if phase.memory > limit:
            yield f"phase {i} uses {phase.memory} of {limit} bytes"
        moved = {e.name: e for e in section.shardings[phase.sharding - 1]} if phase.sharding else {}
        needed = [0.0] * plan.world_size
        for table in plan.table_plans:
            entry = moved.get(table.name)
            if entry is not None:
                for rank, elements in _held(plan, entry, table.rows):
                    needed[rank] += elements
                continue
            for rank in range(plan.world_size):
                needed[rank] += sum(shard.rows * shard.cols for shard in table.on_rank(rank))
        # no table type is narrower than a byte; most are four
        if phase.memory < max(needed):
            yield f"phase {i} claims {phase.memory} bytes, its tables have {max(needed):.0f} elements on a rank"


def _held(plan: Plan, entry: MovedTable, rows: int) -> Iterator[tuple[int, float]]:
    """Elements of a table on each rank; row blocks shared evenly over the ranks that hold them."""
    host = plan.topology.host_size
    for _, cols, rank in entry.columns:
        if entry.sharding_type == "data_parallel":
            holders = range(plan.world_size)
            each = rows
        elif entry.sharding_type == "row_wise":
            holders, each = range(plan.world_size), rows // plan.world_size
        elif entry.sharding_type in ("table_row_wise", "grid_shard"):
            holders, each = range(rank // host * host, rank // host * host + host), rows // host
        else:
            holders, each = range(rank, rank + 1), rows
        for holder in holders:
            yield holder, each * cols
