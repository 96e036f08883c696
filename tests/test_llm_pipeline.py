"""Pipeline schedules: formulas against a simulation of the written-out order, and the order against torch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cost_models.pipeline import ChunkSeconds, Pipeline, deferred, in_flight, peak_held, pipeline_seconds
from ir.parallelism import Layout, Schedule
from planner.pipeline_replay import peak_layers, rank_order

Seconds = dict[tuple[int, int], ChunkSeconds]


def layout(schedule: Schedule, ranks: int, chunks: int, count: int, run: int) -> Layout:
    return Layout(1, 1, ranks, 1, 1, count, schedule, chunks, run, "none", 1, chunks)


def simulate(made: Layout, seconds: Seconds, message: float) -> float:
    """Makespan when every rank runs its list in order, each op as soon as what it needs has arrived."""
    ranks, chunks = made.pipeline, made.virtual_stages
    last = ranks * chunks - 1
    orders = [rank_order(made, rank) for rank in range(ranks)]
    done: dict[tuple[str, int, int], float] = {}
    clock, position = [0.0] * ranks, [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                kind, chunk, item = order[position[rank]]
                stage = chunk * ranks + rank
                source: tuple[str, int, int] | None = None
                if kind == "F" and stage > 0:
                    source = ("F", stage - 1, item)
                elif kind == "B":
                    source = ("F", stage, item) if stage == last else ("B", stage + 1, item)
                if source is not None and source not in done:
                    break
                arrives = 0.0 if source is None else done[source] + message * (source[1] != stage)
                cost = seconds[rank, chunk]
                whole = cost.backward + (0 if made.schedule == "zero_bubble" else cost.weight)
                spent = {"F": cost.forward, "B": whole, "W": cost.weight}[kind]
                clock[rank] = max(clock[rank], arrives) + spent
                done[kind, stage, item] = clock[rank]
                position[rank] += 1
                moved = True
    assert position == [len(order) for order in orders], "the order deadlocks"
    return max(clock)


def pipe_of(made: Layout) -> Pipeline:
    return Pipeline(made.schedule, made.pipeline, made.virtual_stages, made.micro_batches, made.contiguous)


@st.composite
def schedules(draw: st.DrawFn, schedule: Schedule | None = None) -> Layout:
    kind = schedule or draw(st.sampled_from(["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]))
    ranks = draw(st.integers(2, 6))
    chunks = 1 if kind in ("gpipe", "1f1b") else draw(st.integers(2 if kind == "interleaved_1f1b" else 1, 4))
    if chunks == 1:
        count = draw(st.integers(1, 14))
        return layout(kind, ranks, 1, count, count if kind == "gpipe" else 1)
    count = ranks * draw(st.integers(1, 4))
    runs = [n for n in range(ranks, count + 1) if count % n == 0]
    return layout(kind, ranks, chunks, count, draw(st.sampled_from(runs)))


times = st.builds(ChunkSeconds, st.floats(0.5, 2), st.floats(1, 3), st.floats(0.2, 1))


def modelled(made: Layout, one: ChunkSeconds, message: float) -> float:
    return pipeline_seconds(pipe_of(made), made.virtual_stages * one.total, one, message).total


@settings(max_examples=80, deadline=None)
@given(schedules(), times)
def test_equal_chunks_without_messages_are_exact(made: Layout, one: ChunkSeconds) -> None:
    seconds = {(r, v): one for r in range(made.pipeline) for v in range(made.virtual_stages)}
    simulated = simulate(made, seconds, 0.0)
    if made.schedule != "zero_bubble":
        assert modelled(made, one, 0.0) == pytest.approx(simulated, rel=1e-9)
    elif made.micro_batches >= made.pipeline:  # with fewer there are no weight gradients to fill the drain
        assert modelled(made, one, 0.0) == pytest.approx(simulated, rel=0.06)


@settings(max_examples=80, deadline=None)
@given(schedules(), times, st.floats(0, 0.3))
def test_messages_are_within_a_few_per_cent_and_not_below(
    made: Layout, one: ChunkSeconds, message: float
) -> None:
    seconds = {(r, v): one for r in range(made.pipeline) for v in range(made.virtual_stages)}
    simulated = simulate(made, seconds, message)
    if made.schedule == "zero_bubble" and made.micro_batches < 2 * made.pipeline:
        return
    assert modelled(made, one, message) >= 0.97 * simulated
    assert modelled(made, one, message) <= 1.12 * simulated


@settings(max_examples=80, deadline=None)
@given(schedules("interleaved_1f1b"), times, st.data())
def test_uneven_chunks_are_bounded(made: Layout, one: ChunkSeconds, data: st.DataObject) -> None:
    """Lighter first and last chunks, as an embedding or a projection in place of a layer."""
    assume(made.pipeline > 2)  # then some rank has full chunks only
    seconds = {(r, v): one for r in range(made.pipeline) for v in range(made.virtual_stages)}
    light = data.draw(st.floats(0, 1))
    scaled = ChunkSeconds(light * one.forward, light * one.backward, light * one.weight)
    seconds[0, 0] = scaled
    seconds[made.pipeline - 1, made.virtual_stages - 1] = scaled
    slowest = max(sum(seconds[r, v].total for v in range(made.virtual_stages)) for r in range(made.pipeline))
    simulated = simulate(made, seconds, 0.0)
    total = pipeline_seconds(pipe_of(made), slowest, one, 0.0).total
    assert simulated <= total * (1 + 1e-9)
    assert simulated >= made.micro_batches * slowest * (1 - 1e-9)


@settings(max_examples=80, deadline=None)
@given(schedules(), st.data())
def test_activations_in_flight_equal_the_replay(made: Layout, data: st.DataObject) -> None:
    pipe = pipe_of(made)
    for rank in range(made.pipeline):
        ones = (1,) * made.virtual_stages
        most, waiting = peak_layers(made, ones, rank)
        assert in_flight(pipe, rank) == most
        assert deferred(pipe, rank) >= waiting
        sizes = tuple(data.draw(st.lists(st.integers(0, 5), min_size=len(ones), max_size=len(ones))))
        assert peak_held(pipe, rank, sizes) == peak_layers(made, sizes, rank)[0]


@pytest.mark.parametrize(("ranks", "chunks", "count"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 4, 16)])
def test_interleaved_order_is_torchs(ranks: int, chunks: int, count: int) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs: Any = object.__new__(schedules.ScheduleInterleaved1F1B)
    theirs.pp_group_size, theirs.n_local_stages, theirs._n_microbatches = ranks, chunks, count
    theirs.number_of_rounds, theirs.microbatches_per_round = count // ranks, ranks
    made = layout("interleaved_1f1b", ranks, chunks, count, ranks)
    names = {"FORWARD": "F", "FULL_BACKWARD": "B"}
    for rank in range(ranks):
        actions = [a for a in theirs._calculate_single_rank_operations(rank) if a is not None]
        order = [
            (names[a.computation_type.name], a.stage_index // ranks, a.microbatch_index) for a in actions
        ]
        assert order == rank_order(made, rank)


def test_published_bubble_ratio() -> None:
    """(p-1)/(V m), arXiv 2104.04473: 5.9 % and 11.7 % for Llama 3's p=16, V=8 and m=32, 16."""
    one = ChunkSeconds(1.0, 1.0, 1.0)
    for count, ratio in ((32, 0.0586), (16, 0.1172)):
        made = layout("interleaved_1f1b", 16, 8, count, 16)
        timed = pipeline_seconds(pipe_of(made), 8 * one.total, one, 0.0)
        assert timed.bubble / timed.work == pytest.approx(ratio, abs=1e-4)


def test_more_contiguous_micro_batches_hide_messages_and_hold_more() -> None:
    one = ChunkSeconds(1.0, 1.0, 1.0)
    few, many = layout("interleaved_1f1b", 4, 4, 16, 4), layout("interleaved_1f1b", 4, 4, 16, 8)
    assert modelled(many, one, 0.1) < modelled(few, one, 0.1)
    assert in_flight(pipe_of(many), 0) > in_flight(pipe_of(few), 0)
    assert replace(few, contiguous=8) == many
