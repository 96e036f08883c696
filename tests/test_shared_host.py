"""What ranks share and what a host adds: against hand counts and a simulation of processor sharing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from cost_models.calibration import CPU
from cost_models.collectives import all_gather, all_reduce, network, reduce_scatter
from cost_models.shared import (
    exchange_seconds,
    framework_seconds,
    second_exchanges,
    shared_seconds,
    staging_seconds,
)
from ir.topology import Level, Link
from planner.calibrate_host import card_sharing, host_constants


def processor_sharing(work: list[float], cores: float) -> float:
    """Seconds until all jobs are done when those left share the cores, none using more than one."""
    left, time = sorted(work), 0.0
    while left:
        rate = min(1.0, cores / len(left))
        time += left[0] / rate
        left = [job - left[0] for job in left[1:]]
    return time


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8),
    st.floats(1.0, 8.0),
)
def test_one_host_of_busy_ranks(contended: list[float], sharing: float) -> None:
    """Optimal sharing is the formula; sharing equally among those left is never faster than it."""
    size = len(contended)
    sharing = min(sharing, size)
    found = shared_seconds(np.array(contended), size, sharing)
    simulated = processor_sharing([seconds / sharing for seconds in contended], size / sharing)
    assert found <= simulated * (1 + 1e-9) + 1e-12
    if sharing > 1:
        assert simulated <= 2 * found + 1e-12  # Graham's bound of any work-conserving schedule
    same = shared_seconds(np.full(size, 3.0), size, sharing)
    assert same == pytest.approx(3.0)


def test_an_idle_neighbour_leaves_its_card() -> None:
    seconds = np.array([4.0, 0.0, 0.0, 0.0])
    assert shared_seconds(seconds, 2, 1.0) == 4.0
    assert shared_seconds(seconds, 2, 2.0) == 2.0
    assert shared_seconds(np.array([4.0, 0.0, 3.0, 3.0]), 2, 2.0) == 3.0  # the other host has more to send


def test_a_card_that_only_sends_is_faster() -> None:
    measured = replace(CPU, card_sharing=2.0, one_way_gain=0.2)
    both, sends = np.array([4.0, 4.0, 4.0, 4.0]), np.array([4.0, 4.0, 0.0, 0.0])
    assert exchange_seconds(both, 2, measured) == pytest.approx(4.0)
    assert exchange_seconds(sends, 2, measured) == pytest.approx(3.2)
    # the first host receives half of what it sends
    assert exchange_seconds(np.array([4.0, 4.0, 2.0, 2.0]), 2, measured) == pytest.approx(4.0 * (1 - 0.2 / 2))


def test_a_step_of_the_host() -> None:
    measured = replace(CPU, step_seconds=3e-3, table_seconds=2e-4, group_seconds=1e-3)
    coded = replace(measured, exchange_seconds=5e-3, exchange_table_seconds=1e-3)
    assert framework_seconds(8, 1, coded, compressed=True) == pytest.approx(13e-3)
    assert framework_seconds(8, 3, coded) == framework_seconds(8, 3, measured)
    # two directions of 1 MB in and out of a buffer at 4 of 8 GB/s: each copy reads and writes
    assert staging_seconds(2e6, 8e9, replace(CPU, stream_efficiency=0.5)) == pytest.approx(2e-3)
    assert framework_seconds(8, 3, measured) == pytest.approx(3e-3 + 8 * 2e-4 + 2e-3)
    assert framework_seconds(8, 3, CPU) == 0.0


def test_exchanges_in_two_steps_wait_twice() -> None:
    one = planner.topology("local-2")
    two = replace(one, levels=(one.levels[0], Level("cluster", 2, Link("cluster", 1e7, 0.0))))
    assert second_exchanges(("table_wise", "row_wise"), two, 2e-3) == {}
    assert second_exchanges(("table_wise", "grid_shard"), one, 2e-3) == {}
    both = {"output_dist": 2e-3, "gradient_dist": 2e-3}
    assert second_exchanges(("table_wise", "grid_shard"), two, 2e-3) == both
    assert second_exchanges(("table_row_wise",), two, 2e-3) == both
    assert second_exchanges(("table_row_wise",), planner.topology("h100-2x8"), 2e-3) == {}


def record() -> dict[str, Any]:
    """Reductions that take 2, 1.5 and 3 times a ring; 1 ms of floor each."""
    size = 4e6
    ring = 0.75 * size / 2e7  # 3 of 4 parts through both ranks' share of a card
    rows = []
    for name, seconds in (
        ("all_reduce", 2 * 2 * ring),
        ("reduce_scatter", 1.5 * ring),
        ("all_gather", 3 * ring),
    ):
        for of, took in ((1024, 1e-3), (size, 1e-3 + seconds)):
            rows.append({"op": name, "level": "inter", "ranks": 4, "bytes": of, "seconds": took})
    for name, took in (("all_to_all", 0.1), ("one_way", 0.08)):
        rows.append({"op": name, "level": "inter", "ranks": 4, "bytes": 1e6, "seconds": took})
    points = [{"bytes": 1e6, "seconds": 0.051}, {"bytes": 4e6, "seconds": 0.201}]
    return {
        "host_size": 2,
        "collectives": rows,
        "links": {"inter": {"points": points, "flood": {"bandwidth": 1.1e7}}},
        "framework": {
            "few_tables": 2,
            "many_tables": 10,
            "few": 30e-3,
            "many": 34e-3,
            "two_types": 37e-3,
            "dense_bytes": 644,
            "exchange_few": 24e-3,
            "exchange_many": 36e-3,
        },
    }


def test_constants_of_a_record() -> None:
    base = planner.topology("local-2")
    link = Link("cluster", 1e7, 0.0)
    topology = replace(base, levels=(base.levels[0], Level("cluster", 2, link)))
    known = replace(CPU, network_efficiency=1.0, fabric_efficiency=1.0, collective_seconds=1e-3)
    constants = host_constants(record(), topology, known)
    found = replace(known, **constants)
    net = network(topology, found)
    ring = 0.75 * 4e6 / 2e7
    assert all_reduce(4e6, net) == pytest.approx(4 * ring, rel=1e-3)
    assert reduce_scatter(4e6, net) == pytest.approx(1.5 * ring, rel=1e-3)
    assert all_gather(4e6, net) == pytest.approx(3 * ring, rel=1e-3)
    assert found.table_seconds == pytest.approx(4e-3 / 8)
    assert found.group_seconds == pytest.approx(3e-3)  # the floors of its exchanges included
    assert found.one_way_gain == pytest.approx(0.2)
    assert found.exchange_table_seconds == pytest.approx(12e-3 / 8)
    # 24 ms, of which tables are 3, collectives about 5, and the sizes of two exchanges 2
    assert 0.012 < found.exchange_seconds < 0.0155
    # 30 ms, of which tables are 1 and five collectives with their floors about 5
    assert 0.02 < found.step_seconds < 0.0245
    assert not found.ids_ahead
    assert card_sharing(record()) == pytest.approx(2e7 / 1.1e7)
