"""What a table's other options would do to the objective, everything else where it is."""

from __future__ import annotations

import numpy as np

from passes.assignment.compiled import Choice, compile_option
from passes.assignment.insertion import State, insert, peak_price
from passes.assignment.problem import Floats, Option, Problem, Solution


def alternatives(problem: Problem, solution: Solution, table: int) -> tuple[float | None, ...]:
    """For each option of one table, the objective if the table took it and was placed best.

    All other tables stay. Exact for the option in the plan and for options with one piece; the pieces
    of other options are placed cheapest first. None means that the option does not fit.

    Returns:
        Seconds by option index.
    """
    phases = len(problem.phases)
    extra = solution.extra.copy() if problem.limits else None
    state = State(problem, solution.loads.copy(), solution.memory.copy(), extra)
    chosen = solution.choice[table]
    current = problem.options[table][chosen]
    placed = _compiled(problem, current)
    state.add(placed, solution.placement[table], -1.0)
    state.add_everywhere(placed, -1.0)
    state.loads -= np.asarray(_fixed(current, phases))
    left = np.asarray(problem.budgets) * (1 + 1e-9) - solution.spent + np.asarray(placed.cost)
    made: list[float | None] = []
    for j, option in enumerate(problem.options[table]):
        made.append(solution.objective if j == chosen else _objective(problem, state, option, left))
    return tuple(made)


def _compiled(problem: Problem, option: Option) -> Choice:
    return compile_option(
        option, len(problem.phases), limits=len(problem.limits), budgets=len(problem.budgets)
    )


def _fixed(option: Option, phases: int) -> list[float]:
    pieces = [piece for piece in option.pieces if piece.scope == "all"]
    return [sum(piece.load[k] * piece.count for piece in pieces) for k in range(phases)]


def _objective(problem: Problem, state: State, option: Option, left: Floats) -> float | None:
    choice = _compiled(problem, option)
    if (np.asarray(choice.cost) > left).any():
        return None  # a budget would be exceeded
    trial = state.copy()
    trial.loads += np.asarray(_fixed(option, len(problem.phases)))
    trial.add_everywhere(choice)
    if not trial.fits(1e-9):
        return None
    places = insert(trial, choice, peak_price)
    if places is None:
        return None
    trial.add(choice, places)
    return float(np.max(trial.loads, axis=0).sum())
