"""A known placement, or known options on other ranks, as a solution to start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from passes.assignment.compiled import Compiled
from passes.assignment.insertion import State, insert, peak_price
from passes.assignment.problem import Floats, Problem, evaluate, evaluate_extra
from passes.assignment.relaxation import relax
from passes.assignment.starts import threshold_choice
from passes.assignment.target_search import Incumbent

Start = tuple[Sequence[int | None], Sequence[Sequence[int]] | None]
"""Option index of each table, None for one without; and the places of its pieces, as in ``Solution``, None where the
ranks are others than those that are known."""


def incumbent_of(compiled: Compiled, start: Start, seed: int = 0) -> Incumbent:
    """The start as an incumbent: tables without an option take the one that is cheapest beside the others.

    An incumbent without a choice when the start does not fit, or a table cannot be put in.
    """
    problem = compiled.problem
    if start[1] is None:
        return _placed(compiled, start[0], seed)
    choice, placement = list(start[0]), [list(places) for places in start[1]]
    loads = np.zeros((problem.ranks, len(problem.phases)))
    state = State(problem, loads, np.zeros(problem.ranks))
    for t, j in enumerate(choice):
        if j is not None:
            _put(compiled, state, t, j, placement[t])
    for t, j in enumerate(choice):
        if j is None:
            found = _cheapest(compiled, state, t)
            if found is None:
                return Incumbent()
            choice[t], placement[t] = found
            _put(compiled, state, t, found[0], found[1])
    return _within(problem, [j for j in choice if j is not None], placement)


def thresholds_placed(compiled: Compiled, seed: int) -> Incumbent:
    """The first legal placement of the choice at phase thresholds; an incumbent without a choice where there is none."""
    from passes.assignment.by_phase import placements  # OR-Tools takes a second to load

    choice = threshold_choice(compiled)
    for places in placements(compiled, choice, seed) if choice is not None else ():
        found = _within(compiled.problem, choice or [], places)
        if found.choice:
            return found
    return Incumbent()


def _within(problem: Problem, chosen: list[int], placement: list[list[int]]) -> Incumbent:
    """The solution as an incumbent; one without a choice where a limit is exceeded."""
    spots = tuple(tuple(places) for places in placement)
    loads, memory = evaluate(problem, chosen, spots)
    extra, spent = evaluate_extra(problem, tuple(chosen), spots)
    within = float(memory.max()) <= problem.capacity and all(
        a <= b for a, b in zip(spent, problem.budgets, strict=True)
    )
    if not within or (problem.limits and (extra > np.asarray(problem.limits)).any()):
        return Incumbent()
    value = float(loads.max(axis=0).sum())
    return Incumbent(value, float(loads.sum(axis=1).max()), chosen, placement)


def _placed(compiled: Compiled, known: Sequence[int | None], seed: int) -> Incumbent:
    """The known options, others where the relaxation has them, placed anew."""
    from passes.assignment.by_phase import placements  # OR-Tools takes a second to load

    relaxed = relax(compiled, compiled.usable).choice - compiled.start[:-1]
    choice = [int(relaxed[t]) if j is None else j for t, j in enumerate(known)]
    if not compiled.usable[compiled.start[:-1] + np.asarray(choice)].all():
        return Incumbent()
    found = [_within(compiled.problem, choice, places) for places in placements(compiled, choice, seed)]
    return min(found, key=lambda one: one.value, default=Incumbent())


def _put(compiled: Compiled, state: State, t: int, j: int, places: list[int]) -> None:
    choice = compiled.choices[t][j]
    state.loads += _everywhere(compiled, t, j)
    state.add_everywhere(choice)
    state.add(choice, places)


def _everywhere(compiled: Compiled, t: int, j: int) -> Floats:
    fixed: Floats = compiled.everywhere[int(compiled.start[t]) + j]
    return fixed


def _cheapest(compiled: Compiled, state: State, t: int) -> tuple[int, list[int]] | None:
    """The usable option and places that raise the objective least."""
    best: tuple[float, int, list[int]] | None = None
    for j, choice in enumerate(compiled.choices[t]):
        if not compiled.usable[int(compiled.start[t]) + j]:
            continue
        trial = state.copy()
        trial.loads += _everywhere(compiled, t, j)
        trial.add_everywhere(choice)
        places = insert(trial, choice, peak_price)
        if places is None:
            continue
        trial.add(choice, places)
        value = float(trial.loads.max(axis=0).sum())
        if best is None or value < best[0]:
            best = value, j, places
    return None if best is None else (best[1], best[2])
