"""Broadcast, reduction and all-reduce through trees and chains.

S bytes, C bytes of a chunk, K = S / C chunks, h rounds, R the radix of the tree.

================== =================================================================================
k-nomial           ((R-1)(h-1) + ceil(n / R^(h-1)) - 1)(a + S b), h = ceil(log_R n); level by level
pipelined chain    sum over the n-1 hops of (a + C b) + (K-1) times the slowest of them; on one level
                   (K + n - 2)(a + C b), least at C* = sqrt(S a / ((n-2) b))
scatter-allgather  binomial scatter, h a + (f-1)/f s b a level, then a flat ring all-gather
double tree        twice (reduce, broadcast), K chunks of S/(2K) in each tree: the way down the slower
                   tree, then (K-1)(a + 2 S/(2K) b), the rate of a rank with two children
================== =================================================================================

Sources: Thakur et al., IJHPCA 19(1), 2005; Awan et al., arXiv 1707.09414 (chain and its chunk);
Sanders, Speck, Träff, Parallel Computing 35(12), 2009 (two trees).
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

from cost_models.collective.gather import ring
from cost_models.collective.terms import Levels, NetworkLevel, Terms, hop, ranks_of, slowest
from ir.schedules.trees import BinaryTree, double_trees, spans


def rounds(fanout: int, radix: int) -> int:
    """Messages that the root of a k-nomial tree sends, one after the other."""
    distances = spans(fanout, radix)
    if not distances:
        return 0
    return (radix - 1) * (len(distances) - 1) + math.ceil(fanout / distances[0]) - 1


def knomial(size: float, levels: Levels, radix: int = 2, reduction: float = 0.0) -> Terms:
    """Broadcast (or, with ``reduction``, its reverse) level by level; radix 2 is the binomial tree."""
    total = Terms()
    for level in levels:
        total += hop(size, level, reduction).times(rounds(level.fanout, radix))
    return total


def tree_all_reduce(size: float, levels: Levels, radix: int = 2, reduction: float = 0.0) -> Terms:
    """Reduce to one rank, then broadcast."""
    return knomial(size, levels, radix, reduction) + knomial(size, levels, radix)


def chain_hops(levels: Levels) -> list[NetworkLevel]:
    """The level of each hop of a chain through all ranks in order."""
    total, found = ranks_of(levels), []
    inside = 1
    for level in levels:
        inside *= level.fanout
        found += [level] * ((level.fanout - 1) * (total // inside))
    return found


def pipeline(size: float, hops: Levels, chunks: int, reduction: float = 0.0) -> Terms:
    """``size`` bytes in equal chunks through hops that work at the same time."""
    piece = [hop(size / chunks, level, reduction) for level in hops]
    total = slowest(piece).times(chunks - 1)
    for part in piece:
        total += part
    return total


def chain(size: float, levels: Levels, chunks: int, reduction: float = 0.0) -> Terms:
    """Pipelined chain broadcast (or, with ``reduction``, its reverse) through all ranks in order."""
    return pipeline(size, chain_hops(levels), chunks, reduction)


def best_chunks(size: float, hops: Levels, reduction: float = 0.0) -> int:
    """The number of chunks that makes :func:`pipeline` fastest.

    With hop m the slowest, the time is sum (a + C b) + (S/C - 1)(a_m + C b_m), least at
    C* = sqrt(S a_m / (sum b - b_m)). The integers around S / C* of each hop are compared, and those around
    the chunks at which another hop becomes the slowest.
    """
    if len(hops) < 2 or size <= 0:
        return 1
    kinds = {(level.latency, 1 / level.bandwidth + reduction) for level in hops}
    whole = sum(1 / level.bandwidth + reduction for level in hops)
    counts = [math.sqrt(size * (whole - b) / a) for a, b in kinds if a > 0]
    for (a, b), (other_a, other_b) in combinations(sorted(kinds), 2):
        if b > other_b and other_a > a:
            counts.append(size * (b - other_b) / (other_a - a))
    tried = {1, *(max(1, math.floor(k)) for k in counts), *(math.ceil(k) for k in counts)}
    return min(sorted(tried), key=lambda k: pipeline(size, hops, k, reduction).seconds)


def scatter_allgather(size: float, levels: Levels) -> Terms:
    """Broadcast: each rank gets its share, then a ring hands the shares round."""
    total, part = Terms(), size
    for level in reversed(levels):
        f = level.fanout
        total += Terms(len(spans(f, 2)) * level.latency, (f - 1) / f * part / level.bandwidth)
        part /= f
    return total + ring("all_gather", size, levels)


def double_tree(size: float, level: NetworkLevel, chunks: int, reduction: float = 0.0) -> Terms:
    """All-reduce of half the bytes in each of two trees, chunk after chunk, among the members of one level.

    Reduction and broadcast are charged one after the other; NCCL lets the second start with the first chunk.
    Exact from as many chunks as the trees are high; with fewer, ranks that wait for nobody run ahead a little.
    """
    if level.fanout == 1:
        return Terms()
    piece, trees = size / 2 / chunks, double_trees(level.fanout)
    height = max(tree.height for tree in trees)
    total = Terms()
    for adding in (reduction, 0.0):
        # the pipe fills and drains for height - 1 steps each; in between every step is alike
        last = chunks + height - 2
        ends = {step for step in range(last + 1) if step < height - 1 or step > chunks - 1}
        for step in ends:
            total += _step(trees, range(step - chunks + 2, step + 2), piece, level, adding)
        steady = _step(trees, range(height + 1), piece, level, adding)
        total += steady.times(last + 1 - len(ends))
    return total


def best_tree_chunks(size: float, level: NetworkLevel, reduction: float = 0.0) -> int:
    """The number of chunks, at least the height of the trees, that makes :func:`double_tree` fastest.

    Twice (K + h - 2)(a + S/K b) is least near K = sqrt((h - 1) S b / a); the neighbours are compared.
    """
    height = max(tree.height for tree in double_trees(level.fanout))
    if level.latency <= 0 or height < 2:
        return 1
    near = math.sqrt((height - 1) * size * (1 / level.bandwidth + reduction) / level.latency)
    tried = sorted({max(height, math.floor(near)), max(height, math.ceil(near))})
    return min(tried, key=lambda k: double_tree(size, level, k, reduction).seconds)


def _step(
    trees: tuple[BinaryTree, ...], depths: range, piece: float, level: NetworkLevel, adding: float
) -> Terms:
    """A step in which ranks at these depths receive a chunk from their parents (or send it to them)."""
    served: dict[int, int] = {}
    taken: dict[int, int] = {}
    for tree in trees:
        for rank, parent in enumerate(tree.parent):
            if parent >= 0 and tree.depth[rank] in depths:
                served[parent] = served.get(parent, 0) + 1
                taken[rank] = taken.get(rank, 0) + 1
    most = max((*served.values(), *taken.values()), default=0)
    added = max(served.values(), default=0) * piece * adding
    return replace(hop(most * piece, level), reduction=added) if most else Terms()
