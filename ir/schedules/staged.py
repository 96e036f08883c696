"""Collectives through host memory, as messages: every rank is a device and the memory of its host.

Rank 2 i is device i and rank 2 i + 1 its host memory; the innermost level, of two members, is the copy.
"""

from __future__ import annotations

from ir.schedules import Message, Schedule, Steps


def staged(between: Schedule) -> Schedule:
    """All buffers to host memory, ``between`` from host memory to host memory, and back."""
    ranks, blocks = range(between.ranks), tuple(range(between.blocks))
    out = tuple(Message(2 * rank, 2 * rank + 1, blocks) for rank in ranks)
    into = tuple(Message(2 * rank + 1, 2 * rank, blocks) for rank in ranks)
    steps: Steps = tuple(
        tuple(Message(2 * m.source + 1, 2 * m.target + 1, m.blocks, m.reduce) for m in messages)
        for messages in between.steps
    )
    shape = (2, *between.shape)
    return Schedule(between.collective, "host_staged", shape, between.blocks, (out, *steps, into))


def staged_chain(ranks: int, chunks: int) -> Schedule:
    """Pipelined chain broadcast: a chunk is copied while the one before it is on the wire."""
    steps: list[tuple[Message, ...]] = []
    for step in range(chunks + ranks):
        messages = []
        for chunk in range(chunks):
            place = step - chunk  # 0: to the root's host memory; 1..n-1: hop; and from there to the device
            if place == 0:
                messages.append(Message(0, 1, (chunk,)))
            elif 1 <= place < ranks:
                messages.append(Message(2 * place - 1, 2 * place + 1, (chunk,)))
            if 2 <= place <= ranks:
                host = place - 1
                messages.append(Message(2 * host + 1, 2 * host, (chunk,)))
        steps.append(tuple(messages))
    return Schedule("broadcast", "host_staged", (2, ranks), chunks, tuple(steps))
