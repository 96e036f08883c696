"""What if: settings reach the input they name, and sensitivities have the sign physics gives them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import planner
from ir.errors import InputError
from planner.cli import cli
from planner.what_if import Inputs, change, parse_settings, sensitivity, whatif

WORK = 0.3  # deterministic seconds of the solver: any plan will do


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    return planner.compile("dlrm-dcnv2", "h100-2x8", time_limit=WORK)


def changed(plan: planner.Plan, *settings: str) -> Inputs:
    return change(Inputs(plan.topology, plan.workload, plan.constraints), parse_settings(settings))


def test_settings_reach_what_they_name(plan: planner.Plan) -> None:
    made = changed(plan, "hosts=4", "host_size=2", "link.inter=100Gbps", "latency.intra=7us", "hbm=141GB")
    assert (made.topology.hosts, made.topology.host_size) == (4, 2)
    assert made.topology.inter_link.bandwidth == pytest.approx(12.5e9)
    assert made.topology.intra_link.latency == pytest.approx(7e-6)
    assert made.topology.intra_link.bandwidth == plan.topology.intra_link.bandwidth
    assert made.topology.tier("hbm").capacity == 141_000_000_000
    made = changed(plan, "batch=1024", "exchange_dtype=fp16", "memory_reserve=0.3", "bandwidth.hbm=1TB/s")
    assert (made.workload.global_batch, made.workload.exchange_dtype) == (1024, "fp16")
    assert made.constraints.memory_reserve == 0.3
    assert made.topology.tier("hbm").read_bandwidth == made.topology.tier("hbm").write_bandwidth == 1e12
    assert changed(plan, "topology=a100-1x8").topology.device.name == planner.topology("a100-1x8").device.name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("hosts", "not KEY=VALUE"),
        ("hosts=0", "at least 1"),
        ("hostz=3", "did you mean 'hosts'"),
        ("link.side=1GB/s", "no setting 'link.side'"),
        ("link.inter=fast", "--set link.inter=fast"),
        ("hbm=-3", "--set hbm=-3"),
        ("optimizer=lion", "optimizer"),
        ("flops.fp3=1e12", "no setting 'flops.fp3'"),
    ],
)
def test_bad_settings_are_named(plan: planner.Plan, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        changed(plan, setting)


def test_whatif_is_what_compile_gives(plan: planner.Plan) -> None:
    made = whatif(plan, {"hosts": "1"}, time_limit=WORK)
    direct = planner.compile("dlrm-dcnv2", plan.topology.with_hosts(1), plan.workload, time_limit=WORK)
    assert made.table_plans == direct.table_plans
    assert made.timeline == direct.timeline
    there_and_back = whatif(made, {"hosts": "2"}, time_limit=WORK)
    assert there_and_back.digest == whatif(plan, {"hosts": "2"}, time_limit=WORK).digest
    with pytest.raises(InputError, match="not the model of the plan"):
        whatif(plan, {"hosts": "1"}, model="dlrm")


def test_sensitivity_is_the_step_of_the_same_plan_on_a_changed_machine(plan: planner.Plan) -> None:
    found = {row.name: row for row in sensitivity(plan)}
    for row in found.values():
        assert row.worse >= plan.timeline.step * (1 - 1e-12) >= row.better * (1 - 2e-12)
    slow = found["link.cluster"]
    assert slow.worse > plan.timeline.step
    # a tenth less bandwidth stretches the exchange by 1 / 0.9 at most
    assert slow.worse <= plan.timeline.step / 0.9


def test_command_line(plan: planner.Plan, tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "new.json"
    plan.save(file)
    run = CliRunner().invoke(cli, ["whatif", str(file), "--set", "hosts=1", "-o", str(out), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["topology"][0] != ""
    assert planner.Plan.load(out).world_size == 8
    run = CliRunner().invoke(cli, ["whatif", str(file)])
    assert run.exit_code == 0
    assert "10 % worse" in run.output
    run = CliRunner().invoke(cli, ["whatif", str(file), "--set", "hostz=1"])
    assert run.exit_code == 2
    run = CliRunner().invoke(cli, ["whatif", str(file), "--set", "memory_limit=1000000"])
    assert run.exit_code == 3
