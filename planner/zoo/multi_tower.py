"""Multi-tower models: a DLRM-shaped model whose interaction is hierarchical.

Features interact inside their tower first, in a tower module that sends fewer vectors than it reads; the
model's own interaction (the over-arch) then sees the vectors of all towers. This is another model than the
flat one, to be trained as such; its towers are those of a plan. Source: Luo et al. 2024 (arXiv 2403.00877).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codegen.runtime.towers.modules import TowerModule, tower_module
from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.program import Model
from ir.towers import ModuleKind, TowerDecision
from ir.workload import Workload
from planner.zoo.dhen import (
    AdvancedDLRM,
    Convolution,
    CrossModule,
    DHENInteraction,
    DHENLayer,
    SelfAttention,
)
from planner.zoo.dlrm import DLRM
from planner.zoo.layers import CrossInteraction, DotInteraction, FullCross, LinearOverVectors, LowRankCross
from planner.zoo.wukong import WukongInteraction, WukongLayer

_EXPERTS: dict[type[nn.Module], str] = {
    AdvancedDLRM: "dlrm",
    SelfAttention: "attention",
    LinearOverVectors: "linear",
    CrossModule: "cross",
    Convolution: "convolution",
}


class MultiTower(nn.Module):
    """A flat model with tower modules between its tables and its interaction.

    Args:
        flat: whose tables and bottom MLP are taken over; interaction and first top layer are made anew, and so is
            the last bottom layer where vectors get narrower.
        towers: features of each tower and the vectors that leave it.
        kind: of the tower modules.
        dim_out: columns of these vectors; 0: those of the tables.
        pools: of each tower, see :class:`ir.towers.Tower`; none: runs of neighbours.

    Raises:
        InputError: features that are in no tower or in several, or an interaction that is not the zoo's.
    """

    def __init__(
        self,
        flat: DLRM,
        towers: Sequence[tuple[Sequence[str], int]],
        kind: ModuleKind,
        dim_out: int = 0,
        pools: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        listed = [feature for features, _ in towers for feature in features]
        if sorted(listed) != sorted(flat.features):
            raise InputError(
                f"the towers hold {len(listed)} features, {len(set(listed))} of them different, and the model "
                f"has {len(flat.features)}; plan the towers for this model"
            )
        self.dense_features, self.features = flat.dense_features, flat.features
        self.tables, self.embeddings = flat.tables, flat.embeddings
        self.groups = [tuple(features) for features, _ in towers]
        self.ebc = flat.ebc
        dim = flat.tables[0].dim
        device = next(flat.bottom.parameters()).device
        self.towers = nn.ModuleList(
            tower_module(kind, len(features), dim, out, device, dim_out, pool)
            for (features, out), pool in zip(towers, pools or [()] * len(towers), strict=True)
        )
        self.outs = [out for _, out in towers]
        self.bottom, self.interaction, self.top = over_arch(flat, sum(self.outs), dim_out or dim)

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        """Logits (B,), as :meth:`planner.zoo.dlrm.DLRM.forward`."""
        pooled = self.ebc(sparse)
        vectors: list[Tensor] = []
        for features, tower, out in zip(self.groups, self.towers, self.outs, strict=True):
            sent = tower(torch.stack([pooled[feature] for feature in features], dim=1))
            vectors += [sent[:, i] for i in range(out)]
        return self.top(self.interaction(self.bottom(dense), vectors)).squeeze(-1)  # type: ignore[no-any-return]

    def example_inputs(self, batch_size: int) -> tuple[Tensor, Any]:
        """As the flat model's."""
        return DLRM.example_inputs(self, batch_size)  # type: ignore[arg-type]

    def random_batch(self, batch_size: int, workload: Workload, seed: int) -> tuple[Tensor, Any, Tensor]:
        """As the flat model's."""
        return DLRM.random_batch(self, batch_size, workload, seed)  # type: ignore[arg-type]


def with_towers(module: nn.Module, decision: TowerDecision) -> nn.Module:
    """``module`` with the plan's tower modules; unchanged where the plan has none or the model has them.

    Raises:
        InputError: a flat model that is not of the zoo's DLRM shape.
    """
    if decision.module == "none" or any(isinstance(part, TowerModule) for part in module.modules()):
        return module
    if not isinstance(module, DLRM):
        raise InputError(
            f"the plan has {decision.module} tower modules, which can be put into the zoo's models only; give "
            f"{type(module).__name__} its own (codegen.runtime.towers.modules) over the features of each tower"
        )
    return MultiTower(
        module,
        [(tower.features, tower.vectors_out) for tower in decision.towers],
        decision.module,
        decision.towers[0].columns_out,
        [tower.pools for tower in decision.towers],
    )


def over_arch(flat: DLRM, vectors: int, dim: int) -> tuple[nn.Sequential, nn.Module, nn.Sequential]:
    """Bottom MLP, interaction and top MLP of ``flat`` for ``vectors`` feature vectors of ``dim`` columns.

    The bottom MLP is the flat model's own unless its vector has to be narrower; other layers are copied.

    Raises:
        InputError: an interaction that is not the zoo's, or one that cannot have narrower vectors.
    """
    interaction, own = flat.interaction, flat.tables[0].dim
    old = len(flat.features)
    device = next(flat.bottom.parameters()).device
    dense = _dense_width(flat)
    if isinstance(interaction, DotInteraction):
        top = _top(flat, dim + (vectors + 1) * vectors // 2, device)
        return _bottom(flat, dim, device), DotInteraction(), top
    if isinstance(interaction, CrossInteraction):
        first = interaction.layers[0]
        assert isinstance(first, LowRankCross | FullCross)
        rank = first.v.out_features if isinstance(first, LowRankCross) else None
        width = dense + vectors * dim
        made: nn.Module = CrossInteraction(width, len(interaction.layers), rank, device)
        return flat.bottom, made, _top(flat, width, device)
    if dim != own:
        raise InputError(
            f"the interaction {type(interaction).__name__} works on vectors of {own} columns, not {dim}; let the tower "
            "modules narrow vectors"
        )
    if isinstance(interaction, WukongInteraction | DHENInteraction):
        made = copy.deepcopy(interaction)
        made.layers[0] = _first_layer(interaction.layers[0], vectors - old, own, device)
        return flat.bottom, made, copy.deepcopy(flat.top)
    raise InputError(
        f"the interaction {type(interaction).__name__} is not the zoo's, so it cannot be made for {vectors} vectors"
    )


def _bottom(flat: DLRM, width: int, device: torch.device) -> nn.Sequential:
    """The bottom MLP with ``width`` outputs, its last layer made anew where that is another width."""
    if _dense_width(flat) == width:
        return flat.bottom
    layers = list(flat.bottom)
    place, last = [(index, layer) for index, layer in enumerate(layers) if isinstance(layer, nn.Linear)][-1]
    layers[place] = nn.Linear(last.in_features, width, device=device)
    return nn.Sequential(*layers)


def _dense_width(flat: DLRM) -> int:
    return next(
        int(layer.out_features) for layer in reversed(list(flat.bottom)) if isinstance(layer, nn.Linear)
    )


def _top(flat: DLRM, width: int, device: torch.device) -> nn.Sequential:
    """The top MLP with a first layer for ``width`` inputs."""
    first = flat.top[0]
    assert isinstance(first, nn.Linear)
    rest = [copy.deepcopy(layer) for layer in list(flat.top)[1:]]
    return nn.Sequential(nn.Linear(width, first.out_features, device=device), *rest)


def _hidden(mlp: nn.Sequential) -> list[int]:
    return [int(layer.out_features) for layer in mlp if isinstance(layer, nn.Linear)][:-1]


def _first_layer(layer: nn.Module, more: int, dim: int, device: torch.device) -> nn.Module:
    """The first layer of a stack for ``more`` (mostly fewer) vectors."""
    if isinstance(layer, WukongLayer):
        lcb, fmb = layer.lcb.weight, layer.fmb
        sizes = (fmb.out, lcb.shape[0], fmb.y.shape[1])
        return WukongLayer(lcb.shape[1] + more, dim, *sizes, _hidden(fmb.mlp), device)
    assert isinstance(layer, DHENLayer)
    names = [_EXPERTS[type(expert)] for expert in layer.experts]
    out = layer.vectors // len(names) if layer.ensemble == "concat" else layer.vectors
    hidden = next((_hidden(e.mlp) for e in layer.experts if isinstance(e, AdvancedDLRM)), [])
    heads = next((e.heads for e in layer.experts if isinstance(e, SelfAttention)), 1)
    return DHENLayer(_vectors(layer) + more, dim, out, names, layer.ensemble, hidden, heads, device)


def _vectors(layer: DHENLayer) -> int:
    """Vectors that a DHEN layer reads."""
    for part in layer.modules():
        if isinstance(part, LinearOverVectors):
            return int(part.weight.shape[1])
        if isinstance(part, CrossModule):
            return int(part.project.in_features)
    return layer.vectors


def over_arch_model(flat: DLRM, vectors: int, dim: int = 0) -> Model:
    """The dense ops of ``flat`` above ``vectors`` feature vectors of ``dim`` columns (0: the tables'), for pricing.

    Raises:
        InputError: as :func:`over_arch`.
    """
    from ir.capture import capture

    dim = dim or flat.tables[0].dim
    tables = [EmbeddingTable(f"v{i}", 1, dim, (f"v{i}",)) for i in range(vectors)]
    stand_in = DLRM(tables, flat.dense_features, (1,), nn.Identity(), 1, (1,), embeddings="plain")
    stand_in.bottom, stand_in.interaction, stand_in.top = over_arch(flat, vectors, dim)
    return capture(stand_in, name="over-arch")
