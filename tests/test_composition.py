"""All requests at once: one plan for a stacked-interaction model that decides everything, verifies, and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import planner
from cost_models.memory import dense_memory
from ir.capture import capture
from ir.compression import CompressionRequest
from ir.constraints import Constraints
from ir.format_plan import FormatRequest
from ir.growth import GrowthRequest
from ir.sessions import SessionGroup, SessionStats
from ir.tier_plan import TierRequest
from ir.topology import Level
from ir.towers import TowerRequest
from ir.workload import FeatureStats
from planner.report import render_report
from tests import composed_plans as plans
from tests.plans import topology
from tests.test_composed_run import EXACT, run

BUDGET = 1e-6  # relative squared error: small enough for the first order to tell what codecs do to outputs
SIZES = {**plans.ROWS, "d": 4096}
LEFT_FOR_TABLES = 30_000  # bytes a rank; table d with its state takes 164 kB


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    """A small Wukong on two hosts with little memory and a slow link between them, everything asked for."""
    import torch

    from codegen.runtime.codecs.sampling import sample_traffic
    from planner.zoo import build

    torch.manual_seed(0)
    made = build("wukong-small", device="cpu", **plans.options("wukong-small", SIZES))
    features = [f for entry in plans.entries() for f in entry["features"]]
    work = replace(
        made.workload,
        global_batch=32,
        features={f: FeatureStats(6.0) for f in features},
        sessions=SessionStats(8.0, (SessionGroup(("f_a", "f_c", "b1"), 1.0), SessionGroup(("f_d",), 1.0))),
        optimizer="adagrad",
    )
    model = capture(made.module, name="wukong")
    batches = [made.module.random_batch(8, work, seed) for seed in range(2)]  # type: ignore[operator]
    samples = sample_traffic(made.module, batches, lambda model, b: model(*b[:2]).square().mean())
    machine = topology(2, 2)
    slow = replace(machine.levels[1].link, bandwidth=1e4)
    machine = replace(
        machine,
        levels=(machine.levels[0], Level("cluster", 2, slow)),
        host_tiers=(plans.CXL, plans.SSD),
    )
    asked = Constraints(
        formats=FormatRequest(
            rules={**{name: (format,) for name, format in plans.FORMATS.items()}, "traffic.*": ("fp32",)},
            formats={"table": ("fp32",), "weight": ("fp32",), "activation": ("fp32",)},
            kernels="emulate",
        ),
        tiers=TierRequest(tables={"d": ("ssd",)}),
        compression=CompressionRequest(
            samples=samples,
            codecs=("none", "eb_lz", "eb_entropy"),
            error_budget=BUDGET,
            gradient_budget=BUDGET,
            format_error=dict.fromkeys(plans.FORMATS, 0.0),
        ),
        towers=TowerRequest(always=True),
        growth=GrowthRequest(steps=1000),
        memory_reserve=0.0,
        memory_limit=sum(dense_memory(model, work, machine, "train").values()) + LEFT_FOR_TABLES,
    )
    return planner.compile(model, machine, work, constraints=asked, name="wukong", time_limit=0.3)


def test_one_plan_decides_everything_and_verifies(plan: planner.Plan) -> None:
    sections = {"formats", "tiers", "compression", "towers", "dedup", "growth"}
    assert sections <= set(plan.decisions.present())
    assert [finding for finding in planner.verify(plan) if not finding.ok] == []
    assert plan.decisions.towers is not None
    assert plan.decisions.towers.applied
    assert plan.decisions.dedup is not None
    assert len(plan.decisions.dedup.chosen) == 2
    assert {table.format for table in plan.table_plans} == {"fp32", *plans.FORMATS.values()}
    assert any(table.tiers is not None for table in plan.table_plans)
    assert plan.decisions.compression is not None
    assert plan.decisions.compression.uses("forward")
    # the dense part is split over a host, and the step in tower form is priced so
    assert plan.decisions.dense is not None
    assert plan.decisions.dense.shard == 2
    reduced = [e.name for e in plan.timeline.events if "all_reduce" in e.name]
    assert reduced
    assert all(name.startswith("shard_all_reduce") for name in reduced)
    # every section can be read, saved and drawn
    text = plan.explain()
    for words in ("deduplication", "compression", "towers", "growth"):
        assert words in text.lower()
    assert planner.Plan.from_dict(plan.to_dict()).digest == plan.digest
    assert "<details" in render_report(plan, sensitivity=False)


def test_that_plan_trains_as_the_unsharded_model(plan: planner.Plan, tmp_path: Path) -> None:
    """Outputs within what the codecs' bounds allow, to first order; 10 % for what is beyond it."""
    found = run(plan, "wukong-small", tmp_path, options=plans.options("wukong-small", SIZES))
    worst = found["worst"]
    assert found["files"] > 0
    assert worst["allowed"] > 10 * EXACT
    assert worst["vectors"] < 1.1


def test_tower_modules_codecs_and_formats_are_one_plan_that_runs(tmp_path: Path) -> None:
    """The planner gives what modules send a codec, both ways; training errs within its bounds."""
    import torch

    from planner.zoo import build

    torch.manual_seed(0)
    options = plans.options("wukong-small")
    made = build("wukong-small", device="cpu", **options)
    features = [f for entry in plans.entries() for f in entry["features"]]
    work = replace(
        made.workload,
        global_batch=4096,
        features={f: FeatureStats(2.0) for f in features},
        optimizer="adagrad",
    )
    machine = topology(2, 2)
    slow = replace(machine.levels[1].link, bandwidth=1e4)
    machine = replace(machine, levels=(machine.levels[0], Level("cluster", 2, slow)))
    formats = FormatRequest(
        rules={"a": ("fp16",), "b": ("bf16",), "traffic.*": ("fp32",)},
        formats={"table": ("fp32",), "weight": ("fp32",), "activation": ("fp32",)},
        kernels="emulate",
    )
    budget = 1e-4  # bf16 has an error of about 3e-6
    asked = Constraints(
        formats=formats,
        compression=CompressionRequest(
            codecs=("none", "eb_entropy"), error_budget=budget, gradient_budget=budget
        ),
        towers=TowerRequest(module="wukong", compression=1.5, always=True),
    )
    model = capture(made.module, name="wukong")
    both, plain = (
        planner.compile(model, machine, work, constraints=one, name="wukong", time_limit=0.3)
        for one in (asked, replace(asked, compression=None))
    )
    assert [finding for finding in planner.verify(both) if not finding.ok] == []
    section = both.decisions.compression
    assert section is not None
    assert {(row.table, row.direction) for row in section.tables if row.codec != "none"} == {
        (f"tower {n}", way) for n in (0, 1) for way in ("forward", "backward")
    }
    assert both.timeline.step < plain.timeline.step
    assert "tower 1" in both.explain()
    # one step: Adagrad's first one is as long for gradients that the codec rounds away as for any other
    found = run(both, "wukong-small", tmp_path, options=options, steps=1)
    worst = found["worst"]
    assert found["moved"] == 2 * 4
    assert worst["allowed"] > 10 * EXACT
    assert worst["vectors"] < 1.1
    assert 0 < worst["modules"] < 1e-2
    assert found["sent"] < found["raw"]
