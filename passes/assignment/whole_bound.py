"""The bound of :mod:`passes.assignment.room_program` with whole options, by CP-SAT; for few tables.

Loads are rounded down to integers, so that every solution below the incumbent is a point of the model and
the solver's bound, exact in integers, is proved. Where the best choice does not fit its rooms, a dual feasible
function names a room ``v`` up to which that is so, and the model learns: the room is above ``v``, or the
choice keeps the function's row at ``v``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from ortools.sat.python import cp_model

from passes.assignment.compiled import Compiled
from passes.assignment.problem import Floats
from passes.assignment.relaxation import piece_floor
from passes.assignment.room_program import VIOLATED, Pieces

UNITS = 10**7  # the incumbent, in units of the model
SHARES = 10**6  # the ranks, in units of a function's row
ROUNDS = 8
ROWS = 3  # functions added for a phase and round
WORK = 1.0  # deterministic seconds of CP-SAT in all
WORTH = 2e-4  # rise of the bound, relative, below which another round is not worth its work


@dataclass(slots=True)
class Whole:
    """A bound, and the choices that the rounds came by."""

    bound: float  # seconds
    choices: list[list[int]] = field(default_factory=list)  # option of each table; the last is the best


class _Model:
    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        self.compiled = compiled
        self.keep = np.flatnonzero(compiled.usable & (piece_floor(compiled) <= incumbent))
        self.complete = len(np.unique(compiled.table[self.keep])) == compiled.tables
        if not self.complete:
            return
        scale = UNITS / incumbent
        fixed = compiled.everywhere[self.keep]
        self.pieces = Pieces(compiled, self.keep, scale)
        self.phases = fixed.shape[1]
        model = self.model = cp_model.CpModel()
        self.take = [model.new_bool_var("") for _ in self.keep]
        self.rooms = [model.new_int_var(0, UNITS, "") for _ in range(self.phases)]
        piece = _down((compiled.biggest[self.keep] - fixed) * scale)
        part = _down((compiled.share[self.keep] - fixed) * scale)
        edges = np.searchsorted(compiled.table[self.keep], np.arange(compiled.tables + 1))
        for first, last in pairwise(edges):
            model.add_exactly_one(self.take[first:last])
            for p, room in enumerate(self.rooms):
                model.add(room >= self._sum(piece[first:last, p], first))
        for p, room in enumerate(self.rooms):
            model.add(room >= self._sum(part[:, p]))
        memory = _down(compiled.mean_memory[self.keep] / compiled.problem.capacity * SHARES)
        model.add(self._sum(memory) <= SHARES)
        whole = sum(self.rooms) + self._sum(_down(fixed * scale).sum(axis=1))
        model.add(whole <= UNITS)
        model.minimize(whole)

    def _sum(self, values: np.ndarray, first: int = 0) -> cp_model.LinearExprT:
        some = np.flatnonzero(values)
        return cp_model.LinearExpr.weighted_sum(
            [self.take[first + int(i)] for i in some], [int(values[i]) for i in some]
        )

    def learn(self, x: Floats, rooms: list[int]) -> bool:
        """Add what the choice's packing shows; False when it fits as far as the functions see."""
        grown = False
        for p, room in enumerate(rooms):
            at = min(int(self.pieces.needed(p, x, room + 1.0)) - 1, UNITS - 1)
            if at <= room:
                continue
            values, index = self.pieces.usage(p, at + 1.0)
            use = values @ np.bincount(index, x[self.pieces.owner] * self.pieces.copies, values.shape[1])
            rows = [int(k) for k in np.argsort(-use)[:ROWS] if use[k] > 1 + VIOLATED]
            if not rows:
                continue
            above = self.model.new_bool_var("")
            self.model.add(self.rooms[p] >= at + 1).only_enforce_if(above)
            self.model.add(self.rooms[p] <= at).only_enforce_if(above.negated())
            for k in rows:
                taken = _down(self.pieces.by_option(values[k], index) * SHARES)
                self.model.add(self._sum(taken) <= SHARES).only_enforce_if(above.negated())
            grown = True
        return grown


def _down(values: Floats) -> np.ndarray:
    """Integers at most the values (which may be a rounding error below an integer)."""
    return np.floor(values * (1 - 1e-12)).astype(np.int64)


def whole_bound(compiled: Compiled, incumbent: float, seed: int = 0, work: float = WORK) -> Whole:
    """Solve, learn, and solve again until the bound hardly rises; at most the incumbent."""
    model = _Model(compiled, incumbent)
    made = Whole(0.0)
    if not model.complete:
        made.bound = incumbent
        return made
    left = work
    for _ in range(ROUNDS):
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = seed
        solver.parameters.max_deterministic_time = left
        status = solver.solve(model.model)
        if status == cp_model.INFEASIBLE:
            made.bound = incumbent  # nothing is better than the incumbent
            break
        before = made.bound
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) or solver.best_objective_bound > 0:
            made.bound = max(made.bound, solver.best_objective_bound / UNITS * incumbent)
        if status != cp_model.OPTIMAL:
            break
        x = np.array([float(solver.boolean_value(take)) for take in model.take])
        chosen = model.keep[x > 0.5]
        made.choices.append([int(o - s) for o, s in zip(chosen, compiled.start[:-1], strict=True)])
        left -= solver.response_proto.deterministic_time
        small = made.bound < before * (1 + WORTH)
        if small or left <= 0 or not model.learn(x, [solver.value(room) for room in model.rooms]):
            break
    return made
