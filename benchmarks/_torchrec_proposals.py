"""The proposals of TorchRec's proposers, in their order, over a priced search space.

Source: torchrec.distributed.planner.proposers 1.8. None of these proposers reacts to how a proposal was
rated, so each is a plain sequence. A proposal is an array of option numbers, one a table; the order of its
tables is the proposer's, for sums and ties depend on it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks._torchrec_space import Space

MAX_GRID = 10_000  # proposals above which the grid search is skipped (MAX_PROPOSALS)
BINS_PER_DEVICE = 100  # bins of memory in the dynamic programme (hbm_bins_per_device)

Proposal = Any  # numpy array of option numbers


def grid(space: Space) -> Iterator[Proposal]:
    """Every combination, if there are few."""
    if math.prod(len(options) for options in space.tables) > MAX_GRID:
        return
    menus = [sorted(options, key=space.depth.__getitem__) for options in space.tables]
    for chosen in itertools.product(*menus):
        yield np.array(chosen)


def greedy(space: Space, score: list[float]) -> Iterator[Proposal]:
    """From every table's best option on, the table with the most storage moves to its next one."""
    menus = [sorted(options, key=score.__getitem__) for options in space.tables]
    at = [0] * len(menus)
    proposal = np.array([menu[0] for menu in menus])

    def entry(table: int) -> tuple[Any, ...]:
        priced = space.options[menus[table][at[table]]]
        hbm = [unit.storage[0] for unit in priced.units]
        ddr = [unit.storage[1] for unit in priced.units]
        return (-max(hbm), -priced.storage[0], -max(ddr), -priced.storage[1], table)

    heap = [entry(table) for table, menu in enumerate(menus) if len(menu) > 1]
    heapq.heapify(heap)
    yield proposal.copy()
    while heap and heap[0][:4] < (0, 0, 0, 0):
        table = heapq.heappop(heap)[4]
        at[table] += 1
        proposal[table] = menus[table][at[table]]
        if at[table] + 1 < len(menus[table]):
            heapq.heappush(heap, entry(table))
        yield proposal.copy()


def uniform(space: Space, score: list[float]) -> Iterator[Proposal]:
    """One sharding type for all tables, each with its best option of that type."""
    kinds: dict[str, dict[int, list[int]]] = {}
    owner = {option: table for table, options in enumerate(space.tables) for option in options}
    for number, priced in enumerate(space.options):
        kinds.setdefault(priced.option.sharding_type, {}).setdefault(owner[number], []).append(number)
    for tables in kinds.values():
        if len(tables) == len(space.tables):
            yield np.array([min(options, key=score.__getitem__) for options in tables.values()])


def dynamic_programming(space: Space, capacity: list[int]) -> Iterator[Proposal]:
    """The least sum of times for each amount of memory, most memory first.

    ``capacity`` is the HBM of every rank after the reservation, bytes. The first proposal has every
    table's smallest option.
    """
    order: dict[str, list[int]] = {}
    for number in sorted(range(len(space.options)), key=space.hbm.__getitem__):
        order.setdefault(space.options[number].option.fqn, []).append(number)
    menus = list(order.values())
    yield np.array([menu[0] for menu in menus])
    bins = BINS_PER_DEVICE * len(capacity)
    size = float(sum(capacity)) / bins
    back = _layers(space, menus, bins, size)
    for last in range(bins - 1, -1, -1):
        if back[-1][0][last] < 0:
            continue
        chosen, at = [0] * len(menus), last
        for table in range(len(menus) - 1, -1, -1):
            option, previous = back[table]
            chosen[table], at = menus[table][option[at]], previous[at]
        yield np.array(chosen)


def _layers(space: Space, menus: list[list[int]], bins: int, size: float) -> list[tuple[Any, Any]]:
    """For each table and bin, the option that leads there at the least time, and the bin before."""
    perf, used = np.full(bins, np.inf), np.zeros(bins)
    perf[0] = 0.0  # nothing placed: a table's first option falls into its own bin
    layers = []
    for menu in menus:
        new_perf, new_used = np.full(bins, np.inf), np.full(bins, np.inf)
        option, previous = np.full(bins, -1, dtype=np.int32), np.full(bins, -1, dtype=np.int32)
        sources = np.flatnonzero(perf < np.inf)
        for j, number in enumerate(menu):
            total = used[sources] + float(space.hbm[number]) / size
            fits = total < bins
            at, total = sources[fits], total[fits]
            time, target = perf[at] + space.perf[number], total.astype(np.int64)
            # Sources are sorted, so those with one target follow each other; the first of equals wins.
            while len(target):
                first = np.ones(len(target), dtype=bool)
                first[1:] = target[1:] != target[:-1]
                better = first & (new_perf[target] > time)
                new_perf[target[better]], new_used[target[better]] = time[better], total[better]
                option[target[better]], previous[target[better]] = j, at[better]
                if first.all():
                    break
                at, total, time, target = at[~first], total[~first], time[~first], target[~first]
        perf, used = new_perf, new_used
        layers.append((option, previous))
    return layers
