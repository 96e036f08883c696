"""The collective pass: buckets against brute force, choices against prices, verification, and what is emitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import planner
from codegen.collectives import data_parallel
from codegen.runtime.compare import run_plan
from codegen.runtime.launch import LaunchError
from cost_models.calibration import GPU
from cost_models.collective.planning import communication, dense_reduction
from cost_models.exchanged import exchanged_bytes
from cost_models.step import DenseReduction, step_timeline
from ir.collective_plan import CollectiveChoice, CollectivePlan, CollectiveRequest
from ir.constraints import Constraints
from ir.errors import InputError
from ir.ops import EmbeddingTable, Op
from ir.plan import Plan
from ir.program import Model
from ir.workload import FeatureStats, Workload
from passes.collectives import DEFAULT_BUCKET, WORTH, crossovers
from planner.presets import preset
from planner.verify_collectives import check_collectives
from tests.plans import Decision, Table, make_plan


def linear(name: str, k: int, n: int, phase: str) -> Op:
    return Op(
        name, "gemm", flops=2.0 * k * n, params=k * n, activation_bytes=4.0 * n, phase=phase, gemm=(k, n)
    )


MODEL = Model(
    "wide",
    tuple(EmbeddingTable(f"t{i}", 100_000, 64, (f"f{i}",)) for i in range(4)),
    (
        linear("bottom", 512, 512, "bottom"),
        Op("lookup", "lookup", activation_bytes=4096.0, tables=tuple(f"t{i}" for i in range(4))),
        *(linear(f"top{i}", 4096, 4096, "top") for i in range(6)),
    ),
)
LOAD = Workload(65536, {f"f{i}": FeatureStats(pooling_factor=10.0) for i in range(4)})


def compiled(topology: str, **asked: Any) -> Plan:
    request = CollectiveRequest(**asked) if asked else None
    return planner.compile(MODEL, topology, LOAD, constraints=Constraints(collectives=request))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compiled("h100-2x8")


def test_the_bucket_is_the_best_of_all(plan: Plan) -> None:
    """No bucket between 1 and 512 MiB makes the modelled step shorter by more than the stated margin."""
    section = plan.decisions.collectives
    assert section is not None
    lasted = {event.name: event.duration for event in plan.timeline.events}
    phases = {
        name: lasted[name] for name in ("lookup_forward", "output_dist", "gradient_dist", "lookup_backward")
    }
    phases["input_dist"] = lasted["input_dist_next"]
    net = communication(plan.topology, GPU)
    steps = {}
    for mib in (*range(1, 64, 3), 64, 128, 256, 512, 25):
        reduction = dense_reduction(net, mib * 2**20, False)
        timeline = step_timeline(MODEL, phases, plan.topology, LOAD, GPU, "train", reduction=reduction)
        steps[mib] = timeline.step
    assert plan.timeline.step <= steps[25]
    powers = [steps[mib] for mib in (1, 4, 16, 64, 128, 256, 512)]
    assert plan.timeline.step <= min(powers) * (1 + WORTH) + 1e-12
    assert section.default_step_change == pytest.approx(steps[25] - plan.timeline.step)
    free = step_timeline(
        MODEL,
        phases,
        plan.topology,
        LOAD,
        GPU,
        "train",
        reduction=DenseReduction(section.bucket_bytes, lambda size: {"none": 0.0}),
    )
    assert section.exposed_seconds == pytest.approx(plan.timeline.step - free.step, abs=1e-12)


def test_buckets_overlap_with_the_backward_pass(plan: Plan) -> None:
    at = {e.name: (e.start, e.start + e.duration) for e in plan.timeline.events}
    assert at["all_reduce_0"][0] < at["top_backward_1"][1]
    section = plan.decisions.collectives
    assert section is not None
    assert section.exposed_seconds < section.dense_seconds


def test_exchanged_bytes_of_a_plan_are_those_of_its_vectors(plan: Plan) -> None:
    """Whole tables on ranks: batch x width x 2 bytes for each, counted by hand on every rank."""
    moved = exchanged_bytes(plan.table_plans, plan.topology, LOAD)
    counted = [0.0] * plan.world_size
    for table in plan.table_plans:
        assert table.sharding_type in ("table_wise", "column_wise")
        for shard in table.shards:
            counted[shard.rank] += 65536 * shard.cols * (2 if LOAD.exchange_dtype != "fp32" else 4)
    assert moved["output_dist", "all_to_all"] == pytest.approx(max(counted))


def test_default_and_asked_for_buckets() -> None:
    small = compiled("h100-2x8", bucket_bytes=2**20).decisions.collectives
    assert small is not None
    assert small.bucket_bytes == 2**20
    assert small.buckets == 7  # every layer fills one: six of 4096 x 4096, and one of 512 x 512 in fp32
    alone = compiled("h100-1x1")
    assert alone.decisions.collectives is None


def test_the_device_design_can_be_asked_for() -> None:
    """Rabenseifner's all-reduce by this project's messages (arXiv 1810.11112) in place of the library's."""
    asked = compiled("h100-2x8", dense_engine="scheduled", dense_algorithm="halving_doubling")
    section = asked.decisions.collectives
    assert section is not None
    dense = next(choice for choice in section.choices if choice.name == "dense_all_reduce")
    assert (dense.algorithm, dense.engine, dense.levels) == ("halving_doubling", "scheduled", (8, 2))
    assert list(check_collectives(asked)) == []
    with pytest.raises(InputError, match="'halving_doubling' is not run by the library"):
        compiled("h100-2x8", dense_algorithm="halving_doubling")


def test_verification_finds_what_was_changed(plan: Plan) -> None:
    assert list(check_collectives(plan)) == []
    section = plan.decisions.collectives
    assert section is not None

    def faults(**changed: Any) -> str:
        broken = replace(section, **changed)
        return " ".join(
            check_collectives(replace(plan, decisions=replace(plan.decisions, collectives=broken)))
        )

    first, *rest = section.choices
    assert "buckets" in faults(buckets=section.buckets + 1)
    assert "the decision says" in faults(dense_seconds=section.dense_seconds * 1.1)
    assert "are exposed" in faults(exposed_seconds=section.dense_seconds * 1.1)
    assert "ranks" in faults(choices=(replace(first, levels=(7,)), *rest))
    assert "add up to" in faults(choices=(replace(first, seconds=first.seconds * 2), *rest))
    quick = replace(first, seconds=1e-9, terms={"latency": 1e-9})
    assert "at the peak of all links" in faults(choices=(quick, *rest))
    table = section.crossovers[0]
    assert "do not rise" in faults(crossovers=(replace(table, bands=(*table.bands, table.bands[0])),))


def test_plan_file_and_determinism(plan: Plan) -> None:
    assert type(plan).from_dict(plan.to_dict()) == plan
    assert compiled("h100-2x8").digest == plan.digest
    with pytest.raises(InputError, match="bucket_bytes"):
        Constraints.from_dict({"collectives": {"bucket_bytes": 5}})


def test_small_messages_take_fewer_steps_and_large_ones_less_transfer() -> None:
    net = communication(preset("h100-16x8"), GPU)
    bands = crossovers(net, "all_reduce", "scheduled").bands
    assert len(bands) > 1
    small = net.ranked("all_reduce", 256.0, True)[0].terms
    large = net.ranked("all_reduce", 2.0**30, True)[0].terms
    for name in ("ring", "recursive_doubling"):
        other = {p.algorithm: p.terms for p in net.ranked("all_reduce", 256.0, True)}[name]
        assert small.latency <= other.latency
        other = {p.algorithm: p.terms for p in net.ranked("all_reduce", 2.0**30, True)}[name]
        assert large.bandwidth <= other.bandwidth


def test_explain_says_what_was_decided(plan: Plan) -> None:
    from planner.collectives_render import render_collectives
    from planner.render import to_text

    text = to_text(render_collectives(plan), width=200)
    section = plan.decisions.collectives
    assert section is not None
    assert f"{section.buckets} buckets of up to" in text
    for choice in section.choices:
        assert f"{choice.name} ({choice.collective})" in text
        assert choice.runner_up in text
    assert "NCCL_ALGO=allreduce:" in text


TABLES = [Table("a", 61, 24), Table("b", 40, 8)]


def with_dense(plan: Plan, algorithm: str) -> Plan:
    """``plan`` with its dense gradients summed by this project's messages, in buckets of 64 KiB."""
    choice = CollectiveChoice(
        "dense_all_reduce",
        "all_reduce",
        100.0,
        1,
        algorithm,
        "scheduled",
        (2, 2),
        0.0,
        1e-3,
        {"latency": 1e-3},
    )
    section = CollectivePlan(2**16, 1, 1e-3, 1e-3, 0.0, (choice,), ())
    return replace(plan, decisions=replace(plan.decisions, collectives=section))


def test_scheduled_gradients_train_the_unsharded_model() -> None:
    """Through TorchRec and DDP on 2 hosts of 2 ranks; an algorithm that nothing runs is noticed."""
    model = str(Path(__file__).with_name("torchrec_models.py")) + ":Small"
    declared = [[t.name, t.rows, t.dim, (f"f_{t.name}",), t.pooling, t.dtype] for t in TABLES]
    decisions = {t.name: Decision("table_wise", (turn,)) for turn, t in enumerate(TABLES)}
    plan = make_plan(TABLES, decisions, 2, 2, optimizer="adagrad")
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "timeout": 120}
    result = run_plan(with_dense(plan, "halving_doubling"), model, (declared,), **options)
    assert result.equal, result
    assert result.changed == result.tensors
    with pytest.raises(LaunchError, match="no schedule runs all_reduce by 'overlapped'"):
        run_plan(with_dense(plan, "overlapped"), model, (declared,), **options)


def test_ddp_gets_the_bucket(plan: Plan) -> None:
    """TorchRec's wrapper is given what was decided; its own default is what the pass takes for one."""
    import inspect

    from torchrec.distributed.model_parallel import DefaultDataParallelWrapper

    default = inspect.signature(DefaultDataParallelWrapper).parameters["bucket_cap_mb"].default
    assert default * 2**20 == DEFAULT_BUCKET
    section = plan.decisions.collectives
    assert section is not None
    assert data_parallel(plan)._bucket_cap_mb * 2**20 == section.bucket_bytes
    assert data_parallel(replace(plan, decisions=replace(plan.decisions, collectives=None))) is None


def test_emitted_script_sets_the_bucket_and_advises(tmp_path: Path) -> None:
    from codegen.script import emit_torchrec
    from tests.test_script import MODEL as TOWER
    from tests.test_script import seven_types

    model = tmp_path / "tower.py"
    model.write_text(TOWER)
    plan = with_dense(seven_types(), "ring")
    assert plan.decisions.collectives is not None
    told = replace(plan.decisions.collectives, environment={"NCCL_ALGO": "allreduce:ring"})
    told_plan = replace(plan, decisions=replace(plan.decisions, collectives=told))
    text = emit_torchrec(told_plan, f"{model}:build")
    compile(text, "train.py", "exec")
    assert "data_parallel_wrapper=DefaultDataParallelWrapper(bucket_cap_mb=0.0625)" in text
    assert '# os.environ.setdefault("NCCL_ALGO", "allreduce:ring")' in text
    assert "DefaultDataParallelWrapper" not in emit_torchrec(seven_types(), f"{model}:build")
