"""Batches of ids for the models of the zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ir.ops import EmbeddingTable


def random_ids(
    tables: Sequence[EmbeddingTable], pooling: Mapping[str, float], batch: int, seed: int, embeddings: str
) -> Any:
    """Uniform ids, ``round(pooling)`` per sample (at least one) for each feature.

    Returns:
        A ``KeyedJaggedTensor`` for "torchrec", feature -> (ids, offsets) for "plain"; on the CPU.
    """
    random = torch.Generator().manual_seed(seed)
    ids, lengths = {}, {}
    for table in tables:
        for feature in table.features:
            lengths[feature] = max(1, round(pooling[feature]))
            ids[feature] = torch.randint(0, table.rows, (batch * lengths[feature],), generator=random)
    if embeddings == "plain":
        return {key: (ids[key], torch.arange(0, batch * n, n)) for key, n in lengths.items()}
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    import ir.capture_trace  # noqa: F401  quietens a notice that torch logs for TorchRec's tensors

    return KeyedJaggedTensor(
        keys=list(ids),
        values=torch.cat(list(ids.values())),
        lengths=torch.cat([torch.full((batch,), n, dtype=torch.int32) for n in lengths.values()]),
    )
