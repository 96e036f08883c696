"""Explain: why a table is sharded as it is, and what a rank holds."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ir.errors import InputError, did_you_mean
from ir.plan import Plan, TablePlan
from ir.units import format_bytes, format_count, format_seconds
from planner.llm_render import explain_llm, explain_llm_rank
from planner.render import assumption_list, grid, percent, signed, summary, table_list
from planner.sections import render_sections
from planner.serving_render import explain_serving, explain_serving_rank
from planner.storage_render import storage_lines


def find_table(plan: Plan, name: str) -> TablePlan:
    """The decision for ``name``; raises InputError with the nearest name."""
    table = plan.tables.get(name)
    if table is None and not plan.table_plans:
        raise InputError(
            f"the plan of {plan.model.name} has no tables; planner explain PLAN tells of its layout, --rank N of a rank"
        )
    if table is None:
        raise InputError(f"the plan has no table {name!r}{did_you_mean(name, plan.tables)}")
    return table


def explain_plan(plan: Plan, limit: int = 20) -> RenderableType:
    """Summary, the costliest tables, the fullest and the busiest ranks, and the assumptions."""
    if plan.decisions.parallelism is not None:
        return explain_llm(plan)
    if plan.decisions.serving is not None:
        return explain_serving(plan)
    return Group(
        summary(plan),
        Text(),
        Text("tables, costliest first", style="bold"),
        table_list(plan, limit=limit),
        Text(),
        assumption_list(plan),
        *render_sections(plan),
    )


def _places(ranks: tuple[int, ...]) -> str:
    """``"ranks 0-7"`` or ``"ranks 3, 5, 9 and 4 more"``."""
    if len(ranks) > 1 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def explain_table(plan: Plan, name: str) -> RenderableType:
    """The option, where it lives, every cost term beside the runner-up's, and the reason."""
    table = find_table(plan, name)
    stats = plan.workload.stats(table.features[0]) if table.features else None
    head = (
        f"{name}: {format_count(table.rows)} rows x {table.dim} {table.dtype}"
        + (f", pooling factor {stats.pooling_factor:g}" if stats else "")
        + f" -> {table.option} on {_places(table.ranks(plan.world_size))}"
    )
    up = table.runner_up
    costs = grid("term", ">chosen", *([f">{up.option}"] if up else []))
    for term, seconds in table.terms.items():
        other = [format_seconds(up.terms.get(term, 0.0))] if up else []
        costs.add_row(term, format_seconds(seconds), *other)
    costs.add_row(
        "sum over ranks",
        format_seconds(sum(table.terms.values())),
        *([format_seconds(sum(up.terms.values()))] if up else []),
    )
    if up:
        delta = signed(up.delta) if up.delta is not None else up.note
        costs.add_row("change of the step", "-", delta)
    memory = ", ".join(f"{purpose} {format_bytes(size)}" for purpose, size in sorted(table.memory.items()))
    return Group(
        Text(head, style="bold"),
        Text(f"why: {table.reason}"),
        Text(f"memory over all ranks: {memory}"),
        Text(f"kernel: {table.compute_kernel}"),
        *storage_lines(plan, table),
        Text(),
        costs,
    )


def explain_rank(plan: Plan, rank: int) -> RenderableType:
    """What one rank holds: bytes by purpose and its shards."""
    if plan.decisions.parallelism is not None:
        return explain_llm_rank(plan, rank)
    if plan.decisions.serving is not None:
        return explain_serving_rank(plan, rank)
    if not 0 <= rank < plan.world_size:
        raise InputError(f"the plan has ranks 0..{plan.world_size - 1}, not {rank}")
    memory = plan.memory[rank]
    head = (
        f"rank {rank} (host {plan.topology.host_of(rank)}): {format_bytes(memory.total)} of "
        f"{format_bytes(memory.limit)} usable ({percent(memory.total, memory.limit)})"
    )
    uses = grid("purpose", ">bytes")
    for purpose, size in sorted(memory.used.items(), key=lambda item: -item[1]):
        uses.add_row(purpose, format_bytes(size))
    shards = grid("table", "option", ">rows", ">from row", ">cols", ">from col")
    for table in plan.table_plans:
        for shard in table.on_rank(rank):
            shards.add_row(
                table.name,
                table.option,
                f"{shard.rows:,}",
                f"{shard.row:,}",
                str(shard.cols),
                str(shard.col),
            )
    return Group(Text(head, style="bold"), Text(), uses, Text(), shards)
