"""All-gather, reduce-scatter and all-reduce: around a ring, and level by level.

Symbols: f members of a level, n ranks, S bytes of the whole buffer, a latency, b = 1 / bandwidth and r seconds a
byte for adding up (reduce-scatter only).

================ ======================================================================================
flat ring        (n-1) max over levels of (a + S/n b + S/n r): the slowest link is in every step
channel rings    (n-1) max(a1 + (g-1)/g S/n b1, a2 + S/(g n) b2 of each outer level): one ring a NIC
level, ring      (f-1) (a + s/f b), s = S over the product of the fanouts inside the level
level, doubling  log2(f) a + (f-1)/f s b
level, bruck     ceil(log2 f) a + (f-1)/f s b
level, direct    a + (f-1)/f s b
================ ======================================================================================

The sum over levels is the hierarchical collective of two, three or more levels (BlueConnect, Cho et al., MLSys
2019): every rank sends to the ranks of its own place in other hosts, so it is rail-aligned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cost_models.collective.switch import in_switch
from cost_models.collective.terms import Levels, NetworkLevel, Terms, hop, ranks_of, slowest, used
from ir.errors import InputError
from ir.schedules import Collective
from ir.schedules.gather import GatherWay


def both(collective: Collective, scatter: Terms, gather: Terms) -> Terms:
    """A reduce-scatter, an all-gather, or the all-reduce made of both."""
    if collective == "all_reduce":
        return scatter + gather
    return scatter if collective == "reduce_scatter" else gather


def ring(collective: Collective, size: float, levels: Levels, reduction: float = 0.0) -> Terms:
    """One ring through all ranks in order: all_gather, reduce_scatter or all_reduce."""
    n = ranks_of(levels)

    def steps(adding: float) -> Terms:
        return slowest([hop(size / n, level, adding) for level in used(levels)]).times(n - 1)

    return both(collective, steps(reduction), steps(0.0))


def _arriving(parts: Sequence[Terms]) -> Terms:
    """Parts that arrive at different times at a unit that adds them up."""
    total = Terms()
    for part in sorted(parts, key=lambda t: t.latency + t.bandwidth):
        late = part.latency + part.bandwidth >= total.seconds
        total = part if late else total + Terms(reduction=part.reduction)
    return total


def channel_ring(collective: Collective, size: float, levels: Levels, reduction: float = 0.0) -> Terms:
    """As many rings as a host (the first level) has ranks, each leaving it through another NIC."""
    host, outer = levels[0], used(levels[1:])
    if host.fanout == 1 or not outer:
        return ring(collective, size, levels, reduction)
    n, g = ranks_of(levels), host.fanout

    def steps(adding: float) -> Terms:
        inside = hop((g - 1) / g * size / n, host, adding)
        across = [_arriving([inside, hop(size / n / g, level, adding)]) for level in outer]
        return slowest(across).times(n - 1)

    return both(collective, steps(reduction), steps(0.0))


def level_gather(way: GatherWay, size: float, level: NetworkLevel, reduction: float = 0.0) -> Terms:
    """All-gather (backwards: reduce-scatter) of ``size`` bytes among the members of one level.

    Raises:
        InputError: doubling among a number of members that is no power of two.
    """
    f = level.fanout
    if way == "doubling" and f & (f - 1):
        raise InputError(f"doubling needs a power of two, not {f} members; use 'bruck' or 'ring'")
    steps = {"ring": f - 1, "direct": min(f - 1, 1)}.get(way, math.ceil(math.log2(f)))
    moved = (f - 1) / f * size
    return Terms(steps * level.latency, moved / level.bandwidth, moved * reduction)


def by_level(
    collective: Collective, ways: Sequence[GatherWay], size: float, levels: Levels, reduction: float = 0.0
) -> Terms:
    """Reduce-scatter from the innermost level out, or all-gather from the outermost in, or both.

    Args:
        collective: all_gather, reduce_scatter or all_reduce.
        ways: one for each level.
        size: bytes of the whole buffer.
        levels: of the network, innermost first.
        reduction: seconds a byte to add up.
    """
    scatter = gather = Terms()
    for way, level in zip(ways, levels, strict=True):
        scatter += level_gather(way, size, level, reduction)
        gather += level_gather(way, size, level)
        size /= level.fanout
    return both(collective, scatter, gather)


def hierarchical_all_reduce(
    size: float, levels: Levels, top: Terms, ways: Sequence[GatherWay], reduction: float = 0.0
) -> Terms:
    """Reduce-scatter inside, any all-reduce of what is left on top, all-gather inside.

    Args:
        size: bytes of the whole buffer.
        levels: the inner levels only.
        top: the all-reduce of ``size`` over the product of their fanouts on the levels above.
        ways: one for each inner level.
        reduction: seconds a byte to add up.
    """
    return by_level("all_reduce", ways, size, levels, reduction) + top


def overlapped_all_reduce(size: float, levels: Levels, reduction: float = 0.0) -> Terms:
    """The hierarchical all-reduce in so many slices that all levels work at the same time.

    The latencies of all levels in a row, and the bytes of the level that needs longest for its own. A level
    whose switch adds up carries (f+1)/f s at the switch's rate, another one 2 (f-1)/f s around a ring.
    """
    latency, busiest = 0.0, Terms()
    for level in used(levels):
        around = by_level("all_reduce", ("ring",), size, (level,), reduction)
        if level.switch_efficiency:
            around = min(around, in_switch("all_reduce", size, level), key=lambda t: t.seconds - t.latency)
        latency += around.latency
        busiest = max(busiest, replace(around, latency=0.0), key=lambda t: t.seconds)
        size /= level.fanout
    return replace(busiest, latency=latency)
