"""``planner scale``: which size of a model family a machine can afford, and what to grow next."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from ir.plan import write_atomically
from ir.units import format_bytes, format_count, format_seconds
from planner.render import grid
from planner.scale import Advice, PlannedSize

BAR = 14  # characters of the longest bar


@click.command()
@click.argument("family", type=click.Choice(["wukong"]))
@click.option("--topology", "-t", required=True, help="Preset (h100-16x8) or YAML file.")
@click.option("--budget-gflop", type=float, required=True, help="GFLOP a sample, forward and backward.")
@click.option("--tables", help="Table set instead of stand-ins for the paper's 627 B sparse parameters.")
@click.option("--batch", type=int, help="Global batch, instead of the paper's or the table set's.")
@click.option("--constraints", "-c", type=click.Path(), help="YAML file: pins, limits, memory reserve.")
@click.option("--dollars-per-hour", type=float, help="Price of one device; adds dollars per billion samples.")
@click.option("--time-limit", type=float, default=5.0, show_default=True, help="Solver work, about seconds.")
@click.option("--plot", type=click.Path(), help="Write the plot here, as SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def scale(
    family: str,
    topology: str,
    budget_gflop: float,
    tables: str | None,
    batch: int | None,
    constraints: str | None,
    dollars_per_hour: float | None,
    time_limit: float,
    plot: str | None,
    as_json: bool,
) -> None:
    """Walk the scaling rule of a model FAMILY up to a budget and plan each size.

    Each row is one size: what grew, its GFLOP and parameters, the modelled step, memory and cost, and the
    LogLoss that the paper's scaling law expects. The last rows grow one knob of the largest size that fits.
    """
    from planner.cli_support import read_constraints, reports_errors, show

    @reports_errors
    def answer(as_json: bool) -> None:
        from planner.scale import scale_wukong

        advice = scale_wukong(
            topology,
            budget_gflop,
            tables=tables,
            global_batch=batch,
            constraints=read_constraints(constraints),
            time_limit=time_limit,
        )
        if plot:
            write_atomically(plot, svg(advice))
        if as_json:
            click.echo(json.dumps(to_dict(advice, dollars_per_hour)))
        else:
            show(render(advice, dollars_per_hour))
            if plot:
                click.echo(f"\nplot written to {Path(plot)}")

    answer(as_json=as_json)


def dollars(row: PlannedSize, per_hour: float) -> float | None:
    """For a billion samples."""
    return None if row.device_seconds is None else row.device_seconds * 1000 / 3600 * per_hour


def to_dict(advice: Advice, per_hour: float | None = None) -> dict[str, Any]:
    """Plain data of the advice."""
    data = asdict(advice)
    best = advice.best
    data["best"] = best.size.label if best else None
    if per_hour is not None:
        for row, entry in zip(advice.rows, data["rows"], strict=True):
            entry["dollars_per_billion_samples"] = dollars(row, per_hour)
    return data


def render(advice: Advice, per_hour: float | None = None) -> RenderableType:
    """A table with a bar of the step time a row, and the advice in one sentence."""
    cost = ">$/G samples" if per_hour is not None else ">device s/M"
    table = grid(
        *(">l", ">n", ">k", ">MLP", "grew", ">GFLOP", ">dense", ">LogLoss", ">step", ">memory", cost, "step")
    )
    slowest = max((row.step for row in advice.rows if row.step is not None), default=1.0)
    for row in advice.rows:
        head = (
            *(str(count) for count in (row.size.layers, row.size.vectors, row.size.rank, row.size.width)),
            row.size.grew or "-",
            f"{row.gflop:.3g}",
            format_count(row.dense_params),
            f"{row.log_loss:.2f} %" if not row.alone else "-",
        )
        if row.step is None or row.memory is None or row.device_seconds is None:
            table.add_row(*head, "-", "-", "-", "no fit")
            continue
        price = dollars(row, per_hour) if per_hour is not None else row.device_seconds
        bar = "#" * max(1, round(BAR * row.step / slowest))
        table.add_row(*head, format_seconds(row.step), format_bytes(row.memory), f"{price:.3g}", bar)
    title = (
        f"Wukong on {advice.topology} ({advice.devices} devices), global batch {advice.global_batch:,}, "
        f"up to {advice.budget_gflop:g} GFLOP a sample"
    )
    notes = (
        *(f"{row.size.label} does not fit: {row.problem}" for row in advice.rows if row.problem),
        "GFLOP forward and backward; LogLoss by the paper's law, which holds where all knobs grow together;",
        "times are modelled, dense layers replicated unless constraints say otherwise",
    )
    return Group(
        Text(title, style="bold"),
        Text(),
        table,
        Text(),
        Text(verdict(advice)),
        *(Text(n, style="dim") for n in notes),
    )


def verdict(advice: Advice) -> str:
    """The largest size that fits, and what its next doubling costs."""
    best = advice.best
    if best is None or best.step is None:
        return "no size fits this machine; add hosts, or allow sharded dense layers in the constraints"
    grown = [row for row in advice.rows if row.alone and row.step is not None]
    # time for compute: the knob whose FLOP come cheapest on this machine
    cheapest = min(
        grown,
        key=lambda row: (row.step - best.step) / max(row.gflop - best.gflop, 1e-9),  # type: ignore[operator]
        default=None,
    )
    text = f"largest size that fits: {best.size.label}, {best.samples_per_second:,.0f} samples/s"
    if cheapest is not None and cheapest.step is not None:
        text += (
            f"; of one knob alone, {cheapest.size.grew.removesuffix(' alone')} adds compute at the least time "
            f"({format_seconds(cheapest.step - best.step)} for {cheapest.gflop - best.gflop:.2g} GFLOP)"
        )
    return text


def svg(advice: Advice, width: int = 640, height: int = 400) -> str:
    """Step time over GFLOP a sample, both logarithmic: the walk as a line, single knobs as open circles."""
    rows = [row for row in advice.rows if row.step is not None]
    left, bottom, top, right = 70, 50, 30, 20
    xs = [math.log10(row.gflop) for row in rows] or [0.0]
    ys = [math.log10(row.step or 1.0) for row in rows] or [0.0]

    def place(value: float, low: float, high: float, start: float, end: float) -> float:
        return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)

    points = [
        (
            place(x, min(xs), max(xs), left, width - right - 60),
            place(y, min(ys), max(ys), height - bottom, top),
        )
        for x, y in zip(xs, ys, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for (x, y), row in zip(points, rows, strict=False) if not row.alone)
    marks = []
    for (x, y), row in zip(points, rows, strict=False):
        fill = "none" if row.alone else "currentColor"
        label = row.size.grew if row.alone else row.size.label
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="currentColor"/>'
            f'<text x="{x + 6:.1f}" y="{y - 6:.1f}">{label}: {row.gflop:.3g} GFLOP, '
            f"{format_seconds(row.step or 0.0)}</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="9"><text x="{left}" y="16" font-size="12">Wukong on {advice.topology}: modelled step over '
        f"GFLOP a sample (log-log)</text>"
        f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill="none" stroke="currentColor"/>'
        f'<polyline points="{line}" fill="none" stroke="currentColor"/>{"".join(marks)}</svg>\n'
    )
