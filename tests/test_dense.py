"""The dense pass: bytes against published ratios, units, memory and choice against sums made here, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from cost_models.dense import (
    DenseLayout,
    dense_units,
    gathered_params,
    make_layout,
    message_bytes,
    replication_bytes,
    unit_params,
    wire_bytes,
)
from cost_models.dense_tensor import tensor_pairs
from ir.constraints import Constraints, TableConstraint
from ir.dense_plan import DenseRequest
from ir.errors import InfeasibleError, InputError
from ir.ops import EmbeddingTable, Op
from ir.plan import Plan
from ir.program import Model
from ir.tier_plan import TierRequest
from ir.topology import Topology
from ir.workload import Workload
from passes.dense_sparse import group_topology
from planner.explain import explain_plan
from planner.render import to_text
from planner.verification import verify
from tests.plans import topology

WIDE = 1024


def model(layers: int = 4) -> Model:
    """A small table, a bottom layer and wide top layers of 2^20 parameters each."""
    ops = [Op("bottom", "gemm", "bottom", flops=1e3, params=1000, activation_bytes=8, gemm=(10, 100))]
    ops.append(Op("lookup", "lookup", "ebc", tables=("t",), phase="top"))
    ops += [
        Op(
            f"top{i}",
            "gemm",
            f"top.{i}",
            target="Linear",
            inputs=(f"top{i - 1}",) if i else (),
            flops=2e6,
            params=WIDE**2,
            activation_bytes=64,
            phase="top",
            gemm=(WIDE, WIDE),
        )
        for i in range(layers)
    ]
    table = EmbeddingTable("t", 1000, 16, ("f",), module="ebc", parameter="ebc.embedding_bags.t.weight")
    return Model("wide", (table,), tuple(ops))


def compiled(
    machine: Topology, request: DenseRequest | None = None, limit: int | None = None, **load: Any
) -> Plan:
    constraints = Constraints(dense=request, memory_limit=limit, memory_reserve=0.0)
    work = Workload(8 * machine.world_size, {}, optimizer="sgd", **load)
    return planner.compile(model(), machine, work, constraints=constraints)


def test_hsdp_moves_nine_eighths_of_data_parallelism_in_hosts_of_eight() -> None:
    """1.125x, arXiv 2203.11014."""
    machine = topology(32, 8)
    hsdp, ddp = make_layout("hsdp", machine), make_layout("ddp", machine)
    assert message_bytes(hsdp, 1e9) / message_bytes(ddp, 1e9) == pytest.approx(1.125)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_bytes_on_the_wire_follow_a_ring_rank_by_rank(shard: int, replicas: int, reshard: bool) -> None:
    """A ring sends one block of 1/n in each of n - 1 steps, an all-reduce twice that."""
    size = float(shard * replicas * 12)
    sent = 0.0
    if shard > 1:
        for _ in range(3 if reshard else 2):  # gathers and the reduce-scatter
            sent += sum(size / shard for _ in range(shard - 1))
    sent += 2 * sum(size / shard / replicas for _ in range(replicas - 1))
    layout = DenseLayout("fsdp", shard, replicas, reshard and shard > 1, 1)
    assert wire_bytes(layout, size) == pytest.approx(sent)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.integers(1, 8))
def test_memory_law_of_groups(tables: list[int], power: int) -> None:
    """M groups of T/M ranks hold M copies: counted rank by rank, the mean grows by S (M - 1) / T."""
    ranks = 2**power
    for groups in (2**p for p in range(power + 1)):
        of_rank = [0.0] * ranks
        for size in tables:
            for rank in range(ranks):
                of_rank[rank] += size / (ranks // groups)  # evenly over the ranks of its group
        extra = sum(of_rank) / ranks - sum(tables) / ranks
        assert replication_bytes(sum(tables), groups, ranks) == pytest.approx(extra, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**24))
def test_units_hold_each_module_once_and_stay_in_their_phase(unit: int) -> None:
    found = dense_units(model(), unit, 4)
    assert [m for u in found for m in u] == ["bottom", *(f"top.{i}" for i in range(4))]
    sizes, rest = unit_params(model(), found)
    assert sum(sizes) + rest == model().dense_params
    for members in found:
        assert len({m.split(".")[0] for m in members}) == 1
    assert gathered_params(sizes, rest, True) <= gathered_params(sizes, rest, False) == model().dense_params


def test_parameters_of_functional_ops_and_of_repeated_modules() -> None:
    base = model(2)
    loose = Op("free", "gemm", "", params=7, phase="top")
    again = replace(base.ops[2], name="again", params=0)
    units = dense_units(replace(base, ops=(*base.ops, loose, again)), 2**30, 4)
    assert units == (("bottom",), ("top.0",), ("top.1",))
    assert unit_params(replace(base, ops=(*base.ops, loose)), units)[1] == 7


def test_a_plain_compile_is_untouched() -> None:
    assert compiled(topology(2, 2)).decisions.dense is None


def test_what_does_not_fit_replicated_is_split_and_said() -> None:
    """16 bytes a parameter of 4 Mi do not fit in 50 MB, a quarter of them and what is gathered do."""
    plan = compiled(topology(1, 4), limit=50_000_000)
    section = plan.decisions.dense
    assert section is not None
    assert section.strategy == "fsdp"
    assert "does not fit" in section.reason
    assert all(rank.total <= 50_000_000 for rank in plan.memory)
    used = plan.memory[0].used
    assert used["dense_weights"] == pytest.approx(plan.model.dense_params, abs=4)
    assert used["dense_optimizer"] == pytest.approx(2 * plan.model.dense_params, abs=4)
    names = [event.name for event in plan.timeline.events]
    assert sum(name.startswith("reduce_scatter") for name in names) == len(section.units)
    assert not any(name.startswith("all_reduce") for name in names)
    assert plan.timeline.step == pytest.approx(
        min(c.step_seconds for c in section.candidates if c.step_seconds is not None), rel=1e-3
    )
    assert all(finding.ok for finding in verify(plan))
    assert "split over 4 ranks" in to_text(explain_plan(plan), width=120)


def test_nothing_fits_names_the_relaxation() -> None:
    with pytest.raises(InfeasibleError, match=r"as fsdp.*or more ranks") as caught:
        compiled(topology(1, 2), limit=20_000_000)
    assert caught.value.conflict == ("hbm_budget",)
    assert "more memory a rank" in caught.value.relaxation
    with pytest.raises(InfeasibleError, match=r"as ddp.*or allow hsdp or fsdp in dense\.strategies"):
        compiled(topology(1, 4), DenseRequest(strategies=("ddp",)), limit=50_000_000)


def test_refused_requests() -> None:
    asked = Constraints(dense=DenseRequest())
    with pytest.raises(InputError, match="dense parallelism is of training"):
        planner.compile(model(), topology(1, 2), Workload(16, {}), constraints=asked, mode="inference")
    with pytest.raises(InputError, match="3 groups do not divide the ranks"):
        compiled(topology(2, 4), DenseRequest(sparse_groups=(3,)))
    copies = Constraints(
        dense=DenseRequest(strategies=("ddp",), sparse_groups=(2,)),
        tables={"*": TableConstraint(sharding_types=("data_parallel",))},
    )
    with pytest.raises(InputError, match="may be data_parallel only, which does not run in groups"):
        planner.compile(model(), topology(1, 4), Workload(16, {}), constraints=copies)
    with pytest.raises(InfeasibleError, match="hsdp needs several hosts"):
        compiled(topology(1, 4), DenseRequest(strategies=("hsdp",)))


@pytest.mark.parametrize(("groups", "shape"), [(2, (4, 2)), (4, (4,)), (8, (2,)), (16, (1,))])
def test_groups_are_consecutive_ranks(groups: int, shape: tuple[int, ...]) -> None:
    assert tuple(level.fanout for level in group_topology(topology(4, 4), groups).levels) == shape


def test_a_faster_link_in_the_host_makes_hsdp_win_over_fsdp() -> None:
    machine = topology(4, 4)
    inner = replace(machine.levels[0], link=replace(machine.levels[0].link, name="nvlink", bandwidth=1e12))
    outer = replace(machine.levels[1], link=replace(machine.levels[1].link, name="ethernet", bandwidth=1e8))
    plan = compiled(replace(machine, levels=(inner, outer)), DenseRequest(strategies=("fsdp", "hsdp")))
    assert plan.decisions.dense is not None
    assert plan.decisions.dense.strategy == "hsdp"
    tampered = replace(plan.decisions.dense, shard=16, replicas=1)
    broken = replace(plan, decisions=replace(plan.decisions, dense=tampered))
    faults = next(f.faults for f in verify(broken) if f.check == "dense")
    assert "hsdp splits over 16 ranks" in faults[0]


def test_groups_share_what_the_tables_take() -> None:
    plan = compiled(topology(2, 2), DenseRequest(strategies=("ddp",), sparse_groups=(2, 4), sync_every=10**6))
    assert plan.decisions.dense is not None
    sparse = plan.decisions.dense.sparse
    assert sparse is not None
    assert [c.groups for c in sparse.candidates] == [1, 2, 4]
    steps = {c.groups: c.step_seconds for c in sparse.candidates}
    assert steps[sparse.groups] == min(s for s in steps.values() if s is not None)
    assert all(finding.ok for finding in verify(plan))
    assert "groups" in to_text(explain_plan(plan), width=120)


def test_pairs_are_linear_layers_that_nothing_else_reads() -> None:
    """A chain of four layers gives two pairs; a norm, a second reader or odd units between end one."""
    base = chain(("gemm", "elementwise", "gemm", "elementwise", "gemm", "gemm"))
    assert [(p.first, p.second) for p in tensor_pairs(base, 4)] == [("m0", "m2"), ("m4", "m5")]
    assert tensor_pairs(base, 3) == ()  # 64 units
    assert tensor_pairs(base, 4, least=2 * 64**2 + 1) == ()
    normed = chain(("gemm", "norm", "gemm"))
    assert tensor_pairs(normed, 4) == ()
    read_twice = replace(base, ops=(*base.ops, Op("more", "elementwise", "more", inputs=("o1",))))
    assert [p.first for p in tensor_pairs(read_twice, 4)] == ["m2"]


def chain(kinds: tuple[str, ...]) -> Model:
    """Ops one after the other, linear layers of 64 x 64 without biases."""
    ops = []
    for i, kind in enumerate(kinds):
        linear = kind == "gemm"
        ops.append(
            Op(
                f"o{i}",
                kind,
                f"m{i}",
                target="Linear" if linear else "ReLU",
                inputs=(f"o{i - 1}",) if i else (),
                out_shape=(2, 64),
                params=64**2 if linear else 0,
                gemm=(64, 64) if linear else None,
            )
        )
    return Model("chain", (), tuple(ops))


def test_wide_layers_are_split_where_weights_outweigh_activations() -> None:
    """With 8 samples a rank a host gathers far less around a pair than its 8 MiB of weights, with 8,192 far more."""
    machine = topology(1, 4)
    every = DenseRequest(strategies=("ddp", "tp"))
    few = compiled(machine, every)
    assert few.decisions.dense is not None
    assert few.decisions.dense.strategy == "tp"
    assert all(finding.ok for finding in verify(few)), [f for f in verify(few) if not f.ok]
    work = Workload(8192 * 4, {}, optimizer="sgd")
    asked = Constraints(dense=every, memory_reserve=0.0)
    many = planner.compile(model(), machine, work, constraints=asked)
    assert many.decisions.dense is not None
    assert many.decisions.dense.strategy == "ddp"
    used = few.memory[0].used
    split = sum(pair.params for pair in few.decisions.dense.pairs)
    assert used["dense_weights"] == pytest.approx(4 * (few.model.dense_params - split * 3 / 4), abs=4)
    assert few.timeline.step == pytest.approx(
        min(c.step_seconds for c in few.decisions.dense.candidates if c.step_seconds is not None), rel=1e-3
    )
    assert "split over the 4 ranks of a host" in to_text(explain_plan(few), width=140)
    tampered = replace(few.decisions.dense, tensor=2)
    broken = replace(few, decisions=replace(few.decisions, dense=tampered))
    assert any("a host has 4" in fault for f in verify(broken) for fault in f.faults)
    beside = replace(asked, dense=DenseRequest(), tiers=TierRequest())
    with pytest.raises(InputError, match="leave tp out"):
        planner.compile(
            model(), machine, work, constraints=replace(beside, dense=DenseRequest(strategies=("ddp", "tp")))
        )
    unnamed = planner.compile(model(), machine, work, constraints=beside).decisions.dense
    weighed = compiled(machine, DenseRequest()).decisions.dense
    assert unnamed is not None
    assert weighed is not None
    assert "tp" in {candidate.strategy for candidate in weighed.candidates}
    assert "tp" not in {candidate.strategy for candidate in unnamed.candidates}
