"""Sharding, formats and tiers from a plan that is there: its decisions priced anew, and polished.

The relaxation is solved as always, so the bound is that of planning anew; it takes a few per cent of the work. What is left
out is the search for choices to start from: here that is what the plan has. Where its tables still fit where they lie, what
comes out is no worse than leaving all of it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cost_models.calibration import Calibration
from cost_models.placed import option_of
from ir.format_plan import FormatPlan
from ir.plan import TablePlan
from ir.program import Program
from ir.topology import Topology
from passes.assignment import Option, Problem
from passes.assignment.budget import Budget
from passes.assignment.column_generation import Relaxation, fits_alone
from passes.assignment.compiled import compile_problem
from passes.assignment.joint import Joint, portion
from passes.assignment.master import Master
from passes.assignment.polish import Polisher
from passes.assignment.problem import evaluate, evaluate_extra
from passes.assignment.solve import finish
from passes.assignment.target_search import Incumbent
from passes.forced_sharding import places_of
from passes.joint import JointProblem, relax_all
from passes.joint_menus import TableClass
from passes.joint_search import (
    FEW_TABLES,
    KEPT,
    KEPT_FEW,
    POLISH_A_TABLE,
    POLISH_LEAST,
    POLISH_MOST,
    polish_rounds,
    scarcity_prices,
)
from passes.search_share import search_limit
from passes.tiers import Placed, step_limit

METHOD = "master program over priced columns (GLOP)"
ROUNDS = 2  # of polishing that there is work for: a start from a plan has little to gain


@dataclass(frozen=True, slots=True)
class Known:
    """The decisions of a plan.

    Attributes:
        tables: where they lie, in which formats and tiers.
        formats: of the dense tensors.
        same_ranks: places hold on the program's machine.
        unused: takes why the decisions did not carry over, where they did not.
    """

    tables: tuple[TablePlan, ...]
    formats: FormatPlan | None = None
    same_ranks: bool = True
    unused: list[str] = field(default_factory=list)


def place_warm(program: Program, calibration: Calibration, known: Known) -> Placed | None:
    """A solution from what is known; None where it does not carry over, which is noted in it."""
    constraints = program.options.constraints
    tiers, formats = constraints.tiers, constraints.formats
    if tiers is not None and tiers.objective != "step":
        known.unused.append("the number of hosts is looked for")
        return None
    stated, _ = relax_all(program, calibration, step=step_limit(program))
    for problem, relaxed in stated:
        if problem.program.workload.exchange_dtype == program.workload.exchange_dtype:
            joint = _joint(program, problem, relaxed, known)
            most = (
                formats.max_step
                if formats is not None and formats.max_step is not None
                else problem.frame.step
            )
            if joint is not None and (most is None or joint.step <= most):
                return Placed(problem.program, problem, joint, min(stated[0][1].bound, joint.step))
    known.unused.append("its formats, tiers or shardings do not fit what is asked now")
    return None


def _joint(program: Program, problem: JointProblem, relaxed: Relaxation, known: Known) -> Joint | None:
    picks = _picks(problem, known)
    if picks is None:
        return None
    stated = _problem(problem, relaxed, picks)
    choice = [row.index(pick) for row, pick in zip(stated.options, picks, strict=True)]
    options, frame = program.options, problem.frame
    best = Incumbent()
    if known.same_ranks:
        best = _where_they_lie(stated, picks, choice, known.tables, program.topology)
    step = relaxed.bound if frame.step is None else frame.step
    if best.choice:  # stretched resources may be as busy as they would be
        step = max(step, frame.base + best.value, _busy(problem, stated, best))
    limits = tuple(step if s else limit for limit, s in zip(frame.limits, frame.stretched, strict=True))
    stated = replace(stated, limits=limits)
    compiled = compile_problem(stated)
    bound, priced = max(relaxed.bound - frame.base, 1e-12), scarcity_prices(compiled, relaxed.duals)
    each = max(POLISH_LEAST, min(POLISH_MOST, POLISH_A_TABLE * compiled.tables))
    budget = Budget(min(search_limit(program), 2 * ROUNDS * each))
    if not best.choice:
        best, first = Incumbent(choice=choice), portion(budget, 0.5)
        Polisher(compiled, bound, first, options.seed, priced).run(best, 0.0)
        if not best.placement:
            return None
        budget.spend(first.work)
    last = portion(budget, 1.0, ROUNDS * each)
    polish_rounds(compiled, best, bound, priced, last, options.seed)
    solution = finish(stated, best, min(bound, best.value), METHOD, budget.work + last.work)
    extra, spent = evaluate_extra(stated, solution.choice, solution.placement)
    solution = replace(solution, extra=extra, spent=spent)
    step = max(frame.base + solution.objective, _busy(problem, stated, best))
    return Joint(stated, solution, step, relaxed, tuple(choice))


def _picks(problem: JointProblem, known: Known) -> list[Option] | None:
    """The options that the plan has; None where one is not offered any more."""
    plans = {table.name: table for table in known.tables}
    picks: list[Option | None] = [None] * len(problem.frame.names)
    for made in problem.classes:
        for t in made.members:
            plan = plans.get(problem.frame.names[t])
            picks[t] = None if plan is None else _option(problem, made, plan)
    first = len(problem.program.model.tables)
    for i, member in enumerate(problem.members):
        for option, meaning in zip(member.options, member.meaning, strict=True):
            formats = [(tensor.name, tensor.format) for tensor in meaning.tensors]
            if known.formats is not None and all(known.formats.format_of(n) == f for n, f in formats):
                picks[first + i] = option
    found = [pick for pick in picks if pick is not None]
    return found if len(found) == len(picks) else None


def _option(problem: JointProblem, made: TableClass, plan: TablePlan) -> Option | None:
    """A table's sharding, formats and tiers in the terms of its class."""
    wanted = option_of(plan)
    split = None if plan.tiers is None else replace(plan.tiers, reason="")
    for base in made.bases:
        format, state = plan.format or made.table.dtype, plan.state_format or "fp32"
        if (base.option, base.format, base.state) == (wanted, format, state):
            if split is not None and (problem.maker.tiers is None or made.touched is None):
                return None
            option: Option = problem.maker.add(made, base, split)
            return option if fits_alone(option, problem.frame) else None
    return None


def _problem(problem: JointProblem, relaxed: Relaxation, picks: Sequence[Option]) -> Problem:
    """What polishing chooses from: for each table the options of least reduced cost, and its own."""
    frame = problem.frame
    most = KEPT_FEW if len(frame.names) <= FEW_TABLES else KEPT
    ranked: list[list[tuple[float, int]]] = [[] for _ in problem.menus]
    for column, value, (c, o) in zip(relaxed.columns, relaxed.values, relaxed.index, strict=True):
        if fits_alone(problem.menus[c].options[o], frame):
            ranked[c].append((-1.0 if value > 1e-9 else Master.reduced(column, relaxed.duals), o))
    rows: list[tuple[Option, ...]] = [()] * len(frame.names)
    made: dict[tuple[int, Option], tuple[Option, ...]] = {}
    for c, menu in enumerate(problem.menus):
        kept = tuple(menu.options[o] for _, o in sorted(ranked[c])[:most])
        for t in menu.tables:
            own = picks[t]
            rows[t] = made.setdefault((c, own), kept if own in kept else (*kept, own))
    return Problem(
        frame.names,
        tuple(rows),
        frame.hosts,
        frame.host_size,
        frame.capacity,
        frame.phases,
        frame.limits,
        frame.budgets,
    )


def _where_they_lie(
    stated: Problem,
    picks: Sequence[Option],
    choice: list[int],
    known: Sequence[TablePlan],
    topology: Topology,
) -> Incumbent:
    """The plan's own places, those of dense tensors on every rank; without a choice where it does not fit."""
    plans = {table.name: table for table in known}
    placement = []
    for name, pick in zip(stated.names, picks, strict=True):
        every = [-1] * sum(piece.count for piece in pick.pieces)
        placement.append(places_of(plans[name], topology) if name in plans else every)
    spots = tuple(tuple(places) for places in placement)
    loads, memory = evaluate(stated, choice, spots)
    _, spent = evaluate_extra(stated, tuple(choice), spots)
    if memory.max() > stated.capacity or any(a > b for a, b in zip(spent, stated.budgets, strict=True)):
        return Incumbent()
    return Incumbent(float(loads.max(axis=0).sum()), float(loads.sum(axis=1).max()), choice, placement)


def _busy(problem: JointProblem, stated: Problem, best: Incumbent) -> float:
    """Seconds for which the busiest stretched resource is busy."""
    extra, _ = evaluate_extra(stated, tuple(best.choice), tuple(tuple(p) for p in best.placement))
    used = [float(np.max(extra[:, e])) for e, s in enumerate(problem.frame.stretched) if s]
    return max(used, default=0.0)
