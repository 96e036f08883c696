"""The deduplication section as text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ir.plan import Plan
from ir.units import format_bytes, format_seconds
from planner.render import grid

SHOWN = 3  # features named a group


def render_dedup(plan: Plan) -> RenderableType:
    """Each feature group: factor, what it saves and costs, verdict."""
    section = plan.decisions.dedup
    assert section is not None
    table = grid(
        "features", ">factor", ">ids saved", ">time saved", ">of compute", ">expand", "decision", "why"
    )
    for group in section.groups:
        more = len(group.features) - SHOWN
        table.add_row(
            ", ".join(group.features[:SHOWN]) + (f" and {more} more" if more > 0 else ""),
            f"{group.factor:.2f}",
            format_bytes(group.index_bytes_saved),
            format_seconds(group.seconds_saved),
            f"{format_seconds(group.compute_seconds)} ({len(group.compute)} ops)" if group.compute else "",
            format_seconds(group.expand_seconds),
            "deduplicate" if group.chosen else "keep",
            group.reason,
        )
    head = f"deduplication, {section.samples_per_session:g} samples a session (a rank and step)"
    return Group(Text(head, style="bold"), table)
