"""FSDP and HSDP on gloo processes against the unsharded model, and the messages that they really send."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torchrec.distributed.model_parallel import DMPCollection

import planner
from codegen.runtime.compare import run_plan
from codegen.runtime.launch import launch
from codegen.script import emit_torchrec
from cost_models.dense import DenseLayout, message_bytes
from ir.constraints import Constraints
from ir.dense_plan import DenseRequest, GroupTable
from ir.errors import InputError
from ir.plan import Plan
from ir.workload import Workload
from planner.verification import verify
from tests.plans import topology

TARGETS = str(Path(__file__).parent / "dense_targets.py")


def compiled(model: str, hosts: int, host_size: int, **asked: Any) -> Plan:
    constraints = Constraints(dense=DenseRequest(**asked))
    load = Workload(8 * hosts * host_size, {}, optimizer="sgd")
    return planner.compile(model, topology(hosts, host_size), load, constraints=constraints, time_limit=0.3)


@pytest.mark.parametrize(
    ("model", "hosts", "host_size", "asked"),
    [
        (
            "wukong-small",
            2,
            2,
            {"strategies": ("hsdp",), "reshard_after_forward": False, "unit_bytes": 70_000},
        ),
        ("dhen-small", 1, 2, {"strategies": ("fsdp",), "reshard_after_forward": True, "unit_bytes": 40_000}),
    ],
    ids=["hsdp-2x2", "fsdp-2"],
)
def test_a_split_dense_part_trains_as_the_unsharded_model(
    model: str, hosts: int, host_size: int, asked: dict[str, Any]
) -> None:
    plan = compiled(model, hosts, host_size, **asked)
    assert plan.decisions.dense is not None
    assert len(plan.decisions.dense.units) > 2
    result = run_plan(plan, "planner.zoo:build", (model,), {"device": "cpu"}, steps=1, lr=0.1)
    assert result.outputs.absolute < 1e-5
    assert result.weights.absolute < 1e-5


@pytest.mark.parametrize(("shard", "replicas"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("reshard", [False, True])
def test_messages_counted_in_torch_are_those_of_the_model(shard: int, replicas: int, reshard: bool) -> None:
    """Layers of equal and divisible size, so that nothing is padded."""
    found = launch(f"{TARGETS}:messages", 4, {"shard": shard, "replicas": replicas, "reshard": reshard})
    layout = DenseLayout("fsdp", shard, replicas, reshard, 0)
    for counted in found:
        assert counted["sent"] == message_bytes(layout, counted["parameters"])
        assert counted["difference"] < 1e-6


def test_another_world_is_refused() -> None:
    from codegen.runtime.launch import LaunchError

    with pytest.raises((LaunchError, InputError), match="splits the dense part over 4 x 1 ranks, 2 run"):
        launch(f"{TARGETS}:messages", 2, {"shard": 4, "replicas": 1, "reshard": False})


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_split_pair_of_layers_trains_as_the_unsharded_one(tensor: int) -> None:
    """4 ranks: the pair over two hosts of 2, and over one of 4; buffers as the cost model counts them."""
    for found in launch(f"{TARGETS}:pair", 4, {"tensor": tensor}, host_size=tensor):
        assert found["difference"] < 1e-6
        assert found["held"] == 24 * 33 // tensor
        # gathered and scattered, forwards and backwards
        assert found["sent"] == 2 * (16 + 16) * found["samples"] * tensor


def test_a_plan_that_splits_wide_layers_trains_as_the_unsharded_model() -> None:
    plan = compiled("wukong-small", 2, 2, strategies=("tp",))
    assert plan.decisions.dense is not None
    assert plan.decisions.dense.strategy == "tp"
    assert len(plan.decisions.dense.pairs) >= 2
    result = run_plan(plan, "planner.zoo:build", ("wukong-small",), {"device": "cpu"}, steps=1, lr=0.1)
    assert result.outputs.absolute < 1e-5
    assert result.weights.absolute < 1e-5
    with pytest.raises(InputError, match="no tensor parallelism"):
        emit_torchrec(plan, "wukong-small")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_groups_of_tables_train_as_the_unsharded_model(strategy: Any) -> None:
    """Two groups of two ranks; SGD and a synchronisation every step are exact."""
    plan = compiled("dlrm-small", 1, 4, strategies=(strategy,), sparse_groups=(2,), sync_every=1)
    dense = plan.decisions.dense
    assert dense is not None
    assert dense.sparse is not None
    tables = tuple(
        GroupTable(table.name, "row_wise", ((0, table.dim, 0),))
        if i % 2
        else GroupTable(table.name, "table_wise", ((0, table.dim, i // 2 % 2),))
        for i, table in enumerate(plan.table_plans)
    )
    sparse = replace(dense.sparse, groups=2, tables=tables, sync_every=1)
    grouped = replace(plan, decisions=replace(plan.decisions, dense=replace(dense, sparse=sparse)))
    # without the synchronisation weights are off by 1.6e-4 at this rate, outputs by 8e-5
    result = run_plan(grouped, "planner.zoo:build", ("dlrm-small",), {"device": "cpu"}, steps=1, lr=5.0)
    assert result.outputs.absolute < 1e-5
    assert result.weights.absolute < 1e-5


def in_two_groups(kind: str) -> Plan:
    """A plan whose tables are of one kind in two groups of two ranks."""
    plan = compiled("dlrm-small", 1, 4, strategies=("ddp",), sparse_groups=(2,), sync_every=5)
    dense = plan.decisions.dense
    assert dense is not None
    assert dense.sparse is not None
    tables = tuple(GroupTable(t.name, kind, ((0, t.dim, 0),)) for t in plan.table_plans)
    sparse = replace(dense.sparse, groups=2, tables=tables)
    return replace(plan, decisions=replace(plan.decisions, dense=replace(dense, sparse=sparse)))


def test_copies_in_a_group_are_refused() -> None:
    """TorchRec would broadcast them from rank 0 of all ranks, which the second group lacks."""
    plan = in_two_groups("data_parallel")
    faults = next(f.faults for f in verify(plan) if f.check == "dense")
    assert "data_parallel in a group" in faults[0]
    with pytest.raises(InputError, match="data_parallel in 2 groups"):
        run_plan(plan, "planner.zoo:build", ("dlrm-small",), {"device": "cpu"}, steps=1)


def test_the_script_of_groups_is_for_gpus() -> None:
    """TorchRec's own 2D wrapper, with groups of two ranks; on a CPU topology it is refused."""
    grouped = in_two_groups("row_wise")
    with pytest.raises(InputError, match="2 groups of tables on GPUs only"):
        emit_torchrec(grouped, "dlrm-small")
    gpu = replace(grouped.topology, device=replace(grouped.topology.device, kind="gpu"))
    tree = ast.parse(emit_torchrec(replace(grouped, topology=gpu), "dlrm-small"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "DMPCollection"]
    accepted = inspect.signature(DMPCollection.__init__).parameters
    assert {str(keyword.arg) for keyword in calls[0].keywords} <= set(accepted)
    constants = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    assert ast.unparse(constants["GROUP_SIZE"]) == "2"
    assert ast.unparse(constants["SYNC_EVERY"]) == "5"
