"""Wukong in the sizes of the paper's table 5, on stand-ins for the tables of its internal data set.

Published (arXiv 2403.02545v4): 720 features, dim 160, 627 B sparse parameters, a global batch of
262,144, and l, n_F, n_L, k, MLP, GFLOP a sample and parameters of each size. Not published: the rows
of each table, the pooling factors, and how many vectors enter the first layer. The rows here spread
like a Pareto law and add up to 627 B parameters; one id a sample and feature; the number of vectors is
fitted to the seven published GFLOP.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ir.workload import Workload
from planner.zoo.dlrm import DLRM
from planner.zoo.wukong import build_wukong

DIM = 160  # the paper, section 5
FEATURES = 720  # the paper, section 5
SPARSE_PARAMS = 627e9  # the paper, section 5
GLOBAL_BATCH = 262_144  # the paper, section 5
# fitted on the seven GFLOP of table 5 (worst 19 %): 720 of features and 160 of the dense part
VECTORS = 880
PARETO = 1.0  # exponent of the stand-in for table sizes: rows of the i-th largest ~ 1 / (i + OFFSET)
OFFSET = 20  # keeps the largest table near 1 % of all parameters
BOTTOM_HIDDEN = 512  # DLRM's first bottom layer


def internal_tables() -> list[dict[str, object]]:
    """The stand-in tables, largest first, as entries of :mod:`ir.tables`."""
    weights = [(i + OFFSET) ** -PARETO for i in range(1, FEATURES + 1)]
    rows = SPARSE_PARAMS / DIM / sum(weights)
    return [
        {"name": f"t{i}", "rows": round(rows * weight), "dim": DIM, "features": [f"f{i}"]}
        for i, weight in enumerate(weights)
    ]


def build_wukong_internal(
    *,
    layers: int = 2,
    fmb: int = 8,
    lcb: int = 8,
    rank: int = 24,
    width: int = 2048,
    mlp_layers: int = 3,
    vectors: int = VECTORS,
    row_cap: int | None = None,
    global_batch: int = GLOBAL_BATCH,
    embeddings: str | None = None,
    device: str | torch.device = "meta",
) -> tuple[DLRM, Workload]:
    """Wukong over :func:`internal_tables`.

    Args:
        layers, fmb, lcb, rank: the paper's l, n_F, n_L, k.
        width, mlp_layers: of every MLP, also of the top one: the paper's MLP "3x2048".
        vectors: that enter the first layer; those beyond one a feature come from the dense part.

    Raises:
        InputError: as :func:`planner.zoo.wukong.build_wukong`.
    """
    hidden = (width,) * mlp_layers
    module, workload = build_wukong(
        tables=internal_tables(),
        bottom=(BOTTOM_HIDDEN, (vectors - FEATURES) * DIM),
        layers=layers,
        fmb=fmb,
        lcb=lcb,
        rank=rank,
        hidden=hidden,
        top=(*hidden, 1),
        row_cap=row_cap,
        global_batch=global_batch,
        embeddings=embeddings,
        device=device,
    )
    # the paper exchanges fp16 forward and bf16 backward, and computes in mixed precision
    return module, replace(workload, compute_dtype="bf16", exchange_dtype="fp16")
