"""Traces: they parse, their times are the plan's, waits fill up to the slowest rank, a run is put beside."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import planner
from codegen.chrome_trace import MEASURED_FIRST, measured_events
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


def test_events_of_a_thread_do_not_overlap_and_arrows_pair_up(plan: planner.Plan, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_plan_trace(plan, path)
    events = events_of(path)
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(spans))
    starts = {e["id"]: e["ts"] for e in events if e["ph"] == "s"}
    ends = {e["id"]: e["ts"] for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert starts, "ranks of this plan differ, so somebody waits"


def well_formed(events: list[dict[str, Any]]) -> int:
    """The Trace Event Format as Perfetto's importer reads it; the number of arrows.

    Complete events need a time and a duration, and nest within a thread. An arrow starts and ends at the slice that is open
    at its time on its thread (``bp: e`` for the end), with one numeric id for its two ends, of one name and category.
    Metadata name every process and every thread.
    """
    named: dict[str, set[Any]] = {"process_name": set(), "thread_name": set()}
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    arrows: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for event in events:
        assert event["ph"] in ("M", "X", "s", "f")
        assert type(event["pid"]) is int
        if event["ph"] == "M":
            where = event["pid"] if event["name"].startswith("process") else (event["pid"], event["tid"])
            named.setdefault(event["name"], set()).add(where)
            assert set(event["args"]) == {"sort_index" if event["name"].endswith("index") else "name"}
            continue
        assert type(event["tid"]) is int
        assert isinstance(event["ts"], int | float)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            continue
        assert type(event["id"]) is int
        assert 0 < event["id"] < 2**63
        assert event["ph"] not in arrows[event["id"]]
        assert (event.get("bp") == "e") == (event["ph"] == "f")
        arrows[event["id"]][event["ph"]] = event
    assert set(slices) <= named["thread_name"]
    assert {pid for pid, _ in slices} <= named["process_name"]
    for lane in slices.values():
        stack: list[float] = []
        for start, end in sorted(lane, key=lambda one: (one[0], -one[1])):
            while stack and stack[-1] <= start + 1e-3:  # rounding of a microsecond
                stack.pop()
            assert not stack or end <= stack[-1] + 1e-3
            stack.append(end)
    for ends in arrows.values():
        start, end = ends["s"], ends["f"]
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        assert start["ts"] <= end["ts"]
        assert (start["pid"], start["tid"]) != (end["pid"], end["tid"])
        for one in (start, end):
            assert any(a <= one["ts"] < b for a, b in slices[one["pid"], one["tid"]])
    return len(arrows)


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
