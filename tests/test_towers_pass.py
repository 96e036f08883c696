"""The tower pass: sample, module widths, accounting, placement, verdict, verification, emitted script."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import planner
from codegen.runtime.launch import launch
from codegen.runtime.towers.modules import tower_module
from codegen.tower_script import emit_towers
from codegen.towers_torchrec import unfit
from cost_models.calibration import CPU
from cost_models.towers import module_work
from ir.capture import capture
from ir.errors import InputError
from ir.ops import EmbeddingTable, Op
from ir.plan import Plan
from ir.program import Model
from ir.topology import Device, Level, Link, MemoryTier, Topology
from ir.tower_sample import PooledSample
from ir.towers import Tower, TowerDecision, TowerRequest, illegal
from ir.workload import Workload
from passes.tower_modules import columns_within, fixed_widths, profile, widths_within
from passes.tower_pools import pools
from planner.towers import sample_pooled
from planner.zoo import build
from planner.zoo.multi_tower import over_arch_model, with_towers
from tests.composed_plans import compressed

RANKS = str(Path(__file__).with_name("tower_plans.py"))


def machine(hosts: int, host_size: int, slow: float) -> Topology:
    """Fast hosts on a network of ``slow`` bytes/s."""
    device = Device("cpu", "cpu", {"fp32": 1e12}, (MemoryTier("ddr", 2**33, 1e11, 1e11),))
    levels = (
        Level("host", host_size, Link("loopback", 1e11)),
        Level("cluster", hosts, Link("ethernet", slow)),
    )
    return Topology(f"test-{hosts}x{host_size}", device, levels)


def tables(n: int, rows: int = 20_000, dim: int = 32) -> Model:
    return Model(
        "tables",
        tuple(EmbeddingTable(f"t{i}", rows + 64 * i, dim, (f"f{i}",), module="ebc") for i in range(n)),
        (),
    )


def request(**how: Any) -> planner.Constraints:
    return planner.Constraints(towers=TowerRequest(**how))


@pytest.mark.parametrize(
    ("kind", "columns"), [("projection", 8), ("projection", 3), ("cross", 8), ("wukong", 8), ("dhen", 8)]
)
@pytest.mark.parametrize("out", [1, 2, 5])
def test_work_of_modules_is_what_torch_counts(kind: Any, columns: int, out: int) -> None:
    module = tower_module(kind, 5, 8, out, dim_out=columns)
    work = module_work(kind, 5, 8, out, columns)
    assert work.params == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        sent = module(torch.randn(3, 5, 8))
    assert sent.shape == (3, out, columns)
    assert work.flops == pytest.approx(counter.get_total_flops() / 3)


def test_projections_start_as_pools_or_as_projections() -> None:
    """So that the over-arch starts from sums of vectors, or from vectors whose dot products are near the flat ones."""
    x = torch.randn(3, 5, 8)
    pooled = tower_module("projection", 5, 8, 2)(x)
    assert torch.allclose(pooled, torch.stack([x[:, :3].sum(1), x[:, 3:].sum(1)], 1), atol=1e-6)
    narrow = tower_module("projection", 5, 8, 5, dim_out=3)
    basis = torch.stack([narrow(torch.eye(8)[i].expand(1, 5, 8))[0, 0] for i in range(8)])
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
    assert torch.equal(tower_module("projection", 5, 8, 5)(x), x)
    alike = tower_module("projection", 5, 8, 2, pools=[1, 0, 1, 1, 0])(x)
    assert torch.allclose(alike, torch.stack([x[:, [1, 4]].sum(1), x[:, [0, 2, 3]].sum(1)], 1), atol=1e-6)
    for kind in ("wukong", "dhen"):
        assert tower_module(kind, 5, 8, 2, pools=[1, 0, 1, 1, 0])(x).shape == (3, 2, 8)
    with pytest.raises(InputError, match="one of 2 sums"):
        tower_module("projection", 5, 8, 2, pools=[0, 0, 0, 0, 0])
    with pytest.raises(InputError, match="cross tower modules keep the 8 columns"):
        tower_module("cross", 5, 8, 5, dim_out=3)


@pytest.mark.parametrize("kind", ["projection", "cross", "wukong", "dhen"])
def test_modules_treat_samples_independently(kind: Any) -> None:
    torch.manual_seed(0)
    module = tower_module(kind, 4, 8, 2)
    x = torch.randn(6, 4, 8)
    assert torch.allclose(module(x)[2:4], module(x[2:4]), atol=1e-6)


def test_sample_measures_cosines_and_survives_a_file(tmp_path: Path) -> None:
    """By hand: b is a turned by 60 degrees, c is zero in every other sample and else a."""
    a = np.tile([[1.0, 0.0]], (4, 1))
    b = np.tile([[0.5, 3**0.5 / 2]], (4, 1)) * 7
    c = -a * np.array([[1.0], [0.0], [1.0], [0.0]])
    sample = PooledSample(("a", "b", "c"), (2, 2, 2), np.concatenate([a, b, c], 1).astype(np.float32))
    sample.save(tmp_path / "s.npz")
    read = PooledSample.load(tmp_path / "s.npz")
    assert read.digest == sample.digest
    expected = np.array([[0, 0.5, 0.5], [0.5, 0, 0.25], [0.5, 0.25, 0]])
    assert read.strengths(["a", "b", "c"], "cosine") == pytest.approx(expected, abs=1e-6)
    assert read.strengths(["a", "b", "c"]) == pytest.approx(
        np.zeros((3, 3))
    )  # each is constant where it is present
    with pytest.raises(InputError, match="lacks feature 'd'"):
        read.of(["d"])
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="no pooled sample"):
        PooledSample.load(tmp_path / "bad.npz")


def test_what_never_changes_is_no_interaction() -> None:
    """b follows a around a mean of its own; c is near that mean and follows nothing; empty bags stay empty."""
    random = np.random.default_rng(0)
    shared = random.standard_normal((4000, 3))
    mean = np.array([5.0, 0.0, 0.0])
    a, b, c = shared, 2 * shared + mean, mean + 0.1 * random.standard_normal((4000, 3))
    b[::2] = 0.0
    sample = PooledSample(("a", "b", "c"), (3, 3, 3), np.concatenate([a, b, c], 1).astype(np.float32))
    found = sample.strengths(["a", "b", "c"])
    assert found[0, 1] == pytest.approx(0.5, abs=0.02)  # parallel in the half of the samples that have both
    assert found[2].max() < 0.05
    assert sample.strengths(["a", "b", "c"], "cosine")[1, 2] > 0.3


def test_pools_split_alike_features_evenly() -> None:
    """Two groups of four in four sums: two of each group, never one of both; brute force has no better one."""
    group = np.array([0, 1, 0, 1, 1, 0, 0, 1])
    strengths = np.where(group[:, None] == group[None, :], 0.5, 0.02) + 0.01 * np.cos(np.arange(64)).reshape(
        8, 8
    )
    strengths = (strengths + strengths.T) / 2
    np.fill_diagonal(strengths, 0.0)
    found = np.array(pools(strengths, 4))
    assert all(len(set(group[found == pool].tolist())) == 1 for pool in range(4))
    even = [p for p in itertools.product(range(4), repeat=8) if set(np.bincount(p, minlength=4)) <= {1, 2, 3}]
    value = lambda p: strengths[np.equal.outer(p, p)].sum()  # noqa: E731
    limit = max(np.bincount(found))
    assert value(found) >= max(value(np.array(p)) for p in even if max(np.bincount(p)) <= limit) - 1e-9
    assert pools(strengths, 8) == ()


def _low_rank(n: int, dim: int, rank: int, seed: int) -> PooledSample:
    random = np.random.default_rng(seed)
    pooled = random.standard_normal((400, rank)) @ random.standard_normal((rank, n * dim))
    return PooledSample(tuple(f"f{i}" for i in range(n)), (dim,) * n, pooled.astype(np.float32))


def test_energy_lost_is_that_of_the_missing_components() -> None:
    """Rank 6 in vectors of 4: two vectors carry everything, one does not; independent noise loses its share."""
    found = profile(_low_rank(5, 4, 6, 0), [f"f{i}" for i in range(5)], 4)
    assert found.lost[0] > 0.01
    assert found.lost[1:] == pytest.approx(0.0, abs=1e-6)
    noise = np.random.default_rng(1).standard_normal((20_000, 12)).astype(np.float32)
    sample = PooledSample(("x", "y", "z"), (4, 4, 4), noise)
    lost = profile(sample, ["x", "y", "z"], 4).lost
    assert lost == pytest.approx([2 / 3, 1 / 3, 0], abs=0.02)
    by_columns = profile(sample, ["x", "y", "z"], 4, "columns")
    assert by_columns.lost == pytest.approx([3 / 4, 1 / 2, 1 / 4, 0], abs=0.02)
    assert [columns_within([by_columns] * 2, budget) for budget in (0.0, 0.3, 0.55, 0.9)] == [4, 3, 2, 1]


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.3])
def test_widths_are_the_narrowest_within_the_budget(budget: float) -> None:
    samples = [_low_rank(4, 3, 5, s) for s in (1, 2)] + [_low_rank(3, 3, 7, 3)]
    found = [profile(s, s.features, 3) for s in samples]
    chosen = widths_within(found, [3, 3, 3], budget)
    assert min(widths_within(found, [3, 3, 3], 0.9, least=2)) == 2
    total = sum(p.energy for p in found)

    def lost(widths: tuple[int, ...]) -> float:
        return sum(p.energy * p.lost[w - 1] for p, w in zip(found, widths, strict=True)) / total

    def peer(widths: tuple[int, ...]) -> tuple[int, int]:
        return max(max(2 * w, sum(widths) - w) for w in widths), sum(widths)

    fitting = [
        w for w in itertools.product(range(1, 5), range(1, 5), range(1, 4)) if lost(w) <= budget + 1e-9
    ]
    assert lost(tuple(chosen)) <= budget + 1e-9
    assert peer(tuple(chosen)) == min(map(peer, fitting))
    assert fixed_widths([4, 5, 1], 2.0) == [2, 3, 1]


def test_towers_pay_on_a_slow_network_only() -> None:
    """Modules keep 8 of 32 columns, or one of two tables' vectors; with links as fast as the host's they add work."""
    work = Workload(8192)
    always_wide = request(module="projection", compression=4, narrow="columns")
    slow = planner.compile(tables(8), machine(4, 1, 1e8), work, constraints=always_wide, time_limit=0.1)
    section = slow.decisions.towers
    assert section is not None
    assert section.applied
    assert slow.timeline.step == section.steps["modules"] < section.steps["flat"]
    assert section.cross_host_bytes["modules"] * 4 == section.cross_host_bytes["exchange"]
    merged = request(module="projection", compression=4)
    halved = planner.compile(tables(8), machine(4, 1, 1e8), work, constraints=merged, time_limit=0.1)
    assert halved.decisions.towers is not None
    crossing = halved.decisions.towers.cross_host_bytes
    assert crossing["modules"] * 2 == crossing["exchange"]
    fast = planner.compile(tables(8), machine(4, 1, 1e11), work, constraints=merged, time_limit=0.1)
    flat = planner.compile(tables(8), machine(4, 1, 1e11), work, time_limit=0.1)
    assert fast.decisions.towers is not None
    assert not fast.decisions.towers.applied
    assert fast.table_plans == flat.table_plans
    assert fast.timeline == flat.timeline
    assert "towers do not pay here" in fast.warnings[-1]
    for plan in (slow, fast):
        assert all(finding.ok for finding in planner.verify(plan)), planner.verify(plan)
    assert Plan.from_dict(slow.to_dict()).to_dict() == slow.to_dict()


def test_a_host_adds_to_a_step_in_tower_form_what_it_adds_to_a_flat_one() -> None:
    """By hand: 5 ms a step, 1 a table, 2 for the second kind of exchange, ids in line; copies at 50 of 100 GB/s."""
    host = replace(
        CPU, ids_ahead=False, step_seconds=5e-3, table_seconds=1e-3, group_seconds=2e-3, kernel_seconds=0.0
    )
    plan = planner.compile(
        tables(8),
        machine(2, 2, 1e8),
        Workload(8192),
        constraints=request(always=True),
        calibration=host,
        time_limit=0.1,
    )
    events = {event.name: event for event in plan.timeline.events}
    assert events["framework"].duration == pytest.approx(15e-3)
    assert "input_dist_next" not in events
    assert events["lookup_forward"].start >= events["input_dist"].start + events["input_dist"].duration
    # two tables a rank, half of 8192 x 2 x 128 B leave it; laid out twice, read and written
    moved = 8192 * 2 * 128
    expected = moved / 2 / 50e9 + 300e-6 + 4 * moved / 50e9
    assert events["in_tower"].duration == pytest.approx(expected, rel=1e-6)


def test_shards_stay_in_their_tower_and_faults_are_found() -> None:
    plan = planner.compile(
        tables(6),
        machine(4, 1, 1e8),
        Workload(1024),
        constraints=request(towers=2, always=True),
        time_limit=0.1,
    )
    section = plan.decisions.towers
    assert section is not None
    for name, table in plan.tables.items():
        assert {shard.rank // 2 for shard in table.shards} == {section.tower_of(name)}
    for tower in section.towers:  # "t3" has the feature "f3"
        holders = [plan.tables["t" + feature[1:]].shards[0].rank for feature in tower.features]
        assert holders == sorted(holders)
    moved = replace(plan.table_plans[0], shards=(replace(plan.table_plans[0].shards[0], rank=3),))
    broken = replace(plan, table_plans=(moved, *plan.table_plans[1:]))
    if section.tower_of(moved.name) == 1:
        moved = replace(moved, shards=(replace(moved.shards[0], rank=0),))
        broken = replace(plan, table_plans=(moved, *plan.table_plans[1:]))
    faults = {f.check: f.faults for f in planner.verify(broken)}
    assert "outside the tower" in faults["towers"][0]
    halved = replace(section, towers=section.towers[:1])
    faults = {
        f.check: f.faults
        for f in planner.verify(replace(plan, decisions=replace(plan.decisions, towers=halved)))
    }
    assert any("in no tower" in fault for fault in faults["towers"])


def test_requests_that_do_not_fit() -> None:
    def run(model: Model | None = None, **how: Any) -> None:
        planner.compile(model or tables(4), machine(2, 1, 1e8), Workload(256), constraints=request(**how))

    with pytest.raises(InputError, match="3 towers do not fit 2 hosts"):
        run(towers=3)
    with pytest.raises(InputError, match="need a compression, or an accuracy_budget with interactions"):
        run(module="cross")
    mixed = replace(tables(4), tables=(replace(tables(4).tables[0], dim=64), *tables(4).tables[1:]))
    with pytest.raises(InputError, match="need vectors of one width"):
        run(mixed, module="cross", compression=2)
    with pytest.raises(InputError, match="cross tower modules keep the columns"):
        run(module="cross", compression=2, narrow="columns")
    sequence = replace(
        tables(4), tables=(replace(tables(4).tables[0], pooling="none"), *tables(4).tables[1:])
    )
    with pytest.raises(InputError, match="sequences of rows"):
        run(sequence)


def test_legality_reads_the_graph() -> None:
    records = tables(2).tables

    def ops(*lookups: tuple[str, str, tuple[str, ...]]) -> tuple[Op, ...]:
        made = [Op("ids", "input")]
        for name, source, read in lookups:
            made.append(Op(name, "lookup", inputs=(source,), tables=read))
            made.append(Op(f"{name}_sum", "elementwise", inputs=(name,)))
        return tuple(made)

    assert illegal(records, ops(("a", "ids", ("t0",)), ("b", "ids", ("t1",)))) == ""
    assert "computed from another lookup" in illegal(
        records, ops(("a", "ids", ("t0",)), ("b", "a_sum", ("t1",)))
    )
    assert "looked up by 2 ops" in illegal(records, ops(("a", "ids", ("t0",)), ("b", "ids", ("t0",))))


@pytest.mark.parametrize("name", ["dlrm-small", "dlrm-dcnv2-small", "wukong-small", "dhen-small"])
def test_over_arch_of_the_zoo_prices_what_the_model_has(name: str) -> None:
    """Dense parameters of the multi-tower model = over-arch as priced + tower modules as accounted."""
    flat = build(name)
    features, dim = flat.module.features, flat.module.tables[0].dim
    towers = []
    kind, columns = ("projection", dim // 2) if name.startswith("dlrm") else ("cross", dim)
    for number, (start, end, out) in enumerate([(0, 10, 3), (10, 26, 4)]):
        work = module_work(kind, end - start, dim, out, columns)
        part = tuple(features[start:end])
        widths = (dim * len(part), out, columns * out)
        towers.append(Tower(part, part, number, 1, dim, *widths, work.params, work.flops, dim_out=columns))
    section = TowerDecision(True, "test", "coherent", kind, tuple(towers))
    model = with_towers(flat.module, section)
    whole = capture(model)
    priced = over_arch_model(build(name).module, sum(t.vectors_out for t in section.towers), columns)
    assert whole.dense_params == priced.dense_params + sum(t.params for t in section.towers)
    assert whole.dense_flops == pytest.approx(
        priced.dense_flops + sum(t.flops for t in section.towers), rel=1e-6
    )


def test_sample_of_a_model_feeds_the_budget(tmp_path: Path) -> None:
    flat = build("dlrm-small", device="cpu", row_cap=200)
    batches = [flat.module.random_batch(64, flat.workload, seed)[1] for seed in range(3)]
    sample = sample_pooled(flat.module, batches, limit=150)
    assert sample.pooled.shape == (150, 26 * 16)
    path = tmp_path / "sample.npz"
    sample.save(path)
    how = {"module": "projection", "accuracy_budget": 0.2, "interactions": str(path), "always": True}
    plan = planner.compile(
        flat.module, machine(2, 1, 1e9), flat.workload, constraints=request(**how), time_limit=0.1
    )
    section = plan.decisions.towers
    assert section is not None
    assert section.affinity is not None
    assert section.affinity.value <= section.affinity.bound
    assert section.energy_lost is not None
    assert section.energy_lost <= 0.2
    assert all(finding.ok for finding in planner.verify(plan))
    assert "interaction within towers" in plan.explain()


@pytest.fixture(scope="module")
def small_plan() -> planner.Plan:
    """DLRM on Criteo Kaggle, capped, in two towers of one rank."""
    return planner.compile(
        "dlrm-small",
        machine(2, 1, 1e9),
        constraints=request(module="projection", compression=3, narrow="columns", always=True),
        time_limit=0.1,
    )


def test_applied_plan_trains_the_multi_tower_model(small_plan: planner.Plan) -> None:
    """plan.apply on two gloo ranks against the same multi-tower model in one process."""
    small = replace(small_plan, table_plans=tuple(_capped(t, 300) for t in small_plan.table_plans))
    answers = launch(f"{RANKS}:train", 2, {"plan": small.to_dict(), "row_cap": 300}, host_size=1, timeout=120)
    for answer in answers:
        assert answer["moved"] == [0, 1]
        assert answer["outputs"] < 1e-6
        assert answer["first"] > answer["last"]


def test_torchrec_towers_train_the_same_model(small_plan: planner.Plan) -> None:
    """Three SGD steps on 2 x 2 ranks: whole tables, a row split and a column split inside a host."""
    section = small_plan.decisions.towers
    assert section is not None
    towers = tuple(replace(t, first_rank=2 * n, ranks=2) for n, t in enumerate(section.towers))
    made = []
    for index, table in enumerate(small_plan.table_plans):
        whole = _capped(table, 300)
        first = 2 * section.tower_of(table.name)
        shard = replace(whole.shards[0], rank=first + index % 2)
        kind, shards = "table_wise", (shard,)
        if index % 3 == 1 and whole.rows > 2:
            half = -(-whole.rows // 2)
            kind = "table_row_wise"
            shards = (replace(shard, rank=first, rows=half),)
            shards += (replace(shard, rank=first + 1, row=half, rows=whole.rows - half),)
        elif index % 3 == 2:
            kind = "table_column_wise"
            shards = (replace(shard, rank=first, cols=8), replace(shard, rank=first + 1, col=8, cols=8))
        made.append(replace(whole, sharding_type=kind, shards=shards))
    plan = replace(
        small_plan,
        topology=machine(2, 2, 1e9),
        memory=tuple(replace(small_plan.memory[0], rank=rank) for rank in range(4)),
        table_plans=tuple(made),
        decisions=replace(small_plan.decisions, towers=replace(section, towers=towers)),
    )
    answers = launch(
        f"{RANKS}:torchrec", 4, {"plan": plan.to_dict(), "row_cap": 300}, host_size=2, timeout=120
    )
    for answer in answers:
        assert max(answer["errors"]) < 1e-5
        assert answer["moved"] > 1e-3
    assert "need a module" in unfit(
        replace(plan, decisions=replace(plan.decisions, towers=replace(section, module="none")))
    )
    alone = replace(plan, topology=machine(1, 4, 1e9))
    assert "one host each" in unfit(alone)


def _capped(table: Any, rows: int) -> Any:
    """The plan's tables have 10,000 rows at most; the test's are smaller, whole on the same ranks."""
    most = min(table.rows, rows)
    whole = replace(table.shards[0], row=0, col=0, rows=most, cols=table.dim)
    return replace(table, rows=most, sharding_type="table_wise", shards=(whole,))


@pytest.mark.parametrize(
    ("codec", "relative", "error", "saved"), [("lz", 0.0, 1e-6, 0.5), ("eb_lz_entropy", 1e-2, 0.01, 2.0)]
)
def test_a_codec_between_peers(
    small_plan: planner.Plan, codec: str, relative: float, error: float, saved: float
) -> None:
    """A lossless codec changes nothing; a bounded one stays near and sends less, gradients included."""
    small = replace(small_plan, table_plans=tuple(_capped(t, 300) for t in small_plan.table_plans))
    how = {"plan": small.to_dict(), "row_cap": 300, "codec": codec, "relative": relative}
    for answer in launch(f"{RANKS}:coded", 2, how, host_size=1, timeout=120):
        assert answer["error"] < error
        # forward and backward, 200 samples, the widths that the tower sends and receives
        assert answer["plain"] == 4 * 200 * sum(t.width_out for t in small_plan.decisions.towers.towers)
        assert answer["plain"] > saved * answer["sent"]


def test_emitted_script_trains(tmp_path: Path, small_plan: planner.Plan) -> None:
    script = tmp_path / "train.py"
    coded = compressed(small_plan, dict.fromkeys(("tower 0", "tower 1"), ("eb_entropy", 0.01)))
    script.write_text(emit_towers(coded, "dlrm-small"))
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *(str(script), "--steps", "2", "--batch", "33"),
        ],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 1  loss" in done.stdout
    assert small_plan.decisions.towers is not None
    kept = replace(small_plan.decisions.towers, applied=False)
    flat = replace(small_plan, decisions=replace(small_plan.decisions, towers=kept))
    with pytest.raises(InputError, match="has no towers to run"):
        emit_towers(flat, "dlrm-small")
