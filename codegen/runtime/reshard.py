"""Tensors of one sharding into those of another, between the ranks that run: what both hold is copied, the rest is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and size along each dimension."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The elements of ``block`` go from rank ``source`` to rank ``target``."""

    source: int
    target: int
    block: Block


def reshard(old: Mapping[str, Any], new: Mapping[str, Any], group: Any = None) -> int:
    """Fill ``new`` from ``old``; called by all ranks together.

    Args:
        old: name -> plain tensor (every rank has all of it) or ``ShardedTensor``; a rank may lack names of which it has
            nothing.
        new: likewise, other blocks of the same elements; written in place.
        group: whose ranks; default: the default group.

    Returns:
        Bytes that this rank received from others.
    """
    group = group if group is not None else dist.group.WORLD
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    held = [{name: [block for block, _ in _blocks(value)] for name, value in of.items()} for of in (old, new)]
    copied = {name for name, value in old.items() if not hasattr(value, "local_shards")}
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (held, {name: value.dtype for name, value in old.items()}), group=group)
    everyone = [blocks for blocks, _ in told]
    kinds = {name: kind for _, types in reversed(told) for name, kind in types.items()}
    received = 0
    for name in sorted({name for _, after in everyone for name in after}):
        parts = _parts(name, everyone, name in copied)
        place = rank, world, group
        received += _exchange(old.get(name), new.get(name), parts, kinds.get(name, torch.float32), place)
    return received


def _blocks(value: Any) -> list[tuple[Block, Tensor]]:
    """What this rank holds of a tensor."""
    if hasattr(value, "local_shards"):
        return [
            ((tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)), s.tensor.detach())
            for s in value.local_shards()
        ]
    whole = value.detach()
    return [(((0,) * whole.ndim, tuple(whole.shape)), whole)]


def _parts(name: str, everyone: list[Any], copied: bool) -> list[_Part]:
    """Which rank gives which block to which, in an order that all ranks agree on."""
    found = []
    for target, (before, after) in enumerate(everyone):
        for wanted in after.get(name, ()):
            # of copies a rank takes its own
            givers = [(target, before)] if copied else enumerate(had for had, _ in everyone)
            for source, had in givers:
                for block in had.get(name, ()):
                    common = _common(wanted, block)
                    if common is not None:
                        found.append(_Part(source, target, common))
    return found


def _common(one: Block, other: Block) -> Block | None:
    low = tuple(max(a, b) for a, b in zip(one[0], other[0], strict=True))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True))
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    return low, tuple(b - a for a, b in zip(low, high, strict=True))


def _exchange(old: Any, new: Any, parts: list[_Part], kind: torch.dtype, place: tuple[int, int, Any]) -> int:
    """Move the parts of one tensor, in the type that it has had; bytes received from others.

    Optimizers keep states of half tables in another type where a kernel is fused than where every rank has a copy.
    """
    rank, world, group = place
    mine = _blocks(old) if old is not None else []
    known = next(
        (tensor for _, tensor in (*mine, *(_blocks(new) if new is not None else []))), torch.empty(0)
    )
    nothing = known.new_empty(0, dtype=kind)
    sent = [[_of(mine, part).reshape(-1) for part in parts if (part.source, part.target) == (rank, other)]
            for other in range(world)]  # fmt: skip
    coming = [
        [part for part in parts if (part.source, part.target) == (other, rank)] for other in range(world)
    ]
    counts = [sum(_count(part.block) for part in some) for some in coming]
    if all(part.source == part.target for part in parts):
        arrived = torch.cat([nothing, *(piece for some in sent for piece in some)])
    else:
        outgoing = torch.cat([nothing, *(piece for some in sent for piece in some)])
        arrived = outgoing.new_empty(sum(counts))
        dist.all_to_all_single(
            arrived, outgoing, counts, [sum(piece.numel() for piece in some) for some in sent], group=group
        )
    at, targets = 0, _blocks(new) if new is not None else []
    for part in (part for some in coming for part in some):
        size = _count(part.block)
        _of(targets, part).copy_(arrived[at : at + size].view(part.block[1]))
        at += size
    return int((sum(counts) - counts[rank]) * nothing.element_size())


def _of(blocks: list[tuple[Block, Tensor]], part: _Part) -> Tensor:
    """The elements of a part inside the block that holds them, as a view."""
    for block, tensor in blocks:
        if _common(block, part.block) == part.block:
            cut = tuple(
                slice(a - b, a - b + n)
                for a, b, n in zip(part.block[0], block[0], part.block[1], strict=True)
            )
            return tensor[cut]
    raise AssertionError("a part lies inside one of the blocks that it was cut from")


def _count(block: Block) -> int:
    count = 1
    for size in block[1]:
        count *= size
    return count
