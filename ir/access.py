"""Row popularity from a reuse histogram: what is left of an access trace when the ids themselves are not kept.

A reuse histogram counts, for each access, how many other distinct rows were accessed since the row's last access
(:func:`cost_models.cache.reuse_histogram`); its running sum is the hit rate H(C) of an LRU cache of C rows. Under
independent accesses (Che, Tung, Wang, IEEE JSAC 20(7), 2002) an LRU cache of C rows remembers the last T accesses,

    1 - H(C) = sum_i p_i exp(-p_i T),        dT = dC / (1 - H(C)),

so the miss rate as a function of T is a mixture of decays, one a row, weighted by the row's share p_i of all
accesses. :func:`popularity_from_reuse` finds the mixture: the accesses that go to rows of each of a ladder of
popularities, by expectation maximisation, which keeps them positive.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ir.errors import InputError
from ir.workload import ICDF_STEPS

FloatArray = npt.NDArray[np.float64]

GRID = 160  # popularities tried: 9 a factor of ten over 18 decades
POINTS = 240  # window lengths at which the mixture is compared
ROUNDS = 3000  # of expectation maximisation; the curve moves less than 1e-4 after about a thousand


def popularity_from_reuse(
    histogram: npt.ArrayLike, first: int, rows: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Groups of rows of equal popularity, hottest first, from a reuse histogram.

    Args:
        histogram: (D,) accesses by the number of other distinct rows since the row's last access.
        first: accesses that see their row for the first time: the distinct rows of the trace.
        rows: of the table; rows that were never accessed form a last group. Default: the distinct rows.

    Returns:
        ``(counts, mass)``: rows of each group (fractions are allowed), and the share of accesses it receives;
        as :class:`cost_models.cache.Popularity` takes them.

    Raises:
        InputError: an empty histogram, negative counts, or fewer rows than the trace has.
    """
    counts = np.asarray(histogram, dtype=np.float64)
    accesses = float(counts.sum()) + first
    if counts.ndim != 1 or (counts < 0).any() or first < 1 or counts.sum() <= 0:
        raise InputError(
            "a reuse histogram needs counts >= 0, some of them positive, and at least one first access"
        )
    total = first if rows is None else rows
    if total < first:
        raise InputError(f"the trace has {first} distinct rows but the table only {total}; check the table")
    misses = _miss_rates(counts, first)
    known = misses > 1e-9
    windows = np.concatenate([[0.0], np.cumsum(1 / np.maximum(misses[known], 1e-9))])[: known.sum()]
    keep = np.unique(np.searchsorted(windows, np.geomspace(1, max(windows[-1], 2.0), POINTS)))
    keep = np.concatenate([[0], keep[(keep > 0) & (keep < len(windows))]])
    share = np.geomspace(1.0, 0.1 / accesses, GRID)
    mass = _mixture(np.exp(-np.outer(windows[keep], share)), misses[known][keep])
    used = mass > 1e-9
    size = mass[used] / share[used]
    size *= min(1.0, total / size.sum())  # an estimate: it may be a little more than there are
    if total > size.sum() + 1e-6:
        return np.append(size, total - size.sum()), np.append(mass[used] / mass[used].sum(), 0.0)
    return size, mass[used] / mass[used].sum()


def _miss_rates(counts: FloatArray, first: int) -> FloatArray:
    """(D + 1,) miss rate of LRU caches of 0 to D rows in the steady state.

    The k-th first access reuses nothing among the k - 1 rows before it, and nobody knows what came before the
    trace: it is an observation censored at distance k - 1 (Kaplan, Meier, JASA 53(282), 1958).
    """
    at_risk = np.cumsum(counts[::-1])[::-1] + np.maximum(first - np.arange(len(counts)), 0)
    return np.concatenate([[1.0], np.cumprod(1 - counts / np.maximum(at_risk, 1e-300))])


def _mixture(decays: FloatArray, target: FloatArray) -> FloatArray:
    """Weights >= 0 that add up to 1 with ``decays @ weights`` near ``target`` (Richardson, JOSA 62(1), 1972)."""
    weights = np.full(decays.shape[1], 1 / decays.shape[1])
    reach = decays.sum(axis=0)
    for _ in range(ROUNDS):
        weights *= decays.T @ (target / np.maximum(decays @ weights, 1e-12)) / reach
    return np.asarray(weights / weights.sum())


def icdf_from_reuse(histogram: npt.ArrayLike, first: int, rows: int) -> tuple[float, ...]:
    """The ICDF (see :mod:`ir.workload`) of a table of ``rows`` rows; raises as :func:`popularity_from_reuse`."""
    counts, mass = popularity_from_reuse(histogram, first, rows)
    served = np.concatenate([[0.0], np.cumsum(mass)])
    held = np.concatenate([[0.0], np.cumsum(counts)]) / rows
    needed = np.interp(np.linspace(0, 1, ICDF_STEPS + 1), served / served[-1], held)
    return tuple(float(round(x, 9)) for x in np.minimum(needed, 1.0))
