"""Send a schedule: each step posts its messages, waits for them, and puts or adds what arrived.

What is sent in a step is what was held when the step began; blocks of a message travel in one tensor. Works on
any backend that has point-to-point messages (gloo, NCCL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ir.errors import InputError
from ir.schedules import Message, Schedule, minus, plus

if TYPE_CHECKING:
    from torch import Tensor

Group = dist.ProcessGroup | None


def execute(schedule: Schedule, blocks: Tensor, group: Group = None, root: int = 0) -> None:
    """Run ``schedule`` in place on this rank's buffer.

    Args:
        schedule: for as many ranks as the group has.
        blocks: (schedule.blocks, elements of a block), contiguous.
        group: default: the default group.
        root: the rank of the group that plays rank 0 (and rank 0 plays it).

    Raises:
        InputError: another number of ranks or of blocks than the schedule's.
    """
    world = dist.get_world_size(group)
    if world != schedule.ranks or blocks.shape[0] != schedule.blocks:
        raise InputError(
            f"the schedule is for {schedule.ranks} ranks and {schedule.blocks} blocks; the group has {world} ranks "
            f"and the buffer {blocks.shape[0]} blocks"
        )
    me = _swapped(dist.get_rank(group), root)
    for messages in schedule.steps:
        out = [m for m in messages if m.source == me]
        into = [m for m in messages if m.target == me]
        if not out and not into:
            continue
        arrived = _transfer(blocks, out, into, group, root)
        for message, tensor in zip(into, arrived, strict=True):
            places = torch.tensor(message.blocks, device=blocks.device)
            if message.reduce:
                blocks.index_add_(0, places, tensor)
            else:
                blocks.index_copy_(0, places, tensor)


def _swapped(rank: int, root: int) -> int:
    """Rank 0 and ``root`` change places; the others keep theirs, and with it their host."""
    return {0: root, root: 0}.get(rank, rank)


def _transfer(
    blocks: Tensor, out: list[Message], into: list[Message], group: Group, root: int
) -> list[Tensor]:
    """Everything of one step at once; what arrived, in the order of ``into``."""

    def peer(rank: int) -> int:
        place = _swapped(rank, root)
        return dist.get_global_rank(group, place) if group is not None else place

    arrived = [blocks.new_empty(len(m.blocks), *blocks.shape[1:]) for m in into]
    posted = [
        dist.P2POp(dist.irecv, tensor, peer(m.source), group) for m, tensor in zip(into, arrived, strict=True)
    ]
    posted += [
        dist.P2POp(dist.isend, blocks[list(m.blocks)].contiguous(), peer(m.target), group) for m in out
    ]
    for work in dist.batch_isend_irecv(posted):
        work.wait()
    return arrived


def _as_blocks(tensor: Tensor, count: int) -> Tensor:
    """The elements in ``count`` equal blocks, the last ones padded with zeros; a copy."""
    flat = tensor.reshape(-1)
    each = -(-flat.numel() // count)
    padded = flat.new_zeros(count * each)
    padded[: flat.numel()] = flat
    return padded.view(count, each)


def all_reduce(tensor: Tensor, schedule: Schedule, group: Group = None) -> None:
    """Sum over ranks, in place; any shape and size."""
    blocks = _as_blocks(tensor, schedule.blocks)
    execute(schedule, blocks, group)
    tensor.copy_(blocks.view(-1)[: tensor.numel()].view(tensor.shape))


def broadcast(tensor: Tensor, schedule: Schedule, root: int = 0, group: Group = None) -> None:
    """``root``'s values on every rank, in place; ``root`` counts in the group."""
    blocks = _as_blocks(tensor, schedule.blocks)
    execute(schedule, blocks, group, root)
    tensor.copy_(blocks.view(-1)[: tensor.numel()].view(tensor.shape))


def reduce(tensor: Tensor, schedule: Schedule, root: int = 0, group: Group = None) -> None:
    """The sum on ``root``, in place; the other ranks keep what they had."""
    blocks = _as_blocks(tensor, schedule.blocks)
    execute(schedule, blocks, group, root)
    if dist.get_rank(group) == root:
        tensor.copy_(blocks.view(-1)[: tensor.numel()].view(tensor.shape))


def all_gather(output: Tensor, share: Tensor, schedule: Schedule, group: Group = None) -> None:
    """Every rank's ``share`` on every rank: ``output`` is (ranks * rows, ...), ``share`` (rows, ...)."""
    output.zero_()
    rows, rank = share.shape[0], dist.get_rank(group)
    output[rank * rows : (rank + 1) * rows] = share
    blocks = _shares(output, schedule)
    execute(schedule, blocks, group)
    output.copy_(blocks.view(-1).view(output.shape))


def reduce_scatter(share: Tensor, addends: Tensor, schedule: Schedule, group: Group = None) -> None:
    """The sum of this rank's rows: ``addends`` is (ranks * rows, ...), ``share`` (rows, ...)."""
    blocks = _shares(addends, schedule).clone()
    execute(schedule, blocks, group)
    rows, rank = share.shape[0], dist.get_rank(group)
    share.copy_(blocks.view(-1).view(addends.shape)[rank * rows : (rank + 1) * rows])


def _shares(tensor: Tensor, schedule: Schedule) -> Tensor:
    if tensor.numel() % schedule.blocks:
        raise InputError(
            f"{tensor.numel()} elements do not divide into the {schedule.blocks} blocks of {schedule.algorithm}; pad "
            "the tensor or choose another algorithm"
        )
    return tensor.contiguous().view(schedule.blocks, -1)


def all_to_all(output: Tensor, sent: Tensor, schedule: Schedule, group: Group = None) -> None:
    """Rows i * rows to (i + 1) * rows of ``sent`` to rank i; both are (ranks * rows, ...)."""
    ranks, rank = schedule.ranks, dist.get_rank(group)
    rows = sent.contiguous().view(ranks, -1)
    order = [plus(rank, offset, schedule.shape) for offset in range(ranks)]
    blocks = rows[order].contiguous()
    execute(schedule, blocks, group)
    received = torch.empty_like(blocks)
    received[[minus(rank, offset, schedule.shape) for offset in range(ranks)]] = blocks
    output.copy_(received.view(output.shape))
