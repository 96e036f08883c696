"""The plan as one self-contained HTML page: no network, light and dark, interactive."""

from __future__ import annotations

import base64
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ir.errors import PlannerError
from ir.plan import Plan, write_atomically
from ir.units import format_bytes, format_count, format_seconds
from planner.llm_render import llm_facts
from planner.render import machine, objective_words
from planner.report_machine import machine_data, tier_data
from planner.report_measured import Measured, measured_data, read_measured
from planner.report_pareto import BudgetPoint, fronts
from planner.report_sections import section_parts
from planner.report_tables import table_rows
from planner.serving_render import serving_facts

MOST_RUNS = 600  # bars of the memory chart; more ranks than that are joined


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
        step_title="Modelled prompt, to its first token"
        if plan.decisions.serving is not None
        else "Modelled step",
        sections=section_parts(plan),
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
        "tables": table_rows(plan),
        "machine": machine_data(plan),
        "tiers": tier_data(plan),
        "measured": measured_data(plan, measured) if measured is not None else None,
        "fronts": fronts(plan, sweep),
        "sensitivity": _sensitivity(plan) if sensitivity else [],
    }


def _headline(plan: Plan) -> list[tuple[str, str]]:
    """The cards on top: what the plan's kind says first, in few words."""
    cards = [("machine", f"{machine(plan.topology)}, {plan.mode}")]
    digest = ("digest", plan.digest.removeprefix("sha256:")[:16])
    if plan.decisions.parallelism is not None:
        return [*_joined(llm_facts(plan)), *cards, digest]
    if plan.decisions.serving is not None:
        return [*_joined(serving_facts(plan)), *cards, digest]
    certificate, model = plan.certificate, plan.model
    fullest = max(plan.memory, key=lambda rank: rank.total / rank.limit)
    batch = plan.workload.global_batch
    rate = batch / plan.timeline.step if plan.timeline.step else 0.0
    objective, bound = format_seconds(certificate.objective), format_seconds(certificate.lower_bound)
    dense = f"{format_count(model.dense_params)} dense parameters" if model.dense_params else "no dense part"
    return [
        ("step", f"{format_seconds(plan.timeline.step)} modelled"),
        ("throughput", f"{format_count(rate)} samples/s at {batch:,} samples a step"),
        (
            f"certificate: {objective_words(certificate.objective_name)}",
            f"{objective}, proved none below {bound}",
        ),
        ("gap to the bound", f"{100 * certificate.gap:.2f} % ({certificate.status})"),
        ("fullest rank", f"{format_bytes(fullest.total)} of {format_bytes(fullest.limit)}"),
        (
            "model",
            f"{len(plan.table_plans)} tables, {format_count(model.embedding_params)} embedding parameters, {dense}",
        ),
        *cards,
        digest,
    ]


def _joined(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Facts with those that have no name of their own added to the one before."""
    made: list[tuple[str, str]] = []
    for name, text in facts:
        if not name and made:
            made[-1] = (made[-1][0], f"{made[-1][1]}; {text}")
        else:
            made.append((name, text))
    return made


def _memory(plan: Plan) -> dict[str, Any]:
    """Runs of ranks with the same use; at most MOST_RUNS, by joining neighbours under their largest."""
    most: dict[str, int] = {}
    for rank in plan.memory:
        for purpose, size in rank.used.items():
            most[purpose] = max(size, most.get(purpose, 0))
    purposes = sorted(most, key=lambda purpose: (-most[purpose], purpose))
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


def _sensitivity(plan: Plan) -> list[list[Any]]:
    """Name, seconds and rows of each of the plan's times."""
    from planner.assumptions import sensitivity

    try:
        found = sensitivity(plan)
    except PlannerError:
        return []  # the model is not at hand: the report does without
    return [
        [name, seconds, [[row.name, row.value, row.worse, row.better] for row in found.of(name)]]
        for name, seconds in found.seconds.items()
    ]
