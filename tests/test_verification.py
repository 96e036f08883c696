"""The independent check finds each planted fault, and passes sound plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

import planner
from ir.plan import Plan, Shard, TablePlan
from ir.program import Model
from ir.workload import Workload
from planner.verification import Finding, verify


@pytest.fixture(scope="module")
def plan(model: Model, workload: Workload) -> Plan:
    """A plan in which every table is placed by another sharding type."""
    kinds = ("row_wise", "column_wise", "table_wise", "table_row_wise", "data_parallel")
    rules = {f"t{i}": planner.TableConstraint(sharding_types=(kind,)) for i, kind in enumerate(kinds)}
    constraints = planner.Constraints(tables=rules, min_column_width=8)
    return planner.compile(model, "h100-2x4", workload, constraints=constraints)


def faults(plan: Plan, check: str) -> str:
    """All faults of one check in one text."""
    findings: dict[str, Finding] = {finding.check: finding for finding in verify(plan)}
    return "; ".join(findings[check].faults)


def change(plan: Plan, name: str, **fields: object) -> Plan:
    """The plan with one table decision altered."""
    tables = tuple(replace(t, **fields) if t.name == name else t for t in plan.table_plans)  # type: ignore[arg-type]
    return replace(plan, table_plans=tables)


def shift(table: TablePlan, index: int, **fields: int) -> tuple[Shard, ...]:
    """The table's shards with one altered."""
    shards = list(table.shards)
    shards[index] = replace(shards[index], **fields)
    return tuple(shards)


def test_a_sound_plan_passes(plan: Plan, model: Model) -> None:
    assert all(finding.ok for finding in verify(plan, model.tables))


def test_a_missing_row_block(plan: Plan) -> None:
    broken = change(plan, "t0", shards=plan.tables["t0"].shards[:-1])
    assert "are on no rank" in faults(broken, "coverage")


def test_rows_held_twice(plan: Plan) -> None:
    table = plan.tables["t0"]
    broken = change(plan, "t0", shards=shift(table, 1, row=table.shards[1].row - 1))
    assert "held twice" in faults(broken, "coverage")


def test_a_shard_outside_the_table(plan: Plan) -> None:
    broken = change(plan, "t1", shards=shift(plan.tables["t1"], -1, cols=64))
    assert "outside" in faults(broken, "coverage")


def test_a_copy_on_one_rank_only(plan: Plan) -> None:
    broken = change(plan, "t4", shards=shift(plan.tables["t4"], 0, rank=7))
    assert "is data_parallel but has a shard on rank 7 alone" in faults(broken, "ranks")


def test_a_copy_that_is_not_whole(plan: Plan) -> None:
    broken = change(plan, "t4", shards=shift(plan.tables["t4"], 0, rows=5))
    assert "are on no rank" in faults(broken, "coverage")


def test_one_place_claimed_everywhere(plan: Plan) -> None:
    broken = change(plan, "t2", shards=shift(plan.tables["t2"], 0, rank=-1))
    assert "is table_wise but has a shard on every rank" in faults(broken, "ranks")


def test_row_blocks_on_swapped_ranks(plan: Plan) -> None:
    """Coverage holds, but TorchRec ignores the placement of row-wise shards."""
    table = plan.tables["t0"]
    shards = list(table.shards)
    shards[0], shards[1] = replace(shards[0], rank=1), replace(shards[1], rank=0)
    broken = change(plan, "t0", shards=tuple(shards))
    assert faults(broken, "coverage") == ""
    assert "are meant" in faults(broken, "geometry")


def test_maxima_over_split_rows(plan: Plan) -> None:
    assert faults(plan, "geometry") == ""
    assert "maxima" in faults(change(plan, "t0", pooling="max"), "geometry")


def test_table_row_wise_over_two_hosts(plan: Plan) -> None:
    table = plan.tables["t3"]
    moved = tuple(replace(s, rank=(s.rank + 2) % 8) for s in table.shards)
    assert "row blocks must sit" in faults(change(plan, "t3", shards=moved), "geometry")


def test_a_rank_that_does_not_exist(plan: Plan) -> None:
    broken = change(plan, "t2", shards=shift(plan.tables["t2"], 0, rank=8))
    assert "has a shard on rank 8; the topology has 8 ranks" in faults(broken, "ranks")


def test_memory_below_what_the_shards_need(plan: Plan) -> None:
    memory = (replace(plan.memory[0], used={"weights": 1}), *plan.memory[1:])
    assert "its shards alone need" in faults(replace(plan, memory=memory), "memory")


def test_memory_above_the_device(plan: Plan) -> None:
    memory = (replace(plan.memory[0], used={"weights": 10**12}), *plan.memory[1:])
    assert "rank 0 uses" in faults(replace(plan, memory=memory), "memory")


def test_a_bound_above_the_objective(plan: Plan) -> None:
    certificate = replace(plan.certificate, lower_bound=plan.certificate.objective * 2)
    assert "is above the objective" in faults(replace(plan, certificate=certificate), "certificate")


def test_overlapping_events(plan: Plan) -> None:
    first, *rest = plan.timeline.events
    twice = replace(first, name="copy")
    broken = replace(plan, timeline=replace(plan.timeline, events=(first, twice, *rest)))
    assert "starts on stream" in faults(broken, "timeline")


def test_another_kernel(plan: Plan) -> None:
    assert "dense kernel only" in faults(change(plan, "t4", compute_kernel="fused"), "kernels")


def test_a_table_decided_twice(plan: Plan) -> None:
    broken = replace(plan, table_plans=(*plan.table_plans, plan.table_plans[0]))
    assert "decided twice" in faults(broken, "tables")


def test_a_plan_for_another_model(plan: Plan, model: Model) -> None:
    other = tuple(replace(t, rows=t.rows + 1) if t.name == "t2" else t for t in model.tables[:-1])
    found = {f.check: "; ".join(f.faults) for f in verify(plan, other)}
    assert "'t2' is 700 x 32 in the plan, 701 x 32 in the model" in found["model"]
    assert "'t4' is not in the model" in found["model"]
