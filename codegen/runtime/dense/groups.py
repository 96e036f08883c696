"""2D sparse parallelism from process groups: each group holds all tables, replicas of a shard are averaged.

TorchRec's ``DMPCollection`` does the same on GPUs only; this runs on gloo too. With SGD and a synchronisation every
step the result is that of one model-parallel group: the mean of w - lr g_m over groups is w - lr times the mean
gradient. Optimizers with state, and longer intervals, are approximations, as they are in ``DMPCollection``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ir.errors import InputError


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's two process groups.

    Attributes:
        count: M.
        first: global rank of the first rank of this rank's group.
        shards: the ranks of this group.
        replicas: the ranks at this place in every group.
    """

    count: int
    first: int
    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup


def make_groups(count: int) -> Groups:
    """``count`` groups of consecutive ranks of the default group; called by all ranks.

    Raises:
        InputError: the ranks do not divide into so many groups.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % count:
        raise InputError(
            f"{world} ranks do not divide into {count} groups; start a multiple of {count} processes"
        )
    each = world // count
    shards, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        [list(range(first, first + each)) for first in range(0, world, each)]
    )
    replicas, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        [list(range(place, world, each)) for place in range(each)]
    )
    return Groups(count, rank // each * each, shards, replicas)


def on_global_ranks(decided: Any, first: int) -> Any:
    """A TorchRec ``ShardingPlan`` of a group with its shards placed on the ranks that hold them; in place.

    ``ranks`` stay those of the group, by which TorchRec's exchanges count; placements are global, as sharded tensors
    want them.
    """
    for module in decided.plan.values():
        for sharding in module.values():
            for shard in getattr(sharding.sharding_spec, "shards", None) or ():
                rank, device = shard.placement.rank(), shard.placement.device()
                shard.placement = type(shard.placement)(f"rank:{first + rank}/{device}")
    return decided


class TableSync:
    """Averages tables and their fused optimizer state over the replicas every ``every`` steps."""

    def __init__(self, wrapped: Any, groups: Groups, every: int) -> None:
        self.wrapped, self.groups, self.every = wrapped, groups, every
        self.steps = 0

    def __call__(self) -> None:
        """After each step, on all ranks."""
        self.steps += 1
        if self.steps % self.every:
            return
        with torch.no_grad():
            for tensor in self._tensors():
                dist.all_reduce(tensor, group=self.groups.replicas)
                tensor.div_(self.groups.count)

    def _tensors(self) -> Iterator[Tensor]:
        for value in self.wrapped.state_dict().values():
            if hasattr(value, "local_shards"):
                yield from (shard.tensor for shard in value.local_shards())
        for slots in self.wrapped.fused_optimizer.state_dict()["state"].values():
            for value in slots.values():
                if hasattr(value, "local_shards"):
                    yield from (shard.tensor for shard in value.local_shards())
                elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
                    yield value
