"""UpDLRM's partitions: every id is served exactly once, tiles are balanced, stored sums save reads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.pim import PimSystem
from ir.errors import InfeasibleError, InputError, IRError
from ir.pim import PimPartition, stored_sums, tile_entries
from passes.pim_partition import (
    balance,
    batch_time,
    cache_aware,
    mine_lists,
    non_uniform,
    uniform,
)


def trace(rng: np.random.Generator, rows: int, bags: int, pooling: int) -> tuple[np.ndarray, np.ndarray]:
    """Zipf popularity, with groups of three rows that come together in a third of the bags."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -0.7
    lists = []
    for _ in range(bags):
        bag = rng.choice(rows, size=int(rng.integers(0, pooling)), p=weights / weights.sum()).tolist()
        if rng.random() < 0.34:
            start = 3 * int(rng.integers(0, 8))
            bag += [start, start + 1, start + 2]
        lists.append(bag)
    return np.asarray(list(itertools.chain(*lists)), dtype=np.int64), np.cumsum([0, *map(len, lists)])


def expand(partition: PimPartition, tile: int, place: int) -> tuple[int, ...]:
    """The rows behind an entry, written without the functions under test."""
    if tile == -1:
        return (place,)
    rows = [row for row in range(partition.rows) if partition.owner[row] == tile]
    entries: list[tuple[int, ...]] = [(row,) for row in rows]
    for members in partition.lists:
        if partition.owner[members[0]] == tile:
            entries += stored_sums(members)
    return entries[place]


def partitions(
    rng: np.random.Generator, rows: int, ids: np.ndarray, offsets: np.ndarray
) -> list[PimPartition]:
    frequency = np.bincount(ids, minlength=rows)
    return [
        uniform(rows, 6, 4, 5),
        non_uniform(frequency, 6, 4, 5, tile_rows=rows),
        non_uniform(frequency, 6, 4, 5, tile_rows=-(-rows // 5), host_rows=3),
        cache_aware(
            ids, offsets, rows, 6, 4, 5, tile_rows=rows, max_items=int(rng.integers(2, 6)), max_sums=60
        ),
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_the_entries_of_a_bag_are_its_ids_each_exactly_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(30, 60))
    ids, offsets = trace(rng, rows, 30, 12)
    fresh, bounds = trace(rng, rows, 20, 12)
    for partition in partitions(rng, rows, ids, offsets):
        entries = tile_entries(partition, fresh, bounds)
        served: dict[int, list[int]] = {bag: [] for bag in range(20)}
        for tile, bag, place in zip(entries.tile, entries.bag, entries.place, strict=True):
            served[int(bag)] += expand(partition, int(tile), int(place))
        for bag in range(20):
            assert sorted(served[bag]) == sorted(fresh[bounds[bag] : bounds[bag + 1]].tolist())


def optimum(weights: list[int], tiles: int) -> int:
    """Least possible fullest tile, by trying every assignment."""
    best = sum(weights)
    for choice in itertools.product(range(tiles), repeat=len(weights)):
        loads = [0] * tiles
        for weight, tile in zip(weights, choice, strict=True):
            loads[tile] += weight
        best = min(best, max(loads))
    return best


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=3, max_size=8), st.integers(2, 3))
def test_lpt_keeps_grahams_bound_and_the_proved_bound_is_below_the_optimum(
    weights: list[int], tiles: int
) -> None:
    frequency = np.asarray(weights)
    partition = non_uniform(frequency, 2, 2, tiles, tile_rows=len(weights))
    ids = np.repeat(np.arange(len(weights)), frequency)
    found = balance(partition, ids, np.asarray([0, len(ids)]))
    best = optimum(weights, tiles)
    graham = 4 / 3 - 1 / (3 * tiles)  # R. L. Graham, SIAM J. Appl. Math. 17(2), 1969: LPT's worst ratio
    assert found.lower_bound <= best <= found.fullest <= best * graham + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 5), st.integers(0, 10**6))
def test_no_tile_holds_more_than_it_can(rows: int, tiles: int, slack: int, seed: int) -> None:
    frequency = np.random.default_rng(seed).integers(0, 4, rows)
    tile_rows = -(-rows // tiles) + slack
    partition = non_uniform(frequency, 2, 2, tiles, tile_rows=tile_rows)
    held = np.bincount(partition.owner, minlength=tiles)
    assert held.sum() == rows
    assert held.max() <= tile_rows


def test_on_a_skewed_trace_balance_improves_and_stored_sums_save_reads() -> None:
    rng = np.random.default_rng(1)
    rows = 4000
    ids, offsets = trace(rng, rows, 3000, 16)
    fresh, bounds = trace(rng, rows, 1000, 16)
    frequency = np.bincount(ids, minlength=rows)
    plain = uniform(rows, 16, 8, 8)
    even = non_uniform(frequency, 16, 8, 8, tile_rows=1000)
    cached = cache_aware(ids, offsets, rows, 16, 8, 8, tile_rows=1000, max_items=3, max_sums=400)
    fullest = [balance(p, fresh, bounds).fullest for p in (plain, even, cached)]
    assert fullest[0] > 1.5 * fullest[1]
    assert fullest[2] < 0.95 * fullest[1]
    times = [batch_time(p, fresh, bounds, PimSystem()).total for p in (plain, even, cached)]
    assert times[0] > times[1] > times[2]


def test_planted_groups_are_found_with_the_reads_they_save() -> None:
    rng = np.random.default_rng(3)
    groups = [(0, 7, 9), (20, 21, 30), (40, 41, 42)]
    bags = [[*groups[i % 3], int(rng.integers(50, 500))] for i in range(90)]
    ids = np.asarray(list(itertools.chain(*bags)))
    offsets = np.arange(0, 4 * 90 + 1, 4)
    found = mine_lists(ids, offsets, np.bincount(ids, minlength=500), max_items=3)
    assert {members: saved for members, saved in found if members in groups} == dict.fromkeys(groups, 60)


def test_limits_are_named() -> None:
    with pytest.raises(InfeasibleError, match="do not fit on 2 tiles"):
        non_uniform(np.ones(10, dtype=np.int64), 2, 2, 2, tile_rows=4)
    with pytest.raises(InputError, match="outside"):
        tile_entries(uniform(4, 2, 2, 2), np.asarray([4]), np.asarray([0, 1]))
    with pytest.raises(InputError, match="offsets"):
        tile_entries(uniform(4, 2, 2, 2), np.asarray([1]), np.asarray([0, 2]))
    with pytest.raises(IRError, match="spans tiles"):
        PimPartition("cache_aware", 4, 2, 2, 2, np.asarray([0, 0, 1, 1]), ((1, 2),))
