"""Exact partition of few tables by column generation: every tower that fits is a column.

    maximise  sum_S value_S z_S   subject to   sum over S with i of z_S = 1 for each table i,   sum_S z_S = T

All subsets of the allowed sizes that meet the capacities are enumerated, so pricing is a scan over arrays.
GLOP solves the master problem over the columns found so far; when no column prices in, its value is the
bound of the full relaxation. A column whose reduced cost exceeds the distance between that bound and the
best partition known is in no better partition; CP-SAT decides among the rest.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST = 3_000_000  # subsets that are enumerated: about 100 MB and 2 s
_ADD = 200  # columns that enter in one round
_ROUNDS = 300
_CHOICE = 20_000  # columns that CP-SAT may choose among
_UNITS = 10**7  # integer steps of CP-SAT's objective for the value known
_DETERMINISTIC = 4.0  # CP-SAT's deterministic seconds


def countable(n: int, sizes: tuple[int, int]) -> bool:
    """Whether the subsets of these sizes are few enough to enumerate."""
    return n <= 60 and sum(math.comb(n, size) for size in range(sizes[0], min(n, sizes[1]) + 1)) <= MOST


class _Columns:
    """Subsets of one size as rows of table numbers, with their values."""

    def __init__(self, members: npt.NDArray[np.int8], value: Floats) -> None:
        self.members, self.value = members, value


def _enumerate(gain: Floats, resources: Floats, sizes: tuple[int, int], capacity: Floats) -> list[_Columns]:
    """Subsets that meet the capacities, by size; supersets of one that does not are never made."""
    n = len(gain)
    members = np.arange(n, dtype=np.int8)[:, None]
    value = np.zeros(n)
    load = resources.copy()
    kept = (load <= capacity * (1 + 1e-9)).all(1)
    members, value, load = members[kept], value[kept], load[kept]
    made = [_Columns(members, value)] if sizes[0] <= 1 else []
    for size in range(2, min(sizes[1], n) + 1):
        parts = []
        for last in range(1, n):
            base = np.flatnonzero(members[:, -1] < last)
            total = load[base] + resources[last]
            base = base[(total <= capacity * (1 + 1e-9)).all(1)]
            added = gain[last][members[base].astype(np.int64)].sum(1)
            row = np.full((len(base), 1), last, dtype=np.int8)
            grown = np.concatenate([members[base], row], axis=1)
            parts.append((grown, value[base] + added, load[base] + resources[last]))
        members = np.concatenate([p[0] for p in parts])
        value = np.concatenate([p[1] for p in parts])
        load = np.concatenate([p[2] for p in parts])
        if size >= sizes[0]:
            made.append(_Columns(members, value))
    return made


def exact(
    gain: Floats,
    resources: Floats,
    towers: int,
    sizes: tuple[int, int],
    capacity: Floats,
    best: Ints,
) -> tuple[Ints, float]:
    """A partition no worse than ``best`` (which meets the limits), and a proved bound on any partition."""
    every = _enumerate(gain, resources, sizes, capacity)
    same = best[:, None] == best[None, :]
    value = float(gain[same].sum() / 2)
    pool = [tuple(np.flatnonzero(best == t).tolist()) for t in range(towers)]
    bound, tables, count = _relaxation(gain, every, pool, towers)
    slack = max(bound - value, 0.0) + 1e-9 * max(bound, 1.0)
    chosen: list[tuple[tuple[int, ...], float]] = []
    for columns in every:
        if not len(columns.value):
            continue
        missing = _reduced(columns, tables, count)
        near = np.flatnonzero(missing >= -slack)
        if len(chosen) + len(near) > _CHOICE:
            return best, bound
        chosen += [(tuple(columns.members[i].tolist()), float(columns.value[i])) for i in near]
    return _choose(chosen, len(gain), towers, best, value, bound)


def _reduced(columns: _Columns, tables: Floats, count: float) -> Floats:
    """Value less the prices of the tables in the column and of a tower."""
    reduced: Floats = columns.value - tables[columns.members.astype(np.int64)].sum(1) - count
    return reduced


def _relaxation(
    gain: Floats, every: list[_Columns], pool: list[tuple[int, ...]], towers: int
) -> tuple[float, Floats, float]:
    """Bound, price of each table and price of a tower; any prices give a bound, optimal ones the best.

    The bound is that of the prices, sum of tables' + T x (tower's + largest reduced cost), so it does not
    rest on the tolerances of the linear solver.
    """
    from ortools.linear_solver import pywraplp

    n = len(gain)
    solver = pywraplp.Solver.CreateSolver("GLOP")
    rows = [solver.Constraint(1, 1) for _ in range(n)]
    number = solver.Constraint(towers, towers)
    goal = solver.Objective()
    goal.SetMaximization()
    known: set[tuple[int, ...]] = set()

    def add(column: tuple[int, ...]) -> None:
        known.add(column)
        variable = solver.NumVar(0, solver.infinity(), "")
        for i in column:
            rows[i].SetCoefficient(variable, 1)
        number.SetCoefficient(variable, 1)
        index = list(column)
        goal.SetCoefficient(variable, float(gain[np.ix_(index, index)].sum() / 2))

    for column in pool:
        add(column)
    best, prices = np.inf, (np.zeros(n), 0.0)
    for _ in range(_ROUNDS):
        if solver.Solve() != solver.OPTIMAL:
            break
        tables, count = np.array([row.dual_value() for row in rows]), number.dual_value()
        entering: list[tuple[float, tuple[int, ...]]] = []
        for columns in every:
            reduced = _reduced(columns, tables, count)
            if not len(reduced):
                continue
            top = np.argpartition(-reduced, min(_ADD, len(reduced) - 1))[:_ADD]
            entering += [(float(reduced[i]), tuple(columns.members[i].tolist())) for i in top]
        most = max(0.0, max(r for r, _ in entering))
        bound = float(tables.sum() + towers * (count + most))
        if bound < best:
            best, prices = bound, (tables, count + most)
        fresh = sorted((r, c) for r, c in entering if r > 1e-9 * max(best, 1.0) and c not in known)[-_ADD:]
        if not fresh:
            break
        for _, column in fresh:
            add(column)
    return best * (1 + 1e-12), *prices


def _choose(
    columns: list[tuple[tuple[int, ...], float]], n: int, towers: int, best: Ints, value: float, bound: float
) -> tuple[Ints, float]:
    """The best partition made of ``columns``; values rounded up, so that the solver's bound is one."""
    from ortools.sat.python import cp_model

    unit = max(value, 1e-300) / _UNITS
    model = cp_model.CpModel()
    used = [model.new_bool_var(f"z{k}") for k in range(len(columns))]
    of_table: list[list[cp_model.IntVar]] = [[] for _ in range(n)]
    for variable, (column, _) in zip(used, columns, strict=True):
        for i in column:
            of_table[i].append(variable)
    for variables in of_table:
        model.add_exactly_one(variables)
    model.add(sum(used) == towers)
    grid = [math.ceil(worth / unit) for _, worth in columns]
    model.maximize(cp_model.LinearExpr.weighted_sum(used, grid))
    sets = {tuple(np.flatnonzero(best == t).tolist()) for t in range(towers)}
    for variable, (column, _) in zip(used, columns, strict=True):
        model.add_hint(variable, column in sets)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = _DETERMINISTIC
    solver.parameters.max_time_in_seconds = 4 * _DETERMINISTIC
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return best, bound
    found = np.zeros(n, dtype=np.int64)
    total = 0.0
    for tower, k in enumerate(k for k, variable in enumerate(used) if solver.value(variable)):
        found[list(columns[k][0])] = tower
        total += columns[k][1]
    # the columns left out are in no partition better than the one known
    proved = max(min(bound, solver.best_objective_bound * unit), value, total)
    return (found if total > value else best), proved
