"""Models for the TorchRec tests; built in every rank's process, so they take JSON arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Tables under ``ebc``, their pooled vectors concatenated by key, one linear layer: a logit."""

    def __init__(self, tables: Sequence[Sequence[Any]], weighted: bool = False) -> None:
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        from torchrec.modules.embedding_configs import DataType, PoolingType

        super().__init__()
        configs = [
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=dim,
                feature_names=list(features),
                pooling=PoolingType[pooling.upper()],
                data_type=DataType[dtype.upper()],
            )
            for name, rows, dim, features, pooling, dtype in tables
        ]
        self.ebc = EmbeddingBagCollection(tables=configs, is_weighted=weighted, device=torch.device("cpu"))
        self.names = [feature for config in configs for feature in config.feature_names]
        width = sum(config.embedding_dim * len(config.feature_names) for config in configs)
        self.top = nn.Linear(width + 3, 1)

    def forward(self, dense: Tensor, ids: Any) -> Tensor:
        pooled = self.ebc(ids)
        return self.top(torch.cat([dense, *(pooled[name] for name in self.names)], dim=1)).squeeze(-1)

    def example_inputs(self, batch: int) -> tuple[Tensor, Any]:
        from torchrec import KeyedJaggedTensor

        count = batch * len(self.names)
        weights = torch.ones(count) if self.ebc.is_weighted() else None
        ids = KeyedJaggedTensor(
            keys=self.names,
            values=torch.zeros(count, dtype=torch.int64),
            lengths=torch.ones(count, dtype=torch.int32),
            weights=weights,
        )
        return torch.zeros(batch, 3), ids


class ByPosition(Small):
    """Takes the vectors as they come, which is another order when they are sharded."""

    def forward(self, dense: Tensor, ids: Any) -> Tensor:
        return self.top(torch.cat([dense, self.ebc(ids).values()], dim=1)).squeeze(-1)


class Sequences(nn.Module):
    """An EmbeddingCollection whose rows are the output."""

    def __init__(self, tables: Sequence[Sequence[Any]]) -> None:
        from torchrec import EmbeddingCollection, EmbeddingConfig

        super().__init__()
        self.ec = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=name, num_embeddings=rows, embedding_dim=dim, feature_names=list(features)
                )
                for name, rows, dim, features, _, _ in tables
            ],
            device=torch.device("cpu"),
        )

    def forward(self, ids: Any) -> Any:
        return self.ec(ids)


class Forgetful(Small):
    """Computes something else when its tables are sharded: what the comparison must notice."""

    def forward(self, dense: Tensor, ids: Any) -> Tensor:
        return super().forward(dense, ids) * (
            1.0 if type(self.ebc).__name__ == "EmbeddingBagCollection" else 0.9
        )
