"""The tier pass: splits against brute force, hosts against capacity arithmetic, drives that cannot keep up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import planner
from cost_models.cache import Popularity, hit_rate
from cost_models.placed import rank_memory, rank_tiers
from cost_models.tiers import row_fetch, touched_rows
from ir.constraints import Constraints, TableConstraint
from ir.errors import InfeasibleError, InputError
from ir.ops import EmbeddingTable
from ir.plan import Plan
from ir.program import Model
from ir.tier_plan import TierRequest
from ir.topology import MemoryTier, Topology
from ir.workload import FeatureStats, Workload, icdf_from_zipf
from planner.verification import verify

GB = 10**9
DRAM = MemoryTier("ddr", 2000 * GB, 200e9, 200e9, 1e-7, 64, price_per_gb=10.0, watt_per_gb=0.1)
NAND = MemoryTier(
    "nand", 6400 * GB, 6.8e9, 5.6e9, 8e-5, 4096, iops=1e6, write_iops=2e5, dwpd=3, price_per_gb=0.3
)
OPTANE = MemoryTier("optane", 6400 * GB, 28e9, 25e9, 6e-6, 512, iops=18e6, dwpd=100, price_per_gb=2.0)


def machine(*tiers: MemoryTier, hosts: int = 1) -> Topology:
    """A100 hosts of two devices with the given host tiers."""
    base = planner.topology("a100-2x2").with_hosts(hosts)
    return replace(base, host_tiers=tiers)


def model(rows: int, tables: int = 4) -> tuple[Model, Workload]:
    """Equal tables of 128 columns, Zipf 1.05, 4 ids a sample."""
    records = tuple(EmbeddingTable(f"t{i}", rows, 128, (f"f{i}",)) for i in range(tables))
    stats = FeatureStats(pooling_factor=4.0, icdf=icdf_from_zipf(rows, 1.05))
    return Model("m", records, ()), Workload(8192, {f"f{i}": stats for i in range(tables)})


def compiled(rows: int, topology: Topology, request: TierRequest, tables: int = 4) -> Plan:
    """A verified plan; every table weighs 1 kB a row with Adagrad."""
    made, workload = model(rows, tables)
    plan = planner.compile(made, topology, workload, constraints=Constraints(tiers=request), time_limit=2.0)
    assert [finding for finding in verify(plan, made.tables) if finding.faults] == []
    return plan


def test_tables_that_fit_stay_in_the_device() -> None:
    plan = compiled(1_000_000, machine(DRAM), TierRequest())
    assert all(table.tiers is None for table in plan.table_plans)


def test_hot_rows_stay_and_memory_is_what_the_ranges_say() -> None:
    plan = compiled(80_000_000, machine(DRAM), TierRequest())  # 328 GB on 2 x 68 GB
    below = [table.tiers for table in plan.table_plans if table.tiers is not None]
    assert below
    for tiers in below:
        assert sum(piece.rows for piece in tiers.ranges) == 80_000_000
        names = [piece.tier for piece in tiers.ranges]
        assert names in (["hbm", "ddr"], ["ddr"])
        assert tiers.prefetch_depth >= 1
    section = plan.decisions.tiers
    assert section is not None
    assert section.tiers[0].price_per_gb > 0
    memory = rank_memory(plan.table_plans, plan.topology, plan.workload, plan.mode)
    for entry, again in zip(plan.memory, memory, strict=True):
        assert sum(again.values()) <= entry.limit
    from cost_models.calibration import GPU

    used = rank_tiers(plan.table_plans, plan.topology, plan.workload, GPU, plan.mode, TierRequest())
    stored = sum(m.get("weights", 0) + m.get("optimizer", 0) for m in memory) + used["ddr"]["bytes"].sum()
    assert stored == pytest.approx(4 * 80_000_000 * 1024, rel=1e-6)
    assert plan.certificate.lower_bound <= plan.certificate.objective


def test_rows_of_unknown_popularity_fill_what_the_device_has_left() -> None:
    """One table of 225 GB, every row as likely as another: the link is busy for the rows that do not fit."""
    made, workload = model(220_000_000, tables=1)
    workload = replace(workload, features={"f0": FeatureStats(pooling_factor=4.0)})
    plan = planner.compile(
        made, machine(DRAM), workload, constraints=Constraints(tiers=TierRequest()), time_limit=2.0
    )
    tiers = plan.tables["t0"].tiers
    assert tiers is not None
    assert tiers.ranges[0].tier == "hbm"
    room = sum(entry.limit for entry in plan.memory) / 1024
    assert 0.9 * room <= tiers.ranges[0].rows <= room
    assert tiers.fetched_rows == pytest.approx(8192 * 4 * (1 - tiers.ranges[0].rows / 220_000_000), rel=1e-3)
    assert plan.certificate.gap <= 0.05


def test_hit_rates_are_those_of_the_popularity() -> None:
    """Accesses served by the hottest rows, against the cache model's LFU curve of the same Zipf law."""
    plan = compiled(80_000_000, machine(DRAM), TierRequest())
    popularity = Popularity.from_zipf(80_000_000, 1.05)
    checked = 0
    for table in plan.table_plans:
        if table.tiers is not None and table.tiers.ranges[0].tier == "hbm":
            held = table.tiers.ranges[0]
            assert held.accesses == pytest.approx(hit_rate("lfu", popularity, held.rows), abs=0.01)
            checked += 1
    assert checked


def test_one_more_gigabyte_buys_what_its_price_says() -> None:
    """The price is a dual of the bound: compiled again with more memory, the bound falls by at most that, and
    nearly by that; the step of the plan falls too."""
    request = TierRequest()
    small = compiled(80_000_000, machine(DRAM), request)
    base = machine(DRAM)
    extra = 0.25 * GB
    tier = base.device.tiers[0]
    larger = replace(base.device, tiers=(replace(tier, capacity=int(tier.capacity + extra)),))
    grown = compiled(80_000_000, replace(base, device=larger), request)
    assert small.decisions.tiers is not None
    price = small.decisions.tiers.tiers[0].price_per_gb
    fall = small.certificate.lower_bound - grown.certificate.lower_bound
    assert fall <= price * extra / GB * (1 + 1e-3) + 1e-9
    assert fall >= 0.5 * price * extra / GB


def test_touched_rows_against_a_drawn_batch() -> None:
    rows = 20_000
    table = EmbeddingTable("t", rows, 32, ("f",))
    workload = Workload(4096, {"f": FeatureStats(pooling_factor=5.0, icdf=icdf_from_zipf(rows, 1.05))})
    touched = touched_rows(table, machine(DRAM), workload)
    rng = np.random.default_rng(0)
    weights = np.arange(1, rows + 1) ** -1.05
    drawn = [len(np.unique(rng.choice(rows, 4096 * 5, p=weights / weights.sum()))) for _ in range(5)]
    # an ICDF of 100 steps takes the rows of a step as equally popular
    assert touched.touched.sum() == pytest.approx(np.mean(drawn), rel=0.08)
    assert touched.rows.sum() == rows


def test_block_amplification_and_wear_by_hand() -> None:
    fetch = row_fetch(NAND, 1024.0, machine(NAND), TierRequest(), train=True)
    assert fetch.iops == pytest.approx(
        2 * (1 / 1e6 + 1 / 2e5)
    )  # two devices share the drive, one block a row
    assert fetch.endurance == pytest.approx(2 * 4096 * 86400 / (3 * 6400e9))
    assert row_fetch(OPTANE, 1024.0, machine(OPTANE), TierRequest(), train=False).endurance == 0.0
    doubled = row_fetch(NAND, 1024.0, machine(NAND), TierRequest(endurance_years=10.0), train=True)
    assert doubled.endurance == pytest.approx(2 * fetch.endurance)


def test_nand_is_refuted_where_small_blocks_keep_up() -> None:
    request = TierRequest(objective="nodes", throughput=1.5e6, max_hosts=1)
    kept = compiled(200_000_000, machine(OPTANE), request)
    assert kept.decisions.tiers is not None
    assert kept.decisions.tiers.hosts == 1
    with pytest.raises(InfeasibleError, match=r"iops|endurance"):
        compiled(200_000_000, machine(NAND), request)


def test_fewest_hosts_without_tiers_is_capacity_arithmetic() -> None:
    """820 GB of tables at 136 GB a host need 7 hosts (row-wise splits waste nothing); DRAM needs one."""
    without = TierRequest(tiers=(), objective="nodes", throughput=1e5, max_hosts=16)
    plan = compiled(200_000_000, machine(DRAM, hosts=2), without)
    with_tiers = compiled(200_000_000, machine(DRAM, hosts=2), replace(without, tiers=None))
    assert plan.decisions.tiers is not None
    assert with_tiers.decisions.tiers is not None
    assert plan.decisions.tiers.lower_bound == 7.0
    assert plan.topology.hosts in (7, 8)
    assert with_tiers.topology.hosts == 1


def test_the_cheapest_hosts_leave_out_tiers_that_do_not_pay() -> None:
    request = TierRequest(objective="cost", throughput=1e5, max_hosts=8, host_price=20_000.0)
    plan = compiled(100_000_000, machine(DRAM, OPTANE, hosts=2), request)
    section = plan.decisions.tiers
    assert section is not None
    assert section.lower_bound <= section.objective
    assert [tier.name for tier in plan.topology.host_tiers] == ["optane"]  # 12,800 dollars instead of 20,000
    with pytest.raises(InputError, match="host_price"):
        compiled(100_000_000, machine(DRAM), replace(request, host_price=None))


def test_a_cache_serves_what_che_says() -> None:
    plan = compiled(80_000_000, machine(DRAM), TierRequest(placements=("cache",)))
    cached = [t.tiers.cache for t in plan.table_plans if t.tiers is not None and t.tiers.cache is not None]
    assert cached
    popularity = Popularity.from_zipf(80_000_000, 1.05)
    for cache in cached:
        assert cache.hit_rate == pytest.approx(hit_rate("lru", popularity, cache.rows), abs=0.03)


def test_unknown_tiers_are_named() -> None:
    with pytest.raises(InputError, match="no memory tier 'dram'"):
        compiled(1_000, machine(DRAM), TierRequest(tiers=("dram",)))


def inference(
    tables: dict[str, tuple[int, int]], topology: Topology, small: int, constraints: Constraints
) -> Plan:
    """A verified plan of tables of unknown popularity: 10 ids a sample, those after the first ``small`` one."""
    records = tuple(EmbeddingTable(name, rows, dim, (f"f_{name}",)) for name, (rows, dim) in tables.items())
    stats = {
        f"f_{name}": FeatureStats(pooling_factor=10.0 if k < small else 1.0) for k, name in enumerate(tables)
    }
    plan = planner.compile(
        Model("m", records, ()), topology, Workload(65536, stats), mode="inference", constraints=constraints,
        time_limit=0.5,
    )  # fmt: skip
    assert [finding for finding in verify(plan, records) if finding.faults] == []
    return plan


def test_tables_that_fill_some_ranks_leave_room_for_others() -> None:
    """Two tables of 102 GB and forty of 4 GB on 4 x 68 GB: choices by averages alone cannot be placed."""
    tables = {f"large{i}": (200_000_000, 128) for i in range(2)} | {
        f"t{i}": (15_000_000, 64) for i in range(40)
    }
    many = len(tables)
    tables |= {f"small{i}": (200_000, 64) for i in range(20)} | {
        f"next{i}": (3_000_000, 64) for i in range(20)
    }
    topology = replace(planner.topology("a100-1x4"), host_tiers=(DRAM,))
    plan = inference(tables, topology, many, Constraints(tiers=TierRequest()))
    assert plan.certificate.gap <= 0.05


def test_a_lookup_by_processors_is_spread_over_the_ranks_that_wait_for_it() -> None:
    """Two tables of 51 GB and ten of 2.6 GB: some of it must be pooled, which takes much longer than averages say."""
    tables = {f"large{i}": (100_000_000, 128) for i in range(2)} | {
        f"t{i}": (10_000_000, 64) for i in range(24)
    }
    pooling = MemoryTier("upmem", 2560 * 2**26, 8.44e9, 15.9e9, 2.31e-7, 8, processors=2560)
    topology = replace(planner.topology("a100-1x2"), host_tiers=(pooling,))
    free, whole, halves = (
        inference(tables, topology, 26, Constraints(tiers=TierRequest(), tables=allowed))
        for allowed in (
            {},
            {"large*": TableConstraint(sharding_types=("table_wise",))},
            {"large*": TableConstraint(sharding_types=("column_wise",))},
        )
    )
    assert any(t.tiers is not None and t.tiers.pim is not None for t in free.table_plans)
    assert free.certificate.objective <= 1.01 * min(whole.certificate.objective, halves.certificate.objective)
