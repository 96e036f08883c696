"""All-reduce between partners, level by level: recursive doubling and halving-doubling.

With f members of a level, p = 2^floor(log2 f), and s bytes left at the level:

================== =============================================================================
recursive doubling log2(p) (a + s b + s r)                                   s stays S
halving-doubling   2 log2(p) a + 2 (p-1)/p s b + (p-1)/p s r                 s shrinks p times
f not a power of 2 plus (a + s b + s r) + (a + s b): f - p members fold into their neighbours
================== =============================================================================

Source: Thakur, Rabenseifner, Gropp, IJHPCA 19(1), 2005.
"""

from __future__ import annotations

from cost_models.collective.terms import Levels, NetworkLevel, Terms, hop
from ir.schedules.doubling import power_below


def _fold(size: float, level: NetworkLevel, reduction: float) -> Terms:
    if level.fanout == power_below(level.fanout):
        return Terms()
    return hop(size, level, reduction) + hop(size, level)


def recursive_doubling(size: float, levels: Levels, reduction: float = 0.0) -> Terms:
    """All-reduce in which partners exchange whole buffers."""
    total = Terms()
    for level in levels:
        rounds = power_below(level.fanout).bit_length() - 1
        total += _fold(size, level, reduction) + hop(size, level, reduction).times(rounds)
    return total


def halving_doubling(size: float, levels: Levels, reduction: float = 0.0) -> Terms:
    """All-reduce in which partners exchange ever smaller parts, then the sums back."""
    total = Terms()
    for level in levels:
        pairs = power_below(level.fanout)
        moved = (pairs - 1) / pairs * size
        total += _fold(size, level, reduction)
        total += Terms(
            2 * (pairs.bit_length() - 1) * level.latency, 2 * moved / level.bandwidth, moved * reduction
        )
        size /= pairs
    return total
