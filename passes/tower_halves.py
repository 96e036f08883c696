"""Two towers of few tables, exactly: every partition is looked at, half of the tables at a time.

With y in {-1, +1}^n naming the tower of each table, what two towers gain is total / 2 + y^T G y / 4. The tables are cut
into two halves a and b, y^T G y = y_a^T G_aa y_a + 2 y_a^T G_ab y_b + y_b^T G_bb y_b, and the middle term of all 2^(n/2)
by 2^(n/2) combinations is one product of matrices. Table 0 stays in tower 0, since towers have no names.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST = 28  # tables: 2^27 partitions, a few seconds
_BLOCK = 128  # rows of the product held at a time: 128 x 2^14 doubles are 16 MiB
_SLACK = 1e-9  # of a capacity, for rounding


def best_halves(gain: Floats, resources: Floats, sizes: tuple[int, int], capacity: Floats) -> Ints:
    """The best partition of ``gain`` (n, n) into two towers within the limits of :class:`passes.tower_partition.Partition`.

    At least one partition must meet the limits. Of equal ones the first in binary order is taken.
    """
    n = len(gain)
    assert n <= MOST
    left, right = _signs(n // 2, fixed=True), _signs(n - n // 2, fixed=False)
    a, b = slice(0, n // 2), slice(n // 2, n)
    square_left = np.einsum("si,ij,sj->s", left, gain[a, a], left)
    square_right = np.einsum("si,ij,sj->s", right, gain[b, b], right)
    middle = 2.0 * gain[a, b] @ right.T
    # tables and resources of tower 0; tower 1 has the rest
    held = np.column_stack([np.ones(n), resources])
    whole, most = held.sum(0), np.concatenate([[float(sizes[1])], capacity]) * (1 + _SLACK)
    least = np.maximum(whole - most, np.concatenate([[float(sizes[0])], np.zeros(len(capacity))]))
    most = np.minimum(most, np.concatenate([[whole[0] - sizes[0]], capacity * (1 + _SLACK)]))
    in_left, in_right = (left > 0) @ held[a], (right > 0) @ held[b]
    best, place = -np.inf, (0, 0)
    for start in range(0, len(left), _BLOCK):
        rows = slice(start, start + _BLOCK)
        value = left[rows] @ middle
        value += square_left[rows, None]
        value += square_right
        for r in range(held.shape[1]):
            mine = in_left[rows, r, None] + in_right[:, r]
            value[(mine > most[r]) | (mine < least[r])] = -np.inf
        found = int(np.argmax(value))
        if value.flat[found] > best:
            best, place = float(value.flat[found]), (start + found // len(right), found % len(right))
    chosen = np.concatenate([left[place[0]], right[place[1]]])
    return np.asarray(chosen < 0, dtype=np.int64)


def _signs(count: int, fixed: bool) -> Floats:
    """(2^count, count) of +1 and -1; with ``fixed`` those that start with +1."""
    numbers = np.arange(2 ** (count - 1) if fixed else 2**count)
    bits = (numbers[:, None] >> np.arange(count - 1, -1, -1)) & 1
    signs: Floats = np.where(bits, -1.0, 1.0)
    return signs
