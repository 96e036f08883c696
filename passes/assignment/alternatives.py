"""What a table's other options would do to the objective, everything else where it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passes.assignment.compiled import HOST, Choice, compile_option
from passes.assignment.insertion import State, insert, peak_price
from passes.assignment.problem import Floats, Option, Problem, Solution


def alternatives(problem: Problem, solution: Solution, table: int) -> tuple[float | None, ...]:
    """For each option of one table, the objective if the table took it and was placed best.

    All other tables stay. Exact for the option in the plan and for options with one piece; the pieces
    of other options are placed cheapest first. None means that the option does not fit.

    Returns:
        Seconds by option index.
    """
    state, left = _without(problem, solution, table)
    chosen = solution.choice[table]
    made: list[float | None] = []
    for j, option in enumerate(problem.options[table]):
        made.append(solution.objective if j == chosen else _objective(problem, state, option, left))
    return tuple(made)


def runner_up(
    problem: Problem, solution: Solution, table: int, spent: Sequence[float], tie: float
) -> tuple[int, float] | None:
    """The best other option of a table and the objective with it, as :func:`alternatives` has it.

    Options are placed in the order of what they cost at least, until none left can be better: with thousands of
    tables nearly all of them have room off the slowest ranks, and one placement settles them.

    Args:
        problem: what was assigned.
        solution: where everything is.
        table: the table whose other options are looked at.
        spent: of each option, what decides between options of equal objective.
        tie: seconds below which a longer objective is an equal one.

    Returns:
        Option index and seconds; None where no other option fits.
    """
    state, left = _without(problem, solution, table)
    peaks = state.loads.max(axis=0)
    hosts = state.loads.reshape(problem.hosts, problem.host_size, -1).max(axis=1)
    options = problem.options[table]

    def rank(objective: float, j: int) -> tuple[float, float]:
        longer = objective - solution.objective
        return (longer if longer > tie else 0.0), spent[j]

    floors = {
        j: rank(_floor(option, peaks, {"rank": state.loads, "host": hosts}), j)
        for j, option in enumerate(options)
        if j != solution.choice[table]
    }
    best: tuple[tuple[float, float], int, float] | None = None
    for j in sorted(floors, key=lambda j: (floors[j], j)):
        if best is not None and floors[j] >= best[0]:
            break
        objective = _objective(problem, state, options[j], left, peaks)
        if objective is not None and (best is None or rank(objective, j) < best[0]):
            best = rank(objective, j), j, objective
    return None if best is None else (best[1], best[2])


def _floor(option: Option, peaks: Floats, loads: dict[str, Floats]) -> float:
    """Seconds that the objective has at least with the option: each piece stands on some place (places, K)."""
    least = float(peaks.sum())
    for piece in option.pieces:
        if piece.scope != "all":
            grown = np.maximum(loads[piece.scope] + np.asarray(piece.load), peaks) @ np.ones(len(peaks))
            least = max(least, float(grown.min()))
    return least + float(sum(_fixed(option, len(peaks))))


def _without(problem: Problem, solution: Solution, table: int) -> tuple[State, Floats]:
    """The machine without one table, and what is then left of each budget."""
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
    return state, left


def _compiled(problem: Problem, option: Option) -> Choice:
    return compile_option(
        option, len(problem.phases), limits=len(problem.limits), budgets=len(problem.budgets)
    )


def _fixed(option: Option, phases: int) -> list[float]:
    pieces = [piece for piece in option.pieces if piece.scope == "all"]
    return [sum(piece.load[k] * piece.count for piece in pieces) for k in range(phases)]


def _objective(
    problem: Problem, state: State, option: Option, left: Floats, peaks: Floats | None = None
) -> float | None:
    """Seconds with the option placed best; ``peaks`` (K,) of the state spare the search where nothing grows."""
    choice = _compiled(problem, option)
    if (np.asarray(choice.cost) > left).any():
        return None  # a budget would be exceeded
    if peaks is not None and _has_room(problem, state, choice, peaks):
        return float((peaks + np.asarray(_fixed(option, len(peaks)))).sum())
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


def _has_room(problem: Problem, state: State, choice: Choice, peaks: Floats) -> bool:
    """Whether enough places take a piece of the option below the peaks; only of options with equal, free pieces."""
    if not choice.plain or len(choice.groups) != 1 or state.extra is not None:
        return False
    group = choice.groups[0]
    free = (state.loads <= peaks - np.asarray(group.phases)).all(axis=1)
    free &= state.memory <= problem.capacity - choice.fixed_memory - group.memory
    if choice.fixed_memory and float(state.memory.max()) + choice.fixed_memory > problem.capacity:
        return False
    if group.scope == HOST:
        free = free.reshape(problem.hosts, problem.host_size).all(axis=1)
    return int(np.count_nonzero(free)) >= group.copies
