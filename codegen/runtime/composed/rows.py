"""Shards whose rows are read through a number format, kept in memory tiers, or both.

Weights are float32 masters, as in training with microscaling formats: the lookup sees the values that the format
keeps, the gradient passes straight through, and the optimizer updates the masters inside the backward pass. Optimizer
state is rounded to its own format after each update. Scales are those of a shard: a column block that is no whole number
of a format's blocks has scales of its own, over fewer elements than an unsharded row's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.runtime.format_modules import WIDE, cast
from codegen.runtime.tiered.bag import TieredEmbeddingBag, apply_update
from codegen.runtime.tiered.table import Policy, Range
from codegen.runtime.towers.ids import Bags
from codegen.runtime.towers.layout import Held
from codegen.runtime.towers.lookup import FusedLookup
from ir.errors import InputError
from ir.workload import Optimizer


@dataclass(frozen=True, slots=True)
class Update:
    """The optimizer of the tables."""

    optimizer: Optimizer
    lr: float
    eps: float


@dataclass(frozen=True, slots=True)
class Storage:
    """How one shard is kept.

    Attributes:
        format, state_format: ids; "fp32" leaves values as they are.
        ranges: tiers, hottest rows first; empty: all rows in memory.
        cache_rows, policy, folder: of the tiers.
    """

    format: str = WIDE
    state_format: str = WIDE
    ranges: tuple[Range, ...] = ()
    cache_rows: int = 0
    policy: Policy = "lru"
    folder: Path | None = None

    @property
    def plain(self) -> bool:
        """Float32 rows in memory with float32 state."""
        return self.format == self.state_format == WIDE and not self.ranges


class MemoryRows(nn.Module):
    """Sums of rows in memory that the backward pass updates."""

    def __init__(self, weights: Tensor, storage: Storage, update: Update) -> None:
        super().__init__()
        rows, dim = weights.shape
        width = {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim}[update.optimizer]
        # buffers, not parameters: no optimizer and no data-parallel wrapper may touch them
        self.register_buffer("table", weights.detach().float().clone().contiguous())
        self.register_buffer("state", torch.zeros(rows, width))
        self.table: Tensor
        self.state: Tensor
        self.storage, self.update, self.steps = storage, update, 0

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        """(bags, dim) of ids (n,), the first id of each bag (bags,) and factors (n,)."""
        unique, places = torch.unique(ids, return_inverse=True)
        rows = self.table.index_select(0, unique)
        if torch.is_grad_enabled():
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(self._updater(unique))  # type: ignore[no-untyped-call]
        read = cast(rows, self.storage.format, -1)
        return F.embedding_bag(places, read, offsets, mode="sum", per_sample_weights=weights)

    def _updater(self, ids: Tensor) -> Callable[[Tensor], None]:
        def update(rows: Tensor) -> None:
            assert rows.grad is not None
            how = self.update
            with torch.no_grad():
                table, state = self.table.index_select(0, ids), self.state.index_select(0, ids)
                self.steps += 1
                apply_update(how.optimizer, table, state, rows.grad, how.lr, how.eps, self.steps)
                self.table.index_copy_(0, ids, table)
                self.state.index_copy_(0, ids, cast(state, self.storage.state_format, -1))
            rows.grad = None

        return update

    def weight(self) -> Tensor:
        """(rows, dim) all weights as they are now."""
        return self.table


class TieredRows(TieredEmbeddingBag):
    """Sums of rows in memory tiers, read through a format."""

    storage: Storage

    def read(self, rows: Tensor) -> Tensor:
        """The values that the format keeps."""
        return cast(rows, self.storage.format, -1)

    def keep(self, state: Tensor) -> Tensor:
        """The values that the state's format keeps."""
        return cast(state, self.storage.state_format, -1)


def make_rows(weights: Tensor, storage: Storage, update: Update) -> MemoryRows | TieredRows:
    """The rows of one shard with their weights (rows, columns).

    Raises:
        InputError: tiers without a folder, or a folder in use.
    """
    if not storage.ranges:
        return MemoryRows(weights, storage, update)
    if storage.folder is None:
        raise InputError("tables in memory tiers need a folder for their files; give storage='FOLDER'")
    rows, dim = weights.shape
    made = TieredRows.create(
        storage.folder,
        rows,
        dim,
        storage.ranges,
        optimizer=update.optimizer,
        cache_rows=storage.cache_rows,
        policy=storage.policy,
        weights=weights,
        lr=update.lr,
        eps=update.eps,
    )
    made.storage = storage
    return made


class Shards(nn.Module):
    """A rank's shards: plain ones of one part in one FBGEMM operator, the others each by itself.

    Args:
        held: this rank's shards.
        parts: of each slot, the part of its feature.
        storage: of each shard.
        weights: table -> whole weight.
        update: the optimizer.
        fused: use FBGEMM where it fits; otherwise every shard is a :class:`MemoryRows`.
    """

    def __init__(
        self,
        held: Sequence[Held],
        parts: Sequence[int],
        storage: Sequence[Storage],
        weights: Mapping[str, Any],
        update: Update,
        fused: bool,
    ) -> None:
        super().__init__()
        self.held = tuple(held)
        self._place: list[tuple[str, int]] = [("rows", 0)] * len(self.held)  # and the position there
        together: dict[int, list[int]] = {}
        alone: list[MemoryRows | TieredRows] = []
        for index, (one, how) in enumerate(zip(self.held, storage, strict=True)):
            found = {parts[slot] for slot in one.slots}
            if fused and how.plain and len(found) == 1:
                together.setdefault(found.pop(), []).append(index)
                continue
            self._place[index] = ("rows", len(alone))
            alone.append(make_rows(_part_of(weights, one), how, update))
        self.rows = nn.ModuleList(alone)
        self.operators = nn.ModuleDict()
        self._members: dict[str, list[int]] = {}
        for part, members in together.items():
            operator = FusedLookup(
                [self.held[i] for i in members], torch.device("cpu"), update.optimizer, update.lr, update.eps
            )
            with torch.no_grad():
                for i, target in zip(members, operator.weights(), strict=True):
                    target.copy_(_part_of(weights, self.held[i]))
            self.operators[str(part)], self._members[str(part)] = operator, members
            for position, i in enumerate(members):
                self._place[i] = (str(part), position)

    def forward(self, bags: Sequence[Bags]) -> list[Tensor]:
        """(rows of the slot's part, columns) for each shard and each of its slots, in order."""
        found: dict[int, list[Tensor]] = {}
        for part, operator in self.operators.items():
            members = [self.held[i] for i in self._members[part]]
            widths = [one.shard.cols for one in members for _ in one.slots]
            blocks = iter(torch.split(operator(bags), widths, dim=1))
            for i, one in zip(self._members[part], members, strict=True):
                found[i] = [next(blocks) for _ in one.slots]
        for i, one in enumerate(self.held):
            if i not in found:
                found[i] = self._alone(self.rows[self._place[i][1]], [bags[slot] for slot in one.slots])
        return [block for i in range(len(self.held)) for block in found[i]]

    def _alone(self, rows: nn.Module, bags: Sequence[Bags]) -> list[Tensor]:
        """All slots of a shard in one lookup, so that a row is updated once a step."""
        lengths = torch.cat([bag.lengths for bag in bags]).long()
        weights = [bag.weights for bag in bags if bag.weights is not None]
        pooled = rows(
            torch.cat([bag.ids for bag in bags]).long(),
            lengths.cumsum(0) - lengths,
            torch.cat(weights) if weights else None,
        )
        return list(torch.split(pooled, [bag.lengths.numel() for bag in bags]))

    def weights(self) -> list[Tensor]:
        """The shards' weights, in order."""
        found = []
        for place, position in self._place:
            if place == "rows":
                rows: Any = self.rows[position]
                found.append(rows.weight())
            else:
                operator: Any = self.operators[place]
                found.append(operator.weights()[position])
        return found

    def alone(self) -> list[tuple[Held, MemoryRows | TieredRows]]:
        """The shards that are in no FBGEMM operator."""
        found: list[tuple[Held, Any]] = [
            (one, self.rows[position])
            for one, (place, position) in zip(self.held, self._place, strict=True)
            if place == "rows"
        ]
        return found

    def flush(self) -> None:
        """Make changed rows of tiered tables durable."""
        for rows in self.rows:
            if isinstance(rows, TieredRows):
                rows.flush()

    def close(self) -> None:
        """Close the files of tiered tables."""
        for rows in self.rows:
            if isinstance(rows, TieredRows):
                rows.close()


def _part_of(weights: Mapping[str, Any], held: Held) -> Tensor:
    shard = held.shard
    whole: Tensor = weights[held.table].detach()
    if whole.is_meta:  # fresh rows, uniform within TorchRec's bound
        return torch.empty(shard.rows, shard.cols).uniform_(-(whole.shape[0] ** -0.5), whole.shape[0] ** -0.5)
    return whole[shard.row : shard.row + shard.rows, shard.col : shard.col + shard.cols]
