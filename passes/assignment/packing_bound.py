"""A stronger bound for one phase: pieces must be packed whole.

A target ``z`` is refuted when this program has no solution (``F`` is the smallest load that the options
put on every rank, found by the same program; bins then have room ``c = z - F``):

    sum share x <= z,   sum mean_memory x <= capacity,   one option a table,
    sum_o ( sum over pieces of o of f(load / c) ) x_o  <=  ranks      for every dual feasible function f.

``f`` is dual feasible when the values of any set of sizes that fit one bin add up to at most 1; then the
row holds for every packing. Functions: Martello and Toth's L2 (1990), Fekete and Schepers' u^(k) (2001,
New classes of fast lower bounds for bin packing problems), and Carlier, Clautiaux and Moukrim's f_CCM
(2007). A piece on a host counts as one piece on each of its ranks, places within hosts are relaxed.
Rows are added when violated. Solved by OR-Tools: GLOP, or SCIP with whole choices (``integral``).
"""

from __future__ import annotations

import numpy as np
from ortools.linear_solver import pywraplp

from passes.assignment.compiled import HOST, Compiled
from passes.assignment.problem import Floats

ROUNDS = 12  # rounds of row generation for one target
BATCH = 4  # rows added in a round
SHRINK = 1e-9  # sizes are rounded down by this fraction, so that rounding cannot invalidate a row
TOLERANCE = 1e-6  # violation at which a row is added, above the solvers' feasibility tolerance
CLOSE = 5e-7  # a target this close below a solution, refuted, proves the solution optimal
NODES = 2000  # SCIP's limit for one target; without a verdict the target is not refuted


def dual_feasible(sizes: Floats) -> Floats:
    """Values of all functions at sizes in [0, 1], shape (functions, len(sizes))."""
    s = np.minimum(sizes, 1.0) * (1 - SHRINK)
    values = [s]
    values += [np.floor((k + 1) * s) / k for k in range(1, 20)]
    edges = np.unique(np.round(np.concatenate([s[s <= 0.5], 1 - s[s > 0.5]]), 6))
    edges = edges[(edges > 0.02) & (edges <= 0.5)]
    for edge in edges[np.unique(np.linspace(0, len(edges) - 1, 40).astype(int))] if len(edges) else []:
        for cut in (edge, min(edge * (1 + 1e-5), 0.5), edge * (1 - 1e-5)):
            values.append(np.where(s > 1 - cut, 1.0, np.where(s >= cut, s, 0.0)))
            whole = int(np.floor(1 / cut))
            below = np.floor(s / cut) / whole
            above = 1 - np.floor((1 - s) / cut) / whole
            values.append(np.where(s < 0.5, below, np.where(s > 0.5, above, 0.5)))
    return np.array(values)


class PackingBound:
    """Refutes targets for one problem with one phase."""

    def __init__(self, compiled: Compiled, integral: bool) -> None:
        self.compiled, self.integral = compiled, integral
        self.ranks = compiled.problem.ranks
        size = compiled.problem.host_size
        choices = [choice for options in compiled.choices for choice in options]
        self.fixed = np.array([choice.fixed for choice in choices])
        rows = [
            (i, g.load, g.copies * (size if g.scope == HOST else 1))
            for i, choice in enumerate(choices)
            for g in choice.groups
        ]
        self.owner = np.array([r[0] for r in rows], dtype=np.int64)
        self.load = np.array([r[1] for r in rows])
        self.copies = np.array([float(r[2]) for r in rows])
        self.largest = compiled.total_biggest - self.fixed

    def bound(self, low: float, high: float, steps: int) -> float:
        """The largest refuted target found; ``low`` when none is. ``high`` is a known objective."""
        proof = high * (1 - CLOSE)
        if proof > low and self.refutes(proof):
            return proof
        for _ in range(steps):
            target = 0.5 * (low + high)
            if self.refutes(target):
                low = target
            else:
                high = target
            if high - low < 1e-4 * high:
                break
        return low

    def refutes(self, target: float) -> bool:
        """Whether no solution has an objective of ``target`` or less."""
        base = 0.0
        for _ in range(3):
            least = self._least_fixed(target, base)
            if least is None:
                return True
            if least <= base + 1e-4 * target:
                return False
            base = least * (1 - 1e-6)
        return False

    def _least_fixed(self, target: float, base: float) -> float | None:
        """Smallest load on every rank among the relaxed solutions; None when there is none."""
        compiled = self.compiled
        room = target - base
        keep = np.flatnonzero(
            compiled.usable
            & (self.fixed <= target * (1 + 1e-9))
            & (self.largest <= room * (1 + 1e-9))
            & (compiled.total_biggest <= target * (1 + 1e-9))
        )
        if len(np.unique(compiled.table[keep])) < compiled.tables or room <= 0:
            return None
        values = self._usage(keep, room)
        solver = pywraplp.Solver.CreateSolver("SCIP" if self.integral else "GLOP")
        make = solver.BoolVar if self.integral else (lambda name: solver.NumVar(0.0, 1.0, name))
        x = [make("") for _ in keep]
        tables = compiled.table[keep]
        for t in range(compiled.tables):
            one = solver.Constraint(1.0, 1.0)
            for i in np.flatnonzero(tables == t):
                one.SetCoefficient(x[i], 1.0)
        _at_most_one(solver, x, compiled.total_share[keep] / target)
        _at_most_one(solver, x, compiled.mean_memory[keep] / compiled.problem.capacity)
        objective = solver.Objective()
        for variable, cost in zip(x, self.fixed[keep] / target, strict=True):
            objective.SetCoefficient(variable, float(cost))
        objective.SetMinimization()
        if self.integral:
            solver.SetSolverSpecificParametersAsString(f"limits/nodes = {NODES}\n")
        return self._cut_until_settled(solver, x, values, target)

    def _usage(self, keep: np.ndarray, room: float) -> Floats:
        """Bins that each option uses under each function, shape (functions, options)."""
        position = np.full(len(self.fixed), -1)
        position[keep] = np.arange(len(keep))
        mine = position[self.owner] >= 0
        values = dual_feasible(self.load[mine] / room) * self.copies[mine]
        usage = np.zeros((len(keep), len(values)))
        np.add.at(usage, position[self.owner[mine]], values.T)
        return np.ascontiguousarray(usage.T) / self.ranks

    def _cut_until_settled(
        self, solver: pywraplp.Solver, x: list[pywraplp.Variable], usage: Floats, target: float
    ) -> float | None:
        added: set[int] = set()
        value = 0.0
        for _ in range(ROUNDS):
            status = solver.Solve()
            if status == pywraplp.Solver.INFEASIBLE:
                return None
            if status != pywraplp.Solver.OPTIMAL:
                return value
            point = np.array([variable.solution_value() for variable in x])
            value = float(solver.Objective().Value()) * target
            used = usage @ point
            used[list(added)] = 0.0
            new = [int(k) for k in np.argsort(-used)[:BATCH] if used[k] > 1 + TOLERANCE]
            if not new:
                return value
            for k in new:
                added.add(k)
                _at_most_one(solver, x, usage[k])
        return value


def _at_most_one(solver: pywraplp.Solver, x: list[pywraplp.Variable], weights: Floats) -> None:
    row = solver.Constraint(-solver.infinity(), 1.0 + 1e-9)
    for i in np.flatnonzero(weights):
        row.SetCoefficient(x[int(i)], float(weights[i]))
