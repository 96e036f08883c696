"""The program of :mod:`passes.assignment.room_program` for many tables, by cutting planes on its dual.

Only a few rows couple the tables: one for each phase, the memory, and the dual feasible functions of the box.
At prices for those rows every table takes its cheapest option, so the Lagrangian

    L(y, m, v) = sum_t min_o ( F_o + y part_o + m memory_o + v f_o )  - m - sum v
                 + sum_p min_{low_p <= c_p <= high_p} (1 - y_p) c_p

costs one pass over the options and bounds every solution of the box from below. It is maximised by Kelley's
cutting planes (1960, The cutting-plane method for solving convex programs), stabilised by evaluating between the
best prices and the master's (Ben-Ameur and Neto 2007, Acceleration of cutting-plane and column generation
algorithms). The master's multipliers mix the choices it met into a point of the program. The rows of
``room_program`` that hold one table's fractional pieces below a room are left out: boxes settle that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp

from passes.assignment.compiled import Compiled
from passes.assignment.problem import Floats
from passes.assignment.room_program import BATCH, VIOLATED, Point, Rooms

CUTS = 120  # passes over the options in one box; the bound is valid after any of them
CLOSE = 2e-5  # relative distance of the master to the best bound at which a box is settled
HIGHEST = 4.0  # largest price of a row; a limit only lowers the bound
INSIDE = 0.5  # share of the way from the best prices to the master's at which the Lagrangian is evaluated
FUNCTIONS = 6  # rows of functions in one box at most
ROUNDS = 4  # times that functions are added
LEAST = 1e-4  # weight of a mixed choice that counts
FEW_SIZES = 200  # different sizes up to which a phase has functions: with more, pieces fill any room


class RoomDual(Rooms):
    """The program of one problem; boxes are solved one after the other. See ``RoomProgram``."""

    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        super().__init__(compiled, incumbent)
        if not self.complete:
            return
        self.rows: Floats = np.column_stack([self.part, self.memory])  # what an option takes of each row
        sizes = [len(np.unique(self.pieces.load[:, p])) for p in range(self.phases)]
        self.counted = np.array(sizes) <= FEW_SIZES  # phases whose equal pieces fill a room in steps
        self.known: list[NDArray[np.int64]] = []  # choices met, as indices of ``keep``

    def solve(self, low: Floats, high: Floats) -> Point | None:
        """The optimum of a box; None when no choice has all pieces within ``high``."""
        fits: NDArray[np.bool_] = np.all(self.piece <= high * (1 + 1e-9), axis=1)
        if not np.logical_or.reduceat(fits, self.edges[:-1]).all():
            return None
        box = _Box(self, low, high, fits)
        point = box.maximise()
        for _ in range(ROUNDS):
            if not box.cut(point):
                break
            better = box.maximise()
            point = Point(max(better.value, point.value), better.x, better.rooms)
        self.solved += 1
        self.known = box.choices[-CUTS:]
        return point


class _Box:
    """One box: its rows, and the choices met."""

    def __init__(self, program: RoomDual, low: Floats, high: Floats, fits: NDArray[np.bool_]) -> None:
        self.program, self.low, self.high = program, low, high
        self.open = np.flatnonzero(fits)
        self.edges = np.searchsorted(self.open, program.edges)
        self.rows: Floats = program.rows[self.open]
        self.rows[:, : program.phases] /= np.where(low > 0, 1.0 - program.spare, 1.0)
        self.least = np.ones(
            self.rows.shape[1] - program.phases
        )  # right-hand sides of the rows but the rooms
        self.cost: Floats = program.cost[self.open]
        self.choices = [choice for choice in program.known if fits[choice].all()]
        self.prices: Floats = np.concatenate([np.ones(program.phases), np.zeros(len(self.least))])

    def _lagrangian(self, prices: Floats) -> tuple[float, NDArray[np.int64]]:
        """Its value, and the options (indices of ``keep``) that attain it."""
        reduced = self.cost + self.rows @ prices
        best = np.minimum.reduceat(reduced, self.edges[:-1])
        # the first option of each table that attains the least
        at = np.flatnonzero(reduced == np.repeat(best, np.diff(self.edges)))
        first = at[np.unique(np.searchsorted(self.edges, at, side="right"), return_index=True)[1]]
        left = 1.0 - prices[: self.program.phases]
        rooms = np.minimum(left * self.low, left * self.high).sum()
        value = float(best.sum() + rooms - prices[self.program.phases :] @ self.least)
        chosen: NDArray[np.int64] = self.open[first]
        return value, chosen

    def _used(self, chosen: NDArray[np.int64]) -> tuple[float, Floats]:
        """Load on every rank, and use of each row, of a choice."""
        where = np.searchsorted(self.open, chosen)
        return float(self.cost[where].sum()), self.rows[where].sum(axis=0)

    def maximise(self) -> Point:
        """The largest Lagrangian found and the mixed choice."""
        master = _Master(self.low, self.high, len(self.least))
        for choice in self.choices:
            master.add(*self._used(choice))
        value, choice = self._lagrangian(self.prices)
        best = value
        for _ in range(CUTS):
            self.choices.append(choice)
            master.add(*self._used(choice))
            found = master.solve()
            if found is None or found[0] - best <= CLOSE * abs(best):
                break
            masters = np.maximum(found[1], 0.0)  # the bound needs prices that are not negative
            prices = self.prices + INSIDE * (masters - self.prices)
            value, choice = self._lagrangian(prices)
            if value > best:
                best, self.prices = value, prices
            else:  # the point between tells little: ask at the master's own
                self.choices.append(choice)
                master.add(*self._used(choice))
                value, choice = self._lagrangian(masters)
                if value > best:
                    best, self.prices = value, masters
        return self._mixed(best, master)

    def _mixed(self, value: float, master: _Master) -> Point:
        weights = master.weights()
        x = np.zeros(len(self.program.keep))
        for weight, choice in zip(weights, self.choices, strict=False):
            if weight > LEAST:
                x[choice] += weight
        total = float(sum(w for w in weights if w > LEAST))
        x = x / total if total > 0 else x
        if total <= 0:
            x[self.choices[-1]] = 1.0
        rooms = np.clip((self.program.part * x[:, None]).sum(axis=0), self.low, self.high)
        return Point(value, x, rooms)

    def cut(self, point: Point) -> bool:
        """Add the functions that the point violates; False when there is none."""
        program = self.program
        if len(self.least) > FUNCTIONS:
            return False
        added = False
        for p in np.flatnonzero(program.counted & (self.high > 0) & (self.high < 1.0)):
            values, index = program.pieces.usage(int(p), float(self.high[p]))
            weight = point.x[program.pieces.owner] * program.pieces.copies
            use = values @ np.bincount(index, weight, values.shape[1])
            for k in np.argsort(-use)[:BATCH]:
                if use[k] > 1 + 100 * VIOLATED:
                    taken = program.pieces.by_option(values[k], index)[self.open]
                    self.rows = np.column_stack([self.rows, taken])
                    self.least = np.append(self.least, 1.0)
                    self.prices = np.append(self.prices, 0.0)
                    added = True
        return added


class _Master:
    """max  t + sum_p r_p - m - sum v  under the cuts; GLOP."""

    def __init__(self, low: Floats, high: Floats, others: int) -> None:
        solver = self.solver = pywraplp.Solver.CreateSolver("GLOP")
        infinity = solver.infinity()
        self.top = solver.NumVar(-infinity, infinity, "")
        self.prices = [solver.NumVar(0.0, HIGHEST, "") for _ in range(len(low) + others)]
        objective = solver.Objective()
        objective.SetMaximization()
        objective.SetCoefficient(self.top, 1.0)
        for price in self.prices[len(low) :]:
            objective.SetCoefficient(price, -1.0)
        for price, least, most in zip(self.prices, low, high, strict=False):
            room = solver.NumVar(-infinity, infinity, "")
            objective.SetCoefficient(room, 1.0)
            for edge in (float(least), float(most)):  # room <= (1 - price) edge
                row = solver.Constraint(-infinity, edge)
                row.SetCoefficient(room, 1.0)
                row.SetCoefficient(price, edge)
        self.cuts: list[pywraplp.Constraint] = []

    def add(self, cost: float, used: Floats) -> None:
        """Top is at most the value of one more choice."""
        row = self.solver.Constraint(-self.solver.infinity(), cost)
        row.SetCoefficient(self.top, 1.0)
        for price, use in zip(self.prices, used, strict=True):
            row.SetCoefficient(price, -float(use))
        self.cuts.append(row)

    def solve(self) -> tuple[float, Floats] | None:
        """Value and prices."""
        if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
            return None
        prices = np.array([price.solution_value() for price in self.prices])
        return float(self.solver.Objective().Value()), prices

    def weights(self) -> Floats:
        """Multipliers of the cuts in the order they were added."""
        if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
            return np.zeros(len(self.cuts))
        return np.array([row.dual_value() for row in self.cuts])
