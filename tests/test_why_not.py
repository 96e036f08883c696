"""Why not: forced options cost what an independent search finds, bounds hold, reasons name the limit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import planner
from cost_models.calibration import default_calibration
from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.program import Model, Options, Program
from passes.assignment import evaluate, solve
from passes.forced_sharding import start_of
from passes.sharding_prices import sharding_problem
from planner.cli import cli
from planner.explain_why_not import why_not

ROWS = (5_000_000, 2_000_000, 30_000, 900_000, 700, 40)
MODEL = Model("six", tuple(EmbeddingTable(f"t{i}", rows, 64, (f"f{i}",)) for i, rows in enumerate(ROWS)), ())
WORK = planner.Workload(global_batch=4096, optimizer="adagrad")


def compiled(work: planner.Workload, **limits: Any) -> planner.Plan:
    """The six tables on two hosts of four, with a short search."""
    return planner.compile(MODEL, "h100-2x4", work, time_limit=0.5, **limits)


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return compiled(WORK)


def test_the_cost_lies_between_the_bound_and_every_plan_with_the_option(plan: planner.Plan) -> None:
    objective = plan.certificate.objective
    for name, kind in (("t0", "row_wise"), ("t1", "table_wise"), ("t4", "column_wise")):
        found = why_not(plan, name, kind, model=MODEL)
        if found.verdict == "chosen":
            continue
        rules = {name: planner.TableConstraint(sharding_types=(kind,))}  # type: ignore[arg-type]
        pinned = compiled(WORK, constraints=planner.Constraints(tables=rules))
        cost = pinned.certificate.objective - objective
        assert found.at_least is not None
        assert found.at_most is not None
        assert found.at_least <= cost + 1e-12
        assert found.at_least <= max(0.0, found.at_most) + 1e-12


def test_warm_from_the_plan_it_is_never_worse_than_the_runner_up_in_place(plan: planner.Plan) -> None:
    for table in plan.table_plans[:3]:
        up = table.runner_up
        assert up is not None
        assert up.delta is not None
        # hardly any work allowed: what is found is the start
        found = why_not(plan, table.name, up.option, model=MODEL, time_limit=1e-9)
        assert found.at_most is not None
        assert found.at_most <= up.delta + 1e-9 * plan.certificate.objective


def test_a_search_is_never_worse_than_its_start(plan: planner.Plan) -> None:
    program = Program(MODEL, plan.topology, plan.workload, Options())
    stated = sharding_problem(program, default_calibration(plan.topology))
    start = start_of(stated, plan.table_plans, plan.topology)
    assert None not in start[0]
    choice = tuple(i for i in start[0] if i is not None)
    loads, _ = evaluate(stated.problem, choice, tuple(tuple(places) for places in start[1]))
    # hardly any work allowed: what is found is the start, or better
    again = solve(stated.problem, time_limit=1e-9, start=start)
    assert again.objective <= loads.max(axis=0).sum() * (1 + 1e-12)


def test_reasons_name_what_stands_against_it(plan: planner.Plan) -> None:
    chosen = plan.table_plans[0]
    assert why_not(plan, chosen.name, chosen.option, model=MODEL).verdict == "chosen"
    rowwise = compiled(replace(WORK, optimizer="rowwise_adagrad"))
    refused = why_not(rowwise, "t0", "column_wise", model=MODEL)
    assert refused.verdict == "not offered"
    assert "one state per row" in refused.reason
    narrow = compiled(WORK, constraints=planner.Constraints(min_column_width=64))
    assert "min_column_width" in why_not(narrow, "t0", "column_wise", model=MODEL).reason
    # 5M x 64 fp32 weights and Adagrad states are 2.4 GiB: too much for every rank under 1.5 GiB
    tight = compiled(WORK, constraints=planner.Constraints(memory_limit=1_500_000_000))
    large = why_not(tight, "t0", "data_parallel", model=MODEL)
    assert large.verdict == "does not fit"
    assert "'t0'" in large.reason
    rules = planner.Constraints(tables={"t*": planner.TableConstraint(sharding_types=("row_wise",))})
    pinned = compiled(WORK, constraints=rules)
    assert "constraints forbids it" in why_not(pinned, "t4", "table_wise", model=MODEL).reason


def test_a_place_is_priced_with_all_else_left(plan: planner.Plan) -> None:
    rules = {"*": planner.TableConstraint(sharding_types=("table_wise",))}
    whole = compiled(WORK, constraints=planner.Constraints(tables=rules))
    home = whole.tables["t0"].shards[0].rank
    assert why_not(whole, "t0", f"rank={home}", model=MODEL).verdict == "chosen"
    busy = whole.tables["t1"].shards[0].rank
    found = why_not(whole, "t0", f"rank={busy}", model=MODEL)
    assert found.verdict == "costs"  # the two largest tables on one rank
    assert found.step_change is not None
    assert found.step_change > 0
    assert found.moved_bytes == 5_000_000 * 64 * 4
    both = {"t0": planner.TableConstraint(ranks=(busy,)), "t1": planner.TableConstraint(ranks=(busy,))}
    pinned = compiled(WORK, constraints=planner.Constraints(tables={**rules, **both}))
    # the rest is placed anew there, so it can only be as slow or faster
    assert pinned.timeline.step <= (found.step or 0.0) * (1 + 1e-9)
    other = 1 - whole.topology.host_of(home)
    assert why_not(whole, "t0", f"host={other}", model=MODEL).step_change is not None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("row_wize", "did you mean 'row_wise'"),
        ("column_wise x7", "has no option 'column_wise x7'"),
        ("rank=8", "ranks 0..7"),
        ("shelf=1", "names no place"),
    ],
)
def test_bad_questions_are_named(plan: planner.Plan, asked: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        why_not(plan, "t0", asked, model=MODEL)


def test_command_line(tmp_path: Path) -> None:
    tables, file = tmp_path / "tables.json", tmp_path / "plan.json"
    entries = [{"name": t.name, "rows": t.rows, "dim": t.dim, "pooling_factor": 1} for t in MODEL.tables[:3]]
    tables.write_text(json.dumps({"tables": entries}))
    planner.compile(str(tables), "h100-1x2").save(file)
    run = CliRunner().invoke(cli, ["explain", str(file), "t0", "--why-not", "row_wise", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["table"] == "t0"
    run = CliRunner().invoke(cli, ["explain", str(file), "t0", "--why-not", "data_parallel"])
    assert "why not data_parallel?" in run.output
    run = CliRunner().invoke(cli, ["explain", str(file), "--why-not", "row_wise"])
    assert run.exit_code == 2
    assert "name it" in run.output
