"""The collectives section as text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ir.collective_plan import Crossovers
from ir.plan import Plan
from ir.units import format_bytes, format_seconds
from planner.render import grid, signed


def render_collectives(plan: Plan) -> RenderableType:
    """Each collective with its algorithm, runner-up and reason; the buckets; the crossovers by size."""
    section = plan.decisions.collectives
    assert section is not None
    table = grid("collective", ">bytes", ">count", "algorithm", ">time", "runner-up", ">time", "why")
    for choice in section.choices:
        over = " x ".join(map(str, choice.levels))
        chunk = f", chunks of {format_bytes(choice.chunk)}" if choice.chunk else ""
        table.add_row(
            f"{choice.name} ({choice.collective})",
            format_bytes(choice.size),
            str(choice.count),
            f"{choice.algorithm} over {over}{chunk}, {choice.engine}",
            format_seconds(choice.seconds),
            choice.runner_up or "-",
            format_seconds(choice.runner_up_seconds) if choice.runner_up else "-",
            choice.reason,
        )
    exposed = f"{format_seconds(section.exposed_seconds)} of it" if section.exposed_seconds else "none of it"
    change = signed(section.default_step_change)
    change = "be as long" if change == "0" else f"change by {change}"
    dense = (
        f"dense gradients: {section.buckets} buckets of up to {format_bytes(section.bucket_bytes)}, "
        f"{format_seconds(section.dense_seconds)} of all-reduce, {exposed} outlasting the backward pass; with DDP's "
        f"25 MiB the step would {change}"
    )
    parts: list[RenderableType] = [Text("collectives", style="bold"), table]
    if section.buckets:
        parts.append(Text(dense))
    parts += [Text(_bands(crossovers)) for crossovers in section.crossovers if len(crossovers.bands) > 1]
    for name, value in section.environment.items():
        parts.append(Text(f"to ask NCCL for it: {name}={value}"))
    return Group(*parts)


def _bands(crossovers: Crossovers) -> str:
    first, *rest = crossovers.bands
    later = "".join(f", {band.algorithm} from {format_bytes(band.start)}" for band in rest)
    return f"{crossovers.collective} by size ({crossovers.engine}): {first.algorithm}{later}"
