"""What a tower module's vectors start as: sums of features that are alike.

A projection of n vectors to m starts as m sums (:mod:`codegen.runtime.towers.modules`). The over-arch multiplies
different vectors only, so that what a sum keeps of its features is their common direction, and what a group of
alike features does together shows only if its features are in two sums or more. Pools of about
equal size, as much alike inside as possible, keep both: the partition of tables to towers once more, inside a tower.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from passes.tower_partition import searched, stated

_BALANCE = 0.25  # how far a pool may exceed the mean number of features
_EFFORT = 10_000_000  # looks at a pair of features: under a second


def pools(strengths: npt.NDArray[np.float64], count: int, seed: int = 0) -> tuple[int, ...]:
    """The pool of each of n features by their (n, n) strengths; none where each keeps its own vector."""
    n = len(strengths)
    if count >= n:
        return ()
    problem, start = stated(strengths, np.zeros((n, 0)), count, _BALANCE)
    return tuple(int(pool) for pool in searched(problem, start, seed, _EFFORT))
