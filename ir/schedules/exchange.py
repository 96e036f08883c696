"""All-to-all: everything at once, pair by pair, level by level, or with blocks that hop (Bruck).

Block o of a rank's buffer is for rank r + o (digit by digit); the block that arrives in its place came
from r - o. Level by level is the rail-aligned exchange: first inside the host, then only between ranks
of equal place, with g times fewer and larger messages between hosts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from ir.schedules import Message, Schedule, Shape, Steps, check_shape, digit, plus, with_digit

ExchangeWay = Literal["pairwise", "bruck", "direct"]


def flat(shape: Sequence[int], way: Literal["direct", "pairwise"]) -> Schedule:
    """Every block straight to its rank: all in one step, or one partner a step."""
    shape = check_shape(shape)
    ranks = math.prod(shape)
    steps = [[Message(r, plus(r, o, shape), (o,)) for r in range(ranks)] for o in range(1, ranks)]
    if way == "direct" and steps:
        steps = [[message for messages in steps for message in messages]]
    return Schedule("all_to_all", way, shape, ranks, tuple(tuple(messages) for messages in steps))


def _moves(fanout: int, way: ExchangeWay) -> Iterator[list[tuple[int, list[int]]]]:
    """By step: (how far, the offsets at this level that move)."""
    if way == "direct":
        yield [(offset, [offset]) for offset in range(1, fanout)]
    elif way == "pairwise":
        yield from ([(offset, [offset])] for offset in range(1, fanout))
    else:
        bit = 1
        while bit < fanout:
            yield [(bit, [offset for offset in range(fanout) if offset & bit])]
            bit *= 2


def _level(shape: Shape, level: int, way: ExchangeWay) -> Steps:
    ranks = range(math.prod(shape))
    steps = []
    for moves in _moves(shape[level], way):
        messages = []
        for distance, offsets in moves:
            blocks = tuple(o for o in ranks if digit(o, shape, level) in offsets)
            for rank in ranks:
                target = with_digit(rank, shape, level, digit(rank, shape, level) + distance)
                messages.append(Message(rank, target, blocks))
        steps.append(tuple(messages))
    return tuple(messages for messages in steps if messages)


def by_level(shape: Sequence[int], ways: Sequence[ExchangeWay]) -> Schedule:
    """One level after the other, the innermost first, each by its way."""
    shape = check_shape(shape)
    steps: Steps = ()
    for level, way in enumerate(ways):
        steps += _level(shape, level, way)
    return Schedule("all_to_all", "+".join(ways), shape, math.prod(shape), steps)
