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
from codegen.chrome_trace import measured_events
from ir.errors import InputError
from planner.cli import cli
from planner.trace import MOST_CLASSES, rank_classes, write_plan_trace


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.compile("dlrm-dcnv2", "h100-2x8")


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


def test_a_run_is_put_beside(tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "trace.json"
    planner.compile("dlrm-small", "local-2", planner.Workload(global_batch=64)).save(file)
    run = CliRunner().invoke(cli, ["trace", str(file), "--run", "-o", str(out), "--json"])
    assert run.exit_code == 0, run.output
    names: dict[int, set[str]] = defaultdict(set)
    for event in events_of(out):
        names[event["pid"]].add(event["name"])
    measured = [pid for pid in names if pid >= 1000]
    assert len(measured) == 2
    for pid in measured:
        assert any("linear" in name or "addmm" in name for name in names[pid])
        assert any("gloo" in name for name in names[pid])


def test_not_a_trace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("{}")
    with pytest.raises(InputError, match="no traceEvents"):
        measured_events([file])
