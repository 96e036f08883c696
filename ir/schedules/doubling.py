"""All-reduce between partners: recursive doubling and halving-doubling, for any number of members.

Level by level, innermost first. Of f members at a level, p = 2^floor(log2 f) exchange in pairs; each of
the first f - p even ones first hands its blocks to its neighbour and gets the result at the end.
Recursive doubling exchanges whole buffers; halving-doubling (Rabenseifner) halves what it exchanges, and
the outer levels go on with the part that is left. Source: Thakur, Rabenseifner, Gropp, IJHPCA 19(1), 2005.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ir.schedules import Message, Schedule, Shape, Steps, check_shape, digit, with_digit


def power_below(count: int) -> int:
    """The largest power of two that is not above ``count``."""
    return 1 << (count.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class _Members:
    """Who exchanges at a level: the digit of each participant, by its new place."""

    digits: tuple[int, ...]
    folded: tuple[int, ...]  # digits that hand over to the next digit


def _members(fanout: int) -> _Members:
    extra = fanout - power_below(fanout)
    folded = tuple(range(0, 2 * extra, 2))
    return _Members(tuple(d for d in range(fanout) if d not in folded), folded)


def _pair(
    ranks: Sequence[int], shape: Shape, level: int, distance: int
) -> list[tuple[int, int, int]]:  # rank, its place, partner
    members = _members(shape[level]).digits
    place = {d: i for i, d in enumerate(members)}
    found = []
    for rank in ranks:
        here = place[digit(rank, shape, level)]
        found.append((rank, here, with_digit(rank, shape, level, members[here ^ distance])))
    return found


def _doubled(ranks: list[int], shape: Shape, level: int) -> tuple[Steps, Steps]:
    steps = []
    distance = 1
    while distance < power_below(shape[level]):
        steps.append(tuple(Message(r, to, (0,), True) for r, _, to in _pair(ranks, shape, level, distance)))
        distance *= 2
    return tuple(steps), ()


def _halved(
    ranks: list[int], shape: Shape, level: int, held: dict[int, tuple[int, ...]]
) -> tuple[Steps, Steps]:
    """Exchanges of ever fewer blocks, which leave each rank its part in ``held``; and their way back."""
    down, up = [], []
    distance = power_below(shape[level]) // 2
    chunk = power_below(shape[level])
    width = _width(shape, level)
    while distance:
        out, back = [], []
        for rank, here, to in _pair(ranks, shape, level, distance):
            mine = tuple(
                b for b in held[rank] if bool(b // width % chunk & distance) == bool(here & distance)
            )
            theirs = tuple(b for b in held[rank] if b not in mine)
            out.append(Message(rank, to, theirs, True))
            back.append(Message(rank, to, mine))
        for message in back:
            held[message.source] = message.blocks
        down.append(tuple(out))
        up.append(tuple(back))
        distance //= 2
    return tuple(down), tuple(reversed(up))


def _width(shape: Shape, level: int) -> int:
    """Blocks between two chunks of a level: the participants of the levels inside it."""
    return math.prod(power_below(fanout) for fanout in shape[:level])


def _all_reduce(shape: Shape, halve: bool) -> tuple[Steps, int]:
    blocks = math.prod(power_below(fanout) for fanout in shape) if halve else 1
    ranks = list(range(math.prod(shape)))
    held = {rank: tuple(range(blocks)) for rank in ranks}
    down: Steps = ()
    up: Steps = ()
    for level, fanout in enumerate(shape):
        folded = [rank for rank in ranks if digit(rank, shape, level) in _members(fanout).folded]
        stays = {rank: with_digit(rank, shape, level, digit(rank, shape, level) + 1) for rank in folded}
        if folded:
            down += (tuple(Message(rank, to, held[rank], True) for rank, to in stays.items()),)
            up = (tuple(Message(to, rank, held[rank]) for rank, to in stays.items()), *up)
        ranks = [rank for rank in ranks if rank not in stays]
        there, back = _halved(ranks, shape, level, held) if halve else _doubled(ranks, shape, level)
        down += there
        up = back + up
    return down + up, blocks


def recursive_doubling(shape: Sequence[int]) -> Schedule:
    """Whole buffers between partners; few steps, so for small messages."""
    shape = check_shape(shape)
    steps, blocks = _all_reduce(shape, halve=False)
    return Schedule("all_reduce", "recursive_doubling", shape, blocks, steps)


def halving_doubling(shape: Sequence[int]) -> Schedule:
    """Halves between partners, then the sums back: few steps and little to send."""
    shape = check_shape(shape)
    steps, blocks = _all_reduce(shape, halve=True)
    return Schedule("all_reduce", "halving_doubling", shape, blocks, steps)
