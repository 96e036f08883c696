"""The scheduler against hand-computed steps and a brute-force longest path."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.timeline import TimedOp, schedule
from ir.errors import IRError


def test_overlap_computed_by_hand() -> None:
    timeline = schedule(
        [
            TimedOp("lookup", "compute", 2.0),
            TimedOp("exchange", "network", 5.0, ("lookup",)),
            TimedOp("bottom", "compute", 3.0),
            TimedOp("top", "compute", 4.0, ("exchange",)),
            TimedOp("reduce", "network", 1.0, ("top",)),
        ]
    )
    starts = {event.name: event.start for event in timeline.events}
    # bottom hides behind the exchange: 2-5 of 2-7
    assert starts == {"lookup": 0.0, "exchange": 2.0, "bottom": 2.0, "top": 7.0, "reduce": 11.0}
    assert timeline.step == 12.0
    assert {e.name for e in timeline.events if e.critical} == {"lookup", "exchange", "top", "reduce"}


def test_a_stream_runs_in_the_order_given_even_when_a_later_op_is_ready() -> None:
    timeline = schedule(
        [
            TimedOp("slow", "compute", 4.0),
            TimedOp("first", "network", 1.0, ("slow",)),
            TimedOp("second", "network", 1.0),
        ]
    )
    assert [event.start for event in timeline.events] == [0.0, 4.0, 5.0]


def test_an_op_may_wait_for_one_that_is_listed_later_on_another_stream() -> None:
    timeline = schedule([TimedOp("b", "compute", 1.0, ("a",)), TimedOp("a", "network", 2.0)])
    assert timeline.step == 3.0
    assert timeline.events[0].start == 2.0


def test_no_ops_take_no_time() -> None:
    assert schedule([]).step == 0.0


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([TimedOp("a", "x", 1.0, ("b",)), TimedOp("b", "y", 1.0, ("a",))], "wait for each other"),
        ([TimedOp("a", "x", 1.0, ("b",)), TimedOp("b", "x", 1.0)], "wait for each other"),
        ([TimedOp("a", "x", 1.0), TimedOp("a", "y", 1.0)], "same name"),
        ([TimedOp("a", "x", 1.0, ("ghost",))], "'ghost', which does not exist"),
    ],
)
def test_impossible_steps_are_refused(ops: list[TimedOp], message: str) -> None:
    with pytest.raises(IRError, match=message):
        schedule(ops)


@st.composite
def steps(draw: st.DrawFn) -> list[TimedOp]:
    count = draw(st.integers(1, 8))
    made: list[TimedOp] = []
    for i in range(count):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        stream = draw(st.sampled_from(["compute", "network", "input"]))
        seconds = draw(st.integers(0, 20))  # whole seconds: sums are exact
        made.append(TimedOp(f"op{i}", stream, float(seconds), tuple(f"op{j}" for j in sorted(after))))
    return made


def longest_path(ops: list[TimedOp]) -> float:
    """Every chain of waits, by recursion and without a graph library."""

    def finish(i: int) -> float:
        op = ops[i]
        earlier = [j for j in range(i) if ops[j].stream == op.stream][-1:]
        waits = earlier + [j for j in range(len(ops)) if ops[j].name in op.after]
        return op.seconds + max((finish(j) for j in waits), default=0.0)

    return max(finish(i) for i in range(len(ops)))


@given(steps())
def test_makespan_is_the_longest_path_and_no_stream_runs_two_ops(ops: list[TimedOp]) -> None:
    timeline = schedule(ops)
    assert timeline.step == longest_path(ops)
    assert sum(event.duration for event in timeline.events if event.critical) == timeline.step
    for stream in ("compute", "network", "input"):
        events = [event for event in timeline.events if event.stream == stream]
        for before, after in pairwise(events):
            assert before.start + before.duration <= after.start


@given(steps(), st.integers(0, 7), st.integers(1, 5))
def test_a_slower_op_never_makes_the_step_faster(ops: list[TimedOp], which: int, extra: int) -> None:
    from dataclasses import replace

    slower = list(ops)
    which %= len(ops)
    slower[which] = replace(ops[which], seconds=ops[which].seconds + extra)
    assert schedule(slower).step >= schedule(ops).step
