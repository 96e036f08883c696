"""Thousands of tables: a choice of options that leaves every rank room beside its largest piece.

At the best box of :mod:`passes.assignment.dual_bound` the rooms of the phases say how long each should last. Whole
pieces leave part of them empty. So targets are set above the rooms, and the program is solved once more without the
pieces that nearly fill a target. Phases with pieces of few sizes hold a whole number of the large ones: there the
choice keeps to the room of the box, and the target is the next multiple where that is near.
"""

from __future__ import annotations

import numpy as np

from passes.assignment.compiled import Compiled
from passes.assignment.problem import Floats
from passes.assignment.room_dual import RoomDual
from passes.assignment.room_program import Point

USED = 0.02  # weight of an option in the program's point that counts
ROUNDED = 1e-4  # slack of a multiple
# Tuned on 10,000 synthetic tables on 4,096 ranks:
MARGIN = 0.1  # of the targets over the rooms
LARGEST = 0.95  # of a target, that a piece takes at most where its table has a smaller one


def choice_with_room(compiled: Compiled, incumbent: float, point: Point) -> tuple[list[int], Floats] | None:
    """Option of each table, and targets (K,) in seconds for the placed pieces of a rank; None where there is none.

    Args:
        compiled: the problem.
        incumbent: seconds, the unit of the point.
        point: the optimum of the best box.
    """
    program = RoomDual(compiled, incumbent)
    rooms = np.maximum(point.rooms, 1e-9)
    used = (program.piece * (point.x > USED)[:, None]).max(axis=0)
    largest = np.where(used > 0, used, rooms)
    multiple = np.ceil(rooms / largest - ROUNDED) * largest * (1 + ROUNDED)
    most = rooms * (1 + MARGIN)
    counted = program.counted & (multiple <= most)
    targets = np.where(counted, np.maximum(multiple, rooms), most)
    high = np.where(counted, rooms, targets)
    excess = (program.piece / (high * np.where(counted, 1.0, LARGEST))).max(axis=1)
    placed = np.where(excess > 0, excess, np.inf)  # what is on every rank anyway costs more than its size
    least = np.minimum.reduceat(placed, program.edges[:-1])
    closed = excess > np.maximum(least[compiled.table[program.keep]], 1.0) * (1 + 1e-9)
    program.piece = np.where(closed[:, None], np.inf, np.minimum(program.piece, high))
    found = program.solve(np.where(counted, rooms, 0.0), high)
    if found is None:
        return None
    best = [a + int(found.x[a:b].argmax()) for a, b in zip(program.edges, program.edges[1:], strict=False)]
    return [int(j) for j in program.keep[best] - compiled.start[:-1]], targets * incumbent
