"""Rows on processors in memory: prices against the model of a lookup, pricing against trying every split, and sums."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from codegen.upmem import build_layout, emulate
from codegen.upmem_plan import planned_partition
from cost_models.calibration import GPU
from cost_models.pim import PimLoad, PimSystem, lookup_time, padded, reduce_bytes
from cost_models.pim_tier import pool_prices
from ir.constraints import Constraints
from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.plan import Plan
from ir.program import Mode, Model, Options, Program
from ir.tier_plan import PimTile, TierRequest
from ir.topology import MemoryTier, Topology
from ir.workload import FeatureStats, Workload, icdf_from_zipf
from passes.assignment.column_generation import column
from passes.assignment.master import Duals, Master
from passes.joint import state_problem
from planner.verification import verify

MB = 2**20
DPUS = MemoryTier("upmem", 64 * 64 * MB, 8.44e9, 15.9e9, 2.31e-7, 8, processors=64)
DRAM = MemoryTier("ddr", 64 * MB, 200e9, 200e9, 1e-7, 64)


def machine(*tiers: MemoryTier, memory: int = 2 * MB) -> Topology:
    """One A100 with little memory of its own."""
    base = planner.topology("a100-1x1")
    small = replace(base.device, tiers=(replace(base.device.tiers[0], capacity=memory),))
    return replace(base, device=small, host_tiers=tiers)


def model(rows: int = 20_000, icdf: tuple[float, ...] | None = None) -> tuple[Model, Workload]:
    records = tuple(EmbeddingTable(f"t{i}", rows, 16, (f"f{i}",)) for i in range(2))
    stats = FeatureStats(pooling_factor=20.0, icdf=icdf_from_zipf(rows, 1.05) if icdf is None else icdf)
    return Model("m", records, ()), Workload(64, {f"f{i}": stats for i in range(2)})


def compiled(topology: Topology, mode: Mode = "inference") -> tuple[Plan, Model]:
    made, workload = model()
    plan = planner.compile(
        made, topology, workload, mode=mode, constraints=Constraints(tiers=TierRequest()), time_limit=1.0
    )
    return plan, made


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 40),
    st.integers(1, 128),
    st.integers(1, 2000),
    st.floats(0.5, 1e5),
)
def test_prices_are_not_below_the_model_of_a_lookup(
    cols: int, row_tiles: int, width: int, bags: int, reads: float
) -> None:
    tier = replace(DPUS, processors=2560)
    tile = PimTile(cols, row_tiles)
    price = pool_prices(tier, tile, width, bags)
    used, col_tiles = min(cols, width), -(-width // min(cols, width))
    row_bytes = padded(4 * used)
    load = PimLoad(
        dpus=row_tiles * col_tiles,
        row_bytes=row_bytes,
        max_reads=reads / row_tiles,
        bags=bags,
        push_bytes=(64 + padded(4 * (bags + 4)) + 4 * reads / row_tiles,),
        pull_bytes=float(bags * row_bytes),
        reduce_bytes=reduce_bytes(bags, width, row_tiles),
    )
    if load.dpus > 2560:
        return
    time = lookup_time(load, PimSystem(dpus=2560))
    total = price.fixed + price.per_read * reads
    assert time.total * (1 - 1e-9) <= total <= (time.total + time.lookup) * (1 + 1e-9)
    assert price.row_bytes >= 4 * width


def test_the_best_split_is_the_best_of_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five groups of rows over device, DRAM and DPUs: 3^5 splits with each tile, at random prices."""
    monkeypatch.setattr("cost_models.tiers.UNIFORM_GROUPS", 1)  # the groups of the ICDF, not finer ones
    made, workload = model(icdf=(0.0, 0.001, 0.01, 0.1, 0.4, 1.0))
    topology = machine(DRAM, DPUS)
    options = Options("inference", Constraints(tiers=TierRequest()))
    program = Program(made, topology, workload, options)
    problem = state_problem(program, GPU)
    maker, one = problem.maker, problem.classes[0]
    assert maker.tiers is not None
    assert one.touched is not None
    assert one.tiles
    rng = np.random.default_rng(0)
    pooled = 0
    for _ in range(8):
        limits = problem.frame.limits
        scale = [1e-11 if not row.stretched else 0.3 for row in problem.resources]
        duals = Duals(
            owner=np.zeros(len(problem.menus)),
            phase=rng.uniform(0, 1, len(problem.frame.phases)),
            largest=np.zeros((len(problem.menus), len(problem.frame.phases))),
            memory=float(rng.uniform(0, 1e-9)),
            extra=rng.uniform(0, 1, len(limits)) * scale,
            cost=np.zeros(0),
        )
        costs = {}
        for base in one.bases:
            if base.option.sharding_type == "data_parallel":
                continue
            for tile in (None, *one.tiles):
                places = (0, 1) if tile is None else (0, 1, 2)
                for place in itertools.product(places, repeat=5):
                    split = maker.tiers.split(one.table, one.touched, place, tile)
                    option, _ = maker.option(one, base, split)
                    costs[option] = Master.reduced(column(option, 0, problem.frame), duals)
        best = maker.best_splits(0, one, duals)[0]
        found = Master.reduced(column(best, 0, problem.frame), duals)
        assert found == pytest.approx(min(costs.values()), rel=1e-6, abs=1e-12)
        tiers = one.meaning[best].tiers
        pooled += tiers is not None and tiers.pim is not None
    assert pooled, "no price made processors in memory the best place"


def test_cold_rows_go_to_the_processors_and_sums_are_exact() -> None:
    plan, made = compiled(machine(DPUS))
    assert [finding for finding in verify(plan, made.tables) if finding.faults] == []
    pooled = [table for table in plan.table_plans if table.tiers is not None and table.tiers.pim is not None]
    assert pooled
    section = plan.decisions.tiers
    assert section is not None
    use = next(use for use in section.tiers if use.tier == "upmem")
    assert 0 < use.seconds["lookup"] <= plan.certificate.objective
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    table = pooled[0]
    rng = np.random.default_rng(1)
    order = rng.permutation(table.rows)
    partition = planned_partition(table, plan.topology, order)
    assert table.tiers is not None
    held = sum(piece.rows for piece in table.tiers.ranges if piece.tier == "hbm")
    assert set(order[:held]) == set(np.flatnonzero(partition.owner == -1))
    weights = rng.integers(-1000, 1000, (table.rows, table.dim), dtype=np.int32)
    ids, offsets = order[rng.zipf(1.3, 64 * 20) % table.rows], np.arange(0, 64 * 20 + 1, 20)
    layout = build_layout(partition, weights, max_bags=64, max_ids=64 * 20)
    assert (emulate(layout, ids, offsets) == weights[ids.reshape(64, 20)].sum(1)).all()


def test_processors_beat_a_slow_drive_and_lose_to_enough_dram() -> None:
    """DRAM for all rows: nothing is pooled. A drive of 200 reads a second: the processors take the cold rows."""
    plenty, _ = compiled(machine(DRAM, DPUS))
    assert all(table.tiers is None or table.tiers.pim is None for table in plenty.table_plans)
    slow = MemoryTier("disk", 64 * MB, 1e8, 1e8, 1e-9, 512, iops=200.0)
    chosen, _ = compiled(machine(slow, DPUS))
    without, _ = compiled(machine(slow))
    assert any(table.tiers is not None and table.tiers.pim is not None for table in chosen.table_plans)
    assert chosen.certificate.objective < without.certificate.lower_bound


def test_training_fetches_rows_from_the_same_memory() -> None:
    plan, made = compiled(machine(DPUS), mode="train")
    assert [finding for finding in verify(plan, made.tables) if finding.faults] == []
    below = [table for table in plan.table_plans if table.tiers is not None]
    assert below
    assert all(table.tiers is not None and table.tiers.pim is None for table in below)
    with pytest.raises(InputError, match="no rows on processors"):
        planned_partition(below[0], plan.topology, np.arange(below[0].rows))


def test_the_verifier_finds_what_no_processor_can_do() -> None:
    plan, _ = compiled(machine(DPUS))
    at = next(i for i, table in enumerate(plan.table_plans) if table.tiers is not None)
    table = plan.table_plans[at]
    assert table.tiers is not None
    for tile, words in ((None, "no tile"), (PimTile(1, 1000), "tiles on 64 processors")):
        wrong = replace(table, tiers=replace(table.tiers, pim=tile))
        tables = (*plan.table_plans[:at], wrong, *plan.table_plans[at + 1 :])
        faults = [fault for found in verify(replace(plan, table_plans=tables)) for fault in found.faults]
        assert any(words in fault for fault in faults), faults
