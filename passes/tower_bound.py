"""Upper bounds on the interaction within towers, each proved for any partition of the allowed sizes.

neighbours
    A table has at most hi - 1 companions, whose resources fit beside its own: half the sum over tables
    of a bound on this knapsack, m (capacity - own) + the hi - 1 largest of max(0, gain - m resources),
    the best over a grid of prices m (any m >= 0 gives a bound).
pairs
    T towers of these sizes hold at most P pairs: the sum of the P largest gains.
spectral
    With X the 0/1 membership matrix, Y = X X', s the sizes, J all ones, any u, any c and any P, N >= 0 off the
    diagonal: 2 value = <A, Y> <= <A + P - N - c J - diag u, Y> + c sum s^2 + sum u + sum N, because Y is 0 or 1,
    and that is at most sum_k s_k lambda_k(A + P - N - c J - diag u) + c Q + sum u + sum N, s_k the sizes in the order
    that makes the sum largest and Q the largest (for c < 0 the smallest) sum of squares of sizes. The limits of the
    tower of each table, sum_j a_j Y_ij <= 1 with a_j a resource over its capacity or 1 over the most tables, have
    multipliers too. Any multipliers give a bound; they are improved by subgradient steps.
    Donath and Hoffman 1973 (IBM J. Res. Dev. 17) in the form of Rendl and Wolkowicz 1995 (Math. Programming 72)
    with a multiplier c for the row sums; P and N make it the bound over matrices with entries in [0, 1] (Povh and
    Rendl 2007, SIAM J. Optim. 18).

Few tables are solved exactly instead, see :mod:`passes.tower_columns`.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_PRICES = (0.0, 0.1, 0.25, 0.5, 0.8)  # of a full capacity, in units of a full tower's gains
_STEPS = 250  # subgradient steps
_PATIENCE = 5  # steps without a better bound until they get shorter
_FLOPS = 1e11  # arithmetic allowed for eigenvalues, about 12 s on one core


def upper_bound(
    gain: Floats, resources: Floats, towers: int, sizes: tuple[int, int], capacity: Floats, value: float
) -> tuple[float, str]:
    """The best of these bounds and its name; ``value`` of a known partition steers the steps.

    Arguments are those of :class:`passes.tower_partition.Partition`.
    """
    found = {
        "neighbours": _neighbours(gain, resources, sizes[1], capacity),
        "pairs": _pairs(gain, towers, sizes),
    }
    if value < min(found.values()) * (1 - 1e-9):
        limits = np.column_stack([resources / np.maximum(capacity, 1e-300), np.full(len(gain), 1 / sizes[1])])
        found["spectral"] = _spectral(gain, towers, sizes, value, limits * (1 - 1e-9))
    name = min(found, key=lambda key: found[key])
    return found[name], f"{name} bound"


def _neighbours(gain: Floats, resources: Floats, most: int, capacity: Floats) -> float:
    kept = min(most - 1, len(gain) - 1)
    if kept <= 0:
        return 0.0

    def largest(worth: Floats) -> Floats:
        top: Floats = np.partition(worth, len(gain) - kept, axis=1)[:, len(gain) - kept :].sum(1)
        return top

    best = largest(gain)
    typical = float(best.mean())  # a full tower's worth of gains buys a full capacity
    shares = resources / np.maximum(capacity, 1e-300)
    room = np.maximum(1.0 - shares, 0.0) + 1e-9
    for prices in itertools.product(_PRICES, repeat=resources.shape[1]):
        price = np.array(prices) * typical
        worth = np.maximum(gain - shares @ price, 0.0)
        np.fill_diagonal(worth, 0.0)
        best = np.minimum(best, room @ price + largest(worth))
    return float(best.sum() / 2) * (1 + 1e-12)


def largest_sizes(n: int, towers: int, sizes: tuple[int, int]) -> Ints:
    """The most uneven sizes allowed, in falling order; they majorise every other choice."""
    made = np.full(towers, sizes[0], dtype=np.int64)
    left = n - made.sum()
    for tower in range(towers):
        extra = min(left, sizes[1] - sizes[0])
        made[tower] += extra
        left -= extra
    return made


def _pairs(gain: Floats, towers: int, sizes: tuple[int, int]) -> float:
    n = len(gain)
    made = largest_sizes(n, towers, sizes)
    most = int((made * (made - 1) // 2).sum())
    every = np.sort(gain[np.triu_indices(n, 1)])[::-1]
    return float(every[:most].sum())


def _spectral(gain: Floats, towers: int, sizes: tuple[int, int], value: float, limits: Floats) -> float:
    n = len(gain)
    uneven = largest_sizes(n, towers, sizes).astype(np.float64)
    even = np.full(towers, n // towers) + (np.arange(towers) < n % towers)
    most, least = float((uneven**2).sum()), float((even**2).sum())
    weights = np.zeros(n)
    weights[:towers] = uneven
    u, c = np.zeros(n), float(gain.sum()) / max(n * (n - 1), 1)
    signed = np.zeros((n, n))  # P - N
    full = np.zeros_like(limits)  # of the limits of each table's tower
    best, reach, calm = np.inf, 1.0, 0
    error = 8 * n * np.finfo(np.float64).eps  # of an eigenvalue, relative to the norm
    for _ in range(max(4, min(_STEPS, int(_FLOPS / (10 * n**3))))):
        priced = full @ limits.T
        matrix = gain + signed - c - np.diag(u) - (priced + priced.T) / 2
        values, vectors = np.linalg.eigh(matrix)
        values, vectors = values[::-1], vectors[:, ::-1][:, :towers]
        squares = most if c > 0 else least
        rounding = error * n * max(abs(values[0]), abs(values[-1]))
        fixed = float(u.sum() + c * squares - np.minimum(signed, 0.0).sum() + full.sum())
        bound = (fixed + float(weights @ values) + rounding) / 2
        calm = 0 if bound < best * (1 - 1e-6) else calm + 1
        best = min(best, bound)
        if best <= value * (1 + 1e-7):
            break
        if calm == _PATIENCE:
            reach, calm = reach * 0.6, 0
        relaxed = (vectors * uneven) @ vectors.T  # the Y that these multipliers are best against
        slope = _outside(relaxed, signed)
        slope_u = 1.0 - relaxed.diagonal()
        slope_c = (squares - float(relaxed.sum())) / n  # on the scale of the others
        spare = 1.0 - relaxed @ limits
        spare[(full == 0) & (spare > 0)] = 0.0
        norm = float((slope_u**2).sum() + slope_c**2 + (slope**2).sum() + (spare**2).sum())
        if norm <= 1e-18:
            break
        step = reach * 2 * (bound - value) / norm
        u -= step * slope_u
        c -= step * slope_c / n
        full = np.maximum(full - step * spare, 0.0)
        moved = signed - step * slope
        signed = np.where(signed * moved < 0, 0.0, moved)  # P and N are projected to what is not negative
    return best


def _outside(relaxed: Floats, signed: Floats) -> Floats:
    """Slopes of P where it is used or an entry is negative, of N where it is used or an entry exceeds 1."""
    below = (signed > 0) | ((signed == 0) & (relaxed < 0))
    above = (signed < 0) | ((signed == 0) & (relaxed > 1))
    slope = np.where(below, relaxed, np.where(above, relaxed - 1.0, 0.0))
    np.fill_diagonal(slope, 0.0)
    return slope
