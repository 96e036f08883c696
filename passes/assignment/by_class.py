"""Placements from the best boxes of :mod:`passes.assignment.host_bound`.

A box knows how many hosts have pieces of scope "host", which tables go there, and how long each phase lasts. With whole
numbers of hosts, and the rooms held near the optimum, the program is solved again and again while the rooms follow:
then the lifting counts what such rooms really leave open. Each table takes its largest option and class, and is placed,
largest first, where the fullest phase stays emptiest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from passes.assignment.budget import Budget
from passes.assignment.compiled import HOST, Choice, Compiled, Group
from passes.assignment.fitting import insert_all
from passes.assignment.host_bound import NODES, HostBound, Leaf
from passes.assignment.host_classes import CLASSES
from passes.assignment.host_program import Box, Found
from passes.assignment.insertion import State
from passes.assignment.pair_polish import NEAR, WARM, PairPolish
from passes.assignment.problem import Floats
from passes.assignment.target_search import Incumbent

AIM = 0.03  # above the bound: better solutions than this are looked for
LEAVES = 12  # best boxes that are looked at for placements
NUMBERS = 3  # of hosts in the first class that are looked at
COOLINGS = (NEAR, WARM)  # of two runs of polishing, of which the better counts
BOUND_SHARE = 0.5  # of the work, at most
COLUMN_WORK = (
    1.2e-5  # seconds an option and class in a program, measured on one core of the development machine
)
WIDTH = 0.01  # of a room: how far it may move in one solution of the program
MOVES = 6  # solutions of the program from one leaf
HELD = 1e-6  # relative slack of the held phase
OVER = 1e3  # price of a full held phase
OUTSIDE = 1e2  # and of a host of another class


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """Option and class of each table (-1: none), hosts in the first class, seconds that placed pieces may take."""

    value: float
    choice: list[int]
    kind: list[int]
    first: int
    targets: Floats
    held: NDArray[np.bool_]  # phases of the problem that count whole pieces
    usual: Floats  # seconds of the held phases that pieces of hosts of a class take


def improve_by_class(
    compiled: Compiled, best: Incumbent, bound: float, budget: Budget, seed: int, stop: float
) -> tuple[float, bool]:
    """Improve ``best`` in place; (bound in seconds, whether classes of hosts were of use)."""
    search = HostBound(compiled, min(best.value, bound * (1 + AIM)))
    if not search.program.complete:
        return bound, False
    work = COLUMN_WORK * CLASSES * len(search.program.owner)
    proved, leaf = search.run(int(min(NODES, BOUND_SHARE * budget.limit / work)), bound)
    bound = max(bound, proved)
    proposal = _proposal(search, LEAVES) if leaf is not None else None
    places = None if proposal is None else place(compiled, proposal, budget)
    budget.spend(work * search.program.solved)
    if proposal is None or places is None:
        return bound, False
    found = Incumbent()
    for k, cooling in enumerate(COOLINGS):
        again = Incumbent(math.inf, math.inf, proposal.choice, [list(row) for row in places])
        part = budget.slice(1.0 / (len(COOLINGS) - k))
        PairPolish(compiled, again, seed).run(part, bound, stop, cooling)
        budget.spend(part.work)
        found = min(found, again, key=lambda known: known.value)
    if found.value >= best.value:
        return bound, False
    best.value, best.choice, best.placement = found.value, found.choice, found.placement
    return bound, True


def _proposal(bound: HostBound, leaves: int) -> Proposal | None:
    """The best settled point of the best leaves, of all numbers of hosts there."""
    best: tuple[Box, Found, int] | None = None
    tried: set[int] = set()
    for leaf in bound.open[:leaves]:
        if len(leaf.found.hosts) < CLASSES:
            continue
        for first in sorted({math.floor(leaf.found.hosts[0]), math.ceil(leaf.found.hosts[0])} - tried):
            tried.add(first)
            found = _settled(bound, leaf, first) if len(tried) <= NUMBERS else None
            if found is not None and (best is None or found.value < best[1].value):
                best = leaf.box, found, first
    return None if best is None else _rounded(bound, *best)


def _settled(bound: HostBound, leaf: Leaf, first: int) -> Found | None:
    program = bound.program
    number = np.array([float(first), program.total_hosts - first])
    held = np.arange(program.phases) == program.held
    best, here = None, leaf.found
    for _ in range(MOVES):
        low = np.where(held, leaf.box.low, here.rooms * (1 - WIDTH))
        high = np.where(held, leaf.box.high, here.rooms * (1 + WIDTH))
        found = program.solve(Box(low, high, number, number))
        if found is None:
            break
        here = found
        if best is None or found.value < best.value:
            best = replace(found, rooms=np.where(held, leaf.box.high, found.rooms))
    return best


def _rounded(bound: HostBound, box: Box, found: Found, first: int) -> Proposal:
    program = bound.program
    compiled = program.compiled
    share = np.zeros((len(program.keep), found.x.shape[1]))
    np.add.at(share, program.owner, found.x)
    groups = np.bincount(program.owner, minlength=len(program.keep))
    weight = share.sum(axis=1) / np.maximum(groups, 1)
    choice, kind = [], []
    for t, (a, b) in enumerate(zip(program.edges[:-1], program.edges[1:], strict=True)):
        placed = weight[a:b].sum()
        rest = (1.0 - placed) * _cheapest(program.cost[a:b], groups[a:b])
        value = np.where(groups[a:b] > 0, weight[a:b], rest)
        o = int(a + value.argmax())
        choice.append(int(program.keep[o] - compiled.start[t]))
        kind.append(int(share[o].argmax()) if groups[o] else -1)
    targets = np.zeros(len(compiled.problem.phases))
    for k, p in enumerate(program.merged):
        targets[k] = found.rooms[p] * program.scale[k] * bound.incumbent
    usual = program.classes(box).usual * bound.incumbent
    return Proposal(found.value, choice, kind, first, targets, program.merged == program.held, usual)


def _cheapest(cost: Floats, groups: NDArray[np.int64]) -> Floats:
    """One for the cheapest option without pieces to place."""
    made = np.zeros(len(cost))
    none = np.flatnonzero(groups == 0)
    if len(none):
        made[int(none[int(cost[none].argmin())])] = 1.0
    return made


class _Price:
    """Prices of places for a table whose pieces belong on hosts of class ``kind``."""

    def __init__(self, proposal: Proposal, kind: int) -> None:
        self.targets, self.held = np.maximum(proposal.targets, 1e-300), proposal.held
        self.first = proposal.first
        self.usual = proposal.usual
        self.kind = kind

    def __call__(self, state: State, group: Group, levels: int) -> Floats:
        size = state.problem.host_size
        loads = state.loads / self.targets
        host = np.arange(state.problem.ranks) // size
        if group.scope == HOST:
            loads = loads.reshape(state.problem.hosts, size, -1).max(axis=1)
            host = np.arange(state.problem.hosts)
        step = np.asarray(group.phases) / self.targets
        after = loads[None] + np.arange(1, levels + 1)[:, None, None] * step
        most = np.ones((len(host), 1))
        if group.scope == HOST:
            most = self.usual[(host >= self.first).astype(int)][:, None] / self.targets[self.held]
        full = np.maximum(after[:, :, self.held] - most * (1 + HELD), 0.0).sum(axis=2)
        outside = (host >= self.first) != self.kind
        price: Floats = np.where(self.held, 0.0, after).max(axis=2) + OVER * full + OUTSIDE * outside[None]
        return price


def place(compiled: Compiled, proposal: Proposal, budget: Budget) -> list[list[int]] | None:
    """Places of all pieces; None when one fits nowhere."""
    chosen = [compiled.choices[t][j] for t, j in enumerate(proposal.choice)]
    weights = np.where(proposal.held, 0.0, 1.0 / np.maximum(proposal.targets, 1e-300))
    sizes = np.array([_size(choice, weights) for choice in chosen])
    prices = {kind: _Price(proposal, kind) for kind in set(proposal.kind)}
    order = np.argsort(-sizes, kind="stable")
    return insert_all(compiled.problem, chosen, order, lambda t: prices[proposal.kind[t]], budget)


def _size(choice: Choice, weights: Floats) -> float:
    """What decides the order: hosts first, then the sum of the shares of the targets."""
    return max(
        (float(np.asarray(g.phases) @ weights) + (1e3 if g.scope == HOST else 0.0) for g in choice.groups),
        default=0.0,
    )
