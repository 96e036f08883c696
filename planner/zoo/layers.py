"""Layers the recommenders of the zoo are made of.

Shapes: B samples, F sparse features, D columns of a table, N = (F + 1) x D.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ir.ops import EmbeddingTable


def mlp(
    sizes: Sequence[int],
    *,
    last_relu: bool,
    device: str | torch.device = "meta",
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers between ReLUs, from ``sizes[0]`` inputs to ``sizes[-1]`` outputs."""
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(sizes):
        layers += [nn.Linear(k, n, device=device), activation()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


@torch.fx.wrap
def below_diagonal(products: Tensor) -> Tensor:
    """The entries below the diagonal of (B, n, n), row by row: (B, n (n - 1) / 2).

    One node of a traced graph. The index is made each time rather than kept as a buffer, because a
    trainer that moves a model off the meta device fills buffers with zeros.
    """
    n = products.shape[1]
    row, column = torch.tril_indices(n, n, -1, device=products.device)
    return products.flatten(1).index_select(1, row * n + column)


def pairwise_dots(vectors: Tensor) -> Tensor:
    """Dot products of all pairs of different vectors: (B, n, D) to (B, n (n - 1) / 2)."""
    return below_diagonal(torch.bmm(vectors, vectors.transpose(1, 2)))


def stack_vectors(dense: Tensor, sparse: Sequence[Tensor], dim: int) -> Tensor:
    """The vectors of an interaction as one tensor: (B, m D) and F x (B, D) to (B, m + F, D)."""
    return torch.unflatten(torch.cat([dense, *sparse], dim=1), 1, (-1, dim))


class LinearOverVectors(nn.Module):
    """W X, without a bias: (B, n, D) to (B, l, D), every new vector a weighted sum of the old ones."""

    def __init__(self, vectors: int, out: int, device: str | torch.device = "meta") -> None:
        super().__init__()
        bound = vectors**-0.5  # that of nn.Linear
        self.weight = nn.Parameter((torch.rand(out, vectors, device=device) * 2 - 1) * bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, l, D)."""
        return torch.matmul(self.weight, x)


class DotInteraction(nn.Module):
    """Dot products between all pairs of feature vectors, after the dense vector itself.

    (B, D) and F x (B, D) to (B, D + (F + 1) F / 2); Naumov et al. 2019, section 2.1.
    """

    def forward(self, dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
        """(B, D) and F x (B, D) to (B, D + (F + 1) F / 2)."""
        vectors = torch.stack([dense, *sparse], dim=1)
        return torch.cat([dense, pairwise_dots(vectors)], dim=1)


class LowRankCross(nn.Module):
    """One layer of DCN-V2 in low rank: x0 * (U (V x) + b) + x; Wang et al. 2021, equation 2."""

    def __init__(self, width: int, rank: int, device: str | torch.device = "meta") -> None:
        super().__init__()
        self.v = nn.Linear(width, rank, bias=False, device=device)
        self.u = nn.Linear(rank, width, device=device)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """(B, N) and (B, N) to (B, N)."""
        crossed: Tensor = x0 * self.u(self.v(x)) + x
        return crossed


class FullCross(nn.Module):
    """One layer of DCN-V2 in full rank: x0 * (W x + b) + x; Wang et al. 2021, equation 1."""

    def __init__(self, width: int, device: str | torch.device = "meta") -> None:
        super().__init__()
        self.w = nn.Linear(width, width, device=device)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """(B, N) and (B, N) to (B, N)."""
        crossed: Tensor = x0 * self.w(x) + x
        return crossed


class CrossInteraction(nn.Module):
    """A DCN-V2 cross network over all feature vectors side by side: (B, N) to (B, N).

    ``rank`` None gives full-rank layers.
    """

    def __init__(
        self, width: int, layers: int, rank: int | None, device: str | torch.device = "meta"
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FullCross(width, device) if rank is None else LowRankCross(width, rank, device)
            for _ in range(layers)
        )

    def forward(self, dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
        """(B, D) and F x (B, D) to (B, (F + 1) D)."""
        x0 = torch.cat([dense, *sparse], dim=1)
        x = x0
        for layer in self.layers:
            x = layer(x0, x)
        return x


class PlainEmbeddings(nn.Module):
    """Sum-pooled tables as ``nn.EmbeddingBag``.

    Takes, for each feature, the ids of the batch and the offset of each sample's first id.
    """

    def __init__(self, tables: Sequence[EmbeddingTable], device: str | torch.device = "meta") -> None:
        super().__init__()
        self.bags = nn.ModuleDict(
            {
                table.name: nn.EmbeddingBag(table.rows, table.dim, mode=table.pooling, device=device)
                for table in tables
            }
        )
        self.features = {table.name: table.features for table in tables}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(rows), as TorchRec's collection and the published DLRM do."""
        for bag in self.bags.values():
            assert isinstance(bag, nn.EmbeddingBag)
            if not bag.weight.is_meta:
                bound = bag.num_embeddings**-0.5
                nn.init.uniform_(bag.weight, -bound, bound)

    def forward(self, ids: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Feature -> (ids, offsets), both 1-D, to feature -> (B, D)."""
        pooled = {}
        for name, bag in self.bags.items():
            for feature in self.features[name]:
                jagged = ids[feature]
                pooled[feature] = bag(jagged[0], jagged[1])
        return pooled


def torchrec_embeddings(tables: Sequence[EmbeddingTable], device: str | torch.device) -> Any:
    """Sum-pooled tables as TorchRec's ``EmbeddingBagCollection``."""
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    configs = [
        EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.rows,
            embedding_dim=table.dim,
            feature_names=list(table.features),
        )
        for table in tables
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device(device))
