"""What if: settings reach the input they name, and sensitivities have the sign physics gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import planner
from cost_models.calibration import default_calibration
from cost_models.embedding import phase_overheads
from cost_models.placed import rank_seconds
from ir.collective_plan import CollectiveRequest
from ir.compression import CompressionRequest
from ir.dense_plan import DenseRequest
from ir.errors import InputError
from ir.format_plan import FormatRequest
from ir.ops import EmbeddingTable
from ir.program import Model
from ir.serving import ServingRequest
from ir.tier_plan import TierRequest
from ir.towers import TowerRequest
from passes.assignment import Option, Piece, Problem, solve
from planner.assumption_prices import priced
from planner.assumptions import sensitivity
from planner.cli import cli
from planner.replanning import received
from planner.what_if import Inputs, change, parse_settings, planned_anew, whatif

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


def test_hosts_are_counted_through_all_levels() -> None:
    pods = Inputs(planner.topology("llama3-roce-1024x8"), planner.Workload(), planner.Constraints())
    assert change(pods, {"hosts": "512"}).topology.hosts == 512
    assert change(pods, {"hosts": "512"}).topology.levels[1].fanout == 256  # pods stay as they are
    assert change(pods, {"hosts": "8"}).topology.hosts == 8
    with pytest.raises(InputError, match="multiple of 256"):
        change(pods, {"hosts": "300"})


def test_settings_of_decoders(plan: planner.Plan) -> None:
    made = changed(plan, "serving.new=1000000", "serving.ttft=2.5", "parallelism.tensor=8", "sequence=131072")
    assert made.constraints.serving is not None
    assert (made.constraints.serving.new, made.constraints.serving.ttft) == (1_000_000, 2.5)
    assert made.constraints.parallelism is not None
    assert made.constraints.parallelism.tensor == 8
    assert made.workload.llm is not None
    assert made.workload.llm.sequence == 131072


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
        ("serving.newer=1", "serving.newer"),
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
    assert there_and_back.table_plans == plan.table_plans
    assert "searched as fast without a start" in there_and_back.provenance["anew"]
    with pytest.raises(InputError, match="not the model of the plan"):
        whatif(plan, {"hosts": "1"}, model="dlrm")


def test_many_tables_start_from_the_plan_on_other_hosts() -> None:
    tables = tuple(
        EmbeddingTable(f"t{n}", rows=(n % 9 + 1) * 40_000, dim=32, features=(f"f{n}",)) for n in range(70)
    )
    model = Model("seventy", tables, ())
    plan = planner.compile(model, "h100-2x2", time_limit=WORK)
    made = whatif(plan, {"hosts": "1"}, model=model, time_limit=WORK)
    assert made.provenance["start"] == plan.digest
    assert made.world_size == 2
    assert all(finding.ok for finding in planner.verify(made))


def many(seed: int = 0) -> Problem:
    """Eighty tables in two phases, options of one, two and four pieces."""
    random = np.random.default_rng(seed)
    options = []
    for size in map(float, random.lognormal(0.0, 1.2, 80)):
        options.append(
            tuple(
                Option(
                    f"x{n}",
                    (Piece("rank", (size / n * 1.1 ** (n > 1), size / n + 0.05), 10.0 * size / n, n),),
                )
                for n in (1, 2, 4)
            )
        )
    return Problem(tuple(f"t{n}" for n in range(80)), tuple(options), 3, 4, 1e4, ("a", "b"))


def test_many_tables_start_warm_with_two_fifths_of_the_work() -> None:
    """On fewer hosts, from the options that were good on more: hardly a worse end."""
    before = solve(many(), time_limit=1.0)
    fewer = replace(many(), hosts=2)
    cold = solve(fewer, time_limit=2.0)
    warm = solve(fewer, time_limit=2.0, effort="warm", start=(before.choice, None))
    assert warm.work <= 0.42 * 2.0
    assert warm.objective <= 1.02 * cold.objective
    assert warm.lower_bound <= cold.objective
    again = solve(fewer, time_limit=2.0, effort="warm", start=(before.choice, None))
    assert (again.choice, again.placement) == (warm.choice, warm.placement)


def test_with_the_same_ranks_it_starts_from_the_plan(plan: planner.Plan) -> None:
    change = {"link.inter": "300Gbps", "hbm": "141GB"}
    # next to no work: what is found is hardly more than the start
    made = whatif(plan, change, time_limit=1e-9)
    assert made.provenance["start"] == plan.digest
    before = rank_seconds(
        plan.table_plans, made.topology, plan.workload, default_calibration(made.topology), plan.mode
    )
    overheads = phase_overheads(made.topology, plan.workload, default_calibration(made.topology), plan.mode)
    stayed = sum(float(seconds.max()) + overheads[phase] for phase, seconds in before.items())
    assert made.certificate.objective <= stayed * (1 + 1e-9)
    assert all(finding.ok for finding in planner.verify(made))
    assert made.digest == whatif(plan, change, time_limit=1e-9).digest


SIX = Model("six", tuple(EmbeddingTable(f"t{n}", (n % 5 + 1) * 40_000, 32, (f"f{n}",)) for n in range(6)), ())
WHOLE = {"*": planner.TableConstraint(sharding_types=("table_wise",))}


def where_they_lie(plan: planner.Plan) -> dict[str, planner.TableConstraint]:
    """Constraints that leave whole tables on their ranks."""
    return {
        t.name: planner.TableConstraint(sharding_types=("table_wise",), ranks=(t.shards[0].rank,))
        for t in plan.table_plans
    }


def searched_from(plan: planner.Plan, **settings: str) -> planner.Plan:
    made = whatif(
        plan, {key.replace("_", "."): value for key, value in settings.items()}, model=SIX, time_limit=WORK
    )
    assert "start" in made.provenance
    assert [finding for finding in planner.verify(made) if not finding.ok] == []
    return made


def test_formats_start_from_the_plan() -> None:
    """On the same ranks no worse than each tensor in its format on its rank, which planning anew is held to."""
    traffic = {"traffic.*": ("fp32",)}
    asked = FormatRequest(average_bits=20.0, formats={"table": ("fp32", "fp16", "bf16")}, rules=traffic)
    limits = planner.Constraints(tables=WHOLE, formats=asked)
    fed = planner.Workload(4096)
    plan = planner.compile(SIX, slow("h100-2x2", 1e9), fed, constraints=limits, time_limit=WORK)
    section = plan.decisions.formats
    assert section is not None
    assert {table.format for table in plan.table_plans} - {"fp32"}
    other = searched_from(plan, link_inter="3GB/s", batch="8192")
    rules: dict[str, tuple[str, ...]] = {tensor.name: (tensor.format,) for tensor in section.tensors}
    pinned = planner.Constraints(tables=where_they_lie(plan), formats=replace(asked, rules=rules))
    stayed = planner.compile(SIX, other.topology, other.workload, constraints=pinned, time_limit=WORK)
    assert other.certificate.objective <= stayed.certificate.objective * (1 + 1e-9)
    assert searched_from(plan, hosts="4").world_size == 8


def test_tiers_start_from_the_plan() -> None:
    """Memory for six tenths of the tables: the rest lies in the host's."""
    limits = planner.Constraints(
        tables=WHOLE, tiers=TierRequest(), memory_limit=int(SIX.embedding_params * 0.6), memory_reserve=0.0
    )
    plan = planner.compile(
        SIX, slow("h100-2x2", 1e9), planner.Workload(4096), constraints=limits, time_limit=WORK
    )
    assert any(table.tiers is not None for table in plan.table_plans)
    assert received(plan, plan, range(4)) == (0, 0)
    # rows in the host's memory move as those of the device do: all of it to a machine that is new
    row = 32 * 4 * 2  # weights and the state of Adagrad
    assert received(plan, plan, [-1] * 4)[0] == pytest.approx(SIX.embedding_params // 32 * row)
    other = searched_from(plan, link_inter="3GB/s")
    anew = planner.compile(SIX, other.topology, plan.workload, constraints=limits, time_limit=WORK)
    assert other.certificate.objective <= anew.certificate.objective * 1.02
    assert other.certificate.lower_bound == pytest.approx(anew.certificate.lower_bound, rel=1e-6)
    assert searched_from(plan, hosts="4").world_size == 8


def test_towers_are_kept() -> None:
    made = towered()
    other = whatif(made, {"link.inter": "0.5GB/s", "link.intra": "100GB/s"}, time_limit=WORK)
    assert made.decisions.towers is not None
    assert other.decisions.towers is not None
    assert [t.tables for t in other.decisions.towers.towers] == [
        t.tables for t in made.decisions.towers.towers
    ]
    assert "start" in other.provenance
    assert all(finding.ok for finding in planner.verify(other))
    assert "towers are cut for" in planned_anew(made, changed(made, "hosts=4"))[0]


@pytest.mark.parametrize("bucket", [None, 2**21])
def test_sensitivity_is_the_step_of_the_same_plan_on_a_changed_machine(
    plan: planner.Plan, bucket: int | None
) -> None:
    if bucket is not None:
        limits = planner.Constraints(collectives=CollectiveRequest(bucket_bytes=bucket))
        plan = planner.compile("dlrm-dcnv2", plan.topology, constraints=limits, time_limit=WORK)
    found = {row.name: row for row in sensitivity(plan).rows}
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


def test_decoders_are_sensitive_to_their_matrix_products_most() -> None:
    plan = planner.compile("llama3-8b", "h100-8x8")
    found = {row.name: row for row in sensitivity(plan).rows}
    gemm = found["gemm_efficiency"]
    section = plan.decisions.parallelism
    assert section is not None
    # a tenth less of what products reach lengthens them by a ninth, and little else of the step
    assert gemm.worse - plan.timeline.step == pytest.approx(section.seconds["gemm"] / 9, rel=0.15)
    assert next(iter(found)) == "gemm_efficiency"
    assert all(row.worse >= plan.timeline.step * (1 - 1e-12) for row in found.values())


def slow(machine: str, bandwidth: float) -> planner.Topology:
    """A machine with so slow a network that exchanges are not hidden."""
    made = planner.topology(machine)
    level = replace(made.levels[-1], link=replace(made.inter_link, bandwidth=bandwidth))
    return replace(made, levels=(*made.levels[:-1], level))


def grouped(share: float = 1.0) -> planner.Plan:
    """Tables in one group a host."""
    limits = planner.Constraints(dense=DenseRequest(strategies=("ddp",), sparse_groups=(2,), sync_every=50))
    made = planner.compile("dlrm-small", slow("h100-2x4", share * 1e9), constraints=limits, time_limit=WORK)
    assert made.decisions.dense is not None
    assert made.decisions.dense.sparse is not None
    assert made.decisions.dense.sparse.groups == 2
    return made


def coded(share: float = 1.0) -> planner.Plan:
    limits = planner.Constraints(compression=CompressionRequest())
    return planner.compile("dlrm-small", slow("h100-2x4", share * 1e9), constraints=limits, time_limit=WORK)


def towered(share: float = 1.0) -> planner.Plan:
    """Towers with modules, and codecs between the peers."""
    asked = TowerRequest(module="projection", compression=2.0, always=True)
    limits = planner.Constraints(towers=asked, compression=CompressionRequest())
    return planner.compile("dlrm-small", slow("h100-2x4", share * 1e9), constraints=limits, time_limit=WORK)


def served(share: float = 1.0) -> planner.Plan:
    """A ring across hosts, beside a cached prefix."""
    limits = planner.Constraints(serving=ServingRequest(new=8000, cached=64000, context=2, tensor=8))
    return planner.compile("llama3-70b", slow("h100-2x8", share * 1e9), mode="inference", constraints=limits)


@pytest.mark.parametrize("make", [grouped, coded, towered, served], ids=lambda make: make.__name__)
def test_other_kinds_are_priced_as_planning_them_again_does(make: Callable[..., planner.Plan]) -> None:
    """As planned, and with a slower network under which everything is decided alike."""
    made, again = make(), make(0.9)
    base, price, seconds = priced(made)
    assert price(made.topology, base) == pytest.approx(seconds, rel=1e-12)
    found, slower = sensitivity(made), priced(again)[2]
    for name, whole in seconds.items():
        rows = {row.name: row for row in found.of(name)}
        assert len(rows) > 5
        for row in rows.values():
            assert row.worse >= whole * (1 - 1e-12) >= row.better * (1 - 2e-12)
        link = rows[f"link.{made.topology.levels[-1].name}"]
        assert link.worse == pytest.approx(slower[name], rel=1e-12)
    assert any(slower[name] > 1.01 * whole for name, whole in seconds.items())
