"""Whole tensors from the ranks that hold parts of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.dense.shard import whole as full
from ir.errors import InputError


def gather_rows(part: Tensor) -> Tensor:
    """The ranks' tensors one below the other, on every rank; they may differ in their first dimension."""
    count = torch.tensor([part.shape[0]])
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    most = max(int(c) for c in counts)
    padded = part.new_zeros((most, *part.shape[1:]))
    padded[: part.shape[0]] = part
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(c)] for p, c in zip(parts, counts, strict=True)])


def mean_over_ranks(value: Tensor) -> float:
    """The mean of one number over the ranks."""
    total = value.detach().clone().reshape(1)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def whole_weights(wrapped: Any, copies: int = 1) -> dict[str, Tensor]:
    """All weights of a ``DistributedModelParallel``, whole, on every rank, by their names before sharding.

    ``copies`` ranks hold each shard; their mean counts.

    Raises:
        InputError: the shards that TorchRec really made do not hold each weight exactly once.
    """
    whole = {}
    for name, value in wrapped.state_dict().items():
        if not hasattr(value, "local_shards"):
            whole[name] = full(value).clone()
            continue
        total = torch.zeros(value.size())
        holders = torch.zeros(value.size(), dtype=torch.uint8)
        for shard in value.local_shards():
            place = tuple(
                slice(start, start + length)
                for start, length in zip(
                    shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True
                )
            )
            total[place] = shard.tensor.detach().to(total.dtype)
            holders[place] += 1
        dist.all_reduce(total)
        dist.all_reduce(holders)
        if not bool((holders == copies).all()):
            raise InputError(
                f"{name} is not held exactly {copies} times by the shards that TorchRec made; this is a bug"
            )
        whole[name] = total / copies
    return whole
