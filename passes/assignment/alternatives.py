"""What a table's other options would do to the objective, everything else where it is."""

from __future__ import annotations

import numpy as np

from passes.assignment.compiled import compile_option
from passes.assignment.insertion import State, insert, peak_price
from passes.assignment.problem import Option, Problem, Solution


def alternatives(problem: Problem, solution: Solution, table: int) -> tuple[float | None, ...]:
    """For each option of one table, the objective if the table took it and was placed best.

    All other tables stay. Exact for the option in the plan and for options with one piece; the pieces
    of other options are placed cheapest first. None means that the option does not fit.

    Returns:
        Seconds by option index.
    """
    phases = len(problem.phases)
    state = State(problem, solution.loads.copy(), solution.memory.copy())
    chosen = solution.choice[table]
    current = problem.options[table][chosen]
    state.add(compile_option(current, phases), solution.placement[table], -1.0)
    state.add_fixed(*_fixed(current, phases), -1.0)
    made: list[float | None] = []
    for j, option in enumerate(problem.options[table]):
        made.append(solution.objective if j == chosen else _objective(problem, state, option))
    return tuple(made)


def _fixed(option: Option, phases: int) -> tuple[list[float], float]:
    pieces = [piece for piece in option.pieces if piece.scope == "all"]
    seconds = [sum(piece.load[k] * piece.count for piece in pieces) for k in range(phases)]
    return seconds, sum(piece.memory * piece.count for piece in pieces)


def _objective(problem: Problem, state: State, option: Option) -> float | None:
    seconds, memory = _fixed(option, len(problem.phases))
    trial = state.copy()
    trial.add_fixed(seconds, memory)
    if trial.memory.max() > problem.capacity * (1 + 1e-9):
        return None
    choice = compile_option(option, len(problem.phases))
    places = insert(trial, choice, peak_price)
    if places is None:
        return None
    trial.add(choice, places)
    return float(np.max(trial.loads, axis=0).sum())
