"""From a joint solution to the program's decisions: tables, certificate and the two sections."""

from __future__ import annotations

from dataclasses import replace

from cost_models.calibration import Calibration
from ir.plan import Certificate, TablePlan
from ir.program import Program
from ir.tier_plan import TableTiers
from passes.assignment.budget import Budget
from passes.assignment.joint import Joint, portion
from passes.format_requests import untied, with_request
from passes.format_section import Resolved, format_section
from passes.format_step_limit import least_within_step, too_slow
from passes.formats import check, known_point, resolve, sweep
from passes.joint import JointProblem
from passes.joint_warm import Known, place_warm
from passes.reasons import explain_tables
from passes.search_share import search_limit
from passes.sharding_plans import table_plan
from passes.tiers import Placed, place, tier_section

SWEEP = 0.4  # of the work, for the further points of a sweep
OBJECTIVE = (
    "step: embedding time (sum over phases of the slowest rank) and dense time, fetches overlapped, seconds"
)


def decide_jointly(program: Program, calibration: Calibration, known: Known | None = None) -> Program:
    """Decide tables, formats and tiers together, from those of a plan where ``known`` carries over.

    All searches share the time that this pass has, also those of a sweep.

    Raises:
        InputError, InfeasibleError: as the format and tier requests say.
    """
    constraints, budget = program.options.constraints, Budget(search_limit(program))
    sweeps = constraints.formats is not None and constraints.formats.pareto > 0
    first = portion(budget, 1.0 - SWEEP if sweeps else 1.0)
    resolved, placed = _solved(program, calibration, known, first)
    budget.spend(first.work)
    joint, problem = placed.joint, placed.problem
    machine, workload = problem.program.topology, problem.program.workload
    asked = replace(
        program.options, constraints=replace(constraints, tiers=placed.program.options.constraints.tiers)
    )
    decided = replace(program, topology=machine, workload=workload, options=asked)
    plans = _tables(decided, problem, joint)
    formats = None
    if resolved is not None:
        assert constraints.formats is not None
        named = replace(problem, program=decided)
        formats = format_section(named, joint, placed.bound, resolved)
        swept = sweep(
            decided,
            calibration,
            constraints.formats,
            (known_point(formats, joint.step, placed.bound),),
            budget,
        )
        formats = replace(formats, pareto=swept)
    sections = replace(decided.decisions, formats=formats, tiers=tier_section(placed))
    return replace(decided, tables=plans, certificate=_certificate(placed), decisions=sections)


def _solved(
    program: Program, calibration: Calibration, known: Known | None, budget: Budget
) -> tuple[Resolved | None, Placed]:
    """The joint solution, and what the request for formats came to."""
    request = program.options.constraints.formats

    def placed_from(asked: Program) -> Placed:
        found = place_warm(asked, calibration, known) if known is not None else None
        return found if found is not None else place(asked, calibration, budget)

    if request is None:
        return None, placed_from(program)
    check(program)
    if request.max_step is not None and request.objective != "step":
        if known is not None:
            known.unused.append(f"formats of least {request.objective} are looked for")
        kept = least_within_step(program, calibration, request, budget)
        resolved = Resolved(kept.request, kept.value, kept.lower_bound)
        return resolved, Placed(with_request(program, kept.request), kept.problem, kept.joint, kept.bound)
    resolved = resolve(program, calibration)
    placed = placed_from(with_request(program, resolved.request))
    if request.objective == "step":
        placed = replace(placed, bound=untied(placed.program, calibration, request, placed.bound))
    if request.max_step is not None and placed.joint.step > request.max_step:
        raise too_slow(request, "formats reach" if placed.bound > request.max_step else "placed plan reaches")
    return resolved, placed


def _tables(program: Program, problem: JointProblem, joint: Joint) -> tuple[TablePlan, ...]:
    made = []
    wanted = program.options.constraints
    for t, table in enumerate(program.model.tables):
        chosen = problem.meaning(joint, t)
        plan = table_plan(program, table, chosen.priced, joint.solution.placement[t])
        made.append(
            replace(
                plan,
                format=chosen.format if wanted.formats is not None else None,
                state_format=chosen.state if chosen.state != "fp32" else None,
                tiers=_with_reason(problem, joint, chosen.tiers),
            )
        )
    return explain_tables(tuple(made), joint.problem, joint.solution)


def _with_reason(problem: JointProblem, joint: Joint, tiers: TableTiers | None) -> TableTiers | None:
    """Why rows left the device: the prices that pushed them out."""
    if tiers is None:
        return None
    duals = joint.relaxed.duals
    words = []
    if duals.memory > 0:
        kept = 1e9 * (1 - problem.program.options.constraints.memory_reserve)
        words.append(
            f"one more GB of the device's memory would save up to {duals.memory * kept * 1e6:.3g} us of the step"
        )
    for row, price in zip(problem.resources, duals.extra, strict=True):
        if price > 0 and row.stretched:
            words.append(f"{row.tier} {row.kind} binds")
    return replace(tiers, reason="; ".join(words) or "the whole table does not fit beside the others")


def _certificate(placed: Placed) -> Certificate:
    step = placed.joint.step
    bound = min(placed.bound, step)
    return Certificate(
        objective_name=OBJECTIVE,
        objective=step,
        lower_bound=bound,
        status="optimal" if step - bound <= 1e-6 * step else "feasible",
        bound_method=placed.joint.solution.bound_method,
    )
