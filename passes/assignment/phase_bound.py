"""A proved lower bound for several phases: a linear program over choices and phase lengths.

    minimise    sum_p z_p
    subject to  z_p >= sum_o share[o, p] x_o                         every phase p (the average rank)
                z_p >= sum_{o of t} biggest[o, p] x_o                every phase p and table t
                sum_o mean_memory[o] x_o <= capacity
                sum_{o of t} x_o = 1,  x >= 0

A phase lasts at least as long as the average load and as the largest piece chosen in it; both hold for
every solution, whose choices are 0/1 points of this program. Options that alone exceed the best known
objective are left out, which keeps the bound valid as long as it stays below that objective. The rows
of tables are added when they are violated (few ever are). Solved by OR-Tools' GLOP.
"""

from __future__ import annotations

import numpy as np
from ortools.linear_solver import pywraplp

from passes.assignment.compiled import Compiled
from passes.assignment.problem import Floats
from passes.assignment.relaxation import piece_floor

ROUNDS = 40  # rounds of row generation; the bound is valid after any of them
NODES = 400  # of SCIP's tree; its bound is valid wherever it stops
MARGIN = 1e-7  # taken off the value for GLOP's tolerances (primal and dual 1e-7 to 1e-8)


def phase_bound(compiled: Compiled, incumbent: float, rounds: int = ROUNDS) -> float:
    """The bound, seconds; 0 when the solver fails. ``incumbent`` is the objective of any solution."""
    floor = piece_floor(compiled)
    keep = np.flatnonzero(compiled.usable & (floor <= incumbent))
    if len(np.unique(compiled.table[keep])) < compiled.tables:
        return incumbent  # a table has no option that could improve on the incumbent
    program = _Program(compiled, keep, incumbent)
    value = 0.0
    for _ in range(rounds):
        solved = program.solve()
        if solved is None:
            break
        value, x, z = solved
        if not program.cut(x, z):
            break
    return min(incumbent, value * (1 - MARGIN))


def whole_phase_bound(compiled: Compiled, incumbent: float) -> float:
    """The same with whole choices, by SCIP's branch and bound up to ``NODES`` nodes; for few tables."""
    floor = piece_floor(compiled)
    keep = np.flatnonzero(compiled.usable & (floor <= incumbent))
    if len(np.unique(compiled.table[keep])) < compiled.tables:
        return incumbent
    program = _Program(compiled, keep, incumbent, "SCIP")
    program.cut(np.ones(len(keep)), np.zeros(program.phases))  # every row at once
    program.solver.SetSolverSpecificParametersAsString(f"limits/nodes = {NODES}\n")
    program.solver.Solve()
    value = float(program.solver.Objective().BestBound()) * program.scale
    return min(incumbent, max(0.0, value * (1 - 10 * MARGIN)))


class _Program:
    def __init__(self, compiled: Compiled, keep: np.ndarray, incumbent: float, name: str = "GLOP") -> None:
        self.solver = pywraplp.Solver.CreateSolver(name)
        self.scale = incumbent if incumbent > 0 else 1.0
        self.share: Floats = compiled.share[keep] / self.scale
        self.biggest: Floats = compiled.biggest[keep] / self.scale
        self.table = compiled.table[keep]
        self.edges = np.searchsorted(self.table, np.arange(compiled.tables + 1))
        self.phases = self.share.shape[1]
        solver = self.solver
        infinity = solver.infinity()
        whole = name == "SCIP"
        self.x = [solver.IntVar(0.0, 1.0, "") if whole else solver.NumVar(0.0, 1.0, "") for _ in keep]
        self.z = [solver.NumVar(0.0, infinity, "") for _ in range(self.phases)]
        for t in range(compiled.tables):
            one = solver.Constraint(1.0, 1.0)
            for i in range(self.edges[t], self.edges[t + 1]):
                one.SetCoefficient(self.x[i], 1.0)
        for p in range(self.phases):
            self._row(p, np.arange(len(keep)), self.share[:, p])
        memory = compiled.mean_memory[keep] / compiled.problem.capacity
        row = solver.Constraint(-infinity, 1.0)
        for variable, used in zip(self.x, memory, strict=True):
            row.SetCoefficient(variable, float(used))
        objective = solver.Objective()
        for z in self.z:
            objective.SetCoefficient(z, 1.0)
        objective.SetMinimization()
        self.rows: set[tuple[int, int]] = set()

    def _row(self, phase: int, columns: np.ndarray, values: Floats) -> None:
        """z[phase] >= sum values x[columns]."""
        row = self.solver.Constraint(0.0, self.solver.infinity())
        row.SetCoefficient(self.z[phase], 1.0)
        for i, value in zip(columns, values, strict=True):
            row.SetCoefficient(self.x[int(i)], -float(value))

    def solve(self) -> tuple[float, Floats, Floats] | None:
        if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
            return None
        x = np.array([variable.solution_value() for variable in self.x])
        z = np.array([variable.solution_value() for variable in self.z])
        return self.solver.Objective().Value() * self.scale, x, z

    def cut(self, x: Floats, z: Floats) -> bool:
        """Add the rows of the tables that the point violates; False when there is none."""
        chosen = np.add.reduceat(self.biggest * x[:, None], self.edges[:-1], axis=0)
        added = False
        for t, p in zip(*np.nonzero(chosen > z[None, :] * (1 + 1e-7) + 1e-12), strict=True):
            if (int(t), int(p)) in self.rows:
                continue
            self.rows.add((int(t), int(p)))
            span = np.arange(self.edges[t], self.edges[t + 1])
            self._row(int(p), span, self.biggest[span, p])
            added = True
        return added
