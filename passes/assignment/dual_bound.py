"""The bound of :mod:`passes.assignment.room_bound` with boxes solved by :mod:`passes.assignment.room_dual`.

Boxes cost a hundredth of what they cost GLOP, so there can be many, also with thousands of tables. A box is split
where the largest piece in use exceeds its room, too: below, the piece is closed; above, the room costs its seconds.
"""

from __future__ import annotations

from passes.assignment.compiled import Compiled
from passes.assignment.room_bound import APART, Leaf, RoomBound
from passes.assignment.room_dual import RoomDual

NODES = 48  # boxes at most: 4 s for 10,000 tables
USED = 0.02  # weight of an option in the program's point that counts
METHOD = "Lagrangian over options and phase lengths, dual feasible functions"


class DualBound(RoomBound):
    """The search over boxes for one incumbent; rooms and values in units of the incumbent."""

    def __init__(self, compiled: Compiled, incumbent: float) -> None:
        self.program = self.dual = RoomDual(compiled, incumbent)
        self.incumbent = incumbent

    def _split(self, leaf: Leaf) -> tuple[int, float] | None:
        """The phase whose room is furthest from what its pieces need, and where to split it."""
        program, point = self.dual, leaf.point
        largest = (program.piece * (point.x > USED)[:, None]).max(axis=0)
        best: tuple[float, int, float] | None = None
        for p, room in enumerate(map(float, point.rooms)):
            piece = min(float(largest[p]), float(leaf.high[p]))
            needs = [(piece - room, 0.5 * (piece + room))]
            if program.counted[p]:
                needed = min(program.pieces.needed(p, point.x, room), float(leaf.high[p]))
                needs.append((needed - room, needed))
            short, at = max(needs)
            if short > room * APART + 1e-12 and (best is None or short > best[0]):
                best = short, p, at
        return None if best is None else (best[1], best[2])
