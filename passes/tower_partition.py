"""Tables to towers: as much interaction as possible within towers that are balanced.

    maximise   sum over towers of sum over pairs i < j of the tower's tables of  gain_ij
    subject to lo <= tables of a tower <= hi,   resource r of a tower <= capacity_r

with gain_ij the interaction strength ("coherent") or, for each pair of features, one minus it ("diverse").
The search is deterministic: descents by shifts and swaps, an exact re-assignment of one table of each tower
(a linear sum assignment, solved by OR-Tools), and restarts from disturbed copies of the best. Problems
with few enough towers to enumerate are then solved exactly (:mod:`passes.tower_columns`), and so are two towers of few
tables (:mod:`passes.tower_halves`); others have the bound of :mod:`passes.tower_bound`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from passes.tower_bound import upper_bound
from passes.tower_columns import countable, exact
from passes.tower_halves import MOST, best_halves

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Work of the search in looks at a pair of tables: about 8 s on one core of 2020. A look at all partners of
# one table costs _CALL more, whatever their number.
_EFFORT = 120_000_000
_CALL = 1500
_MEANING = 1e-12  # gains below this fraction of the total are rounding
_GRID = 1e6  # integer steps of the assignment's costs


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """What is to be partitioned.

    Attributes:
        gain: (n, n) symmetric, not negative, zero diagonal.
        resources: (n, R) of each table, not negative.
        towers: T.
        sizes: fewest and most tables of a tower.
        capacity: (R,) of each tower.
    """

    gain: Floats
    resources: Floats
    towers: int
    sizes: tuple[int, int]
    capacity: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Partitioned:
    """A partition with a proved bound.

    Attributes:
        tower: (n,) of each table.
        value: of the objective.
        bound: no partition into towers of these sizes has more.
        method: what proved it.
    """

    tower: Ints
    value: float
    bound: float
    method: str


def partition_value(gain: Floats, tower: Ints) -> float:
    """The objective of a partition, from its definition."""
    same = tower[:, None] == tower[None, :]
    return float(gain[same].sum() / 2)


def stated(gain: Floats, resources: Floats, towers: int, balance: float) -> tuple[Partition, Ints]:
    """The problem with its limits, and a partition that meets them.

    A tower may exceed the mean of tables and of each resource by the fraction ``balance``, or by as much as
    a greedy packing needs (one huge table makes its tower huge in any partition).
    """
    n = len(gain)
    mean = n / towers
    sizes = (
        max(1, math.floor(mean * (1 - min(balance, 1.0)))),
        max(math.ceil(mean), int(mean * (1 + balance))),
    )
    packed = _greedy(resources, towers, sizes)
    held = _held(resources, packed, towers)
    capacity = np.maximum((1 + balance) * resources.sum(0) / towers, held.max(0))
    return Partition(gain, resources, towers, sizes, capacity), packed


def _held(resources: Floats, tower: Ints, towers: int) -> Floats:
    held = np.zeros((towers, resources.shape[1]))
    np.add.at(held, tower, resources)
    return held


def _greedy(resources: Floats, towers: int, sizes: tuple[int, int]) -> Ints:
    """Largest table first, to the tower whose fullest resource stays emptiest."""
    n = len(resources)
    scale = np.maximum(resources.sum(0) / towers, 1e-300)
    shares = resources / scale
    held, count = np.zeros((towers, shares.shape[1])), np.zeros(towers, dtype=np.int64)
    tower = np.zeros(n, dtype=np.int64)
    order = np.argsort(-shares.max(1, initial=0.0), kind="stable")
    for left, item in zip(range(n, 0, -1), order, strict=True):
        short = np.maximum(sizes[0] - count, 0)
        allowed = (short > 0) if short.sum() >= left else (count < sizes[1])
        after = (held + shares[item]).max(1, initial=0.0)
        place = int(np.lexsort((count, np.where(allowed, after, np.inf)))[0])
        tower[item] = place
        held[place] += shares[item]
        count[place] += 1
    return tower


def searched(problem: Partition, start: Ints, seed: int = 0, effort: int = _EFFORT) -> Ints:
    """The best partition found from ``start`` (which must meet the limits); the towers numbered by first table."""
    return _named(_Search(problem, np.random.default_rng(seed), effort).run(start))


def partition(problem: Partition, start: Ints, seed: int = 0) -> Partitioned:
    """The best partition found from ``start`` (which must meet the limits) with its bound."""
    if problem.towers == 2 and 2 <= len(problem.gain) <= MOST:
        best = _named(best_halves(problem.gain, problem.resources, problem.sizes, problem.capacity))
        value = partition_value(problem.gain, best)
        return Partitioned(best, value, value, "enumeration")
    best = searched(problem, start, seed)
    value = partition_value(problem.gain, best)
    bound, method = upper_bound(
        problem.gain, problem.resources, problem.towers, problem.sizes, problem.capacity, value
    )
    if countable(len(problem.gain), problem.sizes) and value < bound * (1 - 1e-6):
        best, proved = exact(
            problem.gain, problem.resources, problem.towers, problem.sizes, problem.capacity, best
        )
        value = partition_value(problem.gain, best)
        if proved < bound:
            bound, method = proved, "column generation"
    return Partitioned(_named(best), value, max(bound, value), method)


def _named(tower: Ints) -> Ints:
    """Towers numbered by their first table, so that equal partitions are equal arrays."""
    order = {int(t): i for i, t in enumerate(dict.fromkeys(tower.tolist()))}
    return np.array([order[int(t)] for t in tower], dtype=np.int64)


class _Search:
    """Descents over partitions that meet the limits."""

    def __init__(self, problem: Partition, random: np.random.Generator, effort: int) -> None:
        self.problem, self.random = problem, random
        self.least = _MEANING * max(float(problem.gain.sum()), 1e-300)
        self.left = effort
        self.slack = problem.capacity * (1 + 1e-9)

    def run(self, start: Ints) -> Ints:
        """The best of a descent from ``start`` and of descents from disturbed copies of the best."""
        best = self._descend(start.copy())
        value = partition_value(self.problem.gain, best)
        n = len(best)
        calm = 0
        while self.left > 0 and calm < 60 and self.problem.towers > 1:
            tried = self._descend(self._disturbed(best, max(2, n // (8 + calm % 16))))
            found = partition_value(self.problem.gain, tried)
            calm = 0 if found > value + self.least else calm + 1
            if found > value:
                best, value = tried, found
        return best

    def _disturbed(self, tower: Ints, swaps: int) -> Ints:
        tower = tower.copy()
        held = _held(self.problem.resources, tower, self.problem.towers)
        for _ in range(swaps):
            i, j = self.random.integers(len(tower), size=2)
            a, b = tower[i], tower[j]
            change = self.problem.resources[i] - self.problem.resources[j]
            if a != b and (held[b] + change <= self.slack).all() and (held[a] - change <= self.slack).all():
                tower[i], tower[j] = b, a
                held[a] -= change
                held[b] += change
        return tower

    def _descend(self, tower: Ints) -> Ints:
        """Shifts and swaps until none helps, then the assignment of one table a tower, and again."""
        self.tower = tower
        self.toward = self._gains()
        self.held = _held(self.problem.resources, tower, self.problem.towers)
        self.count = np.bincount(tower, minlength=self.problem.towers)
        moved = True
        while moved and self.left > 0:
            while moved and self.left > 0:
                moved = False
                for item in self.random.permutation(len(tower)).tolist():
                    moved |= self._improve(item)
                self.left -= len(tower) * (len(tower) + _CALL)
            for _ in range(8):
                moved |= self._reassign()
        return self.tower

    def _gains(self) -> Floats:
        """(n, T): gain of each table with the tables of each tower."""
        member = np.zeros((len(self.tower), self.problem.towers))
        member[np.arange(len(self.tower)), self.tower] = 1.0
        gains: Floats = self.problem.gain @ member
        return gains

    def _improve(self, i: int) -> bool:
        """Make the best shift or swap of one table, if it gains."""
        p, a = self.problem, self.tower[i]
        own = self.toward[i] - self.toward[i, a]
        # shift to tower b
        after = self.held + p.resources[i]
        fits = (after <= self.slack).all(1) & (self.count < p.sizes[1]) & (self.count[a] > p.sizes[0])
        fits[a] = False
        shift = np.where(fits, own, -np.inf)
        # swap with table j
        other = self.toward[:, a] - self.toward[np.arange(len(self.tower)), self.tower]
        swap = own[self.tower] + other - 2 * p.gain[i]
        change = p.resources[i] - p.resources
        legal = (self.held[self.tower] + change <= self.slack).all(1) & (
            self.held[a] - change <= self.slack
        ).all(1)
        swap = np.where(legal & (self.tower != a), swap, -np.inf)
        b, j = int(shift.argmax()), int(swap.argmax())
        if max(shift[b], swap[j]) <= self.least:
            return False
        if shift[b] >= swap[j]:
            self._move(i, b)
        else:
            b = int(self.tower[j])
            self._move(j, int(a))
            self._move(i, b)
        return True

    def _move(self, i: int, b: int) -> None:
        p, a = self.problem, self.tower[i]
        self.toward[:, a] -= p.gain[:, i]
        self.toward[:, b] += p.gain[:, i]
        self.held[a] -= p.resources[i]
        self.held[b] += p.resources[i]
        self.count[a] -= 1
        self.count[b] += 1
        self.tower[i] = b

    def _reassign(self) -> bool:
        """Take one table out of each tower and put them back in the best way, one each."""
        from ortools.graph.python import linear_sum_assignment

        p = self.problem
        order = self.random.permutation(len(self.tower))
        chosen = np.array([order[np.argmax(self.tower[order] == t)] for t in range(p.towers)])
        gains = self.toward[chosen] - p.gain[np.ix_(chosen, chosen)]  # (table, tower without its own)
        self.left -= p.towers * (len(self.tower) + _CALL)
        bare = self.held - p.resources[chosen]
        fits = (bare[None] + p.resources[chosen][:, None] <= self.slack).all(2)
        fits[np.arange(p.towers), np.arange(p.towers)] = True
        scale = _GRID / max(float(np.abs(gains[fits]).max(initial=0.0)), 1e-300)
        costs = -np.rint(gains * scale).astype(np.int64)
        left, right = np.nonzero(fits)
        solver = linear_sum_assignment.SimpleLinearSumAssignment()
        solver.add_arcs_with_cost(left, right, costs[left, right])
        if solver.solve() != solver.OPTIMAL:
            return False
        target = np.array([solver.right_mate(t) for t in range(p.towers)])
        if gains[np.arange(p.towers), target].sum() <= np.trace(gains) + self.least:
            return False
        for item, tower in zip(chosen.tolist(), target.tolist(), strict=True):
            if self.tower[item] != tower:
                self._move(item, tower)
        return True
