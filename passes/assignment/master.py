"""The master program of a joint choice: a linear program over priced columns, with duals.

Tables with equal menus form a class. A column is one option of a class; ``x`` counts the tables that take it:

    minimise    T                                  (or sum_p z_p where the step is not stretched)
    subject to  T >= base + sum_p z_p,   T >= sum mean_extra[o, e] x_o   for resources e that are seconds
                z_p >= sum share[o, p] x_o                      every phase p (the average rank)
                n_c z_p >= sum_{o of c} biggest[o, p] x_o       every phase p and class c of n_c tables
                sum mean_memory[o] x_o <= capacity,  sum mean_extra[o, e] x_o <= limit_e
                sum cost[o, b] x_o <= budget_b
                sum_{o of c} x_o = n_c,  x >= 0

Every placement of every choice is a point of this program (averages over the ranks, averages over the tables
of a class), so its value is a lower bound. Columns may be added as long as some price out
(:meth:`Master.reduced`); before that has ended, the value plus ``sum_c n_c min(0, least reduced cost)`` is a
valid bound (Farley 1990, A note on bounding a class of linear programming problems). Limits may be
exceeded at a price far above any saving, so a value above it says that nothing fits. Solved by OR-Tools:
GLOP, and SCIP for whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ortools.linear_solver import pywraplp

from passes.assignment.problem import Floats

ROUNDS = 60  # rounds of row generation between two pricing rounds
MARGIN = 1e-6  # taken off bounds for GLOP's tolerances
# Prices of a limit exceeded by all of itself, in units of the scale; a higher one where the lower left a limit
# exceeded, because a slow tier may stretch the step by more
PENALTIES = (1e3, 1e6, 1e9)
NODES = 200  # of SCIP's tree for the whole-number program


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One option of one class, as the average rank sees one table that takes it."""

    owner: int  # class
    share: Floats  # (K,) seconds by phase
    biggest: Floats  # (K,) seconds that its largest piece puts on some rank
    memory: float  # bytes
    extra: Floats  # (E,)
    cost: Floats  # (B,)


@dataclass(frozen=True, slots=True, eq=False)
class Duals:
    """Prices at the optimum, in the objective's unit."""

    owner: Floats  # (C,) value of serving one more table
    phase: Floats  # (K,) per second of average load
    largest: Floats  # (C, K) per second of largest piece of a table of the class
    memory: float  # per byte of average memory
    extra: Floats  # (E,) per unit of the average resource
    cost: Floats  # (B,) per unit of the budget


@dataclass(frozen=True, slots=True)
class Limits:
    """Right-hand sides: ``stretched`` resources are seconds that must stay below the step."""

    capacity: float
    extra: tuple[float, ...]
    stretched: tuple[bool, ...]
    budgets: tuple[float, ...]
    base: float = 0.0  # seconds of the step besides the phases
    scale: float = 1.0  # seconds, for conditioning
    phase_weights: tuple[float, ...] | None = None  # of the objective; None: 1 each


class Master:
    """The program; grows by columns."""

    def __init__(self, sizes: Sequence[int], phases: int, limits: Limits, name: str = "GLOP") -> None:
        self.sizes, self.phases, self.limits = list(sizes), phases, limits
        self.whole = name == "SCIP"
        self.columns: list[Column] = []
        self.solver = solver = pywraplp.Solver.CreateSolver(name)
        infinity = solver.infinity()
        self.x: list[pywraplp.Variable] = []
        self.z = [solver.NumVar(0.0, infinity, "") for _ in range(phases)]
        self.step = solver.NumVar(0.0, infinity, "")
        weights = limits.phase_weights or (1.0,) * phases
        longer = solver.Constraint(limits.base / limits.scale, infinity)
        longer.SetCoefficient(self.step, 1.0)
        for z, weight in zip(self.z, weights, strict=True):
            longer.SetCoefficient(z, -weight)
        self.one = [solver.Constraint(float(n), float(n)) for n in sizes]
        self.average = [solver.Constraint(0.0, infinity) for _ in range(phases)]
        for row, z in zip(self.average, self.z, strict=True):
            row.SetCoefficient(z, 1.0)
        self.over: list[pywraplp.Variable] = []
        self.memory = self._limit(1.0)
        self.extra = [
            self._limit(0.0, self.step) if stretched else self._limit(1.0) for stretched in limits.stretched
        ]
        self.cost = [self._limit(1.0) for _ in limits.budgets]
        self.largest: dict[tuple[int, int], pywraplp.Constraint] = {}
        objective = solver.Objective()
        objective.SetCoefficient(self.step, 1.0)
        objective.SetMinimization()
        self.penalise(PENALTIES[0])

    def _limit(self, most: float, step: pywraplp.Variable | None = None) -> pywraplp.Constraint:
        row = self.solver.Constraint(-self.solver.infinity(), most)
        over = self.solver.NumVar(0.0, self.solver.infinity(), "")
        row.SetCoefficient(over, -1.0)
        self.over.append(over)
        if step is not None:
            row.SetCoefficient(step, -1.0)
        return row

    def penalise(self, price: float) -> None:
        """Price limits that are exceeded."""
        for over in self.over:
            self.solver.Objective().SetCoefficient(over, price)

    def _unit(self, e: int) -> float:
        """What one unit of a resource row stands for."""
        return self.limits.scale if self.limits.stretched[e] else max(self.limits.extra[e], 1e-300)

    def add(self, column: Column) -> int:
        """Add a column; its index."""
        limits = self.limits
        # no upper bound in the linear program: it would take a part of the class's dual
        x = (
            self.solver.IntVar(0.0, float(self.sizes[column.owner]), "")
            if self.whole
            else self.solver.NumVar(0.0, self.solver.infinity(), "")
        )
        self.one[column.owner].SetCoefficient(x, 1.0)
        for p, row in enumerate(self.average):
            row.SetCoefficient(x, -float(column.share[p]) / limits.scale)
        self.memory.SetCoefficient(x, column.memory / limits.capacity)
        for e, row in enumerate(self.extra):
            row.SetCoefficient(x, float(column.extra[e]) / self._unit(e))
        for b, row in enumerate(self.cost):
            row.SetCoefficient(x, float(column.cost[b]) / max(limits.budgets[b], 1e-300))
        for p in range(self.phases):
            largest = self.largest.get((column.owner, p))
            if largest is not None:
                largest.SetCoefficient(x, -float(column.biggest[p]) / limits.scale)
        self.columns.append(column)
        self.x.append(x)
        return len(self.x) - 1

    def solve(self) -> float:
        """The value over the columns so far, seconds; infinity when the solver fails."""
        for _ in range(ROUNDS):
            if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
                return float("inf")
            if not self._cut():
                break
        return float(self.solver.Objective().Value()) * self.limits.scale

    def _cut(self) -> bool:
        """Add the rows of largest pieces that the point violates."""
        chosen = np.zeros((len(self.sizes), self.phases))
        for column, x in zip(self.columns, self.x, strict=True):
            value = x.solution_value()
            if value > 0:
                chosen[column.owner] += column.biggest / self.limits.scale * value
        z = np.array([z.solution_value() for z in self.z])
        bound = np.array(self.sizes)[:, None] * z[None, :]
        new = [
            (int(c), int(p))
            for c, p in zip(*np.nonzero(chosen > bound * (1 + 1e-7) + 1e-12), strict=True)
            if (int(c), int(p)) not in self.largest
        ]
        self.require(new)
        return bool(new)

    def require(self, rows: Sequence[tuple[int, int]]) -> None:
        """Add rows of largest pieces, by (class, phase)."""
        for c, p in rows:
            row = self.largest[c, p] = self.solver.Constraint(0.0, self.solver.infinity())
            row.SetCoefficient(self.z[p], float(self.sizes[c]))
            for column, x in zip(self.columns, self.x, strict=True):
                if column.owner == c:
                    row.SetCoefficient(x, -float(column.biggest[p]) / self.limits.scale)

    def values(self) -> Floats:
        """Tables that take each column."""
        return np.array([x.solution_value() for x in self.x])

    def exceeded(self) -> bool:
        """Whether some limit is exceeded at the optimum."""
        return any(over.solution_value() > 1e-7 for over in self.over)

    def duals(self) -> Duals:
        """Prices of the rows; all but ``owner`` are at least 0."""
        scale, limits = self.limits.scale, self.limits
        largest = np.zeros((len(self.sizes), self.phases))
        for (c, p), row in self.largest.items():
            largest[c, p] = max(0.0, row.dual_value())
        extra = [max(0.0, -row.dual_value()) / self._unit(e) * scale for e, row in enumerate(self.extra)]
        cost = [
            max(0.0, -row.dual_value()) / max(limits.budgets[b], 1e-300) * scale
            for b, row in enumerate(self.cost)
        ]
        return Duals(
            owner=np.array([row.dual_value() for row in self.one]) * scale,
            phase=np.array([max(0.0, row.dual_value()) for row in self.average]),
            largest=largest,
            memory=max(0.0, -self.memory.dual_value()) / limits.capacity * scale,
            extra=np.array(extra),
            cost=np.array(cost),
        )

    @staticmethod
    def reduced(column: Column, duals: Duals) -> float:
        """Reduced cost of a column, in the objective's unit."""
        spent = float(duals.phase @ column.share + duals.largest[column.owner] @ column.biggest)
        spent += duals.memory * column.memory + float(duals.extra @ column.extra + duals.cost @ column.cost)
        return spent - float(duals.owner[column.owner])


def whole_choice(
    sizes: Sequence[int], phases: int, limits: Limits, columns: Sequence[Column]
) -> list[int] | None:
    """Tables that take each column in the best whole-number point that SCIP finds; None without one."""
    master = Master(sizes, phases, limits, "SCIP")
    for column in columns:
        master.add(column)
    master.require([(c, p) for c in range(len(sizes)) for p in range(phases)])
    master.solver.SetSolverSpecificParametersAsString(f"limits/nodes = {NODES}\nlimits/gap = 1e-4\n")
    status = master.solver.Solve()
    if status not in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE) or master.exceeded():
        return None
    return [round(x) for x in master.values()]
