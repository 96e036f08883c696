"""A proved lower bound for several phases by branch and bound over the rooms, and the choices at its leaves.

The linear program of a box of rooms (:mod:`passes.assignment.room_program`) sees how whole pieces pack only
through the box's upper end. Where its optimum does not fit the rooms it has, a dual feasible function names a
room up to which that is so; the box is split there: below, the function becomes a row, above, the room costs
its seconds. Best first; the smallest value of an open box bounds every solution at any time.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from passes.assignment.compiled import Compiled
from passes.assignment.problem import Floats
from passes.assignment.room_dual import RoomDual
from passes.assignment.room_program import Point, RoomProgram

NODES = 40  # boxes at most; a handful settles most problems
APART = 1e-5  # relative distance at which a split is worth making
CLOSE = 1e-9  # taken off for the rounding of a few thousand additions


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A box and its optimum."""

    low: Floats
    high: Floats
    point: Point


class RoomBound:
    """The search over boxes for one incumbent; rooms and values in units of the incumbent."""

    program: RoomProgram | RoomDual

    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        self.program = RoomProgram(compiled, incumbent)
        self.incumbent = incumbent

    def run(self, low: Floats | None = None, nodes: int = NODES) -> tuple[float, Leaf | None]:
        """(bound in seconds for rooms from ``low`` on, best open leaf); the bound is at most the incumbent.

        The leaf is None when no solution with such rooms is better than the incumbent.
        """
        program = self.program
        if not program.complete:
            return self.incumbent, None
        low = np.zeros(program.phases) if low is None else low
        high = np.ones(program.phases)  # a better solution has smaller rooms
        heap: list[tuple[float, int, Leaf]] = []

        def push(low: Floats, high: Floats, least: float) -> None:
            point = program.solve(low, high) if (low <= high).all() else None
            if point is not None and max(point.value, least) < 1.0:
                heapq.heappush(heap, (max(point.value, least), program.solved, Leaf(low, high, point)))

        push(low, high, 0.0)
        while heap and nodes > 0:
            value, number, leaf = heapq.heappop(heap)
            split = self._split(leaf)
            if split is None:
                heapq.heappush(heap, (value, number, leaf))
                break
            phase, at = split
            nodes -= 2
            for below in (True, False):
                edge = (leaf.high if below else leaf.low).copy()
                edge[phase] = at
                push(*((leaf.low, edge) if below else (edge, leaf.high)), value)
        least = heap[0][0] if heap else 1.0
        return least * self.incumbent * (1 - CLOSE), heap[0][2] if heap else None

    def _split(self, leaf: Leaf) -> tuple[int, float] | None:
        """The phase whose room is furthest from what its pieces need, and that room."""
        best: tuple[float, int, float] | None = None
        for p, room in enumerate(leaf.point.rooms):
            at = min(self.program.pieces.needed(p, leaf.point.x, float(room)), float(leaf.high[p]))
            if at > room * (1 + APART) and (best is None or at - room > best[0]):
                best = float(at - room), p, at
        return None if best is None else (best[1], best[2])
