"""The plan as one self-contained HTML page: no network, light and dark, interactive."""

from __future__ import annotations

import base64
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ir.errors import PlannerError
from ir.plan import Plan, TablePlan, write_atomically
from ir.units import format_bandwidth, format_bytes, format_count, format_seconds
from planner.report_measured import Measured, measured_data, read_measured
from planner.report_pareto import BudgetPoint, fronts

MOST_RUNS = 600  # bars of the memory chart; more ranks than that are joined
MOST_SHARDS = 2048  # blocks drawn of one table


def write_report(
    plan: Plan,
    path: str | Path,
    *,
    measured: str | Path | None = None,
    sensitivity: bool = True,
    sweep: tuple[BudgetPoint, ...] = (),
) -> int:
    """Write the report of a plan; returns its size in bytes.

    Args:
        plan: the plan.
        path: of the HTML file.
        measured: JSON that ``planner run --json`` printed, drawn beside the model.
        sensitivity: also price the plan with each assumption changed; needs the plan's model.
        sweep: plans under other memory budgets (:func:`planner.report_pareto.memory_sweep`).

    Raises:
        InputError: the folder cannot be written, or ``measured`` is not a run's output.
    """
    found = read_measured(measured) if measured is not None else None
    text = render_report(plan, measured=found, sensitivity=sensitivity, sweep=sweep)
    write_atomically(path, text)
    return len(text.encode())


def render_report(
    plan: Plan,
    *,
    measured: Measured | None = None,
    sensitivity: bool = True,
    sweep: tuple[BudgetPoint, ...] = (),
) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("planner", "templates"), autoescape=True)
    data = report_data(plan, measured, sensitivity, sweep)
    # base64 keeps anything a model calls its tables from ending the script element
    packed = base64.b64encode(json.dumps(data, separators=(",", ":"), allow_nan=False).encode()).decode()
    return environment.get_template("report.html.j2").render(
        title=f"{plan.model.name} on {plan.topology.name}",
        head=_headline(plan),
        sections=_sections(plan),
        assumptions=plan.assumptions,
        warnings=plan.warnings,
        provenance=plan.provenance,
        data=packed,
    )


def report_data(
    plan: Plan, measured: Measured | None, sensitivity: bool, sweep: tuple[BudgetPoint, ...] = ()
) -> dict[str, Any]:
    """Everything that the page's script draws, as plain data."""
    return {
        "world": plan.world_size,
        "hostSize": plan.topology.host_size,
        "step": plan.timeline.step,
        "events": [
            [e.name, e.stream, e.start, e.duration, int(e.critical), e.terms] for e in plan.timeline.events
        ],
        "memory": _memory(plan),
        "load": _load(plan),
        "tables": [_table(table, plan.world_size) for table in plan.table_plans],
        "levels": [
            [level.name, level.fanout, level.link.name, format_bandwidth(level.link.bandwidth)]
            for level in plan.topology.levels
        ],
        "network": _network_share(plan),
        "measured": measured_data(plan, measured) if measured is not None else None,
        "fronts": fronts(plan, sweep),
        "sensitivity": _sensitivity(plan) if sensitivity else [],
    }


def _headline(plan: Plan) -> list[tuple[str, str]]:
    certificate, model = plan.certificate, plan.model
    fullest = max(plan.memory, key=lambda rank: rank.total / rank.limit)
    tokens = plan.workload.llm.global_tokens if plan.workload.llm else 0
    batch, unit = (tokens, "tokens") if tokens else (plan.workload.global_batch, "samples")
    rate = batch / plan.timeline.step if plan.timeline.step else 0.0
    return [
        ("step", f"{format_seconds(plan.timeline.step)} modelled"),
        ("throughput", f"{format_count(rate)} {unit}/s at {batch:,} {unit} a step"),
        ("proved gap", f"{100 * certificate.gap:.2f} % ({certificate.status})"),
        (
            "objective",
            f"{format_seconds(certificate.objective)}, none below {format_seconds(certificate.lower_bound)}",
        ),
        ("fullest rank", f"{format_bytes(fullest.total)} of {format_bytes(fullest.limit)}"),
        (
            "model",
            (
                f"{len(plan.table_plans)} tables, {format_count(model.embedding_params)} embedding and "
                f"{format_count(model.dense_params)} dense parameters"
                if plan.table_plans
                else f"{format_count(model.dense_params)} parameters"
            ),
        ),
        (
            "machine",
            f"{plan.topology.hosts} host{'s' * (plan.topology.hosts != 1)} x {plan.topology.host_size} "
            f"{plan.topology.device.name}, {plan.mode}",
        ),
        ("digest", plan.digest.removeprefix("sha256:")[:16]),
    ]


def _sections(plan: Plan) -> list[tuple[str, str]]:
    """The decision sections as preformatted text, by name."""
    from planner.render import to_text
    from planner.sections import render_section

    return [(name, to_text(render_section(plan, name), width=130)) for name in plan.decisions.present()]


def _memory(plan: Plan) -> dict[str, Any]:
    """Runs of ranks with the same use; at most MOST_RUNS, by joining neighbours under their largest."""
    purposes = sorted({purpose for rank in plan.memory for purpose in rank.used})
    rows = [[rank.used.get(purpose, 0) for purpose in purposes] for rank in plan.memory]
    runs = []
    for _, group in groupby(enumerate(rows), key=lambda item: tuple(item[1])):
        members = list(group)
        runs.append([members[0][0], members[-1][0], members[0][1]])
    if len(runs) > MOST_RUNS:
        size = -(-len(rows) // MOST_RUNS)
        runs = [
            [start, min(start + size, len(rows)) - 1, max(rows[start : start + size], key=sum)]
            for start in range(0, len(rows), size)
        ]
    return {"purposes": purposes, "runs": runs, "limit": plan.memory[0].limit}


def _load(plan: Plan) -> dict[str, Any]:
    """Seconds of embedding work by phase on each rank, for the picture of the machine."""
    if not plan.table_plans:
        return {"phases": [], "seconds": []}
    from cost_models.calibration import default_calibration
    from cost_models.placed import rank_seconds

    loads = rank_seconds(
        plan.table_plans, plan.topology, plan.workload, default_calibration(plan.topology), plan.mode
    )
    table = np.stack(list(loads.values()), axis=1)
    return {"phases": list(loads), "seconds": [[float(f"{x:.4g}") for x in row] for row in table.tolist()]}


def _table(table: TablePlan, world_size: int) -> list[Any]:
    """One row of the explorer; geometry that follows from the type is not listed."""
    up = table.runner_up
    listed = table.sharding_type not in ("row_wise", "data_parallel")
    shards = [[s.rank, s.row, s.col, s.rows, s.cols] for s in table.shards] if listed else []
    return [
        table.name,
        table.rows,
        table.dim,
        table.dtype,
        table.option,
        len(table.ranks(world_size)),
        sum(table.memory.values()),
        sum(table.terms.values()),
        up.option if up else "",
        up.delta if up and up.delta is not None else None,
        table.reason,
        shards[:MOST_SHARDS],
        {name: float(f"{seconds:.4g}") for name, seconds in table.terms.items()},
        _tiers(table),
    ]


def _tiers(table: TablePlan) -> list[list[Any]]:
    """``[tier, rows]`` bands, hottest first, where the rows live in more than one memory."""
    placed = getattr(table, "tiers", None)
    if placed is None:
        return []
    return [[band.tier, band.rows] for band in placed.ranges]


def _network_share(plan: Plan) -> float:
    """Fraction of the step in which the network works."""
    busy = sum(e.duration for e in plan.timeline.events if e.stream == "network")
    return busy / plan.timeline.step if plan.timeline.step else 0.0


def _sensitivity(plan: Plan) -> list[list[Any]]:
    from planner.what_if import sensitivity

    if not plan.table_plans:
        return []
    try:
        return [[row.name, row.value, row.worse, row.better] for row in sensitivity(plan)]
    except PlannerError:
        return []  # the model is not at hand: the report does without
