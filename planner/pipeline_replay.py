"""The order of ops of a pipeline schedule, written out: for checks that use no formula.

Each rank gets its list of ``(kind, chunk, micro-batch)``, kind "F" forward, "B" backward for the inputs (and
the weights, unless the schedule splits them), "W" backward for the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from ir.parallelism import Layout

Step = tuple[str, int, int]


def rank_order(layout: Layout, rank: int) -> list[Step]:
    """What pipeline rank ``rank`` runs in one step, in order."""
    chunks, count = layout.virtual_stages, layout.micro_batches
    group = layout.contiguous if chunks > 1 else 1
    forwards: list[Step] = []
    backwards: list[Step] = []
    for start in range(0, count, group):
        members = range(start, min(start + group, count))
        forwards += [("F", chunk, m) for chunk in range(chunks) for m in members]
        backwards += [("B", chunk, m) for chunk in reversed(range(chunks)) for m in members]
    if layout.schedule == "gpipe":
        return forwards + backwards
    behind = layout.pipeline - 1 - rank
    ahead = behind if chunks == 1 else 2 * behind + (chunks - 1) * group
    ahead = min(ahead, len(forwards))
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    order += backwards[len(forwards) - ahead :]
    return _split(order, rank) if layout.schedule == "zero_bubble" else order


def _split(order: Sequence[Step], delay: int) -> list[Step]:
    """Weight gradients as steps of their own, each ``delay`` backwards after its own."""
    made: list[Step] = []
    waiting: list[Step] = []
    for step in order:
        made.append(step)
        if step[0] == "B":
            waiting.append(("W", step[1], step[2]))
        if len(waiting) > delay:
            made.append(waiting.pop(0))
    return made + waiting


def peak_layers(layout: Layout, stage: Sequence[int], rank: int) -> tuple[int, int]:
    """The most layers' activations a rank holds at once, and layers' worth of deferred weight gradients.

    Args:
        layout: the schedule.
        stage: layers of each chunk of the rank.
        rank: which pipeline rank.
    """
    held = waiting = most = deferred = 0
    for kind, chunk, _ in rank_order(layout, rank):
        if kind == "F":
            held += stage[chunk]
            most = max(most, held)
        elif kind == "B":
            held -= stage[chunk]
            waiting += stage[chunk] if layout.schedule == "zero_bubble" else 0
        else:
            deferred = max(deferred, waiting - stage[chunk])
            waiting -= stage[chunk]
    return most, deferred
