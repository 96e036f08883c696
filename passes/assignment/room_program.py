"""A linear program over choices and rooms, for several phases, with bounds that do not depend on its tolerances.

Every rank carries in phase ``p`` what the chosen options put on all ranks, ``F_p``; the rest of the slowest
rank's load is the ROOM ``c_p``, in which placed pieces stand. Within a box ``low <= c <= high``:

    minimise    sum_p F_p(x) + c_p
    subject to  c_p >= sum_o part[o, p] x_o                          every phase (the average rank)
                c_p >= sum_{o of t} piece[o, p] x_o                  every phase p and table t
                sum_o mean_memory[o] x_o <= capacity
                sum_o ( sum over pieces of o of f(piece / high_p) ) x_o <= ranks     dual feasible f, phase p
                sum_{o of t} x_o = 1,  0 <= x;  x_o = 0 where a piece exceeds high

All rows hold for every solution whose rooms are in the box: dual feasible functions
(:mod:`passes.assignment.packing_bound`) bound what ranks of room ``high_p`` can hold. Rows of tables and of
functions are added when violated. OR-Tools' GLOP solves it; the value returned is the Lagrangian dual at
GLOP's prices, evaluated here option by option (Neumaier and Shcherbina 2004, Safe bounds in linear and
mixed-integer programming), so a tolerance of the solver cannot make it too large.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp

from passes.assignment.compiled import HOST, Compiled
from passes.assignment.packing_bound import dual_feasible
from passes.assignment.problem import Floats
from passes.assignment.relaxation import piece_floor

ROUNDS = 12  # rounds of row generation in one box; the bound is valid after any of them
BATCH = 2  # functions added for a phase and round
VIOLATED = 1e-6  # excess at which a row is added, above GLOP's feasibility tolerance
ELASTIC = 3.0  # incumbents that a unit of a row exceeded costs, so that every box has a solution
STEPS = 20  # bisection steps on a room


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """The optimum of one box, in units of the incumbent."""

    value: float  # proved: no solution with rooms in the box is below
    x: Floats  # (n,) of the options kept
    rooms: Floats  # (K,)


class Pieces:
    """Sizes of the placed pieces of some options, phase by phase."""

    def __init__(self, compiled: Compiled, keep: NDArray[np.int64], scale: float) -> None:
        size = compiled.problem.host_size
        rows = [
            (i, group.phases, group.copies * (size if group.scope == HOST else 1))
            for i, o in enumerate(keep)
            for group in compiled.choices[compiled.table[o]][o - compiled.start[compiled.table[o]]].groups
        ]
        phases = compiled.share.shape[1]
        self.owner = np.array([row[0] for row in rows], dtype=np.int64)
        self.load: Floats = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, phases) * scale
        self.copies: Floats = np.array([float(row[2]) for row in rows])
        self.ranks = compiled.problem.ranks
        self.options = len(keep)

    def usage(self, phase: int, room: float) -> tuple[Floats, NDArray[np.int64]]:
        """Share of the ranks that a piece of each size takes under each function, and the size of each piece."""
        sizes, index = np.unique(self.load[:, phase], return_inverse=True)
        return dual_feasible(sizes / room) / self.ranks, index

    def by_option(self, values: Floats, index: NDArray[np.int64]) -> Floats:
        """Share of the ranks that each option takes, from values by size."""
        taken: Floats = np.bincount(self.owner, values[index] * self.copies, self.options).astype(np.float64)
        return taken

    def needed(self, phase: int, x: Floats, room: float) -> float:
        """A room at which some function shows that ``x`` does not fit, the largest found; 0 if ``room`` will do."""
        weight = self.copies * x[self.owner]
        here = weight > 1e-9
        sizes, index = np.unique(self.load[here, phase], return_inverse=True)
        if not len(sizes) or sizes[-1] <= 0:
            return 0.0
        count = np.bincount(index, weight[here]) / self.ranks

        def short(at: float) -> bool:
            return bool((dual_feasible(sizes / at) @ count).max() > 1 + 10 * VIOLATED)

        low = high = max(room * (1 + 10 * VIOLATED), 1e-12)
        if not short(low):
            return 0.0
        while short(high):
            low, high = high, high * 1.1
        for _ in range(STEPS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if short(middle) else (low, middle)
        return low


class Rooms:
    """What the programs over boxes of rooms know of a problem; all loads are shares of the incumbent."""

    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        self.compiled, self.incumbent = compiled, incumbent
        self.keep = np.flatnonzero(compiled.usable & (piece_floor(compiled) <= incumbent))
        # else a table has no option that could improve on the incumbent
        self.complete = len(np.unique(compiled.table[self.keep])) == compiled.tables
        if not self.complete:
            return
        fixed = compiled.everywhere[self.keep] / incumbent
        self.cost: Floats = fixed.sum(axis=1)
        self.piece: Floats = compiled.biggest[self.keep] / incumbent - fixed
        self.part: Floats = compiled.share[self.keep] / incumbent - fixed
        self.memory: Floats = compiled.mean_memory[self.keep] / compiled.problem.capacity
        self.edges = np.searchsorted(compiled.table[self.keep], np.arange(compiled.tables + 1))
        self.pieces = Pieces(compiled, self.keep, 1.0 / incumbent)
        self.phases = self.part.shape[1]
        self.spare = 0.0  # share of the held rooms that is left empty; bounds need 0
        self.solved = 0


class RoomProgram(Rooms):
    """The program of one problem; boxes are solved one after the other."""

    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        super().__init__(compiled, incumbent)
        if self.complete:
            self._build()

    def _build(self) -> None:
        solver = self.solver = pywraplp.Solver.CreateSolver("GLOP")
        infinity = solver.infinity()
        self.x = [solver.NumVar(0.0, infinity, "") for _ in self.keep]
        self.open = np.ones(len(self.keep), dtype=np.bool_)
        self.room = [solver.NumVar(0.0, 1.0, "") for _ in range(self.phases)]
        self.objective = solver.Objective()
        self.objective.SetMinimization()
        for i in np.flatnonzero(self.cost):
            self.objective.SetCoefficient(self.x[i], float(self.cost[i]))
        for room in self.room:
            self.objective.SetCoefficient(room, 1.0)
        for first, last in zip(self.edges[:-1], self.edges[1:], strict=True):
            one = solver.Constraint(1.0, 1.0)
            for option in range(int(first), int(last)):
                one.SetCoefficient(self.x[option], 1.0)
        self.average = [self._row(-self.part[:, p], 0.0, self.room[p]) for p in range(self.phases)]
        self.limit = self._row(-self.memory, -1.0)
        self.largest: dict[tuple[int, int], pywraplp.Constraint] = {}
        self.packing: list[tuple[int, float, Floats, pywraplp.Constraint]] = []

    def _row(
        self, values: Floats, least: float, room: pywraplp.Variable | None = None
    ) -> pywraplp.Constraint:
        """room + values x >= least, at a price when it cannot hold."""
        row = self.solver.Constraint(least, self.solver.infinity())
        for i in np.flatnonzero(values):
            row.SetCoefficient(self.x[i], float(values[i]))
        if room is not None:
            row.SetCoefficient(room, 1.0)
        over = self.solver.NumVar(0.0, self.solver.infinity(), "")
        row.SetCoefficient(over, 1.0)
        self.objective.SetCoefficient(over, ELASTIC)
        return row

    def solve(self, low: Floats, high: Floats) -> Point | None:
        """The optimum of a box; None when no choice has all pieces within ``high``."""
        if not self._enter(low, high):
            return None
        best = Point(0.0, np.zeros(len(self.keep)), low)  # what is known should GLOP fail
        for _ in range(ROUNDS):
            self.solved += 1
            if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
                break
            x = np.array([variable.solution_value() for variable in self.x])
            rooms = np.array([room.solution_value() for room in self.room])
            best = Point(max(self._dual(low, high), best.value), x, rooms)
            if not self._cut(x, rooms, high):
                break
        return best

    def _enter(self, low: Floats, high: Floats) -> bool:
        """Set the box."""
        fits: NDArray[np.bool_] = np.all(self.piece <= high * (1 + 1e-9), axis=1)
        if not np.logical_or.reduceat(fits, self.edges[:-1]).all():
            return False
        for i in np.flatnonzero(fits != self.open):
            self.x[i].SetUb(self.solver.infinity() if fits[i] else 0.0)
        self.open = fits
        for p, room in enumerate(self.room):
            room.SetBounds(float(low[p]), float(high[p]))
            self.average[p].SetCoefficient(room, 1.0 - self.spare if low[p] > 0 else 1.0)
        for phase, size, _, row in self.packing:
            row.SetLb(-1.0 if high[phase] <= size else -self.solver.infinity())
        self.active = [entry for entry in self.packing if high[entry[0]] <= entry[1]]
        return True

    def _cut(self, x: Floats, rooms: Floats, high: Floats) -> bool:
        """Add the rows that the point violates; False when there is none."""
        added = False
        chosen = np.add.reduceat(self.piece * x[:, None], self.edges[:-1], axis=0)
        for t, p in zip(*np.nonzero(chosen > rooms[None] * (1 + 1e-7) + 1e-12), strict=True):
            if (int(t), int(p)) not in self.largest:
                row = np.zeros(len(x))
                span = slice(self.edges[t], self.edges[t + 1])
                row[span] = -self.piece[span, p]
                self.largest[int(t), int(p)] = self._row(row, 0.0, self.room[p])
                added = True
        for p in np.flatnonzero((high > 0) & (high < 1.0)):  # in no room at all, nothing is left open
            values, index = self.pieces.usage(int(p), float(high[p]))
            use = values @ np.bincount(index, x[self.pieces.owner] * self.pieces.copies, values.shape[1])
            for k in np.argsort(-use)[:BATCH]:
                if use[k] > 1 + VIOLATED:
                    taken = self.pieces.by_option(values[k], index)
                    entry = (int(p), float(high[p]), taken, self._row(-taken, -1.0))
                    self.packing.append(entry)
                    self.active.append(entry)
                    added = True
        return added

    def _dual(self, low: Floats, high: Floats) -> float:
        """The Lagrangian dual at the solver's prices: a lower bound whatever the prices are."""
        price = np.array([max(0.0, row.dual_value()) for row in self.average])
        memory = max(0.0, self.limit.dual_value())
        reduced = self.cost + self.part @ price + memory * self.memory
        value = float(-memory)
        left = 1.0 - price
        for (t, p), row in self.largest.items():
            dual = max(0.0, row.dual_value())
            if dual:
                span = slice(self.edges[t], self.edges[t + 1])
                reduced[span] += dual * self.piece[span, p]
                left[p] -= dual
        for _, _, taken, row in self.active:
            dual = max(0.0, row.dual_value())
            reduced += dual * taken
            value -= dual
        reduced[~self.open] = np.inf
        value += float(np.minimum.reduceat(reduced, self.edges[:-1]).sum())
        return value + float(np.minimum(left * low, left * high).sum())
