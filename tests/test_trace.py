"""Traces: they parse, their times are the plan's, waits fill up to the slowest rank, a run is put beside."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import planner
from codegen.chrome_trace import MEASURED_FIRST, measured_events, placed
from codegen.runtime.spans import phases_of
from ir.errors import InputError
from planner.cli import cli
from planner.report_measured import base_phase
from planner.trace import MOST_CLASSES, rank_classes, write_plan_trace


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.compile("dlrm-dcnv2", "h100-2x8", time_limit=0.3)


def events_of(path: Path) -> list[dict[str, Any]]:
    data = json.loads(path.read_text())
    assert set(data) == {"displayTimeUnit", "otherData", "traceEvents"}
    return data["traceEvents"]


def test_every_rank_is_in_one_class(plan: planner.Plan) -> None:
    classes = rank_classes(plan)
    assert sorted(rank for group in classes for rank in group.ranks) == list(range(16))
    assert len(classes) <= MOST_CLASSES


def test_times_are_the_plans_and_waits_fill_up_to_the_slowest(plan: planner.Plan, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_plan_trace(plan, path)
    events = events_of(path)
    spent: dict[tuple[int, str], float] = defaultdict(float)
    for event in events:
        if event["ph"] == "X":
            spent[event["pid"], event["args"].get("in", event["name"])] += event["dur"]
    processes = {event["pid"] for event in events}
    for event in plan.timeline.events:
        for process in processes:
            assert spent[process, event.name] == pytest.approx(event.duration * 1e6, abs=2e-3)
    ends = [event["ts"] + event["dur"] for event in events if event["ph"] == "X"]
    assert max(ends) == pytest.approx(plan.timeline.step * 1e6)


def well_formed(events: list[dict[str, Any]]) -> int:
    """What Perfetto's importer makes of a trace, in its whole nanoseconds (cut off, not rounded); the number of arrows.

    It drops complete events that overlap another of their thread without one being within the other, and arrows whose end
    has no open slice or whose two ends differ in id, name or category. Threads are named by number alone, and number 0 of
    process 0 is its idle thread.
    """
    numbers: dict[int, int] = {}
    named: dict[str, set[int]] = {"process_name": set(), "thread_name": set(), "process_sort_index": set()}
    arrows: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    stacks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    slices: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for event in sorted(events, key=lambda one: int(one.get("ts", 0) * 1000)):  # stable, as its sorter is
        assert event["ph"] in ("M", "X", "s", "f")
        assert type(event["pid"]) is int
        assert event["pid"] > 0
        if event["name"] in ("process_name", "process_sort_index"):
            named[event["name"]].add(event["pid"])
            continue
        assert type(event["tid"]) is int
        assert numbers.setdefault(event["tid"], event["pid"]) == event["pid"]
        if event["ph"] == "M":
            assert event["args"]["name"]
            named["thread_name"].add(event["tid"])
        elif event["ph"] == "X":
            start = int(event["ts"] * 1000)
            end = start + int(event["dur"] * 1000)
            stack = stacks[event["tid"]]
            while stack and stack[-1][1] <= start:
                stack.pop()
            assert start <= end
            assert not stack or end <= stack[-1][1], f"{event} would be dropped"
            stack.append((start, end))
            slices[event["tid"]].append((start, end))
        else:
            assert type(event["id"]) is int
            assert 0 < event["id"] < 2**63
            assert event["ph"] not in arrows[event["id"]]
            assert (event.get("bp") == "e") == (event["ph"] == "f")
            arrows[event["id"]][event["ph"]] = event
    assert set(slices) <= named["thread_name"] == set(numbers)
    assert set(numbers.values()) <= named["process_name"]
    assert not set(numbers) & named["process_name"]
    for ends in arrows.values():
        start, end = ends["s"], ends["f"]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"]
        assert start["tid"] != end["tid"]
        for one in (start, end):
            assert any(a <= int(one["ts"] * 1000) < b for a, b in slices[one["tid"]])
    return len(arrows)


times = st.floats(0, 5e3, allow_nan=False)


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(0, 1), times, times), max_size=30))
def test_any_slices_are_placed_so_that_none_is_dropped(spans: list[tuple[int, int, float, float]]) -> None:
    """Each slice once, at its time, on a thread of the name of its own."""
    events: list[dict[str, Any]] = []
    for pid in (1, 2):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"p{pid}"}})
        for tid in (0, 1):
            name = {"name": f"p{pid} t{tid}"}
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": name})
    for index, (pid, tid, start, seconds) in enumerate(spans):
        at = {"ts": start, "dur": seconds, "args": {"index": index}}
        events.append({"ph": "X", "name": "s", "pid": pid, "tid": tid, **at})
    made = placed(events)
    well_formed(made)
    threads = {e["tid"]: e["args"]["name"] for e in made if e["name"] == "thread_name"}
    found = {e["args"]["index"]: e for e in made if e["ph"] == "X"}
    assert sorted(found) == list(range(len(spans)))
    for index, (pid, tid, start, seconds) in enumerate(spans):
        event = found[index]
        assert (event["pid"], threads[event["tid"]].split(",")[0]) == (pid, f"p{pid} t{tid}")
        assert event["ts"] == pytest.approx(start, abs=6e-4)
        assert event["dur"] == pytest.approx(seconds, abs=1.1e-3)


def test_perfetto_can_read_it(plan: planner.Plan, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_plan_trace(plan, path)
    assert well_formed(events_of(path)) > 3
    decoder = planner.compile("llama3-8b", "h100-8x8")
    write_plan_trace(decoder, path)
    assert well_formed(events_of(path)) == 0  # its ranks all do the same


def test_a_run_is_put_beside(tmp_path: Path) -> None:
    """Every op of a profiled run; and by phases what the same ops are cut into."""
    file, out = tmp_path / "plan.json", tmp_path / "trace.json"
    made = planner.compile("dlrm-small", "local-2", planner.Workload(global_batch=64))
    made.save(file)
    run = CliRunner().invoke(cli, ["trace", str(file), "--run", "-o", str(out), "--json"])
    assert run.exit_code == 0, run.output
    well_formed(events_of(out))
    names: dict[int, set[str]] = defaultdict(set)
    for event in events_of(out):
        names[event["pid"]].add(event["name"])
    measured = [pid for pid in names if pid >= 1000]
    assert len(measured) == 2
    for pid in measured:
        assert any("linear" in name or "addmm" in name for name in names[pid])
        assert any("gloo" in name for name in names[pid])
    measured_step_has_the_phases_of_the_model(made, events_of(out), measured)


def measured_step_has_the_phases_of_the_model(
    made: planner.Plan, events: list[dict[str, Any]], processes: list[int]
) -> None:
    """Phases cover kernels they stand for, compute does not overlap, and they are those that the model has."""
    modelled = {base_phase(e.name) for e in made.timeline.events if e.duration > 0}
    for pid in processes:
        own = [e for e in events if e["pid"] == pid and e["ph"] == "X"]
        parts = phases_of(own)
        assert {phase for phase, _, _, _ in parts} == modelled - {"framework"}  # between the kernels
        # gloo may run two collectives at a time; a rank computes one thing after the other
        lane = [(start, start + seconds) for _, stream, start, seconds in parts if stream == "compute"]
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(lane))
        for kernel, phase in (
            ("fbgemm::split_embedding_codegen_forward", "lookup_forward"),
            ("fbgemm::split_embedding_backward", "lookup_backward"),
            ("Optimizer.step#SGD", "dense_update"),
        ):
            for event in (e for e in own if e["name"].startswith(kernel)):
                middle = (event["ts"] + event["dur"] / 2) / 1e6
                assert any(p == phase and t <= middle <= t + d for p, _, t, d in parts)


def test_a_collective_within_another_phase_s_is_not_lost() -> None:
    """Gloo exchanges gradients of vectors while a longer all-reduce of dense ones is under way."""
    named = [
        ("[lookup] t", 0, 5),
        ("autograd::engine::evaluate_function: AddmmBackward0", 10, 5),
        ("gloo:all_reduce", 20, 50),
        ("gloo:all_to_all", 30, 10),
        ("gloo:all_reduce", 45, 20),
    ]
    parts = phases_of({"ph": "X", "name": name, "ts": ts, "dur": dur} for name, ts, dur in named)
    network = [(phase, start, seconds) for phase, stream, start, seconds in parts if stream == "network"]
    assert network == [
        ("all_reduce", pytest.approx(20e-6), pytest.approx(50e-6)),
        ("gradient_dist", pytest.approx(30e-6), pytest.approx(10e-6)),
    ]


def test_measured_spans_are_put_beside(plan: planner.Plan, tmp_path: Path) -> None:
    file, run_file, out = tmp_path / "plan.json", tmp_path / "run.json", tmp_path / "trace.json"
    plan.save(file)
    span = {"rank": 1, "phase": "all_reduce", "stream": "network", "start": 0.25, "seconds": 0.5}
    run_file.write_text(json.dumps({"step_seconds": [1.0], "spans": [span]}))
    run = CliRunner().invoke(cli, ["trace", str(file), "-o", str(out), "--measured", str(run_file), "--json"])
    assert run.exit_code == 0, run.output
    (found,) = [e for e in events_of(out) if e.get("cat") == "measured"]
    assert (found["pid"], found["ts"], found["dur"]) == (MEASURED_FIRST + 1, 0.25e6, 0.5e6)
    run_file.write_text(json.dumps({"step_seconds": [1.0]}))
    run = CliRunner().invoke(cli, ["trace", str(file), "-o", str(out), "--measured", str(run_file)])
    assert run.exit_code == 2
    assert "no spans" in run.output


def test_not_a_trace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("{}")
    with pytest.raises(InputError, match="no traceEvents"):
        measured_events([file])
