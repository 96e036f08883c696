"""The index exchange: ids of every feature to the ranks that hold its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.towers.exchange import all_to_all
from codegen.runtime.towers.layout import Slot


@dataclass(frozen=True, slots=True)
class Bags:
    """Ids of one feature: ``lengths[i]`` of them belong to sample ``i``; a weight each, or None."""

    ids: Tensor
    lengths: Tensor
    weights: Tensor | None


@dataclass(frozen=True, slots=True)
class Received:
    """What a rank looks up, for the samples of all ranks, in rank order.

    Attributes:
        bags: one a slot; lengths are those of all samples.
        batch: samples of each rank.
    """

    bags: list[Bags]
    batch: list[int]


def bags_of(ids: Any, feature: str, mean: bool) -> Bags:
    """A feature of a ``KeyedJaggedTensor``; means become sums with weights of 1 / length."""
    jagged = ids[feature]
    lengths, weights = jagged.lengths(), jagged.weights_or_none()
    if mean:
        share = lengths.to(torch.float32).reciprocal().repeat_interleave(lengths)
        weights = share if weights is None else weights * share
    return Bags(jagged.values(), lengths, weights)


def bags_of_slot(bags: Bags, slot: Slot) -> Bags:
    """The ids within a slot's rows, counted from its first row."""
    if slot.whole:
        return bags
    inside = (bags.ids >= slot.row) & (bags.ids < slot.row + slot.rows)
    passed = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
    ends = torch.cat([bags.lengths.new_zeros(1), bags.lengths.cumsum(0)]).long()
    lengths = passed[ends].diff().to(bags.lengths.dtype)
    weights = None if bags.weights is None else bags.weights[inside]
    return Bags(bags.ids[inside] - slot.row, lengths, weights)


def exchange_ids(
    bags: Callable[[str], Bags],
    slots: Sequence[Sequence[Slot]],
    samples: int,
    weighted: bool,
    group: Any,
    like: Tensor,
) -> Received:
    """Send each rank the ids of its slots and receive one's own.

    Three collectives: counts, lengths (int32), ids; a fourth for weights where there are any.

    Args:
        bags: a feature's ids on this rank.
        slots: of each rank of the group.
        samples: of this rank; ranks may differ.
        weighted: whether ids carry weights, the same on all ranks.
        group: process group.
        like: tensor whose type and device the ids have.
    """
    me = dist.get_rank(group)
    made: dict[Slot, Bags] = {}

    def get(slot: Slot) -> Bags:
        if slot not in made:
            made[slot] = bags_of_slot(bags(slot.feature), slot)
        return made[slot]

    per_rank = [[get(slot) for slot in of_rank] for of_rank in slots]
    sent = [sum(b.ids.numel() for b in of_rank) for of_rank in per_rank]
    counts = torch.tensor([[samples, n] for n in sent], dtype=torch.int64, device=like.device).view(-1)
    two = [2] * len(slots)
    answer = all_to_all(counts, two, two, group).view(-1, 2).tolist()
    batch, arriving = [int(a) for a, _ in answer], [int(n) for _, n in answer]
    everything = [b for of_rank in per_rank for b in of_rank]
    mine = len(slots[me])
    lengths = all_to_all(
        torch.cat([like.new_empty(0, dtype=torch.int32), *(b.lengths.int() for b in everything)]),
        [len(of_rank) * samples for of_rank in slots],
        [mine * size for size in batch],
        group,
    )
    ids = all_to_all(torch.cat([like[:0], *(b.ids for b in everything)]), sent, arriving, group)
    weights = None
    if weighted:
        ones = [b.ids.new_ones(b.ids.numel(), dtype=torch.float32) for b in everything]
        own = [one if b.weights is None else b.weights for one, b in zip(ones, everything, strict=True)]
        empty = like.new_empty(0, dtype=torch.float32)
        weights = all_to_all(torch.cat([empty, *own]), sent, arriving, group)
    return Received(_by_slot(lengths, ids, weights, batch, mine), batch)


def _by_slot(
    lengths: Tensor, ids: Tensor, weights: Tensor | None, batch: list[int], slots: int
) -> list[Bags]:
    """From source-major to slot-major order."""
    if not slots:
        return []
    per_source = [
        part.view(slots, size)
        for part, size in zip(torch.split(lengths, [slots * n for n in batch]), batch, strict=True)
    ]
    sizes = [int(n) for part in per_source for n in part.sum(1, dtype=torch.int64).tolist()]
    chunks = torch.split(ids, sizes)
    carried = None if weights is None else torch.split(weights, sizes)
    made = []
    for slot in range(slots):
        made.append(
            Bags(
                torch.cat(chunks[slot::slots]),
                torch.cat([part[slot] for part in per_source]),
                None if carried is None else torch.cat(carried[slot::slots]),
            )
        )
    return made
