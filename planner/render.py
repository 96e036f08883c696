"""Plans as text: rich renderables, turned into plain text, terminal output or notebook HTML."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import ir.plan
from ir.plan import Event, Timeline
from ir.topology import Topology
from ir.units import format_bytes, format_count, format_seconds

WIDTH = 100


def to_text(what: RenderableType, width: int = WIDTH) -> str:
    """Plain text without colour codes, the same on every machine."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(what)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").split("\n"))


def to_html(what: RenderableType, width: int = WIDTH) -> str:
    """A ``<pre>`` with inline styles, for notebooks."""
    console = Console(record=True, width=width, file=io.StringIO(), force_jupyter=False)
    console.print(what)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def grid(*columns: str) -> Table:
    """A borderless table; a column name that starts with ``>`` is right-aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def signed(seconds: float) -> str:
    """A difference in time with its sign; ``"0"`` below a nanosecond."""
    return "0" if abs(seconds) < 1e-9 else f"{'+' if seconds > 0 else '-'}{format_seconds(abs(seconds))}"


def percent(part: float, whole: float) -> str:
    """``"12.3 %"`` of ``whole``."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def percent_change(before: float, after: float) -> str:
    """``"+12.3 %"``, ``"x 12"`` from ten times on; ``"-"`` where there was nothing."""
    if not before:
        return "-"
    return f"{100 * (after - before) / before:+.1f} %" if after < 10 * before else f"x {after / before:.0f}"


def summary(plan: ir.plan.Plan, events: bool = True) -> RenderableType:
    """One screen: the headline numbers, the certificate, the step, what was decided."""
    if plan.decisions.parallelism is not None:
        from planner.llm_render import llm_summary

        return llm_summary(plan, events)
    if plan.decisions.serving is not None:
        from planner.serving_render import serving_summary

        return serving_summary(plan)
    parts: list[RenderableType] = [headline(plan, facts(plan)), Text()]
    if events and plan.timeline.events:
        parts += [Text("modelled step", style="bold"), timeline_chart(plan.timeline), Text()]
    parts += [Text("decisions", style="bold"), _decisions(plan)]
    if plan.warnings:
        parts += [Text(), *(Text(f"warning: {warning}", style="yellow") for warning in plan.warnings)]
    return Group(*parts)


def headline(plan: ir.plan.Plan, rows: Sequence[tuple[str, str]]) -> Table:
    """What was planned for which machine, ``rows``, and the digest, one a line."""
    topology = plan.topology
    what = f"{plan.model.name} on {topology.name} ({machine(topology)}), {plan.mode}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in (("plan", what), *rows, ("digest", plan.digest.removeprefix("sha256:")[:16])):
        table.add_row(name, Text(text))
    return table


def objective_words(name: str) -> str:
    """What a certificate is about, without how it is added up: ``"embedding time"``."""
    return name.partition(":")[0].removesuffix(", seconds").removesuffix(" of a step")


def machine(topology: Topology) -> str:
    """``"16 hosts x 8 H100-SXM5-80GB"``."""
    hosts = f"{topology.hosts} host{'s' * (topology.hosts != 1)}"
    return f"{hosts} x {topology.host_size} {topology.device.name}"


def facts(plan: ir.plan.Plan) -> list[tuple[str, str]]:
    """What is said first of a recommender's plan, by name."""
    certificate, model, step = plan.certificate, plan.model, plan.timeline.step
    fullest = max(plan.memory, key=lambda rank: rank.total / rank.limit)
    return [
        (
            "model",
            f"{len(plan.table_plans)} tables, {format_count(model.embedding_params)} embedding parameters, "
            + (
                f"{format_count(model.dense_params)} dense, {format_count(model.dense_flops)}FLOP forward a sample"
                if model.dense_params
                else "no dense part"
            ),
        ),
        (
            "step",
            f"{format_seconds(step)} modelled, {format_count(plan.workload.global_batch / step)} samples/s at "
            f"global batch {plan.workload.global_batch:,}",
        ),
        (
            "certificate",
            f"{objective_words(certificate.objective_name)} {format_seconds(certificate.objective)}, proved no plan below "
            f"{format_seconds(certificate.lower_bound)}: gap {100 * certificate.gap:.2f} % "
            f"({certificate.status})",
        ),
        (
            "memory",
            f"fullest rank {fullest.rank}: {format_bytes(fullest.total)} of {format_bytes(fullest.limit)} "
            f"usable ({percent(fullest.total, fullest.limit)})",
        ),
    ]


def assumption_list(plan: ir.plan.Plan) -> RenderableType:
    """What the plan rests on, each with its source."""
    table = grid("name", "value", "source")
    for assumption in plan.assumptions:
        table.add_row(assumption.name, assumption.value, assumption.source)
    return Group(Text("assumptions", style="bold"), table)


def _decisions(plan: ir.plan.Plan) -> RenderableType:
    counts = Counter(table.option for table in plan.table_plans)
    table = grid("option", ">tables", ">parameters", ">of device time", "largest")
    seconds = {name: sum(t.terms.values()) for name, t in plan.tables.items()}
    total = sum(seconds.values())
    for option, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        members = [t for t in plan.table_plans if t.option == option]
        members.sort(key=lambda t: (-t.rows * t.dim, t.name))
        names = ", ".join(t.name for t in members[:4])
        table.add_row(
            option,
            str(count),
            format_count(sum(t.rows * t.dim for t in members)),
            percent(sum(seconds[t.name] for t in members), total),
            names + (f" and {count - 4} more" if count > 4 else ""),
        )
    return table


def timeline_chart(timeline: Timeline, width: int = 52) -> RenderableType:
    """The step as bars: one line an op, grouped by stream; ``#`` is on the critical path."""
    table = grid("stream", "op", ">time", f"0{format_seconds(timeline.step):>{width - 1}}")
    streams = list(dict.fromkeys(event.stream for event in timeline.events))
    for stream in streams:
        shown = [e for e in timeline.events if e.stream == stream and e.duration > 0]
        for position, event in enumerate(shown):
            table.add_row(
                "" if position else stream,
                event.name,
                format_seconds(event.duration),
                _bar(event, timeline.step, width),
            )
    return Group(table, Text("# on the critical path, = hidden behind it", style="dim"))


def _bar(event: Event, step: float, width: int) -> Text:
    whole = max(step, event.start + event.duration)  # a plan that was edited may claim a shorter step
    start = min(width - 1, int(event.start / whole * width))
    length = max(1, min(width - start, round(event.duration / whole * width)))
    mark = "#" if event.critical else "="
    return Text(" " * start + mark * length, style="bold" if event.critical else "dim")


def table_list(plan: ir.plan.Plan, names: Sequence[str] | None = None, limit: int = 20) -> RenderableType:
    """Tables by device time, the costliest first."""
    chosen = [plan.tables[name] for name in names] if names else list(plan.table_plans)
    chosen.sort(key=lambda t: (-sum(t.terms.values()), t.name))
    table = grid(
        "table", ">rows", ">dim", "option", ">ranks", ">memory", ">device time", "runner-up", ">costs"
    )
    for t in chosen[:limit]:
        up = t.runner_up
        table.add_row(
            t.name,
            format_count(t.rows),
            str(t.dim),
            t.option,
            str(len(t.ranks(plan.world_size))),
            format_bytes(sum(t.memory.values())),
            format_seconds(sum(t.terms.values())),
            up.option if up else "-",
            signed(up.delta) if up and up.delta is not None else "-",
        )
    more = len(chosen) - limit
    note = [Text(f"... and {more} more (--all)", style="dim")] if more > 0 else []
    return Group(table, *note)
