"""Tower modules: the first level of a hierarchical interaction, inside one tower.

Shapes: B samples, n vectors of D columns of one tower, m vectors out, m <= n. Every module treats samples
independently. The second level, over the outputs of all towers, is the model's own interaction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ir.errors import InputError
from ir.towers import ModuleKind


class TowerModule(nn.Module):
    """(B, n, D) to (B, m, D), from the vectors of one tower only and one sample at a time."""

    def __init__(self, vectors: int, dim: int, out: int) -> None:
        super().__init__()
        if not 1 <= out <= vectors:
            raise InputError(
                f"a tower of {vectors} vectors cannot send {out}; a tower module compresses, so choose 1 to {vectors}"
            )
        self.vectors, self.dim, self.out = vectors, dim, out


def _mixer(vectors: int, out: int, device: torch.device | str | None) -> nn.Parameter:
    """(m, n) weights of vectors, uniform within 1 / sqrt(n), the bound of ``nn.Linear``."""
    return nn.Parameter((torch.rand(out, vectors, device=device) * 2 - 1) * vectors**-0.5)


class ProjectionTower(TowerModule):
    """For DLRM: a linear map of the flattened tower, plus a weighted sum of its vectors."""

    def __init__(self, vectors: int, dim: int, out: int, device: torch.device | str | None = None) -> None:
        super().__init__(vectors, dim, out)
        self.flat = nn.Linear(vectors * dim, out * dim, device=device)
        self.mix = _mixer(vectors, out, device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) to (B, m, D)."""
        y: Tensor = self.flat(x.flatten(1)).view(-1, self.out, self.dim) + torch.matmul(self.mix, x)
        return y


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

    def __init__(self, vectors: int, dim: int, out: int, device: torch.device | str | None = None) -> None:
        super().__init__(vectors, dim, out)
        rank, machine = min(vectors, self.RANK), (out + 1) // 2
        self.heads = machine
        self.y = nn.Parameter(torch.randn(vectors, rank, device=device) * vectors**-0.5)
        self.first_norm = nn.LayerNorm(vectors * rank, device=device)
        self.machine = nn.Linear(vectors * rank, machine * dim, device=device)
        self.linear = _mixer(vectors, out - machine, device) if out > machine else None
        self.shortcut = _mixer(vectors, out, device)
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

    def __init__(self, vectors: int, dim: int, out: int, device: torch.device | str | None = None) -> None:
        super().__init__(vectors, dim, out)
        self.cross = CrossTower(vectors, dim, out, device)
        self.projection = ProjectionTower(vectors, dim, out, device)
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
    kind: ModuleKind, vectors: int, dim: int, out: int, device: torch.device | str | None = None
) -> TowerModule:
    """The module of a kind; raises InputError for "none" and for more vectors out than in."""
    if kind not in _KINDS:
        raise InputError(f"there is no tower module {kind!r}; choose {', '.join(_KINDS)}")
    return _KINDS[kind](vectors, dim, out, device)
