"""All-to-all: everything at once, a partner a step, level by level, and Bruck's.

S bytes a rank, an equal part for every rank; c the ranks that are reached through a level.

================== ============================================================================
direct             max over levels of (a + c S/n b): all levels work at once
pairwise           sum over levels of c (a + S/n b)
level, pairwise    (f-1) (a + S/f b)
level, direct      a + (f-1)/f S b
level, bruck       for each bit of an offset below f: a + (offsets with that bit)/f S b
================== ============================================================================

Level by level is the rail-aligned exchange: g times fewer and larger messages between hosts.
"""

from __future__ import annotations

from collections.abc import Sequence

from cost_models.collective.terms import Levels, NetworkLevel, Terms, hop, ranks_of, slowest
from ir.schedules.exchange import ExchangeWay


def reached(levels: Levels) -> list[int]:
    """How many ranks a rank reaches through each level."""
    inside, found = 1, []
    for level in levels:
        found.append((level.fanout - 1) * inside)
        inside *= level.fanout
    return found


def direct(size: float, levels: Levels) -> Terms:
    """Every block straight to its rank, all at once."""
    part = size / ranks_of(levels)
    counts = reached(levels)
    return slowest([hop(count * part, level) for count, level in zip(counts, levels, strict=True) if count])


def pairwise(size: float, levels: Levels) -> Terms:
    """One partner a step; near partners first."""
    part, total = size / ranks_of(levels), Terms()
    for count, level in zip(reached(levels), levels, strict=True):
        total += hop(part, level).times(count)
    return total


def _level(way: ExchangeWay, size: float, level: NetworkLevel) -> Terms:
    f, total = level.fanout, Terms()
    if way == "direct":
        return hop((f - 1) / f * size, level) if f > 1 else total
    if way == "pairwise":
        return hop(size / f, level).times(f - 1)
    bit = 1
    while bit < f:
        total += hop(sum(1 for offset in range(f) if offset & bit) / f * size, level)
        bit *= 2
    return total


def by_level(ways: Sequence[ExchangeWay], size: float, levels: Levels) -> Terms:
    """One level after the other, the innermost first."""
    total = Terms()
    for way, level in zip(ways, levels, strict=True):
        total += _level(way, size, level)
    return total
