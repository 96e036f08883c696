"""Splits between those that the linear program mixes.

Pricing finds the best split at given prices, which for rows of equal popularity is all or nothing: the program then
halves a table between two columns, and a whole choice can take neither half. The mixture as one split, with the
mean number of rows in every tier, takes the same memory, and no more of the tiers below, since the rows that stay in
the device are the hottest of the table. Where rows are pooled by processors, it takes the whole of what a lookup costs
whatever it reads, of which the program counts a part.

The program knows averages over ranks only, so a table whose rows keep a drive, a link or a processor busy for much of the
step is whole on one rank as gladly as in pieces on all. Its split becomes an option of every other sharding too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ir.tier_plan import TableTiers
from passes.assignment import Option
from passes.assignment.column_generation import Frame, Relaxation, column
from passes.joint_menus import Base, Floats, MenuMaker, TableClass

USED = 1e-6  # share of a class's tables from which a column is part of the mixture
HEAVY = 0.1  # of the step
FULL = (1.0, 0.95)  # of a tier's rows in the mixture: whole pieces do not fill every rank


def with_mixtures(
    frame: Frame, classes: Sequence[TableClass], maker: MenuMaker, relaxed: Relaxation
) -> Relaxation:
    """The relaxation with the mixtures among its columns, at value 0; menus grow by them."""
    columns, index = list(relaxed.columns), list(relaxed.index)
    for c, made in enumerate(classes):
        used: list[tuple[float, Option]] = []
        for value, (owner, o) in zip(relaxed.values, relaxed.index, strict=True):
            if owner == c and value > USED * len(made.members):
                used.append((value / len(made.members), made.menu.options[o]))
        before = len(made.menu.options)
        splits = _splits(made, maker, used) if len(used) > 1 else []
        for base, split in _mixed(made, used, splits):
            maker.add(made, base, split)
        busy = [made.meaning[option].tiers for _, option in used if _heavy(frame, option, relaxed.bound)]
        for base, split in _spread(made, used, [*busy, *(splits if busy else ())]):
            maker.add(made, base, split)
        for o in range(before, len(made.menu.options)):
            columns.append(column(made.menu.options[o], c, frame))
            index.append((c, o))
    values = (*relaxed.values, *(0.0 for _ in range(len(columns) - len(relaxed.columns))))
    return replace(relaxed, columns=tuple(columns), values=values, index=tuple(index))


def _splits(
    made: TableClass, maker: MenuMaker, used: Sequence[tuple[float, Option]]
) -> list[TableTiers | None]:
    """The mean splits of the options in use, one for each shape of tiles."""
    tiers, touched = maker.tiers, made.touched
    chosen = [(value, made.meaning[option]) for value, option in used]
    if tiers is None or touched is None or any(_cached(one.tiers) for _, one in chosen):
        return []
    names = (tiers.device, *(tier.name for tier in tiers.tiers))
    rows = np.zeros(len(names))
    for value, one in chosen:
        if one.tiers is None:
            rows[0] += value * made.table.rows
        else:
            for piece in one.tiers.ranges:
                rows[names.index(piece.tier)] += value * piece.rows
    mean = rows / sum(value for value, _ in chosen)
    tiles = dict.fromkeys(one.tiers.pim for _, one in chosen if one.tiers is not None and one.tiers.pim)
    return [
        tiers.split(made.table, touched, _places(mean, touched.rows, full), tile)
        for full, tile in itertools.product(FULL, tiles or (None,))
    ]


def _mixed(
    made: TableClass, used: Sequence[tuple[float, Option]], splits: Sequence[TableTiers | None]
) -> Iterator[tuple[Base, TableTiers | None]]:
    """The splits in every sharding option and format that is in use."""
    kinds = {(one.priced.option, one.format, one.state) for one in (made.meaning[o] for _, o in used)}
    for split, base in itertools.product(splits, made.bases):
        if (base.option, base.format, base.state) in kinds and base.option.sharding_type != "data_parallel":
            yield base, split


def _spread(
    made: TableClass, used: Sequence[tuple[float, Option]], splits: Sequence[TableTiers | None]
) -> Iterator[tuple[Base, TableTiers | None]]:
    """The splits in every sharding option, in the formats that are in use."""
    kinds = {(one.format, one.state) for one in (made.meaning[o] for _, o in used)}
    for split, base in itertools.product(splits, made.bases):
        if (base.format, base.state) in kinds and base.option.sharding_type != "data_parallel":
            yield base, split


def _heavy(frame: Frame, option: Option, step: float) -> bool:
    """Whether a piece of the option keeps something busy for much of the step on its rank."""
    return any(
        seconds > HEAVY * step
        for piece in option.pieces
        for seconds, stretched in zip(piece.extra, frame.stretched, strict=False)
        if stretched
    )


def _places(mean: Floats, groups: Floats, full: float) -> list[int]:
    """Tier of each group: of every tier but the last whole groups, at most a share ``full`` of its rows in the mixture.

    Tiers that the mixture does not use take none.
    """
    used = [0, *(int(j) for j in np.flatnonzero(mean) if j)]
    edges = np.concatenate([[0.0], np.cumsum(groups)])
    bounds, start = [], 0.0
    for tier in used[:-1]:
        bounds.append(int(np.searchsorted(edges, start + mean[tier] * full * (1 + 1e-9), side="right")) - 1)
        start = float(edges[bounds[-1]])
    where = np.searchsorted(bounds, np.arange(len(groups)), side="right")
    return [used[int(j)] for j in where]


def _cached(split: TableTiers | None) -> bool:
    """Whether rows are cached, which do not mix."""
    return split is not None and split.cache is not None
