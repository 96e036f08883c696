"""Schedules do what they are called: blocks are followed as sets of contributions, for every group size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import InputError
from ir.schedules import Schedule, doubling, exchange, gather, minus, plus, trees

Held = Counter[Any]


@st.composite
def shapes(draw: Any) -> tuple[int, ...]:
    found, ranks = [], 1
    for _ in range(draw(st.integers(1, 3))):
        found.append(draw(st.integers(1, max(1, 16 // ranks))))
        ranks *= found[-1]
    return tuple(found)


def run(schedule: Schedule, start: list[list[Held]]) -> list[list[Held]]:
    """The buffers after all steps; what is sent is what was held when the step began."""
    held = [[Counter(block) for block in buffer] for buffer in start]
    for messages in schedule.steps:
        sent = [[Counter(held[m.source][b]) for b in m.blocks] for m in messages]
        for m, blocks in zip(messages, sent, strict=True):
            for block, value in zip(m.blocks, blocks, strict=True):
                held[m.target][block] = held[m.target][block] + value if m.reduce else value
    return held


def addends(schedule: Schedule) -> list[list[Held]]:
    return [[Counter([rank]) for _ in range(schedule.blocks)] for rank in range(schedule.ranks)]


def total(schedule: Schedule) -> Held:
    return Counter(range(schedule.ranks))


def share(schedule: Schedule, rank: int) -> range:
    each = schedule.blocks // schedule.ranks
    return range(rank * each, (rank + 1) * each)


def gathering(shape: tuple[int, ...], data: Any, kind: str) -> Iterator[Schedule]:
    ways = [
        data.draw(st.sampled_from(["ring", "bruck", "direct"] + ["doubling"] * (f & (f - 1) == 0)))
        for f in shape
    ]
    yield getattr(gather, kind)(shape, ways)
    yield gather.channel_ring(kind, shape)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(shapes(), st.data())
def test_all_gather(shape: tuple[int, ...], data: Any) -> None:
    for schedule in gathering(shape, data, "all_gather"):
        start: list[list[Held]] = [[Counter() for _ in range(schedule.blocks)] for _ in range(schedule.ranks)]
        for rank in range(schedule.ranks):
            for block in share(schedule, rank):
                start[rank][block] = Counter([block])
        assert all(
            buffer == [Counter([b]) for b in range(schedule.blocks)] for buffer in run(schedule, start)
        )


@settings(max_examples=40, deadline=None)
@given(shapes(), st.data())
def test_reduce_scatter(shape: tuple[int, ...], data: Any) -> None:
    for schedule in gathering(shape, data, "reduce_scatter"):
        held = run(schedule, addends(schedule))
        for rank in range(schedule.ranks):
            assert all(held[rank][block] == total(schedule) for block in share(schedule, rank))


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(2, 8), st.integers(1, 6), st.data())
def test_all_reduce(shape: tuple[int, ...], radix: int, chunks: int, data: Any) -> None:
    schedules = [
        *gathering(shape, data, "all_reduce"),
        doubling.recursive_doubling(shape),
        doubling.halving_doubling(shape),
        trees.tree_all_reduce(shape, radix),
        trees.double_tree_all_reduce(shape, chunks),
    ]
    if len(shape) > 1:
        top = doubling.halving_doubling(shape[1:])
        schedules.append(gather.hierarchical_all_reduce(shape, ["ring"], top))
        top = trees.double_tree_all_reduce((math.prod(shape[1:]),), chunks)
        schedules.append(gather.hierarchical_all_reduce(shape, ["direct"], top))
    for schedule in schedules:
        for buffer in run(schedule, addends(schedule)):
            assert buffer == [total(schedule)] * schedule.blocks, schedule.algorithm


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(2, 8), st.integers(1, 9))
def test_broadcast_and_reduce(shape: tuple[int, ...], radix: int, chunks: int) -> None:
    broadcasts = [
        trees.knomial_broadcast(shape, radix),
        trees.scatter_allgather(shape),
    ]
    if math.prod(shape) > 1:
        broadcasts.append(trees.chain_broadcast(shape, chunks))
    for schedule in broadcasts:
        start: list[list[Held]] = [[Counter() for _ in range(schedule.blocks)] for _ in range(schedule.ranks)]
        start[0] = [Counter([block]) for block in range(schedule.blocks)]
        assert all(buffer == start[0] for buffer in run(schedule, start)), schedule.algorithm
    reductions = [trees.knomial_reduce(shape, radix)]
    if math.prod(shape) > 1:
        reductions.append(trees.chain_reduce(shape, chunks))
    for schedule in reductions:
        assert run(schedule, addends(schedule))[0] == [total(schedule)] * schedule.blocks


@settings(max_examples=40, deadline=None)
@given(shapes(), st.data())
def test_all_to_all(shape: tuple[int, ...], data: Any) -> None:
    ways = [data.draw(st.sampled_from(["pairwise", "bruck", "direct"])) for _ in shape]
    for schedule in (
        exchange.flat(shape, "direct"),
        exchange.flat(shape, "pairwise"),
        exchange.by_level(shape, ways),
    ):
        ranks = range(schedule.ranks)
        start: list[list[Held]] = [[Counter([(r, plus(r, o, shape))]) for o in ranks] for r in ranks]
        held = run(schedule, start)
        for rank in ranks:
            assert held[rank] == [Counter([(minus(rank, o, shape), rank)]) for o in ranks]


@given(st.integers(2, 64))
def test_no_rank_has_children_in_both_trees(ranks: int) -> None:
    first, second = trees.double_trees(ranks)
    for rank in range(ranks):
        both = first.children(rank) + second.children(rank)
        assert both <= 2
    assert first.height <= math.ceil(math.log2(ranks))


def test_the_rail_exchange_sends_few_large_messages_between_hosts() -> None:
    """g times fewer messages cross, with the same bytes."""
    shape = (4, 3)

    def crossing(schedule: Schedule) -> list[int]:
        return [len(m.blocks) for s in schedule.steps for m in s if m.source // 4 != m.target // 4]

    flat, rail = crossing(exchange.flat(shape, "direct")), crossing(exchange.by_level(shape, ["direct"] * 2))
    assert sum(flat) == sum(rail)
    assert len(flat) == 4 * len(rail)


def test_unusable_input() -> None:
    with pytest.raises(InputError, match="power of two"):
        gather.all_gather((3,), ["doubling"])
    with pytest.raises(InputError, match="radix of 2 or more"):
        trees.knomial_broadcast((4,), 1)
    with pytest.raises(InputError, match="one chunk or more"):
        trees.chain_broadcast((4,), 0)
    with pytest.raises(InputError, match="no ranks"):
        gather.all_gather((4, 0), ["ring", "ring"])
    with pytest.raises(InputError, match="cannot top"):
        gather.hierarchical_all_reduce((2, 3), ["ring"], doubling.recursive_doubling((2,)))
