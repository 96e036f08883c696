"""Tower modules: the first level of a hierarchical interaction, inside one tower.

Shapes: B samples, n vectors of D columns of one tower, m vectors of d columns out, m <= n, d <= D. Every module
treats samples independently. The second level, over the outputs of all towers, is the model's own interaction.

Modules start as what keeps most of the flat model: sums of neighbouring vectors, or orthonormal projections of each.
Random mixtures of all vectors in their place cost 0.02 to 0.04 of AUC at equal steps (docs/towers.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ir.errors import InputError
from ir.towers import ModuleKind


class TowerModule(nn.Module):
    """(B, n, D) to (B, m, d), from the vectors of one tower only and one sample at a time."""

    def __init__(self, vectors: int, dim: int, out: int, dim_out: int = 0) -> None:
        super().__init__()
        self.vectors, self.dim, self.out, self.dim_out = vectors, dim, out, dim_out or dim
        if not 1 <= out <= vectors or not 1 <= self.dim_out <= dim:
            raise InputError(
                f"a tower of {vectors} vectors of {dim} columns cannot send {out} of {self.dim_out}; a tower module "
                f"compresses, so choose 1 to {vectors} vectors and 1 to {dim} columns"
            )


def _mixer(vectors: int, out: int, device: torch.device | str | None) -> nn.Parameter:
    """(m, n) weights of vectors, uniform within 1 / sqrt(n), the bound of ``nn.Linear``."""
    return nn.Parameter((torch.rand(out, vectors, device=device) * 2 - 1) * vectors**-0.5)


def _pooling(vectors: int, out: int, pools: Sequence[int], device: torch.device | str | None) -> nn.Parameter:
    """(m, n) weights that start as sums: of the vectors of one pool each, or of m runs of neighbours."""
    run = torch.arange(vectors, device=device) * out // vectors
    if pools:
        run = torch.tensor(pools, device=device)
    return nn.Parameter((run == torch.arange(out, device=device)[:, None]).to(torch.get_default_dtype()))


class ProjectionTower(TowerModule):
    """For DLRM: a linear map of the flattened tower, plus a projection of each vector and weighted sums of them.

    Sums where m < n, one projection for all vectors where d < D. The linear map starts at zero and is divided by its
    fan-in n D, because optimizers that scale gradients move each of its weights as far as those of a small
    layer (the learning rates of Yang et al. 2022, arXiv 2203.03466, table 3).
    """

    def __init__(
        self,
        vectors: int,
        dim: int,
        out: int,
        device: torch.device | str | None = None,
        dim_out: int = 0,
        pools: Sequence[int] = (),
    ) -> None:
        super().__init__(vectors, dim, out, dim_out)
        self.flat = nn.Linear(vectors * dim, out * self.dim_out, device=device)
        self.narrow = nn.Linear(dim, self.dim_out, bias=False, device=device) if self.dim_out < dim else None
        self.mix = _pooling(vectors, out, pools, device) if out < vectors else None
        nn.init.zeros_(self.flat.weight)
        nn.init.zeros_(self.flat.bias)
        if self.narrow is not None and not self.narrow.weight.is_meta:
            nn.init.orthogonal_(self.narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, m, d): one product, because sums and projections of vectors are linear maps of them all."""
        weight, bias = self.flat.weight / self.flat.in_features, self.flat.bias / self.flat.in_features
        if self.mix is None and self.narrow is None:
            return functional.linear(x.flatten(1), weight, bias).view_as(x) + x
        sums = torch.eye(self.vectors, device=x.device) if self.mix is None else self.mix
        each = torch.eye(self.dim, device=x.device) if self.narrow is None else self.narrow.weight
        y = functional.linear(x.flatten(1), weight + torch.kron(sums, each), bias)
        return y.view(-1, self.out, self.dim_out)


class CrossTower(TowerModule):
    """For DCN: one low-rank cross layer over the flattened tower, then a projection.

    x0 * (U (V x0) + b) + x0 with rank D (Wang et al. 2021, equation 2), then a linear map to m D.
    """

    def __init__(self, vectors: int, dim: int, out: int, device: torch.device | str | None = None) -> None:
        super().__init__(vectors, dim, out)
        self.v = nn.Linear(vectors * dim, dim, bias=False, device=device)
        self.u = nn.Linear(dim, vectors * dim, device=device)
        self.project = nn.Linear(vectors * dim, out * dim, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, m, D)."""
        flat = x.flatten(1)
        y: Tensor = self.project(flat * self.u(self.v(flat)) + flat)
        return y.view(-1, self.out, self.dim)


class WukongTower(TowerModule):
    """For Wukong: one of its layers, low-rank factorisation machine beside linear compression.

    LN( concat( reshape(W LN(X (X^T Y))), L X ) + S X ) with Y of n x min(n, 24) (Zhang et al. 2024; 24 is
    the rank of the paper's smaller models). Half of the vectors, rounded up, come from the machine.
    """

    RANK = 24  # table 5 of arXiv 2403.02545, models up to 2.12 GFLOP

    def __init__(
        self,
        vectors: int,
        dim: int,
        out: int,
        device: torch.device | str | None = None,
        pools: Sequence[int] = (),
    ) -> None:
        super().__init__(vectors, dim, out)
        rank, machine = min(vectors, self.RANK), (out + 1) // 2
        self.heads = machine
        self.y = nn.Parameter(torch.randn(vectors, rank, device=device) * vectors**-0.5)
        self.first_norm = nn.LayerNorm(vectors * rank, device=device)
        self.machine = nn.Linear(vectors * rank, machine * dim, device=device)
        self.linear = _mixer(vectors, out - machine, device) if out > machine else None
        self.shortcut = _pooling(vectors, out, pools, device)
        self.last_norm = nn.LayerNorm(dim, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, m, D)."""
        products = torch.bmm(x, torch.matmul(x.transpose(1, 2), self.y))
        y = self.machine(self.first_norm(products.flatten(1))).view(-1, self.heads, self.dim)
        if self.linear is not None:
            y = torch.cat([y, torch.matmul(self.linear, x)], dim=1)
        z: Tensor = self.last_norm(y + torch.matmul(self.shortcut, x))
        return z


class DHENTower(TowerModule):
    """For DHEN: the sum of two interaction modules and a shortcut, normalised.

    LN( cross(X) + projection(X) ), the projection's weighted sum of vectors being the shortcut (Zhang et
    al. 2022, the ensemble "sum").
    """

    def __init__(
        self,
        vectors: int,
        dim: int,
        out: int,
        device: torch.device | str | None = None,
        pools: Sequence[int] = (),
    ) -> None:
        super().__init__(vectors, dim, out)
        self.cross = CrossTower(vectors, dim, out, device)
        self.projection = ProjectionTower(vectors, dim, out, device, pools=pools)
        self.norm = nn.LayerNorm(dim, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, m, D)."""
        y: Tensor = self.norm(self.cross(x) + self.projection(x))
        return y


_KINDS: dict[str, Callable[..., TowerModule]] = {
    "projection": ProjectionTower,
    "cross": CrossTower,
    "wukong": WukongTower,
    "dhen": DHENTower,
}


def tower_module(
    kind: ModuleKind,
    vectors: int,
    dim: int,
    out: int,
    device: torch.device | str | None = None,
    dim_out: int = 0,
    pools: Sequence[int] = (),
) -> TowerModule:
    """The module of a kind from ``vectors`` x ``dim`` to ``out`` x ``dim_out`` (0: ``dim``).

    ``pools`` are the vectors out that sum each vector in at the start, see :class:`ir.towers.Tower`; cross modules
    have no such sums.

    Raises:
        InputError: kind "none", more vectors or columns out than in, fewer columns from another than a projection,
            or pools that are not one of ``out`` for each vector.
    """
    if pools and (len(pools) != vectors or set(pools) != set(range(out))):
        raise InputError(
            f"the pools of a tower module name for each of its {vectors} vectors one of {out} sums, and every sum once "
            f"or more; these are {list(pools)}"
        )
    if kind not in _KINDS:
        raise InputError(f"there is no tower module {kind!r}; choose {', '.join(_KINDS)}")
    if kind == "projection":
        return ProjectionTower(vectors, dim, out, device, dim_out, pools)
    if dim_out not in (0, dim):
        raise InputError(f"{kind} tower modules keep the {dim} columns of a vector; narrow vectors instead")
    if kind == "cross":
        return CrossTower(vectors, dim, out, device)
    return _KINDS[kind](vectors, dim, out, device, pools=pools)
