"""Formats alone, with every table where it lies: the least loss (or fewest bytes) that keeps a step limit.

A plan of the least step within a budget leaves slack: ranks that no phase waits for, and phases on ranks that are not the
slowest. Here shardings and places are held, and formats are chosen anew by a mixed-integer program:

    minimise    sum_o cost[o] x_o                            one option a table or dense member
    subject to  sum_o load[o, r, p] x_o <= M_p               every rank r and phase p
                base + sum_p M_p <= the limit on the step
                bytes of every rank within its capacity, every other budget kept

OR-Tools: SCIP, with a limit on nodes, so that the result does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from ortools.linear_solver import pywraplp

from passes.assignment import Option
from passes.assignment.joint import Joint
from passes.assignment.problem import Floats, evaluate
from passes.assignment.solve import finish
from passes.assignment.target_search import Incumbent
from passes.joint import JointProblem

NODES = 300  # of the branch-and-bound tree
MOST_CELLS = 300_000  # loads of options on ranks, by phase: larger programs take minutes and are left alone
GAP = 1e-3  # relative, of the value
MARGIN = 1e-9  # relative: rounding of the solver, left off every limit


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """One option of a table where the table lies."""

    option: Option
    loads: Floats  # (ranks, phases), seconds
    memory: Floats  # (ranks,), bytes


def least_in_place(problem: JointProblem, joint: Joint, budget: str, limit: float) -> Joint | None:
    """``joint`` with the formats of least ``budget`` whose step keeps ``limit``; None where none is found or none is less.

    Args:
        problem: the problem that ``joint`` solves.
        joint: its step may be longer than the limit.
        budget: of the problem's, what is minimised.
        limit: seconds of a step.
    """
    if problem.frame.limits or joint.solution.extra.any():
        return None
    solution = joint.solution
    picks = [row[j] for row, j in zip(joint.problem.options, solution.choice, strict=True)]
    rows = [
        [_placed(joint, t, option) for option in _alike(problem, joint, t, pick)]
        for t, pick in enumerate(picks)
    ]
    at = problem.budgets.index(budget)
    if sum(np.count_nonzero(one.loads) for row in rows for one in row) > MOST_CELLS:
        return None
    found = _solve(problem, joint, rows, at, limit)
    if found is None:
        return None
    made = _joint(problem, joint, [row[j].option for row, j in zip(rows, found, strict=True)])
    before, after = joint.solution.spent[at], made.solution.spent[at]
    better = after < before or (joint.step > limit >= made.step)
    return made if better and made.step <= limit else None


def _alike(problem: JointProblem, joint: Joint, t: int, pick: Option) -> list[Option]:
    """Options of a table in the same sharding, or all of a dense member; the chosen one first."""
    c = next(i for i, menu in enumerate(problem.menus) if t in menu.tables)
    others = problem.menus[c].options
    if c < len(problem.classes):
        meaning = problem.classes[c].meaning
        sharding, shape = meaning[pick].priced.option, _shape(pick)
        others = [
            o for o in others if meaning[o].priced.option == sharding and _shape(o) == shape and _bare(o)
        ]
    return [pick, *(option for option in others if option != pick)]


def _shape(option: Option) -> tuple[tuple[str, int], ...]:
    return tuple((piece.scope, piece.count) for piece in option.pieces)


def _bare(option: Option) -> bool:
    return not any(any(piece.extra) for piece in option.pieces)


def _placed(joint: Joint, t: int, option: Option) -> _Place:
    alone = replace(joint.problem, options=((option,),))
    return _Place(option, *evaluate(alone, (0,), (joint.solution.placement[t],)))


def _solve(
    problem: JointProblem, joint: Joint, rows: Sequence[Sequence[_Place]], at: int, limit: float
) -> list[int] | None:
    """The position of each choice in its row."""
    solver = pywraplp.Solver.CreateSolver("SCIP")
    solver.SetSolverSpecificParametersAsString(f"limits/gap = {GAP}\nlimits/nodes = {NODES}\n")
    frame, ranks = problem.frame, joint.problem.ranks
    unit = max(limit - frame.base, 1e-12)  # seconds; phases together may last that long
    worth = max(joint.solution.spent[at], 1e-300)  # the objective is a fraction of what is spent now
    x = [[solver.IntVar(0.0, 1.0, "") for _ in row] for row in rows]
    longest = [solver.NumVar(0.0, solver.infinity(), "") for _ in frame.phases]
    for row in x:
        solver.Add(solver.Sum(row) == 1)
    solver.Add(solver.Sum(longest) <= 1.0 - MARGIN)
    chosen = [
        (variable, one)
        for row, places in zip(x, rows, strict=True)
        for variable, one in zip(row, places, strict=True)
    ]
    for rank in range(ranks):
        for phase, most in enumerate(longest):
            held = [(v, one.loads[rank, phase] / unit) for v, one in chosen if one.loads[rank, phase] > 0]
            solver.Add(solver.Sum([seconds * v for v, seconds in held]) <= most)
        bytes_ = [(v, one.memory[rank] / frame.capacity) for v, one in chosen if one.memory[rank] > 0]
        solver.Add(solver.Sum([size * v for v, size in bytes_]) <= 1.0 - MARGIN)
    for number in range(len(problem.budgets)):
        if number != at:
            spent = [one.option.cost[number] * v for v, one in chosen]
            solver.Add(solver.Sum(spent) <= 1.0 - MARGIN)
    value = solver.Sum([one.option.cost[at] / worth * v for v, one in chosen])
    solver.Add(value <= (1.0 if joint.step <= limit else max(1.0, 1.0 / worth)))
    solver.Minimize(value)
    if solver.Solve() not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
        return None
    values = [[float(v.solution_value()) for v in row] for row in x]
    return [row.index(max(row)) for row in values]


def _joint(problem: JointProblem, joint: Joint, picks: Sequence[Option]) -> Joint:
    """The formats found, where ``joint`` has its tables; its other options stay known."""
    before = joint.solution
    rows = zip(joint.problem.options, picks, strict=True)
    options = tuple(row if pick in row else (*row, pick) for row, pick in rows)
    choice = [row.index(pick) for row, pick in zip(options, picks, strict=True)]
    best = Incumbent(choice=choice, placement=[list(places) for places in before.placement])
    known = replace(joint.problem, options=options)
    found = finish(known, best, before.lower_bound, before.bound_method, before.work)
    spent = tuple(float(total) for total in np.sum([pick.cost for pick in picks], axis=0))
    solution = replace(found, extra=before.extra, spent=spent)
    return replace(joint, problem=known, solution=solution, step=problem.frame.base + solution.objective)
