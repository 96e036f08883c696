"""Formats alone as a multiple-choice knapsack: least loss or fewest bytes within budgets.

    minimise sum_o objective[o] x_o   subject to  one option a member, sums within the budgets

Members are tensors (or groups that agree). OR-Tools: GLOP for the bound and the prices, SCIP for the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ortools.linear_solver import pywraplp

from ir.errors import InfeasibleError

RESCALINGS = 6  # solves with the objective scaled to the last solution


@dataclass(frozen=True, slots=True)
class KnapsackOption:
    """One choice of a member: what it adds to the objective and to each budget."""

    objective: float
    cost: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Knapsack:
    """The best choice: option index of each member, its value, a proved bound, prices of the budgets."""

    choice: tuple[int, ...]
    value: float
    bound: float
    prices: tuple[float, ...]


def solve_knapsack(members: Sequence[Sequence[KnapsackOption]], budgets: Sequence[float]) -> Knapsack:
    """Solve to optimality.

    Raises:
        InfeasibleError: the least costs together exceed a budget.
    """
    relaxed = _program(members, budgets, "GLOP")
    prices = (0.0,) * len(budgets)
    if relaxed[0].Solve() == pywraplp.Solver.OPTIMAL:
        prices = tuple(
            max(0.0, -row.dual_value()) * relaxed[3] / max(b, 1e-300)
            for row, b in zip(relaxed[2], budgets, strict=True)
        )
    choice, value, bound = _whole(members, budgets)
    for _ in range(RESCALINGS):
        # an option dearer than the whole solution is in no better one; without it the solver sees more digits
        kept = [
            [i for i, o in enumerate(options) if o.objective <= value * (1 + 1e-9)] for options in members
        ]
        fewer = [[options[i] for i in keep] for options, keep in zip(members, kept, strict=True)]
        again, better, bound = _whole(fewer, budgets)
        settled = better >= value * (1 - 1e-9)
        if better <= value:
            choice, value = [keep[i] for keep, i in zip(kept, again, strict=True)], better
        if settled:
            break
    return Knapsack(tuple(choice), value, min(value, bound), prices)


def _whole(
    members: Sequence[Sequence[KnapsackOption]], budgets: Sequence[float]
) -> tuple[list[int], float, float]:
    """(choice, value, bound) of the whole-number program; raises InfeasibleError."""
    solver, x, _, scale = _program(members, budgets, "SCIP")
    solver.SetSolverSpecificParametersAsString("limits/gap = 1e-9\nlimits/nodes = 100000\n")
    if solver.Solve() not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE):
        raise InfeasibleError(
            "no choice of formats keeps every budget; raise a budget or allow other formats",
            conflict=("formats.max_loss", "formats.average_bits", "formats.max_bytes"),
            relaxation="a larger budget",
        )
    values = [[float(variable.solution_value()) for variable in row] for row in x]
    choice = [row.index(max(row)) for row in values]
    value = sum(options[i].objective for options, i in zip(members, choice, strict=True))
    return choice, value, float(solver.Objective().BestBound()) * scale


def _program(
    members: Sequence[Sequence[KnapsackOption]], budgets: Sequence[float], name: str
) -> tuple[pywraplp.Solver, list[list[pywraplp.Variable]], list[pywraplp.Constraint], float]:
    solver = pywraplp.Solver.CreateSolver(name)
    scale = max((option.objective for options in members for option in options), default=0.0) or 1.0
    make = solver.NumVar if name == "GLOP" else solver.IntVar
    x = [[make(0.0, 1.0, "") for _ in options] for options in members]
    rows = [solver.Constraint(-solver.infinity(), 1.0 if b > 0 else 0.0) for b in budgets]
    objective = solver.Objective()
    for options, row in zip(members, x, strict=True):
        one = solver.Constraint(1.0, 1.0)
        for option, variable in zip(options, row, strict=True):
            one.SetCoefficient(variable, 1.0)
            objective.SetCoefficient(variable, option.objective / scale)
            for limit, budget, cost in zip(rows, budgets, option.cost, strict=True):
                limit.SetCoefficient(variable, cost / max(budget, 1e-300))
    objective.SetMinimization()
    return solver, x, rows, scale
