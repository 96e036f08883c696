"""Place a choice of options so that every rank stays within a target load in each phase.

Hosts are filled one after the other by what loads all of their ranks, up to a share of the target: whole
hosts then remain for single pieces, and rooms that hold only so many equal pieces are not cut up. The rest
goes, largest first, where it exceeds the targets least and, among those, where the loads stay most even.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from passes.assignment.budget import Budget
from passes.assignment.compiled import HOST, Choice, Compiled, Group
from passes.assignment.insertion import Price, State, insert
from passes.assignment.problem import Floats, Problem

EXCEED = 1e3  # weight of a relative excess over the target beside the evenness of the loads
INSERT_WORK = 70e-6  # seconds a table placed, measured on one core of the development machine
CELL_WORK = 1.5e-8  # seconds a rank and phase of a table placed, measured likewise


class _Price:
    """Prices of places for :func:`passes.assignment.insertion.insert`."""

    def __init__(self, targets: Floats, fill: float, spread: Floats) -> None:
        self.targets, self.fill, self.spread = targets, fill, spread

    def __call__(self, state: State, group: Group, levels: int) -> Floats:
        loads = state.loads / self.targets
        if group.scope == HOST:
            loads = loads.reshape(state.problem.hosts, state.problem.host_size, -1).max(axis=1)
        step = np.asarray(group.phases) / self.targets
        after = loads[None] + np.arange(1, levels + 1)[:, None, None] * step[None, None]
        price: Floats
        if group.scope == HOST:
            high = after.max(axis=2)
            price = np.where(high <= self.fill, np.arange(after.shape[1])[None] * 1e-6, 1.0 + high)
            return price
        excess = np.maximum(after - 1.0, 0.0) - np.maximum(loads - 1.0, 0.0)
        price = EXCEED * excess.sum(axis=2) + ((after**2 - loads**2) * self.spread).sum(axis=2)
        return price


def fit(
    compiled: Compiled, choices: list[int], targets: Floats, fill: float, budget: Budget
) -> list[list[int]] | None:
    """Places of all pieces; None when one fits nowhere. ``targets`` (K,) are seconds of placed pieces."""
    chosen = [compiled.choices[t][j] for t, j in enumerate(choices)]
    targets = np.maximum(targets, 1e-300)
    spread = _spread(chosen, len(targets))
    sizes = np.array([_size(choice, spread / targets, compiled.problem.capacity) for choice in chosen])
    price = _Price(targets, fill, spread)
    return insert_all(compiled.problem, chosen, np.argsort(-sizes, kind="stable"), lambda _: price, budget)


def insert_all(
    problem: Problem,
    chosen: list[Choice],
    order: NDArray[np.int64],
    price: Callable[[int], Price],
    budget: Budget,
) -> list[list[int]] | None:
    """Places of the chosen options of all tables, one after the other; None when one fits nowhere.

    Args:
        problem: the machine.
        chosen: option of each table.
        order: of the tables.
        price: of places, for a table.
        budget: pays for the work.
    """
    state = State(problem, np.zeros((problem.ranks, len(problem.phases))), np.zeros(problem.ranks))
    for choice in chosen:
        state.add_everywhere(choice)
    if not state.fits():
        return None
    places: list[list[int]] = [[-1] * choice.size for choice in chosen]
    for t in order:
        choice = chosen[t]._replace(fixed_memory=0.0, fixed_extra=())  # on the state already
        if not choice.groups:
            continue
        budget.spend(INSERT_WORK + CELL_WORK * state.loads.size)
        found = insert(state, choice, price(int(t)))
        if found is None:
            return None
        places[t] = found
        state.add(choice, found)
    return places


def _size(choice: Choice, weights: Floats, capacity: float) -> float:
    """What decides the order: hosts first, then the largest share of a target or of the memory."""
    largest = 0.0
    for group in choice.groups:
        size = max(float((np.asarray(group.phases) * weights).max()), group.memory / capacity)
        largest = max(largest, size + (1e3 if group.scope == HOST else 0.0))
    return largest


def _spread(chosen: list[Choice], phases: int) -> Floats:
    """How unequal the pieces on ranks are in each phase, at most 1: equal ones need counting, not levelling."""
    groups = [group for choice in chosen for group in choice.groups]
    some = [group for group in groups if group.scope != HOST] or groups
    if not some:
        return np.zeros(phases)  # everything is on all ranks
    loads = np.array([group.phases for group in some])
    count = np.array([float(group.copies) for group in some])
    mean = np.average(loads, axis=0, weights=count)
    deviation = np.sqrt(np.average((loads - mean) ** 2, axis=0, weights=count))
    spread: Floats = np.minimum(deviation / np.where(mean > 0, mean, 1.0), 1.0)
    return spread
