"""DHEN: a deep hierarchical ensemble of interaction modules over feature vectors.

Zhang et al. 2022, "DHEN: A Deep and Hierarchical Ensemble Network for Large-Scale Click-Through Rate
Prediction" (arXiv 2203.11014). Shapes: B samples, n vectors of d columns. A layer runs several
interaction modules on the same input and combines them::

    X' = LN( Ens_i Interaction_i(X) + ShortCut(X) )        X: (B, n, d)

Each module maps (B, n, d) to (B, l, d). ``concat`` puts the k outputs below each other, so the layer
has k l vectors; ``sum`` and ``weighted`` (a learnt weight a module) leave l. ShortCut is W X where the
counts differ. The paper says what the modules are, not every width: hidden widths here are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ir.errors import InputError, did_you_mean
from ir.workload import Workload
from planner.zoo.dlrm import DLRM, choose_embeddings, vector_width
from planner.zoo.layers import LinearOverVectors, mlp, pairwise_dots, stack_vectors
from planner.zoo.tables import zoo_tables

ENSEMBLES = ("concat", "sum", "weighted")


def _mlp(sizes: Sequence[int], device: str | torch.device) -> nn.Sequential:
    """Linear layers between GELUs: the paper names no activation, and GELU has no kink.

    At a ReLU's kink rounding decides which way a gradient goes; with as many activations as attention and
    convolution have, some lie there in every batch, and two runs that sum in another order drift apart.
    """
    return mlp(sizes, last_relu=False, device=device, activation=nn.GELU)


class AdvancedDLRM(nn.Module):
    """Dot products of all pairs of vectors, beside a compressed copy of them, through an MLP.

    (B, n, d) to (B, l, d); the dots and the l compressed vectors enter the MLP side by side.
    """

    def __init__(
        self, vectors: int, dim: int, out: int, hidden: Sequence[int], device: str | torch.device
    ) -> None:
        super().__init__()
        self.out, self.dim = out, dim
        self.compress = LinearOverVectors(vectors, out, device)
        pairs = vectors * (vectors - 1) // 2
        self.mlp = _mlp([pairs + out * dim, *hidden, out * dim], device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, l, d)."""
        mixed: Tensor = self.mlp(torch.cat([pairwise_dots(x), self.compress(x).flatten(1)], dim=1))
        return mixed.view(-1, self.out, self.dim)


class SelfAttention(nn.Module):
    """A transformer encoder layer over the vectors, then W X: (B, n, d) to (B, l, d)."""

    def __init__(
        self, vectors: int, dim: int, out: int, heads: int, hidden: int, device: str | torch.device
    ) -> None:
        super().__init__()
        self.vectors, self.heads, self.width = vectors, heads, dim // heads
        self.query = nn.Linear(dim, dim, device=device)
        self.key = nn.Linear(dim, dim, bias=False, device=device)  # a softmax does not see a key's bias
        self.value = nn.Linear(dim, dim, device=device)
        self.project = nn.Linear(dim, dim, device=device)
        self.first_norm = nn.LayerNorm(dim, device=device)
        self.feed_forward = _mlp([dim, hidden, dim], device)
        self.second_norm = nn.LayerNorm(dim, device=device)
        self.compress = LinearOverVectors(vectors, out, device)

    def _split(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, heads, n, d / heads)."""
        return x.view(-1, self.vectors, self.heads, self.width).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, l, d)."""
        found = F.scaled_dot_product_attention(
            self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        )
        x = self.first_norm(x + self.project(found.transpose(1, 2).flatten(2)))
        encoded = self.second_norm(x + self.feed_forward(x))
        compressed: Tensor = self.compress(encoded)
        return compressed


class CrossModule(nn.Module):
    """The module of DCN, W X X^T + b, brought to l vectors of d: (B, n, d) to (B, l, d).

    W X X^T is computed as (W X) X^T, (l, d) by (d, n); its n columns are brought to d by a second matrix.
    """

    def __init__(self, vectors: int, dim: int, out: int, device: str | torch.device) -> None:
        super().__init__()
        self.compress = LinearOverVectors(vectors, out, device)
        self.project = nn.Linear(vectors, dim, device=device)  # its bias is b

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, l, d)."""
        crossed: Tensor = self.project(torch.bmm(self.compress(x), x.transpose(1, 2)))
        return crossed


class Convolution(nn.Module):
    """A 2-D convolution over the picture of n x d, then W X: (B, n, d) to (B, l, d)."""

    def __init__(
        self, vectors: int, dim: int, out: int, channels: int, kernel: int, device: str | torch.device
    ) -> None:
        super().__init__()
        self.spread = nn.Conv2d(1, channels, kernel, padding="same", device=device)
        # without a bias: the layer's norm subtracts what is added to all columns
        self.gather = nn.Conv2d(channels, 1, 1, bias=False, device=device)
        self.compress = LinearOverVectors(vectors, out, device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, l, d)."""
        picture = self.gather(F.gelu(self.spread(x.unsqueeze(1)))).squeeze(1)
        compressed: Tensor = self.compress(picture)
        return compressed


MODULES = ("dlrm", "attention", "linear", "cross", "convolution")
"""Names of the interaction modules."""


def _module(
    name: str, vectors: int, dim: int, out: int, hidden: Sequence[int], heads: int, device: str | torch.device
) -> nn.Module:
    if name == "dlrm":
        return AdvancedDLRM(vectors, dim, out, hidden, device)
    if name == "attention":
        return SelfAttention(vectors, dim, out, heads, 4 * dim, device)  # Vaswani et al. 2017: four times
    if name == "linear":
        return LinearOverVectors(vectors, out, device)
    if name == "cross":
        return CrossModule(vectors, dim, out, device)
    if name == "convolution":
        return Convolution(vectors, dim, out, 4, 3, device)
    raise InputError(
        f"DHEN has no interaction module {name!r}{did_you_mean(name, MODULES)}; it has {', '.join(MODULES)}"
    )


class DHENLayer(nn.Module):
    """One layer: (B, n, d) to (B, k l, d) for "concat", (B, l, d) for the other ensembles."""

    def __init__(
        self,
        vectors: int,
        dim: int,
        out: int,
        modules: Sequence[str],
        ensemble: str,
        hidden: Sequence[int],
        heads: int,
        device: str | torch.device = "meta",
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            _module(name, vectors, dim, out, hidden, heads, device) for name in modules
        )
        self.ensemble = ensemble
        self.vectors = out * len(modules) if ensemble == "concat" else out
        if ensemble == "weighted":
            self.mix = nn.Parameter(torch.full((len(modules), 1, 1, 1), 1 / len(modules), device=device))
        same = vectors == self.vectors
        self.shortcut = nn.Identity() if same else LinearOverVectors(vectors, self.vectors, device)
        self.norm = nn.LayerNorm(dim, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, d) to (B, n', d)."""
        found = [expert(x) for expert in self.experts]
        if self.ensemble == "concat":
            together = torch.cat(found, dim=1)
        elif self.ensemble == "sum":
            together = torch.stack(found).sum(0)
        else:
            together = (torch.stack(found) * self.mix).sum(0)
        y: Tensor = self.norm(together + self.shortcut(x))
        return y


class DHENInteraction(nn.Module):
    """The stack in the place of DLRM's interaction: dense (B, m d) and F x (B, d) to (B, n' d)."""

    def __init__(self, dim: int, layers: Sequence[DHENLayer]) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(*layers)

    def forward(self, dense: Tensor, sparse: Sequence[Tensor]) -> Tensor:
        """(B, m d) and F x (B, d) to (B, n' d)."""
        stacked: Tensor = self.layers(stack_vectors(dense, sparse, self.dim))
        return stacked.flatten(1)


def build_dhen(
    *,
    tables: str | Sequence[Any] = "mlperf_dlrm_dcnv2.json",
    dim: int | None = None,
    dense_features: int = 13,
    bottom: Sequence[int] = (512, 256, 128),
    layers: int = 4,
    vectors: int = 16,
    modules: Sequence[str] = MODULES,
    ensemble: str = "concat",
    hidden: Sequence[int] = (1024,),
    heads: int = 4,
    top: Sequence[int] = (1024, 1024, 512, 256, 1),
    row_cap: int | None = None,
    global_batch: int = 65_536,  # the batch of the table set, as for DLRM-DCNv2
    embeddings: str | None = None,
    device: str | torch.device = "meta",
) -> tuple[DLRM, Workload]:
    """DLRM with a DHEN stack as its interaction.

    Args:
        layers: of the stack.
        vectors: l, the vectors that each module makes.
        modules: of every layer, any of :data:`MODULES`, repeats allowed.
        ensemble: one of :data:`ENSEMBLES`.
        hidden: hidden layers of the MLP of AdvancedDLRM.
        heads: of self-attention; they divide the tables' dim.
        bottom: the last width is the tables' dim times the number of vectors that dense features make.

    Raises:
        InputError: an unknown module or ensemble, counts that are not positive, or widths that do not fit.
    """
    if ensemble not in ENSEMBLES:
        raise InputError(
            f"ensemble must be one of {', '.join(ENSEMBLES)}, not {ensemble!r}{did_you_mean(ensemble, ENSEMBLES)}"
        )
    if layers < 1 or vectors < 1 or not modules:
        raise InputError("DHEN needs at least one layer, one vector and one interaction module")
    records, workload = zoo_tables(
        tables, dim=dim, row_cap=row_cap, global_batch=global_batch, optimizer="adagrad"
    )
    width, dense_vectors = vector_width(records, bottom)
    if heads < 1 or width % heads:
        raise InputError(
            f"{heads} attention heads do not divide vectors of {width} columns; choose a divisor"
        )
    count = sum(len(table.features) for table in records) + dense_vectors
    stack: list[DHENLayer] = []
    for _ in range(layers):
        stack.append(DHENLayer(count, width, vectors, modules, ensemble, hidden, heads, device))
        count = stack[-1].vectors
    module = DLRM(
        records,
        dense_features,
        bottom,
        DHENInteraction(width, stack),
        count * width,
        top,
        embeddings=choose_embeddings(embeddings),
        device=device,
    )
    return module, workload
