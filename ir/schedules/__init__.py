"""Schedules of collectives: which rank sends which blocks to which rank, step by step.

One noun with three uses: :mod:`cost_models.fluid` times a schedule, :mod:`codegen.runtime.collectives`
sends it over ``torch.distributed``, and the closed forms of :mod:`cost_models.collective` price it.

Every rank holds a buffer of ``blocks`` equal blocks. A rank does its steps in order: it posts all
messages of a step at once and ends the step when all of them have ended; nothing else holds it up.
A message carries blocks to the same places of the target's buffer, where they replace what is there or
are added to it.

================ ======================= ============================ =======================
collective       buffer                  before                       after
================ ======================= ============================ =======================
broadcast        any blocks              rank 0 has all               every rank has all
reduce           any blocks              every rank has its addends   rank 0 has the sum
all_gather       a share for each rank   rank r has share r           every rank has all
reduce_scatter   a share for each rank   every rank has its addends   rank r has the sum of share r
all_reduce       any blocks              every rank has its addends   every rank has the sum
all_to_all       a block for each rank   block o is for rank r + o    block o came from rank r - o
================ ======================= ============================ =======================

Ranks are numbered digit by digit over a ``shape``, innermost level first, as those of a topology are.
``r + o`` adds each digit modulo its fanout, so that a step of an exchange stays on one level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ir.errors import InputError

Collective = Literal[
    "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "send_receive"
]

Shape = tuple[int, ...]
"""Members a group has at each level, innermost first."""


@dataclass(frozen=True, slots=True)
class Message:
    """Blocks that one rank sends to another in one step."""

    source: int
    target: int
    blocks: tuple[int, ...]
    reduce: bool = False  # added to the target's blocks rather than put in their place


Steps = tuple[tuple[Message, ...], ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A collective as point-to-point messages.

    Attributes:
        collective: what it computes.
        algorithm: how.
        shape: the digits that ranks are numbered by.
        blocks: equal blocks of every buffer.
        steps: the messages.
    """

    collective: Collective
    algorithm: str
    shape: Shape
    blocks: int
    steps: Steps

    @property
    def ranks(self) -> int:
        """Ranks that take part."""
        return math.prod(self.shape)


def check_shape(shape: Sequence[int]) -> Shape:
    """``shape`` as a tuple; raises InputError unless every level has a member."""
    if not shape or any(fanout < 1 for fanout in shape):
        raise InputError(f"a group of shape {tuple(shape)} has no ranks; give each level one or more")
    return tuple(shape)


def stride(shape: Shape, level: int) -> int:
    """How far apart two ranks are whose digit at ``level`` differs by one."""
    return math.prod(shape[:level])


def digit(rank: int, shape: Shape, level: int) -> int:
    """The place of ``rank`` among its siblings at ``level``."""
    return rank // stride(shape, level) % shape[level]


def with_digit(rank: int, shape: Shape, level: int, value: int) -> int:
    """The rank that differs from ``rank`` in its digit at ``level`` alone; ``value`` counts modulo."""
    fanout = shape[level]
    return rank + (value % fanout - digit(rank, shape, level)) * stride(shape, level)


def plus(rank: int, offset: int, shape: Shape) -> int:
    """``rank + offset``, digit by digit without carry."""
    for level in range(len(shape)):
        moved = digit(rank, shape, level) + digit(offset, shape, level)
        rank = with_digit(rank, shape, level, moved)
    return rank


def minus(rank: int, offset: int, shape: Shape) -> int:
    """``rank - offset``, digit by digit without borrow."""
    for level in range(len(shape)):
        moved = digit(rank, shape, level) - digit(offset, shape, level)
        rank = with_digit(rank, shape, level, moved)
    return rank


def reverse(steps: Steps) -> Steps:
    """The messages backwards and added up: a broadcast becomes a reduction, a gather a scatter.

    Holds for schedules in which every block reaches every rank once (the paths of a block form a tree).
    """
    return tuple(
        tuple(Message(m.target, m.source, m.blocks, True) for m in messages) for messages in reversed(steps)
    )
