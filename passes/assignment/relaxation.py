"""A proved lower bound from the averages, and the choices of options that attain it.

Relax the places: a rank carries at least the average load, and some rank carries the largest piece. With
``share[o]`` the load that option ``o`` adds to the average rank, any solution of objective ``z`` or less
uses only options none of whose pieces alone exceeds ``z``, and

    z  >=  min over choices  sum share   subject to   sum mean_memory <= capacity.

The right-hand side is a multiple-choice knapsack; its Lagrangian dual over the memory price ``mu`` equals
its LP relaxation (Geoffrion 1974, Lagrangean relaxation for integer programming). The bound is the
smallest ``z`` at which the inequality holds, found by bisection: below it the inequality is refuted.

With several phases the sum over phases of the largest load is at least the largest sum over phases, so
loads of all phases add up here; the filter on single pieces looks at each phase.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.assignment.compiled import Compiled
from passes.assignment.problem import Floats

Mask = NDArray[np.bool_]
TOLERANCE = 1e-9  # relative width at which the bisection stops
MEMORY_STEPS = 40  # bisection steps on the memory price


@dataclass(frozen=True, slots=True, eq=False)
class Relaxed:
    """The relaxation at one target."""

    value: float  # seconds; infinity when nothing fits
    price: float  # seconds per byte of average memory
    choice: NDArray[np.int64]  # flat option index of each table, memory respected on average if possible


def piece_floor(compiled: Compiled) -> Floats:
    """For each option the objective that its largest piece alone forces, seconds, shape (N,).

    A phase lasts at least as long as the piece and at least as long as the smallest possible average.
    """
    usable = np.where(compiled.usable[:, None], compiled.share, np.inf)
    least = np.minimum.reduceat(usable, compiled.start[:-1], axis=0).sum(axis=0)
    floor: Floats = np.maximum(compiled.biggest, least[None, :]).sum(axis=1)
    return np.maximum(floor, compiled.total_biggest)


def relax(compiled: Compiled, allowed: Mask) -> Relaxed:
    """Solve the dual over the options that ``allowed`` (N,) leaves."""
    cost = np.where(allowed, compiled.total_share, np.inf)
    capacity = compiled.problem.capacity
    base = _pick(compiled, cost)
    if not np.isfinite(cost[base]).all():
        return Relaxed(np.inf, 0.0, base)
    value = float(cost[base].sum())
    if compiled.mean_memory[base].sum() <= capacity:
        return Relaxed(value, 0.0, base)
    lean = _pick(compiled, np.where(allowed, compiled.mean_memory, np.inf))
    if compiled.mean_memory[lean].sum() > capacity * (1 + 1e-12):
        return Relaxed(np.inf, np.inf, lean)
    return _price_memory(compiled, cost, lean)


def _pick(compiled: Compiled, cost: Floats) -> NDArray[np.int64]:
    """Index of the cheapest option of each table, the first on ties."""
    best = np.minimum.reduceat(cost, compiled.start[:-1])
    hit = np.flatnonzero(cost == best[compiled.table])
    tables, first = np.unique(compiled.table[hit], return_index=True)
    picked: NDArray[np.int64] = hit[first]
    assert len(tables) == compiled.tables
    return picked


def _price_memory(compiled: Compiled, cost: Floats, lean: NDArray[np.int64]) -> Relaxed:
    capacity, memory = compiled.problem.capacity, compiled.mean_memory
    low, high = 0.0, max(float(cost[lean].sum()), 1e-12) / capacity
    best, choice, price = -np.inf, lean, 0.0

    def at(mu: float) -> float:
        nonlocal best, choice, price
        picked = _pick(compiled, cost + mu * memory)
        used = float(memory[picked].sum())
        dual = float((cost[picked]).sum()) + mu * (used - capacity)
        if dual > best:
            best, price = dual, mu
        if used <= capacity:
            choice = picked
        return used

    for _ in range(60):
        if at(high) <= capacity:
            break
        low, high = high, high * 4
    for _ in range(MEMORY_STEPS):
        middle = 0.5 * (low + high)
        if at(middle) <= capacity:
            high = middle
        else:
            low = middle
    return Relaxed(best, price, choice)


def average_bound(compiled: Compiled) -> tuple[float, Relaxed]:
    """The bound, seconds, and the relaxation at it.

    Infinity when even the relaxation has no solution (see :mod:`passes.assignment.infeasible`).
    """
    floor = piece_floor(compiled)
    wide = relax(compiled, compiled.usable)
    if not np.isfinite(wide.value):
        return np.inf, wide
    # No solution is below the relaxation without a filter, and every table needs one option.
    smallest = np.minimum.reduceat(np.where(compiled.usable, floor, np.inf), compiled.start[:-1])
    low = max(wide.value, float(smallest.max()))
    here = relax(compiled, compiled.usable & (floor <= low * (1 + 1e-12)))
    if here.value <= low * (1 + 1e-12):
        return low, here
    high = low
    while True:  # an upper end at which the inequality holds
        high = min(max(here.value, high * 1.1), high * 2) if np.isfinite(here.value) else high * 2
        here = relax(compiled, compiled.usable & (floor <= high))
        if here.value <= high:
            break
    while high - low > TOLERANCE * high:
        middle = 0.5 * (low + high)
        at = relax(compiled, compiled.usable & (floor <= middle))
        if at.value <= middle:
            high, here = middle, at
        else:
            low = middle
    return low, here
