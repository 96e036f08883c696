"""FSDP and HSDP on gloo processes against the unsharded model, and the messages that they really send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import planner
from codegen.runtime.compare import run_plan
from codegen.runtime.launch import launch
from cost_models.dense import DenseLayout, message_bytes
from ir.constraints import Constraints
from ir.dense_plan import DenseRequest
from ir.errors import InputError
from ir.plan import Plan
from ir.workload import Workload
from tests.plans import topology

TARGETS = str(Path(__file__).parent / "dense_targets.py")


def compiled(model: str, hosts: int, host_size: int, **asked: Any) -> Plan:
    constraints = Constraints(dense=DenseRequest(**asked))
    load = Workload(8 * hosts * host_size, {}, optimizer="sgd")
    return planner.compile(model, topology(hosts, host_size), load, constraints=constraints)


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
