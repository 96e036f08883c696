"""The semantic-preserving tower transform: a pooled lookup in tower form.

Steps of one forward pass on a rank with ``b`` samples, W ranks, T towers of G ranks:

1. index exchange (W ranks): ids to the ranks that hold their rows;
2. lookup of the rank's shards for the samples of all ranks;
3. exchange in the tower (G ranks): member ``q`` receives all features of the tower for the samples of the
   ranks at position ``q`` of every tower;
4. tower module, if there is one, on those samples;
5. exchange between peers (T ranks): every rank receives the output of every tower for its own samples.

The gradient goes back the same way. It is divided by W on its way to the towers, so that tables and tower
modules get the gradient of the mean over ranks of the ranks' losses, as TorchRec and DDP compute it.
Source: Luo et al. 2024 (arXiv 2403.00877).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from codegen.runtime.towers.exchange import Move, all_to_all, exchange_rows
from codegen.runtime.towers.ids import Bags, bags_of, exchange_ids
from codegen.runtime.towers.layout import TowerLayout, assembly
from codegen.runtime.towers.lookup import DenseLookup, FusedLookup, NoLookup
from ir.towers import sent_name


@dataclass(frozen=True, slots=True)
class Groups:
    """Process groups of a rank: all ranks, its tower, its peers."""

    world: Any
    tower: Any
    peers: Any


def make_groups(world: Any, members: int) -> Groups:
    """The groups of this rank; every rank of ``world`` must call this, because groups are made together."""
    ranks = dist.get_process_group_ranks(world)
    me = dist.get_rank(world)
    tower = peers = None
    for start in range(0, len(ranks), members):
        group = dist.new_group(ranks[start : start + members])
        tower = group if start <= me < start + members else tower
    for position in range(members):
        group = dist.new_group(ranks[position::members])
        peers = group if me % members == position else peers
    return Groups(world, tower, peers)


class TowerLookup(nn.Module):
    """Ids of a rank's samples to the towers' outputs for them.

    Args:
        layout: of the model.
        lookup: this rank's shards.
        groups: of this rank.
        mean: features pooled by mean.
        keys: features in the order of the flat lookup's output.
        modules: tower number -> module from (n, features, dim) to (n, vectors, dim), for towers that have
            one; only this rank's own is kept.
        widths: columns each tower sends to its peers.
        move: how payloads travel between peers.
        weighted: whether the ids carry weights of their own.
        device: where the exchange happens.
    """

    def __init__(
        self,
        layout: TowerLayout,
        lookup: DenseLookup | FusedLookup | NoLookup,
        groups: Groups,
        *,
        mean: frozenset[str],
        keys: Sequence[str],
        modules: Mapping[int, nn.Module] | None = None,
        widths: Sequence[int],
        move: Move = all_to_all,
        weighted: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.layout, self.lookup, self.groups, self.mean = layout, lookup, groups, mean
        self.rank = dist.get_rank(groups.world)
        self.tower, self.member = divmod(self.rank, layout.members)
        self.keys, self.widths, self.move = tuple(keys), tuple(widths), move
        self.weighted, self.device = weighted or bool(mean), torch.device(device)
        own = (modules or {}).get(self.tower)
        self.module = own
        self.with_module = frozenset(modules or {})
        layers = assembly(layout, self.tower)
        self._layers = [(torch.tensor(source), torch.tensor(target)) for source, target in layers]
        plain = layers[0][0] == list(range(len(layers[0][0]))) and len(layers) == 1
        self._in_order = plain
        first = self.tower * layout.members
        self._member_widths = [
            sum(part.cols for part in layout.columns(first + member)) for member in range(layout.members)
        ]

    def forward(self, ids: Any) -> Any:
        """``KeyedJaggedTensor`` of b samples to outputs by name.

        Returns:
            A ``KeyedTensor`` like the flat lookup's; where towers have modules, a dict of feature ->
            (b, dim) for towers without one and ``"tower N"`` -> (b, columns) for the others.
        """
        samples = int(ids.stride())
        read: dict[str, Bags] = {}
        jagged = ids.to_dict()

        def bags(feature: str) -> Bags:
            if feature not in read:
                read[feature] = bags_of(jagged, feature, feature in self.mean)
            return read[feature]

        with torch.no_grad():
            received = exchange_ids(
                bags, self.layout.slots, samples, self.weighted, self.groups.world, ids.values()
            )
        found = self._looked_up(received.bags, sum(received.batch))
        whole = self._in_tower(found, received.batch)
        if self.module is not None:
            features = len(self.layout.features[self.tower])
            whole = self.module(whole.view(len(whole), features, -1)).flatten(1)
        mine = exchange_rows(
            whole,
            [received.batch[t * self.layout.members + self.member] for t in range(self.layout.towers)],
            self.widths,
            self.groups.peers,
            move=self.move,
            scale=1.0 / self.layout.world,
        )
        return self._named(mine) if self.with_module else self._keyed(mine)

    def _looked_up(self, bags: Sequence[Bags], samples: int) -> Tensor:
        """Lookup output for the samples of all ranks, (samples, columns)."""
        held_none = isinstance(self.lookup, NoLookup)
        out = torch.zeros(samples, 0, device=self.device) if held_none else self.lookup(bags)
        # a rank without a gradient would stay away from the exchange of the others' gradients
        if torch.is_grad_enabled() and not out.requires_grad:
            out = out.detach().requires_grad_()
        return out

    def _in_tower(self, found: Tensor, batch: list[int]) -> Tensor:
        """All features of the tower for this member's share of the samples, (samples, columns)."""
        members, towers = self.layout.members, self.layout.towers
        counts = [sum(batch[t * members + q] for t in range(towers)) for q in range(members)]
        if members > 1:
            parts = torch.split(found, batch)
            found = torch.cat([parts[t * members + q] for q in range(members) for t in range(towers)])
        side_by_side = exchange_rows(found, counts, self._member_widths, self.groups.tower)
        if self._in_order:
            return side_by_side
        device = side_by_side.device
        whole = side_by_side.index_select(1, self._layers[0][0].to(device))
        for source, target in self._layers[1:]:
            whole = whole.index_add(1, target.to(device), side_by_side.index_select(1, source.to(device)))
        return whole

    def _keyed(self, mine: Tensor) -> Any:
        from torchrec.sparse.jagged_tensor import KeyedTensor

        named = self._named(mine)
        lengths = [self.layout.dims[key] for key in self.keys]
        return KeyedTensor(list(self.keys), lengths, torch.cat([named[key] for key in self.keys], dim=1))

    def _named(self, mine: Tensor) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for number, part in enumerate(torch.split(mine, list(self.widths), dim=1)):
            if number in self.with_module:
                named[sent_name(number)] = part
                continue
            features = self.layout.features[number]
            dims = [self.layout.dims[feature] for feature in features]
            named.update(zip(features, torch.split(part, dims, dim=1), strict=True))
        return named
