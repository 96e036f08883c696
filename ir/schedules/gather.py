"""All-gather, reduce-scatter and all-reduce, level by level or around one ring.

``gather(shape, how)`` gathers first among ranks that are equal but for their outermost digit, and so on
inwards: little data crosses the outer links. ``reduce_scatter`` is the same backwards, ``all_reduce``
one after the other; with one level these are the flat algorithms. Ways of one level of f members:

- ring: f - 1 steps, each passes one chunk to the next;
- doubling (f a power of two): log2 f steps between partners whose distance doubles (Thakur, Rabenseifner,
  Gropp, IJHPCA 19(1), 2005);
- bruck: ceil(log2 f) steps for any f (Bruck et al., IEEE TPDS 8(11), 1997);
- direct: one step, everybody to everybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from ir.errors import InputError
from ir.schedules import (
    Collective,
    Message,
    Schedule,
    Shape,
    Steps,
    check_shape,
    digit,
    reverse,
    with_digit,
)

GatherWay = Literal["ring", "doubling", "bruck", "direct"]


def _chunks(shape: Shape, level: int, rank: int, members: Sequence[int]) -> tuple[int, ...]:
    """Blocks whose inner digits are the rank's and whose digit at ``level`` is one of ``members``."""
    wanted = set(members)
    return tuple(
        block
        for block in range(math.prod(shape))
        if digit(block, shape, level) in wanted
        and all(digit(block, shape, inner) == digit(rank, shape, inner) for inner in range(level))
    )


def _ring(fanout: int) -> list[list[tuple[int, list[int]]]]:
    """For the member at digit 0, by step: (how far the target is, which chunks relative to it)."""
    return [[(1, [-step])] for step in range(fanout - 1)]


def _bruck(fanout: int) -> list[list[tuple[int, list[int]]]]:
    steps, held = [], 1
    while held < fanout:
        steps.append([(-held, list(range(min(held, fanout - held))))])
        held *= 2
    return steps


def _direct(fanout: int) -> list[list[tuple[int, list[int]]]]:
    return [[(other, [0]) for other in range(1, fanout)]] if fanout > 1 else []


_SHIFTED: dict[str, Callable[[int], list[list[tuple[int, list[int]]]]]] = {
    "ring": _ring,
    "bruck": _bruck,
    "direct": _direct,
}


def _doubling(shape: Shape, level: int, ranks: range) -> Steps:
    fanout = shape[level]
    if fanout & (fanout - 1):
        raise InputError(f"doubling needs a power of two, not {fanout} members; use 'bruck' or 'ring'")
    steps = []
    distance = 1
    while distance < fanout:
        messages = []
        for rank in ranks:
            here = digit(rank, shape, level)
            held = [m for m in range(fanout) if m // distance == here // distance]
            target = with_digit(rank, shape, level, here ^ distance)
            messages.append(Message(rank, target, _chunks(shape, level, rank, held)))
        steps.append(tuple(messages))
        distance *= 2
    return tuple(steps)


def _level(shape: Shape, level: int, way: GatherWay) -> Steps:
    ranks = range(math.prod(shape))
    if way == "doubling":
        return _doubling(shape, level, ranks)
    fanout = shape[level]
    steps = []
    for moves in _SHIFTED[way](fanout):
        messages = []
        for rank in ranks:
            here = digit(rank, shape, level)
            for distance, chunks in moves:
                target = with_digit(rank, shape, level, here + distance)
                members = [(here + chunk) % fanout for chunk in chunks]
                messages.append(Message(rank, target, _chunks(shape, level, rank, members)))
        steps.append(tuple(messages))
    return tuple(steps)


def _gather(shape: Shape, ways: Sequence[GatherWay]) -> Steps:
    if len(ways) != len(shape):
        raise InputError(f"{len(ways)} ways for {len(shape)} levels; give one for each")
    steps: Steps = ()
    for level in reversed(range(len(shape))):
        steps += _level(shape, level, ways[level])
    return steps


def all_gather(shape: Sequence[int], ways: Sequence[GatherWay]) -> Schedule:
    """Gather by one way a level, the outermost level first; raises InputError."""
    shape = check_shape(shape)
    return Schedule("all_gather", "+".join(ways), shape, math.prod(shape), _gather(shape, ways))


def reduce_scatter(shape: Sequence[int], ways: Sequence[GatherWay]) -> Schedule:
    """The all-gather backwards: innermost level first; raises InputError."""
    shape = check_shape(shape)
    steps = reverse(_gather(shape, ways))
    return Schedule("reduce_scatter", "+".join(ways), shape, math.prod(shape), steps)


def all_reduce(shape: Sequence[int], ways: Sequence[GatherWay]) -> Schedule:
    """Reduce-scatter from the innermost level out, all-gather back in; raises InputError."""
    shape = check_shape(shape)
    gathered = _gather(shape, ways)
    return Schedule("all_reduce", "+".join(ways), shape, math.prod(shape), reverse(gathered) + gathered)


def _channels(shape: Shape) -> Steps:
    host, ranks = shape[0], math.prod(shape)
    rings = [
        [first + (channel + 1 + i) % host for first in range(0, ranks, host) for i in range(host)]
        for channel in range(host)
    ]
    steps = []
    for step in range(ranks - 1):
        messages: dict[tuple[int, int], list[int]] = {}
        for channel, ring in enumerate(rings):
            for place, rank in enumerate(ring):
                owner = ring[(place - step) % ranks]
                target = ring[(place + 1) % ranks]
                messages.setdefault((rank, target), []).append(owner * host + channel)
        steps.append(tuple(Message(*pair, tuple(blocks)) for pair, blocks in messages.items()))
    return tuple(steps)


def channel_ring(collective: Collective, shape: Sequence[int]) -> Schedule:
    """One ring for each place in a host: ring c leaves every host from place c, so each NIC carries one.

    Args:
        collective: all_gather, reduce_scatter or all_reduce.
        shape: of the group. Share r of the buffer is blocks r * g to (r + 1) * g - 1, one for each of
            the g rings.
    """
    shape = check_shape(shape)
    gathered = _channels(shape)
    steps = {
        "all_gather": gathered,
        "reduce_scatter": reverse(gathered),
        "all_reduce": reverse(gathered) + gathered,
    }
    return Schedule(collective, "channel_ring", shape, math.prod(shape) * shape[0], steps[collective])


def hierarchical_all_reduce(shape: Sequence[int], ways: Sequence[GatherWay], top: Schedule) -> Schedule:
    """Reduce-scatter on the inner levels, ``top`` among ranks of equal place, all-gather back in.

    Args:
        shape: of the group; its last levels are those of ``top``.
        ways: one for each inner level.
        top: any all-reduce.

    Raises:
        InputError: ``top`` is no all-reduce or for other levels.
    """
    shape = check_shape(shape)
    inner, outer = shape[: len(ways)], shape[len(ways) :]
    if top.collective != "all_reduce" or math.prod(outer) != top.ranks or not inner:
        raise InputError(
            f"{top.collective} over {top.ranks} ranks cannot top {len(ways)} levels of {shape}; "
            f"give an all_reduce over {math.prod(outer)} ranks and at least one inner level"
        )
    width, parts = math.prod(inner), top.blocks

    def spread(steps: Steps) -> Steps:
        return tuple(
            tuple(
                Message(
                    m.source + width * host,
                    m.target + width * host,
                    tuple(block * parts + part for block in m.blocks for part in range(parts)),
                    m.reduce,
                )
                for m in messages
                for host in range(top.ranks)
            )
            for messages in steps
        )

    gathered = spread(_gather(inner, ways))
    between = tuple(
        tuple(
            Message(
                place + width * m.source,
                place + width * m.target,
                tuple(place * parts + part for part in m.blocks),
                m.reduce,
            )
            for m in messages
            for place in range(width)
        )
        for messages in top.steps
    )
    name = "+".join([*ways, top.algorithm])
    return Schedule("all_reduce", name, shape, width * parts, reverse(gathered) + between + gathered)
