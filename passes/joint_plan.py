"""From a joint solution to the program's decisions: tables, certificate and the two sections."""

from __future__ import annotations

from dataclasses import replace

from cost_models.calibration import Calibration
from ir.plan import Certificate, TablePlan
from ir.program import Program
from ir.tier_plan import TableTiers
from passes.assignment.joint import Joint
from passes.format_section import Resolved, format_section
from passes.formats import resolve, sweep
from passes.joint import JointProblem
from passes.reasons import explain_tables
from passes.sharding_plans import table_plan
from passes.tiers import Placed, place, tier_section

OBJECTIVE = (
    "step: embedding time (sum over phases of the slowest rank) and dense time, fetches overlapped, seconds"
)


def decide_jointly(program: Program, calibration: Calibration) -> Program:
    """Decide tables, formats and tiers together; raises InputError or InfeasibleError."""
    constraints = program.options.constraints
    resolved: Resolved | None = None
    solved = program
    if constraints.formats is not None:
        resolved = resolve(program, calibration)
        options = replace(program.options, constraints=replace(constraints, formats=resolved.request))
        solved = replace(program, options=options)
    placed = place(solved, calibration)
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
        pareto = sweep(decided, calibration, constraints.formats)
        named = replace(problem, program=decided)
        formats = format_section(named, joint, placed.bound, resolved, pareto)
    sections = replace(decided.decisions, formats=formats, tiers=tier_section(placed))
    return replace(decided, tables=plans, certificate=_certificate(placed), decisions=sections)


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
        words.append(f"a GB of the device's memory is worth {duals.memory * 1e15:.3g} us of the step")
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
