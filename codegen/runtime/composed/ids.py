"""The index exchange of a batch in parts: ids of every feature to the ranks that hold its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.composed.batch import Parts
from codegen.runtime.towers.exchange import all_to_all
from codegen.runtime.towers.ids import Bags, bags_of_slot
from codegen.runtime.towers.layout import Slot


@dataclass(frozen=True, slots=True)
class Asked:
    """What a rank looks up, for the rows of all ranks, in rank order.

    Attributes:
        bags: one a slot.
        rows: ``rows[rank][part]``.
        samples: of each rank.
    """

    bags: list[Bags]
    rows: list[list[int]]
    samples: list[int]


def exchange_parts(
    parts: Parts,
    slots: Sequence[Sequence[Slot]],
    part_of: Mapping[str, int],
    weighted: bool,
    group: Any,
    like: Tensor,
) -> Asked:
    """Send each rank the ids of its slots and receive one's own.

    Three collectives: counts, lengths (int32), ids; a fourth for weights where there are any.

    Args:
        parts: of this rank's batch; ranks may differ in samples and rows.
        slots: of each rank of the group.
        part_of: feature -> part.
        weighted: whether ids carry weights, the same on all ranks.
        group: process group.
        like: tensor whose type and device the ids have.
    """
    me = dist.get_rank(group)
    made: dict[Slot, Bags] = {}
    for slot in (slot for of_rank in slots for slot in of_rank):
        if slot not in made:
            made[slot] = bags_of_slot(parts.bags[slot.feature], slot)
    per_rank = [[made[slot] for slot in of_rank] for of_rank in slots]
    sent = [sum(b.ids.numel() for b in of_rank) for of_rank in per_rank]
    numbers = torch.tensor(
        [[parts.samples, *parts.rows, n] for n in sent], dtype=torch.int64, device=like.device
    )
    each = [numbers.shape[1]] * len(slots)
    told = all_to_all(numbers.view(-1), each, each, group).view(len(slots), -1).tolist()
    samples, rows, arriving = [t[0] for t in told], [t[1:-1] for t in told], [t[-1] for t in told]
    everything = [b for of_rank in per_rank for b in of_rank]
    mine = [part_of[slot.feature] for slot in slots[me]]
    lengths = all_to_all(
        torch.cat([like.new_empty(0, dtype=torch.int32), *(b.lengths.int() for b in everything)]),
        [sum(b.lengths.numel() for b in of_rank) for of_rank in per_rank],
        [sum(of_rank[part] for part in mine) for of_rank in rows],
        group,
    )
    ids = all_to_all(torch.cat([like[:0], *(b.ids for b in everything)]), sent, arriving, group)
    weights = None
    if weighted:
        own = [
            b.ids.new_ones(b.ids.numel(), dtype=torch.float32) if b.weights is None else b.weights
            for b in everything
        ]
        empty = like.new_empty(0, dtype=torch.float32)
        weights = all_to_all(torch.cat([empty, *own]), sent, arriving, group)
    return Asked(_by_slot(lengths, ids, weights, [[r[part] for part in mine] for r in rows]), rows, samples)


def _by_slot(lengths: Tensor, ids: Tensor, weights: Tensor | None, rows: list[list[int]]) -> list[Bags]:
    """From source-major to slot-major order; ``rows[source][slot]``."""
    slots = len(rows[0])
    pieces = torch.split(lengths, [n for source in rows for n in source])
    sizes = [int(piece.sum(dtype=torch.int64)) for piece in pieces]
    chunks = torch.split(ids, sizes)
    carried = None if weights is None else torch.split(weights, sizes)
    return [
        Bags(
            torch.cat(chunks[slot::slots]),
            torch.cat(pieces[slot::slots]),
            None if carried is None else torch.cat(carried[slot::slots]),
        )
        for slot in range(slots)
    ]
