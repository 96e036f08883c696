"""Splits between those that the linear program mixes.

Pricing finds the best split at given prices, which for rows of equal popularity is all or nothing: the program then
halves a table between two columns, and a whole choice can take neither half. The mixture as one split, with the
mean number of rows in every tier, takes the same memory, and no more of the tiers below, since the rows that stay in
the device are the hottest of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ir.tier_plan import TableTiers
from passes.assignment import Option
from passes.assignment.column_generation import Frame, Relaxation, column
from passes.joint_menus import Base, Floats, MenuMaker, TableClass

USED = 1e-6  # share of a class's tables from which a column is part of the mixture
FULL = (1.0, 0.95)  # of the device's rows in the mixture: whole pieces do not fill every rank


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
        if len(used) < 2:
            continue
        before = len(made.menu.options)
        for base, split in _mixtures(made, maker, used):
            maker.add(made, base, split)
        for o in range(before, len(made.menu.options)):
            columns.append(column(made.menu.options[o], c, frame))
            index.append((c, o))
    values = (*relaxed.values, *(0.0 for _ in range(len(columns) - len(relaxed.columns))))
    return replace(relaxed, columns=tuple(columns), values=values, index=tuple(index))


def _mixtures(
    made: TableClass, maker: MenuMaker, used: Sequence[tuple[float, Option]]
) -> Iterator[tuple[Base, TableTiers | None]]:
    """The mean split in every sharding option and format that is in use."""
    tiers, touched = maker.tiers, made.touched
    chosen = [(value, made.meaning[option]) for value, option in used]
    if tiers is None or touched is None or any(_elsewhere(one.tiers) for _, one in chosen):
        return
    names = (tiers.device, *(tier.name for tier in tiers.tiers))
    rows = np.zeros(len(names))
    for value, one in chosen:
        if one.tiers is None:
            rows[0] += value * made.table.rows
        else:
            for piece in one.tiers.ranges:
                rows[names.index(piece.tier)] += value * piece.rows
    kinds = {(one.priced.option, one.format, one.state) for _, one in chosen}
    bases = [
        base
        for base in made.bases
        if (base.option, base.format, base.state) in kinds and base.option.sharding_type != "data_parallel"
    ]
    mean = rows / sum(value for value, _ in chosen)
    for full in FULL:
        split = tiers.split(made.table, touched, _places(mean, touched.rows, full))
        for base in bases:
            yield base, split


def _places(mean: Floats, groups: Floats, full: float) -> list[int]:
    """Tier of each group: whole groups, at most a share ``full`` of the device's rows there, below it the nearest.

    Tiers that the mixture does not use take none.
    """
    used = [0, *(int(j) for j in np.flatnonzero(mean) if j)]
    edges = np.concatenate([[0.0], np.cumsum(groups)])
    device = int(np.searchsorted(edges, mean[0] * full * (1 + 1e-9), side="right")) - 1
    bounds = [device, *(int(np.abs(edges - end).argmin()) for end in np.cumsum(mean[used])[1:])]
    where = np.searchsorted(np.maximum.accumulate(bounds), np.arange(len(groups)), side="right")
    return [used[min(int(j), len(used) - 1)] for j in where]


def _elsewhere(split: TableTiers | None) -> bool:
    """Whether rows are cached or pooled, which do not mix."""
    return split is not None and (split.cache is not None or split.pim is not None)
