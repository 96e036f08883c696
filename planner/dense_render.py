"""The dense section as text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ir.dense_plan import DensePlan, SparseReplicas
from ir.plan import Plan
from ir.units import format_bytes, format_seconds
from planner.render import grid


def render_dense(plan: Plan) -> RenderableType:
    """The layout, why, what else was weighed; and the groups of the tables."""
    section = plan.decisions.dense
    assert section is not None
    parts: list[RenderableType] = [Text(f"dense part: {_layout(section)}", style="bold")]
    if section.candidates:
        parts.append(Text(section.reason))
        table = grid("layout", ">gathers", ">unit", ">dense memory", ">step")
        for c in section.candidates:
            gathers = "-" if c.strategy in ("ddp", "tp") else "2" if c.reshard_after_forward else "1"
            table.add_row(
                c.strategy,
                gathers,
                format_bytes(c.unit_bytes) if c.unit_bytes else "-",
                format_bytes(c.memory),
                format_seconds(c.step_seconds) if c.step_seconds is not None else "does not fit",
            )
        parts.append(table)
    if section.sparse is not None:
        parts += _sparse(section.sparse)
    return Group(*parts)


def _layout(section: DensePlan) -> str:
    if section.pairs:
        first = section.pairs[0]
        more = f" and {len(section.pairs) - 1} more" if len(section.pairs) > 1 else ""
        return (
            f"tp, {first.first} and {first.second}{more} split over the {section.tensor} ranks of a host, the rest in "
            f"{section.replicas} replicas; {format_bytes(section.wire_bytes)} sent a rank and step"
        )
    if section.shard == 1:
        return f"{section.strategy}, {section.replicas} replicas"
    copies = f", {section.replicas} replicas" if section.replicas > 1 else ""
    gathered = "gathered twice a step" if section.reshard_after_forward else "gathered once a step"
    return (
        f"{section.strategy}, split over {section.shard} ranks{copies}, {len(section.units)} units {gathered}; "
        f"{format_bytes(section.wire_bytes)} sent a rank and step"
    )


def _sparse(sparse: SparseReplicas) -> list[RenderableType]:
    every = "every step" if sparse.sync_every == 1 else f"every {sparse.sync_every} steps"
    head = (
        "tables: one group of all ranks, as planned above"
        if sparse.groups == 1
        else f"tables: {sparse.groups} groups, each with all tables; {format_bytes(sparse.sync_bytes)} a rank averaged "
        f"over them {every}; {format_bytes(sparse.extra_bytes)} more a rank. `tables` is the sharding without groups"
    )
    table = grid(">groups", ">step", ">synchronisation", ">memory")
    for c in sparse.candidates:
        if c.step_seconds is None:
            table.add_row(str(c.groups), "does not fit", "-", "-")
            continue
        table.add_row(
            str(c.groups),
            format_seconds(c.step_seconds),
            format_seconds(c.sync_seconds or 0.0),
            format_bytes(c.memory or 0),
        )
    return [Text(head, style="bold"), table]
