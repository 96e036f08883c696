"""Branch and bound over rooms and numbers of hosts, on the program of :mod:`passes.assignment.host_program`.

Best first. The held phase is split at the sums of its pieces until the best box has one. That box is then narrowed to
where better solutions than the incumbent can be, and for each phase the lifting is chosen that its optimum violates most.
From there on a box is split where its optimum is furthest from obeying what the program relaxes: a number of hosts, or
a room of a lifting.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np

from passes.assignment.compiled import Compiled
from passes.assignment.host_classes import CLASSES
from passes.assignment.host_program import Box, Found, HostProgram, Tilt
from passes.assignment.problem import Floats

NODES = 80  # boxes solved at most
APART = 1e-5  # violation that is worth a split, in incumbents
NEAR = 1e-7  # relative: a room this close above a sum is that sum
CLOSE = 1e-9  # taken off for the rounding of a few thousand additions
SLOPE = 0.5  # price of a room at which boxes are narrowed, beside its weight of one
HOST_SLOPE = 0.1  # the same of all hosts, in incumbents
FAR = 0.02  # below a known bound: what a search does not catch up
STEP = 0.02  # of a room: how far above it a box is split
METHOD = "linear program over options, classes of hosts and phase lengths (GLOP)"


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A box and its optimum; ``value`` is proved."""

    value: float
    box: Box
    found: Found


class HostBound:
    """The search for one incumbent in seconds."""

    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        self.program = HostProgram(compiled, incumbent)
        self.incumbent = incumbent

    def run(self, nodes: int = NODES, known: float = 0.0) -> tuple[float, Leaf | None]:
        """(bound in seconds, best open leaf); the leaf is None when nothing is better than the incumbent.

        The search gives up where it starts far below a ``known`` bound.
        """
        program = self.program
        if not program.complete:
            return self.incumbent, None
        leaves = self._search(self._leaves([program.whole()], 0.0), nodes, held=True)
        hopeful = bool(leaves) and leaves[0].value * self.incumbent > known * (1 - FAR)
        if hopeful and self._ready(leaves[0].box):
            first = leaves[0]
            box = self._narrow(first.box)
            program.pairs = self._pairs(Leaf(first.value, box, first.found))
            leaves = self._search([*leaves[1:], *self._leaves([box], first.value)], nodes, held=False)
        self.open = leaves if hopeful else []
        least = leaves[0].value if leaves else 1.0
        return least * self.incumbent * (1 - CLOSE), leaves[0] if hopeful else None

    def _leaves(self, boxes: list[Box], least: float) -> list[Leaf]:
        """The boxes with solutions that may be better than the incumbent."""
        made = []
        for box in boxes:
            found = self.program.solve(box) if _possible(box) else None
            if found is not None and max(found.value, least) < 1.0:
                made.append(Leaf(max(found.value, least), box, found))
        return made

    def _search(self, leaves: list[Leaf], nodes: int, held: bool) -> list[Leaf]:
        """Split the best leaf until ``nodes`` boxes were solved, in order of their values.

        With ``held`` only the held phase is split.
        """
        heap = [(leaf.value, i, leaf) for i, leaf in enumerate(leaves)]
        heapq.heapify(heap)
        number = len(heap)
        while heap and self.program.solved < nodes:
            value, _, leaf = heap[0]
            boxes = self._steps(leaf) if held or not self._ready(leaf.box) else self._split(leaf)
            if not boxes:
                break
            heapq.heappop(heap)
            for made in self._leaves(boxes, value):
                heapq.heappush(heap, (made.value, number, made))
                number += 1
        return [leaf for _, _, leaf in sorted(heap, key=lambda entry: entry[:2])]

    def _ready(self, box: Box) -> bool:
        """Whether the held phase, where there is one, has one room."""
        return self.program.held < 0 or self.program.alone(box)

    def _steps(self, leaf: Leaf) -> list[Box]:
        """Split the held phase between two sums of its pieces; empty where there is one."""
        box, program = leaf.box, self.program
        p = program.held
        if p < 0:
            return []
        first, last = program.steps
        inside = np.flatnonzero((last >= box.low[p]) & (first <= box.high[p]))
        if len(inside) < 2:
            return []
        at = int(np.searchsorted(last[inside], leaf.found.rooms[p] * (1 - NEAR)))  # the room, rounded up
        at = int(inside[max(1, min(at + int(at == 0), len(inside) - 1))])
        below = replace(box, high=_edge(box.high, p, float(last[at - 1])))
        return [below, replace(box, low=_edge(box.low, p, float(first[at])))]

    def _narrow(self, box: Box) -> Box:
        """The part of a box where solutions better than the incumbent can be.

        With a price t on a room c, the least of objective + t c is L: so t c >= L - 1 where the objective is below 1.
        """
        program = self.program
        low, high, least, most = (edge.copy() for edge in (box.low, box.high, box.least, box.most))
        for p in range(program.phases):
            for t in (SLOPE, -SLOPE) if p != program.held else ():
                tilt = Tilt(_edge(np.zeros(program.phases), p, t), np.zeros(CLASSES))
                _limit(low, high, p, t, program.solve(Box(low, high, least, most), tilt))
        for k in range(CLASSES):
            for t in (HOST_SLOPE / program.total_hosts, -HOST_SLOPE / program.total_hosts):
                tilt = Tilt(np.zeros(program.phases), _edge(np.zeros(CLASSES), k, t))
                _limit(least, most, k, t, program.solve(Box(low, high, least, most), tilt))
                least, most = np.ceil(least - NEAR), np.floor(most + NEAR)
        return self._hosts_left(Box(low, high, least, most))

    def _pairs(self, leaf: Leaf) -> tuple[tuple[int, int], ...]:
        """For each phase the lifting that the leaf's optimum violates most."""
        program = self.program
        point = replace(leaf.box, low=leaf.found.rooms, high=leaf.found.rooms)
        made = []
        for q in range(program.phases):
            best = APART, -1
            for p in range(program.phases):
                if p != q and program.held not in (p, q) and np.isfinite(program.ratio[p, q]):
                    program.pairs = ((p, q),)
                    best = max(best, (float(self._excess(leaf, program.inflated(point))[:, q].sum()), p))
            if best[1] >= 0:
                made.append((best[1], q))
        return tuple(made)

    def _excess(self, leaf: Leaf, counted: Floats) -> Floats:
        """(classes, phases): by how much a leaf's optimum overfills the ranks of a class, in incumbents."""
        program, found = self.program, leaf.found
        used = (program.many[:, None] * found.x).T @ counted
        room = found.hosts[:, None] / program.total_hosts * found.rooms
        over: Floats = np.maximum(used - room, 0.0) * program.weight
        return over

    def _split(self, leaf: Leaf) -> list[Box]:
        """The boxes that replace one; empty when its optimum obeys what the program relaxes."""
        box, found, program = leaf.box, leaf.found, self.program
        point = replace(box, low=found.rooms, high=found.rooms)
        hosts = self._excess(leaf, found.inflated)
        lifted = (self._excess(leaf, program.inflated(point)) - hosts).sum(axis=0)
        hosts = np.where((box.most - box.least)[: len(hosts)] > 0.5, hosts.sum(axis=1), 0.0)
        if max(lifted.max(), hosts.max()) <= APART:
            return []
        if lifted.max() > hosts.max():
            return self._rooms(leaf, int(lifted.argmax()))
        k = int(hosts.argmax())
        at = float(np.clip(np.floor(found.hosts[k] + NEAR), box.least[k], box.most[k] - 1))
        made = [replace(box, most=_edge(box.most, k, at)), replace(box, least=_edge(box.least, k, at + 1))]
        return [self._hosts_left(half) for half in made]

    def _hosts_left(self, box: Box) -> Box:
        """The same solutions: what the limits of the other classes leave to one."""
        rest = self.program.total_hosts
        least = np.maximum(box.least, rest - (box.most.sum() - box.most))
        most = np.minimum(box.most, rest - (box.least.sum() - box.least))
        return replace(box, least=least, most=most)

    def _rooms(self, leaf: Leaf, q: int) -> list[Box]:
        """Split the room of the lifting that is further from its edge."""
        box, rooms, program = leaf.box, leaf.found.rooms, self.program
        p = next(p for p, other in program.pairs if other == q)
        under, over = rooms[q] - box.low[q], box.high[p] - rooms[p]
        if under > program.ratio[p, q] * over:
            p, at = q, float(rooms[q] - 0.5 * under)
        else:
            at = float(rooms[p] + min(0.5 * over, STEP * rooms[p]))
        return [replace(box, high=_edge(box.high, p, at)), replace(box, low=_edge(box.low, p, at))]


def _possible(box: Box) -> bool:
    return bool((box.low <= box.high).all() and (box.least <= box.most).all())


def _limit(low: Floats, high: Floats, at: int, price: float, found: Found | None) -> None:
    """Move one edge, in place, to where the tilted optimum says that the objective reaches the incumbent."""
    if found is None:
        return
    limit = (found.value - 1.0) / price
    if price > 0:
        low[at] = max(low[at], limit)
    else:
        high[at] = min(high[at], limit)


def _edge(edges: Floats, at: int, value: float) -> Floats:
    made = edges.copy()
    made[at] = value
    return made
