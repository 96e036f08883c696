"""The held phase, and the two classes of hosts that it makes; see :mod:`passes.assignment.host_program`.

Where pieces have few sizes, as outputs of equal width have, a rank's load is one of few sums of them. Once the room of
the phase is known to be one such sum, hosts differ by what their pieces of scope "host" leave on each of their ranks:
as many single pieces of the most common size fit as beside nothing, or fewer. Loads are shares of an incumbent.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.assignment.problem import Floats

CLASSES = 2  # with more, the bound of 856 tables gains nothing for twice the time
FEW_SIZES = 8  # different sizes of pieces that the held phase may have
MOST_PIECES = 8  # of the most common size that fit a rank, with which classes still matter
NEAR = 0.01  # of the smallest size: sums closer than this are one cluster
SUMS = 2000  # sums of sizes that are looked at
ROUND = 1e-9  # relative: room for rounding
LOOSE = 1e-9  # the same of a sum of sizes, which are shares of the incumbent


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """Of hosts: room that single pieces have at most in the held phase, and what pieces of hosts take at most.

    ``usual`` is what they take at most where one single piece is lost for each class before.
    """

    left: Floats
    taken: Floats
    usual: Floats


def one_class(room: float) -> Classes:
    """All hosts alike."""
    return Classes(np.array([room]), np.array([np.inf]), np.array([np.inf]))


def held_phase(load: Floats) -> tuple[int, Floats]:
    """The phase with the fewest sizes in ``load`` (pieces, phases), and the clusters of their sums; -1 for none."""
    best = -1
    sizes = [np.unique(load[:, p][load[:, p] > 0]) for p in range(load.shape[1])]
    for p, found in enumerate(sizes):
        if 0 < len(found) <= FEW_SIZES and (best < 0 or len(found) < len(sizes[best])):
            best = p
    steps = _sums(sizes[best]) if best >= 0 else np.zeros((2, 0))
    return (best, steps) if steps.size else (-1, steps)


def classes_of(size: Floats, many: Floats, on_host: NDArray[np.bool_], room: float) -> Classes:
    """The classes at one room.

    Args:
        size: (groups,) of pieces in the held phase.
        many: (groups,) how often they stand on ranks.
        on_host: (groups,) whether they are of scope "host".
        room: of the held phase.
    """
    some = ~on_host & (size > 0)
    if not on_host.any() or not some.any():
        return one_class(room)
    sizes, index = np.unique(size[some], return_inverse=True)
    common = float(sizes[np.bincount(index, many[some]).argmax()])
    count = int(room * (1 + ROUND) / common)
    hosts = size[on_host & (size > 0)]
    if not 1 <= count <= MOST_PIECES or not len(hosts):
        return one_class(room)
    first, last = _sums(np.unique(hosts))
    if not len(first):
        return one_class(room)
    # a host of class k takes at most edge k; the next class takes the next sum of pieces or more
    at = [int(np.searchsorted(first, room - (count - k) * common, "right")) for k in range(CLASSES)]
    least = [0.0] + [float(np.append(first, room)[k]) for k in at[:-1]]
    usual = np.array([float(last[k - 1]) if k else 0.0 for k in at])
    taken = np.append(usual[:-1], room)
    return Classes(room - np.clip(least, 0.0, room), taken, usual)


def _sums(sizes: Floats) -> Floats:
    """(2, n): edges of clusters of sums of sizes, from 0 to 1; no columns where there are too many."""
    width = NEAR * float(sizes.min())
    cells = {0: (0.0, 0.0)}  # by place on a grid: the least and the largest sum
    todo = [0]
    while todo:
        at = heapq.heappop(todo)  # cells in order: sums only grow
        low, high = cells[at]
        for size in map(float, sizes):
            if low + size > 1.0:
                continue
            cell = int((low + size) / width)
            if cell not in cells:
                heapq.heappush(todo, cell)
                if len(cells) > SUMS:
                    return np.zeros((2, 0))
            known = cells.get(cell, (low + size, high + size))
            cells[cell] = min(known[0], low + size), max(known[1], high + size)
    edges = np.array([cells[at] for at in sorted(cells)])
    new = edges[1:, 0] - edges[:-1, 1] > width
    return np.array([edges[np.append(True, new), 0] - LOOSE, edges[np.append(new, True), 1] + LOOSE])
