"""The tables that one rank holds, looked up for every rank at once and updated in the backward pass.

FBGEMM's table-batched kernel, as TorchRec runs it on CPUs: one call for all tables of a pooling mode and all
ranks' samples, gradients that touch only rows looked up, and the optimizer's update fused into the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codegen.runtime.ids_wire import Ids
from codegen.runtime.optimizers import ADAGRAD_EPS, fused_state
from ir.workload import Optimizer

if TYPE_CHECKING:
    from codegen.runtime.compressed_exchange import Piece

FUSED: tuple[Optimizer, ...] = ("sgd", "adagrad", "rowwise_adagrad")  # kernels that FBGEMM has on CPUs
_COLUMNS = 4  # FBGEMM's rows are multiples of this many elements


@dataclass(frozen=True, slots=True)
class Update:
    """The optimizer of tables that are updated in the backward pass."""

    optimizer: Optimizer
    lr: float
    eps: float = ADAGRAD_EPS

    def fuses(self, cols: int) -> bool:
        """Whether a kernel exists for this optimizer and rows of ``cols`` float32."""
        return self.optimizer in FUSED and cols % _COLUMNS == 0


class FusedTables:
    """Pieces with one pooling mode in one kernel.

    ``weights`` are the kernel's own rows, one (rows, cols) view a piece: writing to them changes the tables.
    """

    def __init__(self, pieces: Sequence[Piece], update: Update) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        kinds = {
            "sgd": EmbOptimType.EXACT_SGD,
            "adagrad": EmbOptimType.EXACT_ADAGRAD,
            "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        }
        (pooling,) = {piece.pooling for piece in pieces}
        self.pieces = tuple(pieces)
        self.slots = [(piece, feature) for piece in pieces for feature in piece.features]
        self._widths = [piece.cols for piece, _ in self.slots]
        self._bags: Any = SplitTableBatchedEmbeddingBagsCodegen(
            [(p.rows, p.cols, EmbeddingLocation.HOST, ComputeDevice.CPU) for p in pieces],
            feature_table_map=[n for n, piece in enumerate(pieces) for _ in piece.features],
            pooling_mode=PoolingMode.MEAN if pooling == "mean" else PoolingMode.SUM,
            optimizer=kinds[update.optimizer],
            learning_rate=update.lr,
            eps=update.eps,
        )
        self.weights: list[Tensor] = self._bags.split_embedding_weights()

    def __call__(self, batches: Sequence[tuple[int, Mapping[str, Ids]]]) -> list[list[Tensor]]:
        """Pooled vectors ``[batch][slot]``, (samples, cols), of each batch's (samples, feature -> ids)."""
        counts = [count for count, _ in batches]
        asked = [ids[feature] for _, feature in self.slots for _, ids in batches]
        offsets = torch.zeros(len(self.slots) * sum(counts) + 1, dtype=torch.int64)
        torch.cumsum(torch.cat([lengths for _, lengths in asked]), 0, out=offsets[1:])
        pooled = self._bags(torch.cat([ids for ids, _ in asked]), offsets)
        # splits, not slices: their backward pass is one concatenation
        return [list(rows.split(self._widths, dim=1)) for rows in pooled.split(counts)]

    def state(self) -> list[tuple[Piece, dict[str, Tensor]]]:
        """State of each piece's optimizer by the names of ``torch.optim``."""
        return list(zip(self.pieces, fused_state(self._bags), strict=True))
