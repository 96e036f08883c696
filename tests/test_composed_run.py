"""Towers, deduplication, codecs, formats and tiers in one plan, on gloo ranks, against the unsharded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codegen.composed import refused
from codegen.execution import form_of
from codegen.runtime.launch import launch
from cost_models.dense import dense_units
from ir.capture import capture
from ir.dense_plan import DensePlan, SparseReplicas, TensorPair
from ir.plan import Plan
from planner.verify_composition import check_composition
from planner.verify_dense import check_dense
from planner.zoo import build
from tests import composed_plans as plans

RANKS = str(Path(__file__).with_name("composition_ranks.py"))
EXACT = 1e-6  # fp32: sums over ranks in another order


def run(plan: Plan, model: str, storage: Path, **how: Any) -> dict[str, Any]:
    """The worst of all ranks, and sums over them."""
    answers = launch(
        f"{RANKS}:compare",
        plan.world_size,
        {"plan": plan.to_dict(), "model": model, "options": plans.options(model), "size": 32, "steps": 2}
        | {"storage": str(storage), **how},
        host_size=plan.topology.host_size,
        timeout=300,
    )
    worst: dict[str, float] = {}
    for answer in answers:
        for name, value in answer["worst"].items():
            worst[name] = max(worst.get(name, 0.0), value)
    total = {
        n: sum(answer[n] for answer in answers) for n in ("raw", "sent", "files", "fetched", "moved", "split")
    }
    return {"worst": worst, **total}


def everything(codecs: dict[str, tuple[str, float]], model: str = "wukong-small") -> Plan:
    plan = plans.flat_plan(2, 2, plans.TOWERS_2X2)
    plan = plans.deduplicated(plans.towered(plan), ("f_a", "f_c", "b1"), ("f_d", "f_g"))
    plan = plans.formatted(plans.tiered(plan), plans.FORMATS, plans.STATES)
    return plans.compressed(plan, codecs)


def test_everything_at_once_is_exact_with_lossless_codecs(tmp_path: Path) -> None:
    """2 x 2 ranks: two towers, row and column splits, two dedup groups across towers, six formats, three tiers."""
    found = run(everything(plans.LOSSLESS), "wukong-small", tmp_path)
    worst = found["worst"]
    assert worst["outputs"] < EXACT
    assert worst["tables"] < EXACT
    assert worst["dense"] < EXACT
    assert found["files"] == 3  # d on one rank, g's rows on both ranks of its tower
    assert found["fetched"] > 0
    assert 0 < found["sent"] <= found["raw"] * 1.5


def test_bounded_codecs_err_within_what_their_bounds_allow(tmp_path: Path) -> None:
    """Outputs differ by no more than bounds times gradients, to first order; 10 % for what is beyond it."""
    found = run(everything(plans.BOUNDED), "dhen-small", tmp_path)
    worst = found["worst"]
    assert worst["allowed"] > 10 * EXACT  # the codecs do lose something
    assert worst["vectors"] < 1.1
    assert worst["tables"] < 1e-3


@pytest.mark.parametrize("kind", ["wukong", "dhen"])
def test_tower_modules_see_samples_of_several_groups(kind: str, tmp_path: Path) -> None:
    """Tower 0 has features of a dedup group and others, tower 1 is one group throughout: both ways of a module."""
    plan = plans.towered(plans.flat_plan(2, 2, plans.TOWERS_2X2), kind)
    plan = plans.deduplicated(plan, ("f_a", "f_c"), ("b1", "b2", "f_d", "f_g"))
    plan = plans.compressed(plans.formatted(plans.tiered(plan), plans.FORMATS, {}), plans.LOSSLESS)
    found = run(plan, f"{kind}-small", tmp_path)
    assert found["moved"] == 2 * 4  # both modules, as all four ranks see it
    for name in ("outputs", "tables", "dense", "modules"):
        assert found["worst"][name] < EXACT, name


def test_a_flat_plan_with_copies_and_column_blocks(tmp_path: Path) -> None:
    plan = plans.deduplicated(plans.flat_plan(1, 2, plans.FLAT_2), ("f_a", "f_d"))
    plan = plans.compressed(plans.formatted(plans.tiered(plan), plans.FORMATS, plans.STATES), plans.LOSSLESS)
    found = run(plan, "wukong-small", tmp_path)
    for name in ("outputs", "tables", "dense"):
        assert found["worst"][name] < EXACT, name


@pytest.mark.parametrize(
    ("strategy", "shard", "replicas", "reshard", "module"),
    [("hsdp", 2, 2, False, "wukong"), ("fsdp", 4, 1, True, "none")],
    ids=["hsdp", "fsdp"],
)
def test_a_split_dense_part_joins_the_others(
    strategy: Any, shard: int, replicas: int, reshard: bool, module: str, tmp_path: Path
) -> None:
    """Units of the dense part gathered by host or by all ranks, beside towers, dedup, codecs, formats and tiers."""
    plan = plans.towered(plans.flat_plan(2, 2, plans.TOWERS_2X2), module)
    plan = plans.deduplicated(plan, ("f_a", "f_c"), ("f_d", "f_g"))
    plan = plans.compressed(plans.formatted(plans.tiered(plan), plans.FORMATS, {}), plans.LOSSLESS)
    model = capture(build("wukong-small", **plans.options("wukong-small")).module)
    units = dense_units(model, 2000, 4)
    assert len(units) > 2
    dense = DensePlan(strategy, shard, replicas, reshard_after_forward=reshard, units=units)
    found = run(plans.with_decisions(plan, dense=dense), "wukong-small", tmp_path)
    assert found["split"] == 4  # parameters are split on every rank
    for name in ("outputs", "tables", "dense"):
        assert found["worst"][name] < EXACT, name


def test_towers_beside_a_split_dense_part_are_composed() -> None:
    """The runtime of towers alone would copy the dense part to every rank."""
    plan = plans.towered(plans.flat_plan(2, 2, plans.TOWERS_2X2))
    assert form_of(plan) == "towers"
    assert form_of(plans.with_decisions(plan, dense=DensePlan("hsdp", 2, 2))) == "composed"


def _row_split(plan: Plan) -> Plan:
    return plans.compressed(plans.flat_plan(2, 2, plans.TOWERS_2X2), plans.LOSSLESS)


def _torchrec_codecs(plan: Plan) -> Plan:
    section = plan.decisions.compression
    assert section is not None
    return plans.with_decisions(plan, compression=replace(section, engine="torchrec"))


def _split_layers(plan: Plan) -> Plan:
    pair = TensorPair("top.0", "top.2", 16, 100, 1, 1)
    return plans.with_decisions(plan, dense=DensePlan("tp", 1, 4, tensor=2, pairs=(pair,)))


def _grouped_tables(plan: Plan) -> Plan:
    sparse = SparseReplicas(2, 1, 0, 0, (), ())
    return plans.with_decisions(plan, dense=DensePlan("ddp", 1, 4, sparse=sparse))


@pytest.mark.parametrize("broken", [_row_split, _torchrec_codecs, _split_layers, _grouped_tables])
def test_what_no_runtime_joins_is_refused_and_found_by_the_verifier(broken: Callable[[Plan], Plan]) -> None:
    """The runtime and the verifier, which share no code, agree."""
    plan = everything(plans.LOSSLESS)
    assert refused(plan) == ""
    assert list(check_composition(plan)) == []
    assert refused(broken(plan))
    assert [*check_composition(broken(plan)), *check_dense(broken(plan))]
