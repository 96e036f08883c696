"""Broadcast and reduction: k-nomial trees, a pipelined chain, scatter and all-gather; double binary trees.

Rank 0 is the root. Trees go level by level, the outermost first, so that each host receives once.
Sources: van de Geijn's scatter-allgather and k-nomial trees (Thakur et al., IJHPCA 19(1), 2005); the
pipelined chain of MVAPICH2-GDR (Awan et al., arXiv 1707.09414); double binary trees (Sanders, Speck,
Träff, Parallel Computing 35(12), 2009), numbered in order as in NCCL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ir.errors import InputError
from ir.schedules import Message, Schedule, Shape, Steps, check_shape, digit, reverse, stride
from ir.schedules.gather import all_gather


def spans(fanout: int, radix: int) -> list[int]:
    """Distances of the rounds of a k-nomial tree, the farthest first."""
    if radix < 2:
        raise InputError(f"a k-nomial tree needs a radix of 2 or more, not {radix}")
    found = [1]
    while found[-1] * radix < fanout:
        found.append(found[-1] * radix)
    return found[::-1] if fanout > 1 else []


def _roots(shape: Shape, level: int) -> list[int]:
    """Ranks that have the data before ``level`` is served: all inner digits, and this one, are 0."""
    step = stride(shape, level + 1)
    return list(range(0, math.prod(shape), step))


def _knomial(shape: Shape, radix: int) -> Steps:
    steps: list[tuple[Message, ...]] = []
    for level in reversed(range(len(shape))):
        fanout, width = shape[level], stride(shape, level)
        for span in spans(fanout, radix):
            for child in range(1, radix):
                messages = tuple(
                    Message(root + first * width, root + (first + child * span) * width, (0,))
                    for root in _roots(shape, level)
                    for first in range(0, fanout, span * radix)
                    if first + child * span < fanout
                )
                if messages:
                    steps.append(messages)
    return tuple(steps)


def knomial_broadcast(shape: Sequence[int], radix: int = 2) -> Schedule:
    """A holder serves radix - 1 others a round, one after the other; radix = ranks is the flat tree."""
    shape = check_shape(shape)
    return Schedule("broadcast", f"knomial{radix}", shape, 1, _knomial(shape, radix))


def knomial_reduce(shape: Sequence[int], radix: int = 2) -> Schedule:
    """The broadcast backwards."""
    shape = check_shape(shape)
    return Schedule("reduce", f"knomial{radix}", shape, 1, reverse(_knomial(shape, radix)))


def tree_all_reduce(shape: Sequence[int], radix: int = 2) -> Schedule:
    """Reduce to rank 0, then broadcast."""
    shape = check_shape(shape)
    down = _knomial(shape, radix)
    return Schedule("all_reduce", f"knomial{radix}", shape, 1, reverse(down) + down)


def _chain(ranks: int, chunks: int) -> Steps:
    if chunks < 1:
        raise InputError(f"a chain needs one chunk or more, not {chunks}")
    steps = []
    for step in range(chunks + ranks - 2):
        hops = range(max(0, step - chunks + 1), min(ranks - 1, step + 1))
        steps.append(tuple(Message(hop, hop + 1, (step - hop,)) for hop in hops))
    return tuple(steps)


def chain_broadcast(shape: Sequence[int], chunks: int) -> Schedule:
    """Each rank passes chunk after chunk to the next rank while it receives the following one."""
    shape = check_shape(shape)
    return Schedule("broadcast", "chain", shape, chunks, _chain(math.prod(shape), chunks))


def chain_reduce(shape: Sequence[int], chunks: int) -> Schedule:
    """The chain backwards: each rank adds its own chunk and passes the sum on."""
    shape = check_shape(shape)
    return Schedule("reduce", "chain", shape, chunks, reverse(_chain(math.prod(shape), chunks)))


def scatter_allgather(shape: Sequence[int]) -> Schedule:
    """Each rank its share through a binomial tree, then a ring all-gather over all ranks."""
    shape = check_shape(shape)
    ranks = math.prod(shape)
    steps: list[tuple[Message, ...]] = []
    for level in reversed(range(len(shape))):
        fanout, width = shape[level], stride(shape, level)
        for span in spans(fanout, 2):
            messages = []
            for root in _roots(shape, level):
                for first in range(0, fanout, span * 2):
                    if first + span < fanout:
                        served = range(first + span, min(first + 2 * span, fanout))
                        blocks = tuple(root + m * width + i for m in served for i in range(width))
                        messages.append(Message(root + first * width, root + (first + span) * width, blocks))
            steps.append(tuple(messages))
    gather = all_gather((ranks,), ("ring",))
    return Schedule("broadcast", "scatter_allgather", shape, ranks, (*steps, *gather.steps))


@dataclass(frozen=True, slots=True)
class BinaryTree:
    """A tree over ranks 0..n-1: parent (-1 for the root) and depth of each rank."""

    parent: tuple[int, ...]
    depth: tuple[int, ...]

    @property
    def height(self) -> int:
        """Hops from the root to the deepest rank."""
        return max(self.depth)

    def children(self, rank: int) -> int:
        """How many ranks hang under ``rank``."""
        return self.parent.count(rank)


def _in_order_parent(rank: int, ranks: int) -> int:
    """Parent in the in-order tree: rank 0 is the root, odd ranks are leaves."""
    if rank == 0:
        return -1
    low = rank & -rank
    above = (rank ^ low) | (low << 1)
    return above if above < ranks else rank ^ low


def double_trees(ranks: int) -> tuple[BinaryTree, BinaryTree]:
    """Two binary trees such that a rank with two children in one has none in the other.

    The second is the first mirrored (even ``ranks``) or shifted by one (odd).
    """

    def name(place: int) -> int:
        return ranks - 1 - place if ranks % 2 == 0 else (place + 1) % ranks

    first = [_in_order_parent(rank, ranks) for rank in range(ranks)]
    second = [-1] * ranks
    for place, parent in enumerate(first):
        second[name(place)] = name(parent) if parent >= 0 else -1
    return _tree(first), _tree(second)


def _tree(parent: Sequence[int]) -> BinaryTree:
    def depth(rank: int) -> int:
        return 0 if parent[rank] < 0 else 1 + depth(parent[rank])

    return BinaryTree(tuple(parent), tuple(depth(rank) for rank in range(len(parent))))


def double_tree_all_reduce(shape: Sequence[int], chunks: int) -> Schedule:
    """Half of the buffer up and down each of two trees, chunk after chunk; flat over all ranks.

    Args:
        shape: of the group.
        chunks: pieces of each half.
    """
    shape = check_shape(shape)
    trees = double_trees(math.prod(shape))
    height = max(tree.height for tree in trees)
    down: list[list[Message]] = [[] for _ in range(chunks + height - 1)] if height else []
    for half, tree in enumerate(trees):
        for rank, parent in enumerate(tree.parent):
            if parent < 0:
                continue
            for chunk in range(chunks):
                message = Message(parent, rank, (half * chunks + chunk,))
                down[chunk + tree.depth[rank] - 1].append(message)
    steps = tuple(tuple(messages) for messages in down)
    return Schedule("all_reduce", "double_tree", shape, 2 * chunks, reverse(steps) + steps)


def level_of(source: int, target: int, shape: Shape) -> int:
    """The outermost level at which two ranks differ; raises InputError when they are the same."""
    for level in reversed(range(len(shape))):
        if digit(source, shape, level) != digit(target, shape, level):
            return level
    raise InputError(f"rank {source} sends to itself; leave such messages out")
