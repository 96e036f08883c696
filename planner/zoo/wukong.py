"""Wukong: stacked factorisation machines over feature vectors.

Zhang et al. 2024, "Wukong: Towards a Scaling Law for Large-Scale Recommendation" (arXiv 2403.02545).
Shapes: B samples, n vectors of d columns. A layer maps (B, n, d) to (B, n_F + n_L, d)::

    X' = LN( concat( FMB(X), LCB(X) ) + X )        X is compressed linearly where the counts differ
    FMB(X) = reshape( MLP( LN( flatten( X (X^T Y) ) ) ) )            Y: (n, k), learnt
    LCB(X) = W X                                                     W: (n_L, n), learnt

X (X^T Y) is the product X X^T of a factorisation machine, projected to k columns: O(n k d), never
O(n^2 d). Layer i holds interactions of all orders up to 2^i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ir.errors import InputError
from ir.workload import Workload
from planner.zoo.dlrm import DLRM, choose_embeddings, vector_width
from planner.zoo.layers import LinearOverVectors, mlp, stack_vectors
from planner.zoo.tables import zoo_tables


class FactorizationMachineBlock(nn.Module):
    """(B, n, d) to (B, n_out, d): the low-rank factorisation machine, normalised, through an MLP.

    Args:
        vectors, dim: n and d of the input.
        out: n_out, the paper's n_F.
        rank: k, columns of Y.
        hidden: widths of the hidden layers of the MLP.
    """

    def __init__(
        self,
        vectors: int,
        dim: int,
        out: int,
        rank: int,
        hidden: Sequence[int],
        device: str | torch.device = "meta",
    ) -> None:
        super().__init__()
        self.out, self.dim = out, dim
        # scaled by 1/sqrt(n), so that the entries of X^T Y are as large as those of X
        self.y = nn.Parameter(torch.randn(vectors, rank, device=device) * vectors**-0.5)
        self.norm = nn.LayerNorm(vectors * rank, device=device)
        self.mlp = mlp([vectors * rank, *hidden, out * dim], last_relu=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, n_out, d)."""
        interactions = torch.bmm(x, torch.matmul(x.transpose(1, 2), self.y))  # (B, n, k)
        mixed: Tensor = self.mlp(self.norm(interactions.flatten(1)))
        return mixed.view(-1, self.out, self.dim)


class WukongLayer(nn.Module):
    """One layer: (B, n, d) to (B, n_F + n_L, d)."""

    def __init__(
        self,
        vectors: int,
        dim: int,
        fmb: int,
        lcb: int,
        rank: int,
        hidden: Sequence[int],
        device: str | torch.device = "meta",
    ) -> None:
        super().__init__()
        self.fmb = FactorizationMachineBlock(vectors, dim, fmb, rank, hidden, device)
        self.lcb = LinearOverVectors(vectors, lcb, device)
        same = vectors == fmb + lcb
        self.shortcut = nn.Identity() if same else LinearOverVectors(vectors, fmb + lcb, device)
        self.norm = nn.LayerNorm(dim, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, n_F + n_L, d)."""
        y: Tensor = self.norm(torch.cat([self.fmb(x), self.lcb(x)], dim=1) + self.shortcut(x))
        return y


class WukongInteraction(nn.Module):
    """The interaction stack in the place of DLRM's: dense (B, m d) and F x (B, d) to (B, (n_F + n_L) d).

    The first layer sees F + m vectors: the dense vector counts for ``dense_vectors`` = m of them.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        dense_vectors: int,
        layers: int,
        fmb: int,
        lcb: int,
        rank: int,
        hidden: Sequence[int],
        device: str | torch.device = "meta",
    ) -> None:
        super().__init__()
        counts = [features + dense_vectors] + [fmb + lcb] * (layers - 1)
        self.dim = dim
        self.layers = nn.Sequential(*(WukongLayer(n, dim, fmb, lcb, rank, hidden, device) for n in counts))

    def forward(self, dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
        """(B, m d) and F x (B, d) to (B, (n_F + n_L) d)."""
        stacked: Tensor = self.layers(stack_vectors(dense, sparse, self.dim))
        return stacked.flatten(1)


def build_wukong(
    *,
    tables: str | Sequence[Any] = "mlperf_dlrm_dcnv2.json",
    dim: int | None = None,
    dense_features: int = 13,
    bottom: Sequence[int] = (512, 256, 128),
    layers: int = 4,
    fmb: int = 16,
    lcb: int = 16,
    rank: int = 24,
    hidden: Sequence[int] = (512, 512),
    top: Sequence[int] = (2048, 2048, 2048, 2048, 1),
    row_cap: int | None = None,
    global_batch: int = 65_536,  # the batch of the table set, as for DLRM-DCNv2
    embeddings: str | None = None,
    device: str | torch.device = "meta",
) -> tuple[DLRM, Workload]:
    """DLRM with a Wukong stack as its interaction.

    Args:
        layers, fmb, lcb, rank: the paper's l, n_F, n_L, k.
        hidden: hidden layers of every FMB's MLP.
        bottom: the last width is the tables' dim times the number of vectors that dense features make.

    Raises:
        InputError: counts that are not positive, or widths that do not fit together.
    """
    for name, value in (("layers", layers), ("fmb", fmb), ("lcb", lcb), ("rank", rank)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    records, workload = zoo_tables(
        tables, dim=dim, row_cap=row_cap, global_batch=global_batch, optimizer="adagrad"
    )
    width, dense_vectors = vector_width(records, bottom)
    interaction = WukongInteraction(
        sum(len(table.features) for table in records),
        width,
        dense_vectors=dense_vectors,
        layers=layers,
        fmb=fmb,
        lcb=lcb,
        rank=rank,
        hidden=hidden,
        device=device,
    )
    module = DLRM(
        records,
        dense_features,
        bottom,
        interaction,
        (fmb + lcb) * width,
        top,
        embeddings=choose_embeddings(embeddings),
        device=device,
    )
    return module, workload
