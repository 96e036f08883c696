"""``planner trace``: the modelled step by rank class, and a profiled run beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codegen.chrome_trace import (
    MEASURED_FIRST,
    MICRO,
    Event,
    RankClass,
    measured_events,
    modelled_events,
    write_trace,
)
from codegen.runtime.spans import Span
from cost_models.calibration import Calibration, default_calibration
from cost_models.embedding import phase_overheads
from cost_models.placed import rank_seconds
from ir.plan import Plan

MOST_CLASSES = 8  # the slowest ones are shown; 128 processes are more than a screen
_NEXT = {"input_dist": ("input_dist", "input_dist_next")}  # a phase may run for the next batch


def rank_classes(plan: Plan, calibration: Calibration | None = None) -> tuple[RankClass, ...]:
    """Ranks grouped by what they spend in each embedding phase, slowest class first.

    Of more than :data:`MOST_CLASSES` classes the slowest are kept and the others joined into one that
    is shown with its mean.
    """
    if not plan.table_plans:
        return (RankClass(tuple(range(plan.world_size)), {}),)
    constants = calibration or default_calibration(plan.topology)
    overheads = phase_overheads(plan.topology, plan.workload, constants, plan.mode)
    loads = rank_seconds(plan.table_plans, plan.topology, plan.workload, constants, plan.mode)
    phases = list(loads)
    table = np.stack([loads[p] + overheads[p] for p in phases], axis=1)
    grouped: dict[tuple[float, ...], list[int]] = {}
    for rank, row in enumerate(np.round(table, 9).tolist()):
        grouped.setdefault(tuple(row), []).append(rank)
    order = sorted(grouped.values(), key=lambda ranks: (-table[ranks[0]].sum(), ranks))
    if len(order) > MOST_CLASSES:
        rest = [rank for ranks in order[MOST_CLASSES - 1 :] for rank in ranks]
        order = [*order[: MOST_CLASSES - 1], sorted(rest)]
    classes = []
    for ranks in order:
        mean = dict(zip(phases, table[ranks].mean(axis=0).tolist(), strict=True))
        named = {name: seconds for phase, seconds in mean.items() for name in _NEXT.get(phase, (phase,))}
        classes.append(RankClass(tuple(ranks), named))
    return tuple(classes)


def span_events(spans: Sequence[Span]) -> list[Event]:
    """A measured step by phase: a process a rank, a thread a stream."""
    streams = list(dict.fromkeys(span.stream for span in spans))
    made: list[Event] = []
    for rank in sorted({span.rank for span in spans}):
        name = {"name": f"measured: rank {rank}"}
        made.append({"ph": "M", "name": "process_name", "pid": MEASURED_FIRST + rank, "args": name})
        for thread, stream in enumerate(streams):
            named = {"ph": "M", "name": "thread_name", "pid": MEASURED_FIRST + rank, "tid": thread}
            made.append({**named, "args": {"name": stream}})
    for span in spans:
        made.append(
            {
                "ph": "X",
                "name": span.phase,
                "cat": "measured",
                "pid": MEASURED_FIRST + span.rank,
                "tid": streams.index(span.stream),
                "ts": span.start * MICRO,
                "dur": span.seconds * MICRO,
            }
        )
    return made


def write_plan_trace(
    plan: Plan,
    path: str | Path,
    *,
    calibration: Calibration | None = None,
    profile: dict[str, Any] | None = None,
    spans: Sequence[Span] = (),
) -> int:
    """Write the trace of a plan; returns its number of events.

    Args:
        plan: the plan.
        path: of the trace file.
        calibration: constants of the modelled ranks' shares; default those of the device kind.
        spans: of a run that was measured (:func:`planner.report_measured.read_measured`).
        profile: also train here under torch's profiler: arguments of :func:`codegen.runtime.profile.profile_plan`.

    Raises:
        InputError: the folder cannot be written, or the plan cannot run here.
    """
    events = modelled_events(plan.timeline, rank_classes(plan, calibration))
    if profile is not None:
        from codegen.runtime.profile import profile_plan

        with tempfile.TemporaryDirectory(prefix="planner-trace-") as folder:
            events += measured_events(profile_plan(plan, Path(folder), **profile))
    events += span_events(spans)
    write_trace(path, events, {"model": plan.model.name, "topology": plan.topology.name, "plan": plan.digest})
    return len(events)
