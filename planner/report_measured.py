"""A measured run beside the model: which phases took how long, on the slowest and the fastest rank."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict
from rich.console import RenderableType

from codegen.runtime.spans import Span
from ir.errors import InputError
from ir.plan import Plan
from ir.reading import STRICT, parse_record, read_json
from ir.units import format_seconds
from planner.render import grid, signed

MOST_SPANS = 20_000  # a run of 8 ranks has a few hundred


@dataclass(frozen=True, slots=True)
class Measured:
    """What ``planner run --json`` measured, as far as it is drawn."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    steps: tuple[float, ...]  # seconds of each timed step on its slowest rank
    spans: tuple[Span, ...]  # of one step under the profiler

    @property
    def median(self) -> float:
        """Seconds of a timed step."""
        return statistics.median(self.steps)


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """A phase of the step, seconds; None where one side has no such phase."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    phase: str
    modelled: float | None
    slowest: float | None  # measured on the rank that spends most in it
    fastest: float | None


def read_measured(path: str | Path) -> Measured:
    """What a run printed; raises InputError on a file that is not that."""
    data = read_json(path, "measured run")
    if not isinstance(data, dict) or not isinstance(data.get("step_seconds"), list):
        raise InputError(f"measured run {path} has no step_seconds; give what `planner run --json` printed")
    steps, spans = data["step_seconds"], data.get("spans", [])
    if not steps or not all(type(s) in (int, float) and s >= 0 for s in steps):
        raise InputError(f"measured run {path}: step_seconds must be a list of seconds")
    if not isinstance(spans, list) or len(spans) > MOST_SPANS:
        raise InputError(f"measured run {path}: spans must be a list of at most {MOST_SPANS} records")
    return parse_record(Measured, {"steps": steps, "spans": spans}, f"measured run {path}")


def base_phase(name: str) -> str:
    """The phase that an event of the model belongs to: ``all_reduce_1`` is an ``all_reduce``."""
    return re.sub(r"(_next|_\d+)$", "", name)


def phase_rows(plan: Plan, spans: tuple[Span, ...]) -> tuple[PhaseRow, ...]:
    """Modelled and measured seconds by phase, in the order of the model; then what only one side has."""
    modelled: dict[str, float] = defaultdict(float)
    for event in plan.timeline.events:
        if event.duration > 0:
            modelled[base_phase(event.name)] += event.duration
    by_rank: dict[str, dict[int, float]] = defaultdict(dict)
    for span in spans:
        of_phase = by_rank[span.phase]
        of_phase[span.rank] = of_phase.get(span.rank, 0.0) + span.seconds
    rows = []
    for phase in dict.fromkeys((*modelled, *by_rank)):
        ranks = by_rank.get(phase, {}).values()
        rows.append(PhaseRow(phase, modelled.get(phase), max(ranks, default=None), min(ranks, default=None)))
    return tuple(rows)


def render_phases(rows: tuple[PhaseRow, ...]) -> RenderableType:
    """The rows as a table."""
    table = grid("phase", ">modelled", ">measured", ">fastest rank", ">measured less modelled", ">ratio")
    for row in rows:
        both = row.modelled is not None and row.slowest is not None
        table.add_row(
            row.phase,
            *(
                "-" if value is None else format_seconds(value)
                for value in (row.modelled, row.slowest, row.fastest)
            ),
            signed((row.slowest or 0.0) - (row.modelled or 0.0)) if both else "-",
            f"{(row.slowest or 0.0) / row.modelled:.2f}" if both and row.modelled else "-",
        )
    return table


def measured_data(plan: Plan, found: Measured) -> dict[str, Any]:
    """For the report's script: spans of the ranks that are drawn, and the table of phases."""
    return {
        "steps": list(found.steps),
        "median": found.median,
        "spans": [[s.rank, s.phase, s.stream, s.start, s.seconds] for s in found.spans],
        "phases": [[r.phase, r.modelled, r.slowest, r.fastest] for r in phase_rows(plan, found.spans)]
        if found.spans
        else [],
    }
