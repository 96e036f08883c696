"""Number formats and memory tiers of a plan as text, for explain."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.text import Text

from ir.format_plan import FormatPlan, TensorFormat
from ir.plan import Plan, TablePlan
from ir.tier_plan import TableTiers, TierPlan
from ir.units import format_bytes, format_count, format_seconds
from planner.render import grid

WIDE_GAP = 0.1  # from which a gap is commented on
SHOWN = 12  # tensors and tables listed


def _value(section: FormatPlan, value: float) -> str:
    """A value of the format objective, in its unit."""
    if section.objective_name == "step":
        return format_seconds(value)
    return format_bytes(value) if section.objective_name == "memory" else f"{value:.3g}"


def render_formats(plan: Plan) -> RenderableType:
    """What was decided for how many tensors, the costliest in accuracy, and the sweep."""
    section = plan.decisions.formats
    assert section is not None
    used = Counter((tensor.kind, tensor.format) for tensor in section.tensors)
    head = (
        f"{section.objective_name} {_value(section, section.objective)} (bound "
        f"{_value(section, section.lower_bound)}, gap {100 * section.gap:.2f} %), predicted loss "
        f"+{section.loss:.3g} ± {section.stderr:.1g}, {section.average_bits:.3g} bits per stored element, "
        f"casts {format_seconds(section.cast_seconds)} a step"
    )
    counts = ", ".join(f"{n} {kind} {format}" for (kind, format), n in sorted(used.items()))
    parts: list[RenderableType] = [
        Text("number formats", style="bold"),
        Text(head),
        Text(counts),
        Text(f"losses: {section.sensitivity}"),
    ]
    costly = sorted(section.tensors, key=lambda t: -t.loss)[:SHOWN]
    parts.append(_tensors(costly))
    if section.loss_price > 0:
        parts.append(
            Text(f"one more 1e-6 of loss would buy {section.loss_price * 1e-6:.3g} of the objective")
        )
    if section.pareto:
        sweep = grid(">budget", ">step", ">bound", ">loss", ">bits")
        for point in section.pareto:
            sweep.add_row(
                f"{point.budget:.3g}",
                format_seconds(point.objective),
                format_seconds(point.bound),
                f"{point.loss:.3g}",
                f"{point.average_bits:.3g}",
            )
        parts.append(sweep)
    return Group(*parts)


def _tensors(tensors: list[TensorFormat]) -> RenderableType:
    table = grid("tensor", "format", ">elements", ">bits", ">loss", "next", "why")
    for tensor in tensors:
        table.add_row(
            tensor.name,
            tensor.format + (" (emulated)" if tensor.emulated else ""),
            format_count(int(tensor.elements)),
            f"{tensor.bits:.3g}",
            f"{tensor.loss:.3g}",
            tensor.runner_up,
            tensor.reason,
        )
    return table


def render_tiers(plan: Plan) -> RenderableType:
    """Use of each tier, what one more GB of it would save, the tables that leave HBM, and the hosts tried."""
    section = plan.decisions.tiers
    assert section is not None
    uses = grid("tier", ">stored", ">limit", "busy a step", "binds", ">one more GB saves")
    for use in section.tiers:
        busy = ", ".join(f"{kind} {format_seconds(seconds)}" for kind, seconds in use.seconds.items())
        bought = f"up to {format_seconds(use.price_per_gb)}" if use.price_per_gb > 0 else "nothing"
        binds = ", ".join(use.binding) or "-"
        limits = (format_bytes(use.bytes), format_bytes(use.limit)) if use.limit else ("-", "-")
        uses.add_row(use.tier, *limits, busy or "-", binds, bought)
    parts: list[RenderableType] = [Text("memory tiers", style="bold"), Text(_goal(section)), uses]
    below = [table for table in plan.table_plans if table.tiers is not None]
    if below:
        listed = grid("table", "rows in", ">fetched a step", ">ahead")
        for table in sorted(below, key=lambda t: -t.rows * t.dim)[:SHOWN]:
            assert table.tiers is not None
            listed.add_row(
                table.name,
                _ranges(table.tiers),
                f"{table.tiers.fetched_rows:,.0f}",
                str(table.tiers.prefetch_depth),
            )
        parts += [
            Text(f"{len(below)} of {len(plan.table_plans)} tables reach below the device's memory"),
            listed,
        ]
    for trial in section.trials:
        step = "" if trial.step is None else f", step {format_seconds(trial.step)}"
        parts.append(
            Text(f"{trial.hosts} host{'s' * (trial.hosts != 1)}: {trial.verdict}{step} {trial.why}".rstrip())
        )
    return Group(*parts)


def _goal(section: TierPlan) -> str:
    limit = "" if section.step_limit is None else f" of {format_seconds(section.step_limit)} allowed"
    hosts = f"{section.hosts} host{'s' * (section.hosts != 1)}"
    value, bound = (_in_unit(section, x) for x in (section.objective, section.lower_bound))
    return (
        f"step {format_seconds(section.step)}{limit} on {hosts}; objective {section.objective_name} {value}, "
        f"proved to be {bound} at least{_looseness(section)}"
    )


def _looseness(section: TierPlan) -> str:
    """What a wide gap may come from; empty for a narrow one."""
    if section.objective_name != "step" or section.lower_bound >= (1 - WIDE_GAP) * section.objective:
        return ""
    return (
        " (the bound takes all ranks as equally busy and a part of a table at a part of its cost, so it may be the bound "
        "that is far off, not the plan)"
    )


def _in_unit(section: TierPlan, value: float) -> str:
    if section.objective_name == "step":
        return format_seconds(value)
    unit = {"nodes": "hosts", "cost": "US dollars", "power": "W"}[section.objective_name]
    return f"{value:.6g} {unit}"


def _ranges(tiers: TableTiers) -> str:
    if tiers.cache is not None:
        return (
            f"{tiers.ranges[0].tier}, {tiers.cache.policy} cache of {tiers.cache.rows:,} rows in front "
            f"(hit rate {100 * tiers.cache.hit_rate:.1f} %)"
        )
    return ", ".join(f"{r.tier} {r.rows:,} rows ({100 * r.accesses:.1f} % of accesses)" for r in tiers.ranges)


def storage_lines(plan: Plan, table: TablePlan) -> list[Text]:
    """Format and tiers of one table, each with its reason."""
    lines = []
    section = plan.decisions.formats
    known = {tensor.name: tensor for tensor in section.tensors} if section is not None else {}
    if table.format is not None and table.name in known:
        tensor = known[table.name]
        lines.append(Text(f"format: {table.format}, {tensor.bits:.3g} bits; {tensor.reason}"))
    if table.tiers is not None:
        lines.append(Text(f"rows: {_ranges(table.tiers)}; {table.tiers.reason}"))
        prices = [
            f"{use.tier} {format_seconds(use.price_per_gb)}"
            for use in (plan.decisions.tiers.tiers if plan.decisions.tiers else ())
            if use.price_per_gb > 0
        ]
        lines.append(
            Text(f"one more GB would shorten the step by up to: {', '.join(prices) or 'nothing in any tier'}")
        )
    return lines
