"""Bytes on the links: counted again hop by hop, and against the seconds of the cost models where those are bytes only."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from cost_models.exchanged import exchanged_bytes
from cost_models.llm import Training, llm_calibration
from cost_models.llm_step import step_cost
from ir.parallelism import ParallelismConstraints
from ir.topology import Level, Link, Topology
from planner.link_loads import Dimensions, LinkCounter, link_loads
from tests.plans import Decision, Table, make_plan, topology

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def machine(fanouts: list[int]) -> Topology:
    levels = tuple(Level(f"l{i}", n, Link(f"k{i}", 1e9)) for i, n in enumerate(fanouts))
    return replace(topology(1, 2), levels=levels)


def communicator(over: Dimensions, rank: int) -> list[int]:
    """Every rank of one communicator, in order, by walking the mesh dimensions."""
    base = rank
    for size, stride in over:
        base -= rank // stride % size * stride
    found = [base]
    for size, stride in over:
        found = [r + i * stride for i in range(size) for r in found]
    return sorted(found)


def crossed(machine: Topology, one: int, other: int) -> int:
    """The level whose link two ranks talk through: the innermost domain that holds both."""
    domain = 1
    for number, level in enumerate(machine.levels):
        domain *= level.fanout
        if one // domain == other // domain:
            return number
    raise AssertionError("ranks outside the machine")


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.data())
def test_an_all_to_all_is_what_every_pair_of_ranks_sends(fanouts: list[int], data: st.DataObject) -> None:
    made = machine(fanouts)
    # a group fills whole domains and an equal part of the next, as meshes are laid on machines
    at = data.draw(st.integers(0, len(fanouts) - 1))
    inner = math.prod(fanouts[:at]) * data.draw(
        st.sampled_from([d for d in (1, 2, 3, 4) if fanouts[at] % d == 0])
    )
    over: Dimensions = data.draw(st.sampled_from([((inner, 1),), ((made.world_size // inner, inner),)]))
    sizes = np.arange(1.0, made.world_size + 1)
    counter = LinkCounter(made)
    counter.all_to_all("x", over, sizes)
    wanted = np.zeros((len(made.levels), made.world_size))
    for rank in range(made.world_size):
        group = communicator(over, rank)
        for other in group:
            if other != rank:
                level = crossed(made, rank, other)
                # what goes further up passes the ports of the levels between, but not the fabric of the host
                for passed in range(min(1, level), level + 1) if level else (0,):
                    wanted[passed, rank] += sizes[rank] / len(group)
    np.testing.assert_allclose([load.sent for load in counter.loads()], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fanouts", "over"), [([4, 3], ((12, 1),)), ([2, 2, 3], ((12, 1),)), ([4, 2, 2], ((8, 2),))]
)
def test_rings_with_a_channel_for_every_member_of_a_domain(fanouts: list[int], over: Dimensions) -> None:
    """Channel c visits the members of every domain beginning at the c-th, so each leaves it in one channel."""
    made = machine(fanouts)
    counter = LinkCounter(made)
    counter.ring("x", over, 1.0)
    group = communicator(over, 0)
    sent = np.zeros((len(fanouts), made.world_size))
    domain = fanouts[0]
    for level in range(1, len(fanouts)):
        inside = sum(r < domain for r in group)
        blocks = [group[i : i + inside] for i in range(0, len(group), inside)]
        for channel in range(inside):
            order = [block[(channel + i) % inside] for block in blocks for i in range(inside)]
            for one, other in zip(order, order[1:] + order[:1], strict=True):
                if one // domain != other // domain:
                    sent[level, one] += 1 / inside
                elif level == 1:
                    sent[0, one] += 1 / inside
        domain *= fanouts[level]
    for rank in group:
        np.testing.assert_allclose([load.sent[rank] for load in counter.loads()], sent[:, rank], rtol=1e-12)


def test_tables_send_what_the_exchanges_hold() -> None:
    tables = [Table(name, rows, 32, (f"f_{name}",)) for name, rows in (("a", 1000), ("b", 400), ("c", 64))]
    decisions = {"a": Decision("table_wise", (1,)), "b": Decision("row_wise"), "c": Decision("data_parallel")}
    plan = make_plan(tables, decisions, 1, 4)
    (load,) = link_loads(plan)
    moved = exchanged_bytes(plan.table_plans, plan.topology, plan.workload)
    ids, whole, split = moved.values()
    # one host: three quarters of every buffer leave the rank; rows that are split add up around a ring
    forward = 0.75 * (whole + split)
    copied = 2 * 0.75 * 64 * 32 * 4
    assert load.sent.max() == pytest.approx(0.75 * ids + 2 * forward + copied)
    assert sum(load.parts.values()) == pytest.approx(load.sent.max())


def without_latency(made: Topology) -> Topology:
    levels = tuple(replace(level, link=replace(level.link, latency=0.0)) for level in made.levels)
    return replace(made, levels=levels)


@pytest.mark.parametrize(
    "fixed",
    [
        {"tensor": 8, "context": 2, "pipeline": 2, "zero": (2,)},
        {"tensor": 4, "context": 2, "pipeline": 4, "zero": (1,), "replicate": 2},
        {"tensor": 8, "context": 1, "pipeline": 1, "zero": (3,)},
    ],
)
def test_decoders_send_the_bytes_that_the_step_is_priced_for(fixed: dict[str, object]) -> None:
    """Without start-up times, seconds of a communicator times the rate of its slowest link are its bytes."""
    made = without_latency(planner.topology("h100-8x8"))
    limits = planner.Constraints(parallelism=ParallelismConstraints(**fixed))  # type: ignore[arg-type]
    plan = planner.compile("llama3-8b", made, constraints=limits)
    section, fed = plan.decisions.parallelism, plan.workload.llm
    assert section is not None
    assert fed is not None
    calibration = replace(llm_calibration(made), collective_seconds=0.0)
    training = Training(section.model, fed.sequence, fed.global_tokens // fed.sequence, made, calibration)
    cost = step_cost(training, section.layout, section.stages)
    counted: dict[str, float] = {}
    for load in link_loads(plan):
        for name, size in load.parts.items():
            counted[name] = max(
                counted.get(name, 0.0),
                size
                / calibration.link_bandwidth(
                    made.levels[[level.name for level in made.levels].index(load.level)].link
                ),
            )
    for name, term in (("context parallel", "context_parallel"), ("tensor parallel", "tensor_parallel")):
        priced = cost.terms[term] + cost.hidden.get(term, 0.0)
        assert counted.get(name, 0.0) == pytest.approx(priced, rel=0.03), name
    # the priced chunk is the widest one and has the vocabulary; a gather that hides counts there once more
    priced = cost.terms["data_parallel"] + cost.hidden["data_parallel"]
    assert counted["data parallel"] == pytest.approx(priced, rel=0.25)
