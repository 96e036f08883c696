"""Closed forms of collectives against a fluid simulation of the same messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cost_models.collective import doubling, exchange, gather, staged, switch, trees
from cost_models.collective.algorithms import ALGORITHMS, Setting, price, ranked
from cost_models.collective.terms import NetworkLevel, Terms
from cost_models.fluid import Flow, fair_rates, simulate, simulate_schedule
from ir.errors import InputError
from ir.schedules import Schedule
from ir.schedules import doubling as s_doubling
from ir.schedules import exchange as s_exchange
from ir.schedules import gather as s_gather
from ir.schedules import staged as s_staged
from ir.schedules import trees as s_trees

MOST = 12  # ranks


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def level(fanout: int, draw: Any) -> NetworkLevel:
    return NetworkLevel(fanout, draw(powers(8, 12)), draw(powers(-7, -4)))


@st.composite
def networks(draw: Any) -> list[NetworkLevel]:
    levels, ranks = [], 1
    for _ in range(draw(st.integers(1, 3))):
        fanout = draw(st.integers(1, max(1, MOST // ranks)))
        ranks *= fanout
        levels.append(level(fanout, draw))
    return levels


sizes = powers(1, 9)
reductions = st.one_of(st.just(0.0), powers(-12, -9))
chunk_counts = st.integers(1, 40)


def shape(levels: list[NetworkLevel]) -> tuple[int, ...]:
    return tuple(level.fanout for level in levels)


def agree(
    form: Terms, schedule: Schedule, size: float, levels: list[NetworkLevel], reduction: float = 0.0
) -> None:
    simulated = simulate_schedule(schedule, size, levels, reduction)
    assert form.seconds == pytest.approx(simulated, rel=0.01, abs=1e-15)


GATHERS: dict[str, Callable[..., Schedule]] = {
    "all_gather": s_gather.all_gather,
    "reduce_scatter": s_gather.reduce_scatter,
    "all_reduce": s_gather.all_reduce,
}


@settings(max_examples=60, deadline=None)
@given(networks(), sizes, reductions, st.sampled_from(sorted(GATHERS)), st.data())
def test_gathers(levels: Any, size: float, r: float, kind: Any, data: Any) -> None:
    make, ranks = GATHERS[kind], math.prod(shape(levels))
    agree(gather.ring(kind, size, levels, r), make((ranks,), ("ring",)), size, levels, r)
    channels = s_gather.channel_ring(kind, shape(levels))
    agree(gather.channel_ring(kind, size, levels, r), channels, size, levels, r)
    ways = [
        data.draw(st.sampled_from(["ring", "bruck", "direct"] + ["doubling"] * (f & (f - 1) == 0)))
        for f in shape(levels)
    ]
    agree(gather.by_level(kind, ways, size, levels, r), make(shape(levels), ways), size, levels, r)


@settings(max_examples=60, deadline=None)
@given(networks(), sizes, reductions)
def test_partners(levels: Any, size: float, r: float) -> None:
    recursive = s_doubling.recursive_doubling(shape(levels))
    agree(doubling.recursive_doubling(size, levels, r), recursive, size, levels, r)
    halving = s_doubling.halving_doubling(shape(levels))
    agree(doubling.halving_doubling(size, levels, r), halving, size, levels, r)


@settings(max_examples=60, deadline=None)
@given(networks(), sizes, st.data())
def test_exchanges(levels: Any, size: float, data: Any) -> None:
    agree(exchange.direct(size, levels), s_exchange.flat(shape(levels), "direct"), size, levels)
    agree(exchange.pairwise(size, levels), s_exchange.flat(shape(levels), "pairwise"), size, levels)
    ways = [data.draw(st.sampled_from(["pairwise", "bruck", "direct"])) for _ in levels]
    agree(exchange.by_level(ways, size, levels), s_exchange.by_level(shape(levels), ways), size, levels)


@settings(max_examples=40, deadline=None)
@given(networks(), st.data())
def test_uneven_all_to_all(levels: Any, data: Any) -> None:
    """Every rank sends its own amount: the one that sends most decides, its ports are shared as anybody's."""
    ranks = math.prod(shape(levels))
    sent = data.draw(st.lists(powers(3, 8), min_size=ranks, max_size=ranks))
    flows, capacity = [], {}
    for index, at in enumerate(levels):
        for rank in range(ranks):
            capacity["out", index, rank] = capacity["in", index, rank] = at.bandwidth
    for source in range(ranks):
        for target in range(ranks):
            if source != target:
                index = s_trees.level_of(source, target, shape(levels))
                ports = (("out", index, source), ("in", index, target))
                flows.append(Flow(ports, sent[source] / ranks, levels[index].latency))
    simulated = max(simulate(flows, cast(Any, capacity)), default=0.0)
    assert exchange.direct(max(sent), levels).seconds == pytest.approx(simulated, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(networks(), sizes, reductions, st.integers(2, MOST), chunk_counts)
def test_trees_and_chains(levels: Any, size: float, r: float, radix: int, chunks: int) -> None:
    here = shape(levels)
    agree(trees.knomial(size, levels, radix), s_trees.knomial_broadcast(here, radix), size, levels)
    agree(trees.knomial(size, levels, radix, r), s_trees.knomial_reduce(here, radix), size, levels, r)
    agree(
        trees.tree_all_reduce(size, levels, radix, r),
        s_trees.tree_all_reduce(here, radix),
        size,
        levels,
        r,
    )
    agree(trees.scatter_allgather(size, levels), s_trees.scatter_allgather(here), size, levels)
    assume(math.prod(here) > 1)
    agree(trees.chain(size, levels, chunks), s_trees.chain_broadcast(here, chunks), size, levels)
    agree(trees.chain(size, levels, chunks, r), s_trees.chain_reduce(here, chunks), size, levels, r)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, MOST), sizes, reductions, st.integers(5, 40), st.data())
def test_double_tree_alone_and_on_top(
    inner: int, fanout: int, size: float, r: float, chunks: int, data: Any
) -> None:
    host, top = level(inner, data.draw), level(fanout, data.draw)
    alone = s_trees.double_tree_all_reduce((fanout,), chunks)
    agree(trees.double_tree(size, top, chunks, r), alone, size, [top], r)
    assume(inner * fanout <= MOST)
    form = gather.hierarchical_all_reduce(
        size, [host], trees.double_tree(size / inner, top, chunks, r), ["ring"], r
    )
    agree(form, s_gather.hierarchical_all_reduce((inner, fanout), ["ring"], alone), size, [host, top], r)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, MOST), sizes, reductions, chunk_counts, st.data())
def test_host_staged(fanout: int, size: float, r: float, chunks: int, data: Any) -> None:
    copies, between = level(2, data.draw), level(fanout, data.draw)
    chain = staged.staged_chain(size, [between], copies, chunks)
    agree(chain, s_staged.staged_chain(fanout, chunks), size, [copies, between])
    form = staged.staged(size, copies, doubling.recursive_doubling(size, [between], r))
    messages = s_staged.staged(s_doubling.recursive_doubling((fanout,)))
    agree(form, messages, size, [copies, between], r)


@given(st.integers(2, 16), powers(3, 9), powers(8, 12), powers(-7, -4), st.floats(0.5, 1.0))
def test_in_switch(n: int, size: float, bandwidth: float, latency: float, share: float) -> None:
    """Reads of each part from all ranks at once, and its multicast to all, share the ports."""
    reads = [
        Flow((*(("out", rank) for rank in range(n)), ("in", owner)), size / n, latency) for owner in range(n)
    ]
    casts = [
        Flow((("out", owner), *(("in", rank) for rank in range(n))), size / n, latency) for owner in range(n)
    ]
    capacity = {(way, rank): share * bandwidth for way in ("out", "in") for rank in range(n)}
    at = NetworkLevel(n, bandwidth, 0.0, share, latency)
    for kind, flows in (("all_reduce", reads + casts), ("reduce_scatter", reads), ("all_gather", casts)):
        simulated = max(simulate(flows, cast(Any, capacity)))
        assert switch.in_switch(cast(Any, kind), size, at).seconds == pytest.approx(simulated, rel=0.01)
    with pytest.raises(InputError, match="computes nothing"):
        switch.in_switch("all_reduce", size, NetworkLevel(n, bandwidth, 0.0))


@settings(max_examples=20, deadline=None)
@given(networks(), powers(5, 9))
def test_overlapped_is_the_limit_of_many_slices(levels: Any, size: float) -> None:
    """Slices go up through the levels and down again; a level serves all slices that are at it."""
    busy, left = [], size
    for at in levels:
        busy.append(gather.by_level("all_reduce", ["ring"], left, [NetworkLevel(at.fanout, at.bandwidth, 0)]))
        left /= at.fanout
    slices = 400
    stages = [*range(len(levels)), *reversed(range(len(levels) - 1))]
    flows: list[Flow] = []
    for number in range(slices):
        for place, index in enumerate(stages):
            halves = 1 if index == len(levels) - 1 else 2
            after = [len(flows) - 1] if place else []
            after += [len(flows) - len(stages)] if number else []
            flows.append(Flow(((index,),), busy[index].seconds / halves / slices, 0.0, tuple(after)))
    simulated = max(simulate(flows, {(index,): 1.0 for index in range(len(levels))}))
    form = gather.overlapped_all_reduce(size, levels)
    assert form.seconds - form.latency == pytest.approx(simulated, rel=0.01, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(networks(), powers(3, 7), reductions)
def test_best_chunk_is_the_best_of_all(levels: Any, size: float, r: float) -> None:
    hops = trees.chain_hops(levels)
    assume(len(hops) > 1)
    best = trees.best_chunks(size, hops, r)
    assume(best < 400)
    every = [trees.pipeline(size, hops, k, r).seconds for k in range(1, 2 * best + 10)]
    assert trees.pipeline(size, hops, best, r).seconds <= min(every) * 1.005


def test_published_chunk_of_the_chain() -> None:
    """8 ranks, 64 MiB, 10 GB/s, 10 us: T* = (sqrt(M / B) + sqrt((n - 2) t))^2 at C* = 1.06 MB."""
    at = NetworkLevel(8, 10e9, 10e-6)
    found = price("broadcast", "chain", 2**26, Setting((at,)))
    assert found is not None
    assert found.chunk == pytest.approx(1.06e6, rel=0.01)
    assert found.seconds == pytest.approx((math.sqrt(2**26 / 10e9) + math.sqrt(6 * 10e-6)) ** 2, rel=1e-3)


def test_max_min_rates_of_a_known_case() -> None:
    """Three links of 1, one flow over all of them and one over each: halves; a wide link leaves more."""
    flows = {0: ("a", "b"), 1: ("a",), 2: ("b",), 3: ("b",)}
    assert fair_rates(cast(Any, flows), {"a": 1.0, "b": 1.0}) == pytest.approx(
        {0: 1 / 3, 1: 2 / 3, 2: 1 / 3, 3: 1 / 3}
    )


@given(networks(), sizes, st.sampled_from(sorted(ALGORITHMS)))
def test_ranked_is_sorted_and_priced_by_name(levels: Any, size: float, kind: Any) -> None:
    assume(math.prod(shape(levels)) > 1)
    setting = Setting(tuple(levels), 1e-11, NetworkLevel(2, 1e10, 1e-5), 1e-10)
    found = ranked(kind, size, setting)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in found:
        again = price(kind, one.algorithm, size, setting)
        assert again == one
        assert one.seconds > 0
    with pytest.raises(InputError, match="has no algorithm"):
        price(kind, "magic", size, setting)
