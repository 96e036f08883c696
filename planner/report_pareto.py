"""Step time against device memory: the plan compiled again under smaller and smaller budgets.

Decoders need no sweep: the layouts that were not chosen are in the plan. Number formats bring their own sweep over
the accuracy budget where the constraints ask for one (``formats.pareto``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import ConfigDict

import ir.plan
from ir.errors import InfeasibleError, InputError
from ir.reading import STRICT, dump_record
from ir.units import format_bytes, format_seconds
from planner.what_if import model_of

POINTS = 6  # budgets of a sweep
LEAST = 4  # bytes of a weight, of which a plan must hold each at least once


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """The plan under one budget; seconds, or None where nothing fits."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    budget: int  # bytes a rank that the plan may use
    used: int | None = None  # bytes of the fullest rank
    step: float | None = None
    objective: float | None = None
    lower_bound: float | None = None  # of the objective under this budget
    reason: str = ""  # why nothing fits

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return dump_record(self)


def memory_sweep(
    plan: ir.plan.Plan,
    *,
    model: Any = None,
    points: int = POINTS,
    time_limit: float = 5.0,
) -> tuple[BudgetPoint, ...]:
    """The plan itself, then plans under budgets from what it uses down to the least that could do.

    The budgets fall geometrically to the mean memory of a rank when every weight is held once; the sweep
    ends with the first budget that nothing fits.

    Args:
        plan: of a recommender.
        model: what it was compiled from; default what it says.
        points: budgets besides the plan's own.
        time_limit: deterministic solver work for each, about seconds.

    Raises:
        InputError: a plan without tables, or no model to plan with.
    """
    from planner.api import compile

    if not plan.table_plans:
        raise InputError(
            "a sweep over memory budgets needs tables; plans of decoders list their other layouts"
        )
    captured = model_of(plan, model)
    fullest = max(plan.memory, key=lambda rank: rank.total)
    beside = min(rank.used.get("dense", 0) for rank in plan.memory)
    least = beside + LEAST * plan.model.embedding_params / plan.world_size
    found = [
        BudgetPoint(
            fullest.limit,
            fullest.total,
            plan.timeline.step,
            plan.certificate.objective,
            plan.certificate.lower_bound,
        )
    ]
    ratio = min(1.0, least / fullest.total)
    for number in range(1, points + 1):
        budget = math.ceil(fullest.total * ratio ** (number / points)) - 1
        limit = math.ceil(budget / (1 - plan.constraints.memory_reserve))
        try:
            made = compile(
                captured,
                plan.topology,
                replace(plan.workload, dedup={}, dedup_ops={}),
                mode=plan.mode,
                constraints=replace(plan.constraints, memory_limit=limit),
                time_limit=time_limit,
                seed=int(plan.provenance.get("seed", "0")),
                objective=plan.provenance.get("objective", "phases"),  # type: ignore[arg-type]
                name=plan.model.name,
            )
        except InfeasibleError as error:
            found.append(BudgetPoint(budget, reason=str(error)))
            break
        used, certificate = max(rank.total for rank in made.memory), made.certificate
        found.append(
            BudgetPoint(budget, used, made.timeline.step, certificate.objective, certificate.lower_bound)
        )
    return tuple(found)


def fronts(plan: ir.plan.Plan, sweep: tuple[BudgetPoint, ...]) -> list[dict[str, Any]]:
    """What the report draws: one chart a trade, ``[x, y, label]`` a point, with the units of both axes."""
    made: list[dict[str, Any]] = []
    if sweep:
        refused = [p for p in sweep if p.step is None]
        made.append(
            {
                "title": "Step against memory of the fullest rank",
                "units": ["bytes", "seconds"],
                "points": [[p.used, p.step, _label(p)] for p in sweep if p.step is not None],
                "note": f"nothing fits in {format_bytes(refused[0].budget)}: {refused[0].reason}"
                if refused
                else "",
            }
        )
    layouts = plan.decisions.parallelism
    if layouts is not None and layouts.alternatives:
        used = max(rank.total for rank in plan.memory)
        points: list[list[Any]] = [[used, plan.timeline.step, f"{layouts.layout.label}: chosen"]]
        points += [[a.memory, a.step, f"{a.layout.label}: {a.reason}"] for a in layouts.alternatives]
        title = "Step against memory of the fullest rank: the layouts that came next"
        made.append({"title": title, "units": ["bytes", "seconds"], "points": points, "note": ""})
    formats = plan.decisions.formats
    if formats is not None and formats.pareto:
        unit = {"step": "seconds", "memory": "bytes", "loss": "loss"}[formats.objective_name]
        chosen: list[Any] = [
            formats.loss,
            formats.objective,
            f"chosen: {formats.average_bits:.3g} bits an element",
        ]
        swept = [[p.loss, p.objective, f"{p.average_bits:.3g} bits an element"] for p in formats.pareto]
        made.append(
            {
                "title": f"{formats.objective_name.capitalize()} against predicted loss of number formats",
                "units": ["loss", unit],
                "points": [chosen, *swept],
                "note": formats.sensitivity,
            }
        )
    return made


def _label(point: BudgetPoint) -> str:
    bound = f", none below {format_seconds(point.lower_bound)}" if point.lower_bound is not None else ""
    return f"budget {format_bytes(point.budget)}\nobjective {format_seconds(point.objective or 0.0)}{bound}"
