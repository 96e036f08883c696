"""DLRM-DCNv2: DLRM with the cross network of DCN-V2 as its interaction.

Wang et al. 2021, "DCN V2" (arXiv 2008.13535); MLPerf Training from v3.0 on: three low-rank layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ir.workload import Workload
from planner.zoo.dlrm import DLRM, choose_embeddings, common_dim
from planner.zoo.layers import CrossInteraction
from planner.zoo.tables import zoo_tables


def build_dlrm_dcnv2(
    *,
    tables: str | Sequence[Any] = "mlperf_dlrm_dcnv2.json",
    dim: int | None = None,
    dense_features: int = 13,
    bottom: Sequence[int] = (512, 256, 128),
    cross_layers: int = 3,
    cross_rank: int | None = 512,
    top: Sequence[int] = (1024, 1024, 512, 256, 1),
    row_cap: int | None = None,
    global_batch: int = 65_536,  # mlcommons/training recommendation_v2
    embeddings: str | None = None,
    device: str | torch.device = "meta",
) -> tuple[DLRM, Workload]:
    """DLRM with a cross network; ``cross_rank`` None gives full-rank layers. Defaults are MLPerf's."""
    records, workload = zoo_tables(
        tables, dim=dim, row_cap=row_cap, global_batch=global_batch, optimizer="adagrad"
    )
    width = common_dim(records, bottom) * (1 + sum(len(table.features) for table in records))
    module = DLRM(
        records,
        dense_features,
        bottom,
        CrossInteraction(width, cross_layers, cross_rank, device),
        width,
        top,
        embeddings=choose_embeddings(embeddings),
        device=device,
    )
    return module, workload
