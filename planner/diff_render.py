"""The difference of two plans as text: what went in, what it costs, and what becomes of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.text import Text

from ir.units import format_bytes, format_count, format_seconds
from planner.diff import PlanDiff, TableChange
from planner.render import grid, objective_words, percent_change


def render_diff(diff: PlanDiff, limit: int = 20) -> RenderableType:
    """What went in, what it gains, where: then changes grouped by what became what, and what moves most."""
    if diff.same:
        return Text("the plans are identical")
    parts: list[RenderableType] = []
    if diff.inputs:
        changed = grid("input", "before", "after")
        changed.columns[0].no_wrap = True
        for name, pair in diff.inputs.items():
            changed.add_row(name, *pair)
        parts += [changed, Text()]
    parts += [_costs(diff), Text()]
    if any(diff.parallelism) and not diff.changes:
        return Group(*parts[:-1])
    if diff.changes:
        parts += [_groups(diff), Text(), _movers(diff, limit), Text()]
    parts += [Text(f"{verb}: {name}") for name, verb in diff.sections.items()]
    return Group(*parts, Text(_verdict(diff), style="bold"))


def _costs(diff: PlanDiff) -> RenderableType:
    costs = grid("", ">before", ">after", ">change")
    decoders = any(diff.parallelism)

    def row(name: str, show: Callable[[float], str], old: float, new: float) -> None:
        """A quantity that one side lacks is a dash there, not a nought."""
        texts = (show(value) if value else "-" for value in (old, new))
        costs.add_row(name, *texts, percent_change(old, new) if old and new else "")

    row("step", format_seconds, *diff.step)
    row("tokens/s" if decoders else "samples/s", format_count, *diff.rate)
    if diff.objectives[0] == diff.objectives[1]:
        what = objective_words(diff.objectives[0])
        what = "objective (nothing but fetches hidden)" if what == "step" else what
        row(what, format_seconds if not what.startswith("devices") else "{:.0f}".format, *diff.objective)
    costs.add_row("proved gap", *(f"{100 * gap:.2f} %" for gap in diff.gap), "")
    for name, pair in diff.phases.items():
        row(f"  {name}", format_seconds, *pair)
    row("peak memory", format_bytes, *diff.peak_memory)
    for name, sizes in diff.memory.items():
        row(f"  {name}", format_bytes, *sizes)
    if diff.topology[0] != diff.topology[1]:
        costs.add_row("topology", *diff.topology, "")
    return Group(costs, *([Text(), _layouts(diff)] if decoders else []))


def _layouts(diff: PlanDiff) -> RenderableType:
    """Below each other: a layout is too long for a column."""
    if diff.parallelism[0] == diff.parallelism[1]:
        return Text(f"the same layout: {diff.parallelism[0]}")
    lines = [f"{sign} {layout}" for sign, layout in zip("-+", diff.parallelism, strict=True) if layout]
    return Text("\n".join(lines))


def _groups(diff: PlanDiff) -> RenderableType:
    """``~`` changed, ``+`` new, ``-`` gone; moves are of weights."""
    groups: dict[tuple[str, str], list[TableChange]] = {}
    for change in diff.changes:
        groups.setdefault((change.before, change.after), []).append(change)
    table = grid("", "before", "after", ">tables", ">moves")
    for (old, new), members in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        sign = "+" if not old else "-" if not new else "~"
        size = format_bytes(sum(m.moved_bytes for m in members))
        table.add_row(sign, old or "(absent)", new or "(absent)", str(len(members)), size)
    return table


def _movers(diff: PlanDiff, limit: int) -> RenderableType:
    table = grid("table", "before", "after", ">moves")
    for change in sorted(diff.changes, key=lambda c: (-c.moved_bytes, c.name))[:limit]:
        table.add_row(
            change.name, change.before or "-", change.after or "-", format_bytes(change.moved_bytes)
        )
    return table


def _verdict(diff: PlanDiff) -> str:
    """What changes, what moves, and when that has paid."""
    steps = diff.move.break_even(diff.saved)
    gain = (
        f"saves {format_seconds(diff.saved)} a step"
        if diff.saved > 0
        else (f"costs {format_seconds(-diff.saved)} a step" if diff.saved < 0 else "the step is the same")
    )
    paid = f"; the move has paid after {max(1, math.ceil(steps)):,} steps" if steps is not None else ""
    moves = (
        f"{format_bytes(sum(c.moved_bytes for c in diff.changes))} of weights move, with optimizer state "
        f"{format_bytes(diff.move.bytes)} in about {format_seconds(diff.move.seconds)}"
    )
    return f"{len(diff.changes)} tables change, {diff.unchanged} do not; {moves}; {gain}{paid}"
