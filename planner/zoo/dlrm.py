"""DLRM: tables and a bottom MLP, an interaction between their vectors, a top MLP.

Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation
Systems" (arXiv 1906.00091). The interaction is a module, so DCNv2 is the same model with another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.workload import Workload
from planner.zoo.inputs import random_ids
from planner.zoo.layers import DotInteraction, PlainEmbeddings, mlp, torchrec_embeddings
from planner.zoo.tables import zoo_tables


class DLRM(nn.Module):
    """Logits of a batch.

    Args:
        tables: one vector per feature; all of the width of the bottom MLP's output.
        dense_features: number of dense inputs.
        bottom: widths of the bottom MLP's layers, all with ReLU.
        interaction: module from ((B, D), F x (B, D)) to (B, N).
        interaction_width: N.
        top: widths of the top MLP's layers, the last without ReLU.
        embeddings: "torchrec" for an ``EmbeddingBagCollection``, "plain" for ``nn.EmbeddingBag``.
        device: where the weights lie; "meta" allocates none.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingTable],
        dense_features: int,
        bottom: Sequence[int],
        interaction: nn.Module,
        interaction_width: int,
        top: Sequence[int],
        *,
        embeddings: str = "torchrec",
        device: str | torch.device = "meta",
    ) -> None:
        super().__init__()
        self.dense_features = dense_features
        self.features = [feature for table in tables for feature in table.features]
        self.tables = tuple(tables)
        self.embeddings = embeddings
        if embeddings == "torchrec":
            self.ebc = torchrec_embeddings(tables, device)
        else:
            self.ebc = PlainEmbeddings(tables, device)
        self.bottom = mlp([dense_features, *bottom], last_relu=True, device=device)
        self.interaction = interaction
        self.top = mlp([interaction_width, *top], last_relu=False, device=device)

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        """Logits (B,) of dense features (B, dense_features) and ids.

        ``sparse`` is a ``KeyedJaggedTensor``; with plain tables, feature -> (ids, offsets).
        """
        pooled = self.ebc(sparse)
        # by key: a sharded collection returns its features in another order
        vectors = [pooled[feature] for feature in self.features]
        return self.top(self.interaction(self.bottom(dense), vectors)).squeeze(-1)  # type: ignore[no-any-return]

    def example_inputs(self, batch_size: int) -> tuple[Tensor, Any]:
        """Dense features and one id per sample and feature, on the CPU."""
        dense = torch.zeros(batch_size, self.dense_features)
        pooling = dict.fromkeys(self.features, 1.0)
        return dense, random_ids(self.tables, pooling, batch_size, 0, self.embeddings)

    def random_batch(self, batch_size: int, workload: Workload, seed: int) -> tuple[Tensor, Any, Tensor]:
        """Dense features (normal), ids (uniform over each table, as many per sample as the workload's
        pooling factor, rounded) and labels (0 or 1) of one batch, on the CPU; the same for one seed."""
        random = torch.Generator().manual_seed(seed)
        dense = torch.randn(batch_size, self.dense_features, generator=random)
        labels = torch.randint(0, 2, (batch_size,), generator=random).float()
        pooling = {feature: workload.stats(feature).pooling_factor for feature in self.features}
        return dense, random_ids(self.tables, pooling, batch_size, seed, self.embeddings), labels


def choose_embeddings(embeddings: str | None) -> str:
    """TorchRec's collection where TorchRec is installed, else plain modules; raises InputError."""
    installed = importlib.util.find_spec("torchrec") is not None
    if embeddings is None:
        return "torchrec" if installed else "plain"
    if embeddings not in ("torchrec", "plain"):
        raise InputError(f"embeddings must be 'torchrec' or 'plain', not {embeddings!r}")
    if embeddings == "torchrec" and not installed:
        raise InputError("TorchRec is not installed; install it or build with embeddings='plain'")
    return embeddings


def common_dim(tables: Sequence[EmbeddingTable], bottom: Sequence[int]) -> int:
    """The width of all feature vectors; raises InputError when tables and bottom MLP disagree."""
    dims = {table.dim for table in tables}
    if len(dims) != 1 or list(bottom)[-1:] != [*dims]:
        raise InputError(
            f"the tables have dims {sorted(dims)} and the bottom MLP ends with {list(bottom)[-1:]}; an "
            "interaction needs one width for all"
        )
    return dims.pop()


def vector_width(tables: Sequence[EmbeddingTable], bottom: Sequence[int]) -> tuple[int, int]:
    """The width of all feature vectors, and how many of them the bottom MLP's output makes.

    Raises:
        InputError: tables of several dims, or an output that is no multiple of their dim.
    """
    dims = {table.dim for table in tables}
    last = bottom[-1] if bottom else 0
    if len(dims) != 1 or last < 1 or last % next(iter(dims)):
        raise InputError(
            f"the tables have dims {sorted(dims)} and the bottom MLP ends with {last}; an interaction needs one "
            "width for all vectors, and a bottom MLP that ends with a multiple of it"
        )
    width = dims.pop()
    return width, last // width


def build_dlrm(
    *,
    tables: str | Sequence[Any] = "criteo_terabyte_variants.json#mlperf_v1_cap40M",
    dim: int | None = None,
    dense_features: int = 13,
    bottom: Sequence[int] = (512, 256, 128),
    top: Sequence[int] = (1024, 1024, 512, 256, 1),
    row_cap: int | None = None,
    global_batch: int = 55_296,  # NVIDIA's MLPerf v0.7-v2.1 submissions on one host
    embeddings: str | None = None,
    device: str | torch.device = "meta",
) -> tuple[DLRM, Workload]:
    """DLRM with dot interaction; defaults are MLPerf's (v0.7 to v2.1), which trains with SGD."""
    records, workload = zoo_tables(
        tables, dim=dim, row_cap=row_cap, global_batch=global_batch, optimizer="sgd"
    )
    width = common_dim(records, bottom)
    features = sum(len(table.features) for table in records)
    module = DLRM(
        records,
        dense_features,
        bottom,
        DotInteraction(),
        width + (features + 1) * features // 2,
        top,
        embeddings=choose_embeddings(embeddings),
        device=device,
    )
    return module, workload
