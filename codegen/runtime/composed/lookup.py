"""Ids of a rank's samples to pooled vectors (or tower outputs), under everything a plan decides about tables.

Steps of one forward pass; the symbols are those of :mod:`codegen.runtime.towers.sptt`, and a flat plan is one tower of
all ranks:

1. the batch is split into parts; a deduplicated part has one row a distinct sample;
2. index exchange (W ranks), lookups of this rank's shards, read through their formats, from their tiers;
3. exchange in the tower (G ranks); the distinct rows of a part travel, not its samples;
4. tower module, on distinct rows where all features of the tower are in one part, else on samples;
5. exchange between peers (T ranks), under the plan's codecs; in a flat plan exchange 3 has the codecs;
6. rows are repeated for their samples.

Gradients go back the same way and are divided by W once, so tables and tower modules get those of the mean over ranks of
the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.runtime.composed.batch import Parts, split_batch
from codegen.runtime.composed.exchange import Carried, Rules, by_feature, carry
from codegen.runtime.composed.ids import Asked, exchange_parts
from codegen.runtime.composed.rows import Shards
from codegen.runtime.compressed_all_to_all import PLAIN, Rule, Traffic
from codegen.runtime.format_modules import cast
from codegen.runtime.towers.exchange import all_to_all
from codegen.runtime.towers.layout import TowerLayout
from codegen.runtime.towers.sptt import Groups
from ir.compression import Direction
from ir.towers import sent_name


class Copies(nn.Module):
    """Tables that every rank holds whole, as ordinary parameters read through their formats."""

    def __init__(self, tables: Mapping[str, tuple[Tensor, tuple[str, ...], str]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(weight.detach().clone()) for weight, _, _ in tables.values()
        )
        self.tables = tuple((features, format) for _, features, format in tables.values())

    def forward(self, parts: Parts) -> dict[str, Tensor]:
        """Feature -> (samples, dim)."""
        found = {}
        for weight, (features, format) in zip(self.weights, self.tables, strict=True):
            for feature in features:
                bag = parts.bags[feature]
                unique, places = torch.unique(bag.ids, return_inverse=True)
                rows = cast(F.embedding(unique, weight), format, -1)
                offsets = bag.lengths.long().cumsum(0) - bag.lengths
                found[feature] = F.embedding_bag(
                    places, rows, offsets, mode="sum", per_sample_weights=bag.weights
                )
        return found


class ComposedLookup(nn.Module):
    """The lookup of all tables of a model.

    Args:
        layout: of the towers; one tower of all ranks for a flat plan.
        lookup: this rank's shards.
        copies: tables that every rank holds.
        groups: process groups of this rank.
        dedup: groups of features that are deduplicated together.
        mean: features pooled by mean.
        keys: features in the order of the flat lookup's output.
        modules: tower -> module from (n, features, dim) to (n, vectors, dim); only this rank's own is kept.
        widths: columns that each tower sends its peers.
        rules: how vectors travel, by feature and direction, at a training step.
        plain: (forward, backward): nothing has a codec.
        weighted: whether ids carry weights of their own.

    ``step`` counts training steps for the decay of bounds; ``traffic`` counts bytes of vectors and gradients sent.
    """

    def __init__(
        self,
        layout: TowerLayout,
        lookup: Shards,
        copies: Copies,
        groups: Groups,
        *,
        dedup: Sequence[Sequence[str]],
        mean: frozenset[str],
        keys: Sequence[str],
        modules: Mapping[int, nn.Module],
        widths: Sequence[int],
        rules: Any,
        plain: tuple[bool, bool],
        weighted: bool,
    ) -> None:
        super().__init__()
        self.layout, self.lookup, self.copies, self.groups = layout, lookup, copies, groups
        self.rank = dist.get_rank(groups.world)
        self.tower, self.member = divmod(self.rank, layout.members)
        self.dedup, self.mean, self.keys = [tuple(g) for g in dedup], mean, tuple(keys)
        self.part_of = dict.fromkeys(layout.dims, 0) | {f: n + 1 for n, g in enumerate(self.dedup) for f in g}
        self.samples_part = len(self.dedup) + 1  # as many rows as samples: what a module makes of mixed parts
        self.module = modules.get(self.tower)
        self.with_module = frozenset(modules)
        self.widths = tuple(widths)
        self.rules, self.plain = rules, plain
        self.weighted = weighted or bool(mean)
        self.step = 0
        self.traffic = (Traffic(), Traffic())
        self._outputs = [self._leaving(tower) for tower in range(layout.towers)]

    def _mixed(self, tower: int) -> bool:
        """Whether a module has to see samples, because its features are in several parts."""
        return tower in self.with_module and len({self.part_of[f] for f in self.layout.features[tower]}) > 1

    def _leaving(self, tower: int) -> list[Carried]:
        """What a tower sends its peers."""
        features = self.layout.features[tower]
        if tower not in self.with_module:
            return [Carried(f, self.part_of[f], self.layout.dims[f]) for f in features]
        part = self.samples_part if self._mixed(tower) else self.part_of[features[0]]
        return [Carried(sent_name(tower), part, self.widths[tower])]

    def forward(self, ids: Any) -> Any:
        """``KeyedJaggedTensor`` of this rank's samples to outputs by name.

        Returns:
            A ``KeyedTensor`` like the flat lookup's; where towers have modules, a dict of feature -> (b, dim) for
            towers without one and ``"tower N"`` -> (b, columns) for the others.

        Raises:
            InputError: a batch that was deduplicated in another way than the plan says.
        """
        with torch.no_grad():
            parts = split_batch(ids, self.dedup, self.mean)
            asked = exchange_parts(
                parts, self.layout.slots, self.part_of, self.weighted, self.groups.world, ids.values()
            )
        # by rank and part; the last part has a row a sample
        rows = [[*of_rank, samples] for of_rank, samples in zip(asked.rows, asked.samples, strict=True)]
        inside = self._in_tower(self.lookup(asked.bags), rows)
        leaving = self._through_module(inside, parts, asked, rows)
        found = self._between_peers(leaving, rows)
        for name, part in ((one.name, one.part) for outputs in self._outputs for one in outputs):
            inverse = parts.inverse[part] if part < self.samples_part else None
            if inverse is not None:
                found[name] = found[name].index_select(0, inverse)
        found.update(self.copies(parts))
        if self.training:
            self.step += 1
        return found if self.with_module else self._keyed(found)

    def _in_tower(self, found: Sequence[Tensor], rows: list[list[int]]) -> dict[str, Tensor]:
        """Whole vectors of the tower's features for this member's share of all rows, in peer order."""
        layout, towers, members = self.layout, self.layout.towers, self.layout.members
        own = layout.columns(self.rank)
        ordered = []
        for matrix, column in zip(found, own, strict=True):
            split = torch.split(matrix, [of_rank[self.part_of[column.feature]] for of_rank in rows])
            ordered.append(torch.cat([split[t * members + q] for q in range(members) for t in range(towers)]))
        shares = [
            [sum(rows[t * members + q][part] for t in range(towers)) for part in range(len(rows[0]))]
            for q in range(members)
        ]
        first = self.tower * members
        received = [
            [Carried(c.feature, self.part_of[c.feature], c.cols) for c in layout.columns(first + q)]
            for q in range(members)
        ]
        flat = towers == 1  # then this exchange is the one between all ranks
        blocks = carry(
            ordered,
            [Carried(c.feature, self.part_of[c.feature], c.cols) for c in own],
            received,
            shares,
            shares[self.member],
            (self._rules() if flat else _plainly, self.plain if flat else (True, True)),
            self.groups.tower,
            1.0 / layout.world if flat else 1.0,
            self.traffic if flat else (Traffic(), Traffic()),
        )
        named = [[(c.feature, c.col) for c in layout.columns(first + q)] for q in range(members)]
        return by_feature(blocks, named)

    def _through_module(
        self, inside: dict[str, Tensor], parts: Parts, asked: Asked, rows: list[list[int]]
    ) -> list[Tensor]:
        """What this rank sends its peers, rows of the ranks at its position one below the other."""
        peers = [t * self.layout.members + self.member for t in range(self.layout.towers)]
        inverse = self._inverses(parts, asked, rows, peers)  # all ranks take part
        features = self.layout.features[self.tower]
        if self.module is None:
            return [inside[f] for f in features]
        vectors = [
            inside[f] if (index := inverse.get(self.part_of[f])) is None else inside[f].index_select(0, index)
            for f in features
        ]
        out: Tensor = self.module(torch.stack(vectors, dim=1)).flatten(1)
        return [out]

    def _inverses(
        self, parts: Parts, asked: Asked, rows: list[list[int]], peers: Sequence[int]
    ) -> dict[int, Tensor]:
        """Part -> row of each sample of the peers, for the parts that this rank's module needs by sample."""
        needed = [
            sorted({self.part_of[f] for f in self.layout.features[t]} - {0}) if self._mixed(t) else []
            for t in range(self.layout.towers)
        ]
        if not any(needed):
            return {}
        with torch.no_grad():
            known = [index if index is not None else torch.empty(0) for index in parts.inverse]
            sent = [known[part].int() for of_tower in needed for part in of_tower]
            own = needed[self.tower]
            sizes = [parts.samples * len(of_tower) for of_tower in needed]
            arriving = [asked.samples[peer] * len(own) for peer in peers]
            flat = all_to_all(
                torch.cat([torch.empty(0, dtype=torch.int32), *sent]), sizes, arriving, self.groups.peers
            )
            pieces = torch.split(flat, [asked.samples[peer] for peer in peers for _ in own])
            found = {}
            for n, part in enumerate(own):
                start, shifted = 0, []
                for number, peer in enumerate(peers):
                    shifted.append(pieces[number * len(own) + n].long() + start)
                    start += rows[peer][part]
                found[part] = torch.cat(shifted)
        return found

    def _between_peers(self, leaving: Sequence[Tensor], rows: list[list[int]]) -> dict[str, Tensor]:
        if self.layout.towers == 1:
            return {one.name: matrix for one, matrix in zip(self._outputs[0], leaving, strict=True)}
        peers = [t * self.layout.members + self.member for t in range(self.layout.towers)]
        received = carry(
            leaving,
            self._outputs[self.tower],
            self._outputs,
            [rows[peer] for peer in peers],
            rows[self.rank],
            (self._rules(), self.plain),
            self.groups.peers,
            1.0 / self.layout.world,
            self.traffic,
        )
        return {
            one.name: matrix
            for outputs, matrices in zip(self._outputs, received, strict=True)
            for one, matrix in zip(outputs, matrices, strict=True)
        }

    def _rules(self) -> Rules:
        step = self.step if self.training else None

        def rule(name: str, direction: Direction) -> Rule:
            found: Rule = self.rules(name, direction, step)
            return found

        return rule

    def _keyed(self, found: Mapping[str, Tensor]) -> Any:
        from torchrec.sparse.jagged_tensor import KeyedTensor

        lengths = [found[key].shape[1] for key in self.keys]
        return KeyedTensor(list(self.keys), lengths, torch.cat([found[key] for key in self.keys], dim=1))


def _plainly(name: str, direction: Direction) -> Rule:
    return PLAIN
