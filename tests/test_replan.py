"""Replanning: least movement by brute force, survivors keep what they hold, long horizons move more."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from cost_models.calibration import default_calibration
from ir.constraints import Constraints, TableConstraint
from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.program import Model, Options, Program
from passes.relabel import Relabel, assign
from planner.cli import cli
from planner.replanning import received, replan


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.integers(0, 50), min_size=n * n, max_size=n * n)))
def test_assignment_is_the_best_of_all(values: list[int]) -> None:
    size = int(len(values) ** 0.5)
    worth = np.array(values, np.int64).reshape(size, size)
    best = max(sum(worth[i, p[i]] for i in range(size)) for p in itertools.permutations(range(size)))
    found = assign(worth)
    assert sorted(found) == list(range(size))
    assert sum(worth[i, j] for i, j in enumerate(found)) == best


WORK = 0.2  # deterministic seconds of the solver
TABLES = Model(
    "twelve",
    tuple(
        EmbeddingTable(f"t{n}", rows=(n + 1) * 200_000, dim=64 if n % 2 else 128, features=(f"f{n}",))
        for n in range(12)
    ),
    (),
)


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.compile(TABLES, "h100-2x8", time_limit=WORK)


def test_renamed_ranks_are_named_back(plan: planner.Plan) -> None:
    """Shuffle the ranks of a plan as the symmetry allows: relabelling finds the way back, nothing moves."""
    random = np.random.default_rng(0)
    inner = [random.permutation(8) for _ in range(2)]
    shuffle = {h * 8 + i: (1 - h) * 8 + int(inner[h][i]) for h in range(2) for i in range(8)}
    hosts = {h * 8 + i: (1 - h) * 8 + i for h in range(2) for i in range(8)}
    tables = []
    for table in plan.table_plans:
        names = {"table_row_wise": hosts, "grid_shard": hosts}.get(table.sharding_type, shuffle)
        if table.sharding_type in ("row_wise", "data_parallel"):
            tables.append(table)
        else:
            tables.append(replace(table, shards=tuple(replace(s, rank=names[s.rank]) for s in table.shards)))
    shuffled = replace(plan, table_plans=tuple(tables))
    assert received(plan, shuffled, range(16))[0] > 0
    program = Program(
        Model("m", (), ()), plan.topology, plan.workload, Options(), tables=shuffled.table_plans
    )
    back = Relabel(plan.table_plans, tuple(range(16))).run(program).tables
    assert back is not None
    assert received(plan, replace(plan, table_plans=back), range(16)) == (0, 0)


def test_nothing_changed_moves_nothing(plan: planner.Plan) -> None:
    found = replan(plan, plan.topology, model=TABLES, time_limit=WORK)
    assert found.candidates[0].moved == 0
    assert all(finding.ok for finding in planner.verify(found.plan))


def test_a_lost_host() -> None:
    by_table = Constraints(tables={"*": TableConstraint(sharding_types=("table_wise", "column_wise"))})
    old = planner.compile(
        TABLES, "h100-3x4", planner.Workload(global_batch=49152), constraints=by_table, time_limit=WORK
    )
    short, long = (
        replan(old, "h100-2x4", lost=(4, 5, 6, 7), model=TABLES, horizon=h, time_limit=WORK)
        for h in (1, 10**9)
    )
    survivors = (0, 1, 2, 3, 8, 9, 10, 11)
    for found in (short, long):
        assert found.plan.world_size == 8
        assert all(finding.ok for finding in planner.verify(found.plan))
        for candidate in found.candidates:
            assert candidate.moved == received(old, candidate.plan, survivors)[0]
    # what pays within one step is to move least; in a billion steps only the step counts
    assert short.candidates[0].moved == min(c.moved for c in short.candidates)
    assert long.plan.timeline.step == min(c.plan.timeline.step for c in long.candidates)
    # at least what was lost must move: no survivor has it
    lost = sum(s.rows * s.cols * 4 for t in old.table_plans for s in t.shards if 4 <= s.rank < 8)
    assert short.candidates[0].moved >= lost


def test_a_host_more_and_tables_grown_and_traffic_drifted() -> None:
    """New ranks take part, grown tables are planned at their new size, and what is held still counts."""
    by_table = Constraints(tables={"*": TableConstraint(sharding_types=("table_wise",))})
    work = planner.Workload(24576, {f"f{n}": planner.FeatureStats(2.0) for n in range(12)})
    old = planner.compile(TABLES, "h100-2x4", work, constraints=by_table, time_limit=WORK)
    more = replan(old, "h100-3x4", model=TABLES, horizon=10**9, time_limit=WORK)
    assert more.plan.timeline.step < old.timeline.step
    assert any(shard.rank >= 8 for table in more.plan.table_plans for shard in table.shards)
    tables = (
        *(replace(t, rows=2 * t.rows) for t in TABLES.tables),
        EmbeddingTable("new", 1000, 64, ("new",)),
    )
    grown = Model("grown", tables, ())
    hot = replace(work, features={**work.features, "f0": planner.FeatureStats(60.0)})
    found = replan(old, "h100-2x4", workload=hot, model=grown, horizon=1, time_limit=WORK)
    assert [finding for finding in planner.verify(found.plan, grown.tables) if not finding.ok] == []
    # with one step to pay, tables stay where they are and only the rows that are new arrive somewhere
    new_rows = sum(t.rows * t.dim * 8 for t in TABLES.tables) + 1000 * 64 * 8
    assert found.candidates[0].moved == new_rows
    shorter = Model("shorter", tuple(replace(t, rows=t.rows - 1) for t in TABLES.tables), ())
    with pytest.raises(InputError, match="only have gained rows"):
        replan(old, "h100-2x4", model=shorter)


def test_constants_given_hold_for_every_candidate() -> None:
    """Each candidate is priced by the same constants: lookups ten times slower lengthen every step."""
    slow = default_calibration(planner.topology("h100-2x4"))
    slow = replace(slow, row_efficiency=slow.row_efficiency / 10)
    old = planner.compile(TABLES, "h100-2x4", time_limit=WORK)
    plain = {
        c.name: c.plan.timeline.step
        for c in replan(old, "h100-2x4", model=TABLES, time_limit=WORK).candidates
    }
    given = replan(old, "h100-2x4", model=TABLES, time_limit=WORK, calibration=slow).candidates
    assert all(c.plan.timeline.step > 1.05 * plain[c.name] for c in given)


def test_bad_input(plan: planner.Plan) -> None:
    with pytest.raises(InputError, match=r"ranks 0\.\.15, not 16"):
        replan(plan, "h100-1x8", lost=(16,))
    with pytest.raises(InputError, match="no rank is left"):
        replan(plan, "h100-1x8", lost=range(16))
    with pytest.raises(InputError, match="at least one step"):
        replan(plan, "h100-1x8", horizon=0)


def test_command_line(tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "new.json"
    planner.compile("dlrm-small", "local-4", time_limit=WORK).save(file)
    arguments = [
        "replan",
        str(file),
        "-t",
        "local-2",
        "--lost",
        "1,3",
        "-o",
        str(out),
        "--json",
        "--time-limit",
        "0.1",
    ]
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 0, run.output
    body = json.loads(run.output)
    totals = [row["total_seconds"] for row in body["candidates"]]
    assert totals == sorted(totals)
    assert planner.Plan.load(out).digest == body["digest"]
    run = CliRunner().invoke(cli, ["replan", str(file), "-t", "local-2", "--lost", "x"])
    assert run.exit_code == 2
    assert "must list ranks" in run.output
    lost = ["replan", str(file), "-t", "local-3", "--lost", "2", "--time-limit", "0.1", "-o", str(out)]
    run = CliRunner().invoke(cli, lost)
    assert run.exit_code == 2
    assert "does not divide" in run.output
    run = CliRunner().invoke(cli, [*lost, "--batch", "999"])
    assert run.exit_code == 0, run.output
    assert planner.Plan.load(out).workload.global_batch == 999
