"""The compression section of a plan as text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ir.plan import Plan
from ir.units import format_seconds
from planner.render import grid


def render_compression(plan: Plan) -> RenderableType:
    """Both exchanges before and after, and the codec of every table with its verdict."""
    section = plan.decisions.compression
    assert section is not None
    head = [Text(f"compression, run by {section.engine}", style="bold")]
    for exchange in section.exchanges:
        after = exchange.link + exchange.coding
        how = (
            f"{format_seconds(exchange.uncompressed)} -> {format_seconds(after)} "
            f"(link {format_seconds(exchange.link)}, codecs {format_seconds(exchange.coding)})"
            if exchange.used
            else f"{format_seconds(exchange.uncompressed)}, left as it is"
        )
        head.append(Text(f"{exchange.phase}: {how}"))
    if section.decay.steps and section.decay.start > 1:
        head.append(
            Text(
                f"bounds start {section.decay.start:g} times wider and decay over {section.decay.steps} steps "
                f"in {section.decay.stages} stages"
            )
        )
    table = grid("table", "direction", "class", "codec", "bound / rms", "ratio", "error", "budget", "verdict")
    for row in section.tables:
        table.add_row(
            row.table,
            row.direction,
            row.table_class,
            row.codec,
            f"{row.bound:.3g}" if row.bound else "-",
            f"{row.ratio:.1f}",
            f"{row.error:.2g}",
            f"{row.budget:.2g}",
            row.verdict,
        )
    return Group(*head, table)
