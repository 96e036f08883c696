"""The growth section as text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ir.plan import Plan
from ir.units import format_bytes, format_count, format_seconds
from planner.render import grid, percent


def render_growth(plan: Plan) -> RenderableType:
    """Each phase: steps, hidden units, FLOP, step time, memory, sharding, and what it takes to begin it."""
    section = plan.decisions.growth
    assert section is not None
    units = sum(layer.units for layer in section.layers)
    table = grid(
        "phase",
        ">steps",
        ">hidden units",
        ">FLOP",
        ">step",
        ">memory",
        "exchange",
        "GEMMs",
        "tables",
        ">to begin",
    )
    for phase in section.phases:
        moved = len(section.shardings[phase.sharding - 1]) if phase.sharding else 0
        table.add_row(
            phase.kind,
            f"{phase.steps:,}",
            percent(sum(phase.kept), units),
            f"{format_count(phase.flops)}",
            format_seconds(phase.step_seconds),
            format_bytes(phase.memory),
            phase.exchange_dtype,
            phase.gemm_format or "as planned",
            f"{moved} elsewhere" if moved else "as planned",
            format_seconds(phase.move_seconds) if phase.move_seconds else "-",
        )
    head = (
        f"growth and pruning of {len(section.layers)} hidden layers: {100 * section.flop_saving:.1f} % of the dense "
        f"FLOP and {100 * section.time_saving:.1f} % of the time of {section.steps:,} steps saved "
        f"({format_seconds(section.seconds)} instead of {format_seconds(section.dense_seconds)})"
    )
    gained = section.fixed_seconds - section.seconds
    note = (
        f"phases with their own sharding or types gain {format_seconds(gained)}, moves paid"
        if gained > 0
        else "no phase gains from a sharding or types of its own"
    )
    return Group(Text(head, style="bold"), table, Text(note, style="dim"))
