"""A rank's tables in a checkpoint: which block of which tensor each shard of this project's runtimes is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegen.checkpoint_blocks import Block, Blocks
from codegen.runtime.composed.rows import MemoryRows, Shards, TieredRows
from codegen.runtime.optimizers import fused_state
from codegen.runtime.tiered.bag import overwrite
from codegen.runtime.towers.layout import Held
from codegen.runtime.towers.lookup import DenseLookup, FusedLookup
from ir.plan import Shard

CHUNK = 1 << 16  # rows of a table in tiers that are in memory at once


@dataclass(frozen=True, slots=True)
class Place:
    """What a parameter of a runtime is in the unsharded model: all of ``path``, or a shard of a (rows, dim) table."""

    path: str
    rows: int = 0
    dim: int = 0
    shard: Shard | None = None


@dataclass(slots=True)
class State:
    """Collects values by name."""

    found: dict[str, Any] = field(default_factory=dict)

    def block(self, key: str, shape: tuple[int, ...], block: Block, dtype: torch.dtype) -> None:
        """A part of a tensor."""
        self.found.setdefault(key, Blocks(shape, dtype)).add(block)

    def weight(self, place: Place, tensor: Tensor) -> None:
        """A parameter."""
        if place.shard is None:
            self.found[place.path] = tensor
            return
        offset = (place.shard.row, place.shard.col)
        self.block(place.path, (place.rows, place.dim), Block.of(tensor, offset), tensor.dtype)

    def slot(self, place: Place, name: str, tensor: Tensor) -> None:
        """A tensor of an optimizer's state: one number a weight, a row, or in all (Adam's steps)."""
        shard, key = place.shard, f"optimizer/{place.path}/{name}"
        if shard is None:
            self.found[key] = tensor
        elif tensor.ndim == 0:
            self.count(place, lambda: float(tensor), tensor.fill_)
        elif tensor.ndim == 1:
            key = row_key(key, shard.col, shard.cols, place.dim)
            self.block(key, (place.rows,), Block.of(tensor, (shard.row,)), tensor.dtype)
        else:
            whole = (place.rows, place.dim)
            self.block(key, whole, Block.of(tensor, (shard.row, shard.col)), tensor.dtype)

    def count(self, place: Place, get: Callable[[], float], put: Callable[[float], Any]) -> None:
        """Steps that Adam has taken; the shards of a rank each have theirs, and all are set."""
        key = f"optimizer/{place.path}/step"
        others: Block | None = self.found[key].blocks.get(()) if key in self.found else None

        def write(start: tuple[int, ...], value: Tensor) -> None:
            put(float(value))
            if others is not None and others.write is not None:
                others.write(start, value)

        self.block(key, (), Block((), (), lambda: torch.tensor(get()), write), torch.float32)


def row_key(key: str, col: int, cols: int, dim: int) -> str:
    """The name of row-wise state of a column block."""
    return key if cols == dim else f"{key}/{col}:{col + cols}"


PlaceOf = Callable[[str, Shard], Place]


def add_shards(state: State, lookup: Any, place_of: PlaceOf, places: dict[int, Place]) -> None:
    """The shards of a rank in any of the forms that they have."""
    if isinstance(lookup, Shards):
        for held, rows in lookup.alone():
            place = place_of(held.table, held.shard)
            if isinstance(rows, TieredRows):
                _add_tiered(state, place, rows)
            else:
                _add_rows(state, place, rows)
        for operator in lookup.operators.values():
            add_shards(state, operator, place_of, places)
    elif isinstance(lookup, FusedLookup):
        _add_fused(state, lookup.held, lookup, place_of)
    elif isinstance(lookup, DenseLookup):
        for held, parameter in zip(lookup.held, lookup.shards, strict=True):
            places[id(parameter)] = place_of(held.table, held.shard)
            state.weight(places[id(parameter)], parameter)


def _add_fused(state: State, held: Iterable[Held], lookup: FusedLookup, place_of: PlaceOf) -> None:
    for one, weight, slots in zip(held, lookup.weights(), fused_state(lookup.operator), strict=True):
        place = place_of(one.table, one.shard)
        state.weight(place, weight)
        for slot, tensor in slots.items():
            state.slot(place, slot, tensor)


def _add_rows(state: State, place: Place, rows: MemoryRows) -> None:
    state.weight(place, rows.table)
    for slot, columns in _slots_of(rows.update.optimizer, rows.table.shape[1]).items():
        part = rows.state[:, columns]
        state.slot(place, slot, part.view(-1) if rows.update.optimizer == "rowwise_adagrad" else part)
    if rows.update.optimizer == "adam":
        state.count(place, lambda: rows.steps, lambda steps: setattr(rows, "steps", int(steps)))


def _slots_of(optimizer: str, dim: int) -> dict[str, slice]:
    """Columns of the state of a row."""
    return {
        "sgd": {},
        "adagrad": {"sum": slice(0, dim)},
        "rowwise_adagrad": {"sum": slice(0, 1)},
        "adam": {"exp_avg": slice(0, dim), "exp_avg_sq": slice(dim, 2 * dim)},
    }[optimizer]


def _add_tiered(state: State, place: Place, rows: TieredRows) -> None:
    """A shard in tiers, in chunks that are read from it when they are saved."""
    shard, table = place.shard, rows.table
    assert shard is not None
    dim, optimizer = table.shape.dim, table.shape.optimizer
    whole = (place.rows, place.dim)
    slots = _slots_of(optimizer, dim)
    for first in range(0, shard.rows, CHUNK):
        count = min(CHUNK, shard.rows - first)
        offset = (shard.row + first, shard.col)
        state.block(place.path, whole, _chunk(rows, first, count, slice(0, dim), offset), torch.float32)
        for slot, columns in slots.items():
            key = f"optimizer/{place.path}/{slot}"
            kept = slice(dim + columns.start, dim + columns.stop)
            if optimizer == "rowwise_adagrad":
                key = row_key(key, shard.col, shard.cols, place.dim)
                block = _chunk(rows, first, count, kept, (offset[0],))
                state.block(key, (place.rows,), block, torch.float32)
            else:
                state.block(key, whole, _chunk(rows, first, count, kept, offset), torch.float32)
    if optimizer == "adam":
        state.count(place, lambda: table.steps, lambda steps: setattr(table, "steps", int(steps)))


def _chunk(rows: TieredRows, first: int, count: int, columns: slice, offset: tuple[int, ...]) -> Block:
    """Some columns of the records (weights, then state) of consecutive rows; a vector where the offset has one entry."""

    def read() -> Tensor:
        part = torch.from_numpy(rows.table.read_all(np.arange(first, first + count))[:, columns])
        return part[:, 0] if len(offset) == 1 else part

    def write(at: tuple[int, ...], values: Tensor) -> None:
        column = columns.start + (at[1] if len(at) > 1 else 0)
        overwrite(rows.table, first + at[0], column, values.reshape(len(values), -1).numpy())

    size = (count, columns.stop - columns.start)
    return Block(offset, size[: len(offset)], read, write)
