"""Lookups of the shards that one rank holds: sums over bags, one output block a shard and feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.runtime.towers.ids import Bags
from codegen.runtime.towers.layout import Held
from ir.workload import Optimizer

_FBGEMM_OPTIMIZERS = {
    "sgd": "EXACT_SGD",
    "adagrad": "EXACT_ADAGRAD",
    "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD",
    "adam": "ADAM",
}


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0)])


class DenseLookup(nn.Module):
    """Shards as ordinary parameters with a gradient, for any optimizer of ``torch.optim``."""

    def __init__(self, held: Sequence[Held], device: torch.device) -> None:
        super().__init__()
        self.held = tuple(held)
        self.shards = nn.ParameterList(
            nn.Parameter(torch.empty(h.shard.rows, h.shard.cols, device=device)) for h in held
        )

    def forward(self, bags: Sequence[Bags]) -> Tensor:
        """(samples, columns of all shards and features)."""
        blocks = []
        for held, weight in zip(self.held, self.shards, strict=True):
            for slot in held.slots:
                bag = bags[slot]
                blocks.append(
                    F.embedding_bag(
                        bag.ids,
                        weight,
                        _offsets(bag.lengths),
                        mode="sum",
                        per_sample_weights=bag.weights,
                        include_last_offset=True,
                    )
                )
        return torch.cat(blocks, dim=1)

    def weights(self) -> list[Tensor]:
        """The shards, in order."""
        return [weight.detach() for weight in self.shards]


class FusedLookup(nn.Module):
    """Shards in one FBGEMM operator that applies the optimizer inside the backward pass."""

    def __init__(
        self, held: Sequence[Held], device: torch.device, optimizer: Optimizer, lr: float, eps: float
    ) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
            EmbeddingLocation,
            PoolingMode,
        )
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        super().__init__()
        self.held = tuple(held)
        on_cpu = device.type == "cpu"
        place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
        if not on_cpu:
            place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
        self.slots = [slot for h in held for slot in h.slots]
        self.operator = SplitTableBatchedEmbeddingBagsCodegen(
            [(h.shard.rows, h.shard.cols, *place) for h in held],
            feature_table_map=[index for index, h in enumerate(held) for _ in h.slots],
            optimizer=getattr(EmbOptimType, _FBGEMM_OPTIMIZERS[optimizer]),
            learning_rate=lr,
            eps=eps,
            pooling_mode=PoolingMode.SUM,
            output_dtype=SparseType.FP32,
            device=None if on_cpu else device,
        )

    def forward(self, bags: Sequence[Bags]) -> Tensor:
        """(samples, columns of all shards and features)."""
        chosen = [bags[slot] for slot in self.slots]
        ids = torch.cat([bag.ids for bag in chosen])
        weights = [bag.weights for bag in chosen if bag.weights is not None]
        out: Tensor = self.operator(
            indices=ids.long(),
            offsets=_offsets(torch.cat([bag.lengths for bag in chosen])),
            per_sample_weights=torch.cat(weights) if weights else None,
        )
        return out

    def weights(self) -> list[Tensor]:
        """The shards, in order."""
        return [weight.detach() for weight in self.operator.split_embedding_weights()]


class NoLookup(nn.Module):
    """A rank that holds no shard."""

    held: tuple[Held, ...] = ()

    def weights(self) -> list[Tensor]:
        """None."""
        return []


def make_lookup(
    held: Sequence[Held],
    *,
    kernel: str,
    device: torch.device,
    optimizer: Optimizer,
    lr: float,
    eps: float,
    weights: Mapping[str, Any],
) -> DenseLookup | FusedLookup | NoLookup:
    """The lookup of a rank's shards with their weights.

    Args:
        held: the shards.
        kernel: "dense" or "fused".
        device: where they lie.
        optimizer, lr, eps: of the fused kernel.
        weights: table -> whole weight; a meta tensor gives fresh rows, uniform within 1 / sqrt(rows).
    """
    if not held:
        return NoLookup()
    made = DenseLookup(held, device) if kernel == "dense" else FusedLookup(held, device, optimizer, lr, eps)
    with torch.no_grad():
        for piece, target in zip(held, made.weights(), strict=True):
            whole, shard = weights[piece.table], piece.shard
            if whole.is_meta:
                target.uniform_(-(whole.shape[0] ** -0.5), whole.shape[0] ** -0.5)
            else:
                rows = slice(shard.row, shard.row + shard.rows)
                target.copy_(whole[rows, shard.col : shard.col + shard.cols])
    return made
