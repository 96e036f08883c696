"""A linear program over options, classes of hosts and rooms, for several phases.

It knows two things that averages over all ranks (:mod:`passes.assignment.room_program`) do not.

Hosts fall into CLASSES by what their pieces of scope "host" leave in one phase whose pieces have few sizes, the held
phase: as many of its most common single pieces fit a rank as beside nothing, or fewer. Each class obeys the limits
by itself, with its number of hosts a variable. Products of that number and a room are replaced by their envelope over
the box (McCormick 1976, Computability of global solutions to factorable nonconvex programs).

A rank that holds a piece of load ``a`` in phase ``p`` has room for ``c_p - a``, and so for no more than
``rho (c_p - a)`` of phase ``q``, where ``rho`` is the largest ratio of the two loads in any piece. The
rest of ``c_q`` stays empty beside that piece. So pieces of loads ``a, b`` may be counted in phase ``q`` with

    max(b, D + rho a),   D = min(0, low_q - rho high_p),

and a rank still holds at most ``c_q`` of them: with ``n > 0`` pieces counted by the second term, their sum is at most
``n D + rho c_p <= D + rho c_p <= c_q``; with none it is the load.

Phases in which all pieces have proportional loads are one phase. OR-Tools' GLOP solves the program; the value is
the Lagrangian at its prices, evaluated here (Neumaier and Shcherbina 2004), as in ``room_program``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp

from passes.assignment.compiled import HOST, Compiled
from passes.assignment.host_classes import CLASSES, ROUND, Classes, classes_of, held_phase, one_class
from passes.assignment.packing_bound import dual_feasible
from passes.assignment.problem import Floats
from passes.assignment.room_program import Rooms

FUNCTIONS = 2  # dual feasible functions added for a class and round
VIOLATED = 1e-6
ROUNDS = 4
ELASTIC = 20.0  # incumbents that exceeding all rows by a whole one costs, so that every box has a solution

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """Rooms of the phases from ``low`` to ``high``, and numbers of hosts in each class from ``least`` to ``most``."""

    low: Floats
    high: Floats
    least: Floats
    most: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Tilt:
    """What a unit of each room, and a host of each class, cost beside the objective."""

    rooms: Floats
    hosts: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The optimum of a box; loads in units of the incumbent."""

    value: float  # proved
    x: Floats  # (groups, classes) share of a table whose option and class this is
    rooms: Floats
    hosts: Floats  # (classes,)
    inflated: Floats  # (groups, phases) loads as they were counted


class HostProgram(Rooms):
    """The program of one problem. ``complete`` is False where a table has no option left.

    Attributes:
        phases: of the program: those with proportional loads are one.
        weight: (phases,) seconds of the objective that a second of a phase's room is.
        owner: (groups,) option, as index of ``keep``, of each group of equal pieces.
        load: (groups, phases) of one piece on one rank.
        many: (groups,) ranks that the group's pieces are on, over all ranks.
        on_host: (groups,) whether its pieces are of scope "host".
        held: the phase that classes are made by; -1 for none.
        steps: (2, n) clusters of sums of sizes of the held phase, in order: a rank's largest load there is in one.
    """

    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        super().__init__(compiled, incumbent)
        if not self.complete:
            return
        problem = compiled.problem
        self.total_hosts = float(problem.hosts)
        rows = [
            (i, group.phases, group.copies * (problem.host_size if group.scope == HOST else 1), group.scope)
            for i, o in enumerate(self.keep)
            for group in compiled.choices[compiled.table[o]][o - compiled.start[compiled.table[o]]].groups
        ]
        self.owner: Ints = np.array([row[0] for row in rows], dtype=np.int64)
        load = np.array([row[1] for row in rows], dtype=np.float64).reshape(len(rows), -1) / incumbent
        self.many: Floats = np.array([float(row[2]) for row in rows]) / problem.ranks
        self.on_host: Mask = np.array([row[3] == HOST for row in rows], dtype=np.bool_)
        first, self.merged, self.scale = _merged(load)
        self.weight = np.bincount(self.merged, self.scale * (1 - ROUND))
        self.load: Floats = load[:, first]
        self.phases = len(first)
        self.held, self.steps = held_phase(self.load)
        self.ratio = np.full((self.phases, self.phases), np.inf)  # (p, q): largest load in q over that in p
        for p in np.flatnonzero((self.load > 0).all(axis=0)):
            self.ratio[p] = (self.load / self.load[:, [p]]).max(axis=0, initial=0.0) * (1 + ROUND)
        self.pairs: tuple[tuple[int, int], ...] = ()  # phases p and q of the liftings, one for each q at most
        self._solvers: dict[tuple[float, bool], _Solver] = {}

    def inflated(self, box: Box) -> Floats:
        """(groups, phases): the loads as they may be counted."""
        made = self.load.copy()
        for p, q in self.pairs:
            offset = min(0.0, float(box.low[q] - self.ratio[p, q] * box.high[p]))
            made[:, q] = np.maximum(made[:, q], offset + self.ratio[p, q] * self.load[:, p])
        return made

    def alone(self, box: Box) -> bool:
        """Whether the held phase has one possible room in the box."""
        if self.held < 0:
            return False
        low, high = box.low[self.held], box.high[self.held]
        return int(((self.steps[1] >= low) & (self.steps[0] <= high)).sum()) == 1

    def classes(self, box: Box) -> Classes:
        """One class, or ``CLASSES`` of them where the room of the held phase is known."""
        if not self.alone(box):
            return one_class(float(box.high[max(self.held, 0)]))
        return classes_of(self.load[:, self.held], self.many, self.on_host, float(box.high[self.held]))

    def whole(self) -> Box:
        """The box of all better solutions."""
        one = np.ones(self.phases)
        hosts = np.full(CLASSES, self.total_hosts)
        return Box(np.zeros(self.phases), one, np.zeros(CLASSES), hosts)

    def solve(self, box: Box, tilt: Tilt | None = None) -> Found | None:
        """The optimum of a box; None when no choice has all pieces within it. ``tilt`` adds to the objective."""
        open_groups = np.all(self.load <= box.high * (1 + ROUND), axis=1)
        fits = np.ones(len(self.keep), dtype=np.bool_)
        fits[self.owner[~open_groups]] = False
        if not np.logical_or.reduceat(fits, self.edges[:-1]).all():
            return None
        key = (float(box.high[self.held]) if self.held >= 0 else 1.0, self.alone(box))
        if key not in self._solvers:
            self._solvers[key] = _Solver(self, self.classes(box))
        solver = self._solvers[key]
        if solver.number == 1:
            box = replace(box, least=np.array([self.total_hosts]), most=np.array([self.total_hosts]))
        elif not box.least.sum() <= self.total_hosts <= box.most.sum():
            return None
        self.solved += 1
        return solver.run(
            box, fits, self.inflated(box), tilt or Tilt(np.zeros(self.phases), np.zeros(CLASSES))
        )


def _merged(load: Floats) -> tuple[Ints, Ints, Floats]:
    """First phase of each set of phases with proportional loads; of each phase its set, and its load over the first's."""
    first: list[int] = []
    merged, scale = np.zeros(load.shape[1], dtype=np.int64), np.ones(load.shape[1])
    for p in range(load.shape[1]):
        top = load[:, p].max(initial=0.0)
        for k, q in enumerate(first):
            ratio = top / max(load[:, q].max(initial=0.0), 1e-300)
            if top > 0 and np.allclose(load[:, p], ratio * load[:, q], rtol=ROUND, atol=0.0):
                merged[p], scale[p] = k, ratio
                break
        else:
            merged[p] = len(first)
            first.append(p)
    return np.array(first, dtype=np.int64), merged, scale


class _Solver:
    """GLOP's program for one room of the held phase; its rows and columns change from box to box."""

    def __init__(self, program: HostProgram, classes: Classes) -> None:
        self.program, self.classes = program, classes
        self.number = len(classes.left)
        solver = self.solver = pywraplp.Solver.CreateSolver("GLOP")
        infinity = self.infinity = solver.infinity()
        objective = self.objective = solver.Objective()
        objective.SetMinimization()
        groups = np.bincount(program.owner, minlength=len(program.keep))
        self.rows: list[pywraplp.Constraint] = []  # those with a price
        self.option = {o: solver.NumVar(0.0, infinity, "") for o in np.flatnonzero(groups != 1).tolist()}
        self.placed = [
            [solver.NumVar(0.0, infinity, "") for _ in range(self.number)] for _ in range(len(program.owner))
        ]
        self.room = [solver.NumVar(0.0, 1.0, "") for _ in range(program.phases)]
        self.hosts = [solver.NumVar(0.0, program.total_hosts, "") for _ in range(self.number)]
        self.over = solver.NumVar(0.0, 1.0, "")
        objective.SetCoefficient(self.over, ELASTIC)
        self._tables(objective)
        total = solver.Constraint(program.total_hosts, program.total_hosts)
        for host in self.hosts:
            total.SetCoefficient(host, 1.0)
        shape = range(program.phases)
        self.average = [self._row() for _ in shape]
        self.within = [[(self._row(), self._row()) for _ in shape] for _ in range(self.number)]
        for p in shape:
            self.average[p].SetCoefficient(self.room[p], 1.0)
        self.counted = np.zeros((len(program.owner), program.phases))  # loads in the rows
        self.taken = self._taken()
        self.functions: list[tuple[int, Floats, pywraplp.Constraint]] = []  # class, use by group, row
        self.fits = np.ones(len(program.keep), dtype=np.bool_)

    def _row(self, least: float = 0.0) -> pywraplp.Constraint:
        row = self.solver.Constraint(least, self.infinity)
        row.SetCoefficient(self.over, 1.0)
        self.rows.append(row)
        return row

    def _tables(self, objective: pywraplp.Objective) -> None:
        """One option a table; the memory; pieces of options with several groups of them."""
        program = self.program
        groups: list[list[int]] = [[] for _ in program.keep]
        for g, o in enumerate(program.owner.tolist()):
            groups[o].append(g)
        self.memory = self._row(-1.0)
        for first, last in zip(program.edges[:-1], program.edges[1:], strict=True):
            one = self.solver.Constraint(1.0, 1.0)
            for o in range(int(first), int(last)):
                mine = [self.option[o]] if o in self.option else self.placed[groups[o][0]]
                for column in mine:
                    one.SetCoefficient(column, 1.0)
                    objective.SetCoefficient(column, float(program.cost[o]))
                    self.memory.SetCoefficient(column, -float(program.memory[o]))
                for g in groups[o] if o in self.option else ():
                    link = self.solver.Constraint(0.0, 0.0)
                    link.SetCoefficient(self.option[o], -1.0)
                    for column in self.placed[g]:
                        link.SetCoefficient(column, 1.0)

    def _taken(self) -> list[pywraplp.Constraint | None]:
        """What pieces of hosts take of the held phase in each class."""
        program = self.program
        made: list[pywraplp.Constraint | None] = []
        for k in range(self.number):
            if not np.isfinite(self.classes.taken[k]):
                made.append(None)
                continue
            row = self._row()
            row.SetCoefficient(self.hosts[k], float(self.classes.taken[k]) / program.total_hosts)
            for g in np.flatnonzero(program.on_host):
                value = -float(program.many[g] * program.load[g, program.held])
                row.SetCoefficient(self.placed[g][k], value)
            made.append(row)
        return made

    def run(self, box: Box, fits: Mask, inflated: Floats, tilt: Tilt) -> Found:
        """Solve one box."""
        self._enter(box, fits, inflated)
        self.room_cost = self.program.weight + tilt.rooms
        self.host_cost = tilt.hosts[: self.number]
        for column, cost in zip(self.room + self.hosts, [*self.room_cost, *self.host_cost], strict=True):
            self.objective.SetCoefficient(column, float(cost))
        best: Found | None = None
        for _ in range(ROUNDS):
            if self.solver.Solve() != pywraplp.Solver.OPTIMAL:
                break
            found = self._found(box, fits, inflated)
            best = found if best is None or found.value >= best.value else best
            if not self._cut(found):
                break
        if best is None:  # what is known should GLOP fail
            return Found(0.0, np.zeros((len(self.placed), self.number)), box.low, box.least, inflated)
        return best

    def _enter(self, box: Box, fits: Mask, inflated: Floats) -> None:
        program = self.program
        for g in np.flatnonzero(fits[program.owner] != self.fits[program.owner]):
            for column in self.placed[g]:
                column.SetUb(self.infinity if fits[program.owner[g]] else 0.0)
        self.fits = fits
        for g, p in zip(*np.nonzero(inflated != self.counted), strict=True):
            value = -float(program.many[g] * inflated[g, p])
            for k, column in enumerate(self.placed[g]):
                self.average[p].SetCoefficient(column, value)
                for row in self.within[k][p]:
                    row.SetCoefficient(column, value)
        self.counted = inflated
        hosts = program.total_hosts
        for p, room in enumerate(self.room):
            low, high = float(box.low[p]), float(box.high[p])
            room.SetBounds(low, high)
            for k, host in enumerate(self.hosts):
                least, most = float(box.least[k]), float(box.most[k])
                for row, count, edge in zip(self.within[k][p], (most, least), (low, high), strict=True):
                    row.SetCoefficient(room, count / hosts)
                    row.SetCoefficient(host, edge / hosts)
                    row.SetLb(count * edge / hosts)
        for k, host in enumerate(self.hosts):
            host.SetBounds(float(box.least[k]), float(box.most[k]))

    def _cut(self, found: Found) -> bool:
        """Add dual feasible functions of single pieces that the classes violate; False when there are none."""
        program, added = self.program, False
        if program.held < 0:
            return False
        size = program.load[:, program.held]
        counts = np.ones(len(size), dtype=np.bool_) if self.number == 1 else ~program.on_host
        sizes, index = np.unique(size, return_inverse=True)
        for k in range(self.number):
            left = float(self.classes.left[k])
            if not 0 < left < 1.0:
                continue
            values = dual_feasible(sizes / left)
            use = np.bincount(index, found.x[:, k] * program.many * counts, len(sizes))
            over = values @ use - found.hosts[k] / program.total_hosts
            for f in np.argsort(-over)[:FUNCTIONS]:
                if over[f] > VIOLATED:
                    taken = values[f][index] * program.many * counts
                    row = self._row()
                    row.SetCoefficient(self.hosts[k], 1.0 / program.total_hosts)
                    for g in np.flatnonzero(taken):
                        row.SetCoefficient(self.placed[g][k], -float(taken[g]))
                    self.functions.append((k, taken, row))
                    added = True
        return added

    def _found(self, box: Box, fits: Mask, inflated: Floats) -> Found:
        """The optimum, its value proved by the Lagrangian."""
        program = self.program
        prices = np.array([_price(row) for row in self.average])
        within = np.array([[[_price(row) for row in rows] for rows in per] for per in self.within])
        memory = _price(self.memory)
        total = program.total_hosts
        room = self.room_cost - prices
        hosts = self.host_cost.copy()
        value = min(0.0, ELASTIC - sum(_price(row) for row in self.rows)) - memory
        for p in range(program.phases):
            for side, count, edge in ((0, box.most, box.low[p]), (1, box.least, box.high[p])):
                price = within[:, p, side]
                room[p] -= float(price @ count) / total
                hosts -= price * edge / total
                value += float(price @ count) * edge / total
        group = (program.many[:, None] * inflated) @ (prices[:, None] + within.sum(axis=2).T)
        held = program.many * program.load[:, program.held]
        for k, row in enumerate(self.taken):
            if row is not None:
                group[:, k] += _price(row) * held * program.on_host
                hosts[k] -= _price(row) * self.classes.taken[k] / total
        for k, taken, row in self.functions:
            group[:, k] += _price(row) * taken
            hosts[k] -= _price(row) / total
        reduced = program.cost + memory * program.memory
        np.add.at(reduced, program.owner, group.min(axis=1))
        reduced[~fits] = np.inf
        value += float(np.minimum.reduceat(reduced, program.edges[:-1]).sum())
        value += float(np.minimum(room * box.low, room * box.high).sum())
        value += _least_hosts(hosts, box.least[: self.number], box.most[: self.number], total)
        return Found(
            value,
            np.array([[column.solution_value() for column in row] for row in self.placed]),
            np.array([variable.solution_value() for variable in self.room]),
            np.array([variable.solution_value() for variable in self.hosts]),
            inflated,
        )


def _price(row: pywraplp.Constraint) -> float:
    return max(0.0, float(row.dual_value()))


def _least_hosts(cost: Floats, least: Floats, most: Floats, total: float) -> float:
    """min cost n over least <= n <= most with sum n = total; infinite where there is none."""
    if least.sum() > total or most.sum() < total:
        return float("inf")
    left, value = total - float(least.sum()), float(cost @ least)
    for k in np.argsort(cost):
        part = min(left, float(most[k] - least[k]))
        value, left = value + part * float(cost[k]), left - part
    return value
