"""Random models, machines, inputs and limits: every plan is sound, proved and repeatable.

``PLANS=5000`` compiles so many instead of a thousand. Small instances are also enumerated by a second
implementation of the objective: every option of every table at every place.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import planner
from cost_models.calibration import default_calibration
from cost_models.embedding import PHASES, phase_overheads
from ir.compression import CompressionRequest
from ir.constraints import Constraints, TableConstraint
from ir.dense_plan import DenseRequest
from ir.errors import InfeasibleError
from ir.format_plan import FormatRequest
from ir.growth import GrowthRequest
from ir.ops import EmbeddingTable, Op
from ir.program import Model, Options, Program
from ir.sessions import SessionGroup, SessionStats
from ir.tier_plan import TierRequest
from ir.topology import Device, Level, Link, MemoryTier, Topology
from ir.towers import TowerRequest
from ir.workload import FeatureStats, Workload
from passes.sharding_prices import price_options

CASES = int(os.environ.get("PLANS", "1000"))
WORK = 0.005  # deterministic seconds of the solver: the plans need not be good, they must be sound
pytestmark = pytest.mark.timeout(max(300, 2 * CASES))  # seconds; a case takes a tenth of one on an idle core
SOUND = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(SOUND, max_examples=max(CASES // 50, 1))
SOME = settings(SOUND, max_examples=max(CASES // 15, 1))

sizes = st.integers(0, 40).map(lambda n: max(1, round(2 ** (n / 2))))  # 1 to 2^20 rows, even over magnitudes


@st.composite
def machines(draw: st.DrawFn, most: int = 8) -> Topology:
    """One or two levels of up to four members, any speeds, a device of 64 MiB to 4 GiB."""
    speed = st.integers(80, 130).map(lambda n: 10 ** (n / 10))
    host, hosts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    assume(host * hosts <= most)
    hbm = MemoryTier(
        "hbm",
        draw(st.integers(2**26, 2**32)),
        draw(speed),
        draw(speed),
        granule=draw(st.sampled_from([32, 64])),
    )
    device = Device("random", draw(st.sampled_from(["gpu", "cpu"])), {"fp32": 1e13}, (hbm,))
    inner, outer = (Link(name, draw(speed), draw(st.floats(0, 1e-4))) for name in ("inner", "outer"))
    levels = (Level("host", host, inner),) + ((Level("cluster", hosts, outer),) if hosts > 1 else ())
    ddr = MemoryTier("ddr", 2**36, 1e10, 1e10, latency=1e-7)
    return Topology("random", device, levels, (ddr,))


@st.composite
def models(draw: st.DrawFn, most: int = 6) -> tuple[Model, dict[str, FeatureStats]]:
    """Up to ``most`` tables of any size, shared or not, pooled or not, with or without a dense part."""
    tables, stats = [], {}
    for index in range(draw(st.integers(1, most))):
        features = tuple(f"f{index}_{n}" for n in range(draw(st.sampled_from([1, 1, 1, 2]))))
        for feature in features:
            icdf = draw(st.sampled_from([(), (0.0, 0.001, 0.02, 1.0)]))
            stats[feature] = FeatureStats(
                draw(st.sampled_from([0.0, 0.3, 1.0, 7.5, 60.0])), icdf, draw(st.sampled_from([1.0, 0.2]))
            )
        pooling = draw(st.sampled_from(["sum", "sum", "sum", "mean", "none"]))
        dim = draw(st.sampled_from([4, 8, 16, 20, 64, 96, 128]))
        tables.append(EmbeddingTable(f"t{index}", draw(sizes), dim, features, pooling))
    columns = sum(t.dim * len(t.features) for t in tables)
    ops = [
        Op("ids", "input", out_shape=(1, len(stats)), dtype="int64"),
        Op(
            "lookup",
            "lookup",
            inputs=("ids",),
            out_shape=(1, columns),
            activation_bytes=4 * columns,
            tables=tuple(t.name for t in tables),
        ),
    ]
    if draw(st.booleans()):
        ops.append(
            Op(
                "top",
                "gemm",
                inputs=("lookup",),
                phase="top",
                out_shape=(1, 64),
                flops=128.0 * columns,
                params=64 * columns,
                activation_bytes=256,
                gemm=(columns, 64),
            )
        )
    return Model("random", tuple(tables), tuple(ops)), stats


@st.composite
def workloads(draw: st.DrawFn, world: int, stats: dict[str, FeatureStats]) -> Workload:
    return Workload(
        world * draw(st.sampled_from([1, 7, 64, 1024])),
        stats,
        optimizer=draw(st.sampled_from(["sgd", "adagrad", "rowwise_adagrad", "adam"])),
        exchange_dtype=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
    )


RULES = st.builds(
    TableConstraint,
    sharding_types=st.sampled_from(
        [
            None,
            ("table_wise",),
            ("row_wise", "table_wise"),
            ("column_wise", "data_parallel"),
            ("grid_shard", "table_row_wise", "table_column_wise"),
        ]
    ),
    min_column_width=st.sampled_from([None, 4, 32]),
    ranks=st.sampled_from([None, None, None, (0,)]),
)


@st.composite
def limits(draw: st.DrawFn) -> Constraints:
    """Pins by glob, column widths, a reserve."""
    return Constraints(
        memory_reserve=draw(st.sampled_from([0.0, 0.15, 0.5])),
        min_column_width=draw(st.sampled_from([4, 32])),
        allow_state_split=draw(st.booleans()),
        tables={
            name: draw(RULES) for name in draw(st.sampled_from([(), (), ("t0",), ("t[12]",), ("*", "t0")]))
        },
    )


def check(plan: planner.Plan, model: Model) -> None:
    """What must hold of any plan, from the plan alone."""
    assert [finding for finding in planner.verify(plan, model.tables) if not finding.ok] == []
    held = plan.constraints.memory_limit or plan.topology.device.tiers[0].capacity
    assert all(rank.total <= held * (1 - plan.constraints.memory_reserve) for rank in plan.memory)
    certificate = plan.certificate
    assert 0 <= certificate.lower_bound <= certificate.objective * (1 + 1e-9)
    assert math.isfinite(plan.timeline.step)
    assert planner.Plan.from_dict(plan.to_dict()).digest == plan.digest


@SOUND
@given(st.data())
def test_every_plan_is_sound(data: st.DataObject) -> None:
    # most instances are small, which is enough for most faults and leaves time for many
    machine = data.draw(machines(most=data.draw(st.sampled_from([2, 4, 4, 8]))))
    model, stats = data.draw(models(most=data.draw(st.sampled_from([1, 2, 3, 3, 4, 6]))))
    work = data.draw(workloads(machine.world_size, stats))
    asked = data.draw(limits())
    mode, objective = (
        data.draw(st.sampled_from(["train", "inference"])),
        data.draw(st.sampled_from(["phases", "bottleneck"])),
    )
    options: dict[str, Any] = {"constraints": asked, "mode": mode, "objective": objective, "time_limit": WORK}
    try:
        plan = planner.compile(model, machine, work, **options)
    except InfeasibleError:
        return
    check(plan, model)
    for name, table in plan.tables.items():
        rule = asked.for_table(name)
        assert rule.sharding_types is None or table.sharding_type in rule.sharding_types
        assert rule.ranks is None or {shard.rank for shard in table.shards} <= set(rule.ranks)
    if data.draw(st.integers(0, 9)) == 0:
        assert planner.compile(model, machine, work, **options).to_json() == plan.to_json()


def placed_loads(program: Program, table: EmbeddingTable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every option of a table at every place: seconds (phases, ranks) and bytes (ranks,)."""
    machine = program.topology
    world, size = machine.world_size, machine.host_size
    for priced in price_options(program, table, default_calibration(machine)):
        copies = [unit for unit in priced.units for _ in range(unit.count)]
        ranges: list[Sequence[int]] = [
            {"rank": range(world), "host": range(machine.hosts), "all": (0,)}[u.unit.scope] for u in copies
        ]
        for places in itertools.product(*ranges):
            if priced.option.together and len({place // size for place in places}) > 1:
                continue
            seconds, held = np.zeros((len(PHASES), world)), np.zeros(world)
            for unit, place in zip(copies, places, strict=True):
                first, count = {"rank": (place, 1), "host": (place * size, size), "all": (0, world)}[
                    unit.unit.scope
                ]
                seconds[:, first : first + count] += np.array([[unit.seconds[p]] for p in PHASES])
                held[first : first + count] += sum(unit.memory.values())
            yield seconds, held


@SOME
@given(st.data())
def test_no_choice_of_options_and_places_beats_the_bound(data: st.DataObject) -> None:
    machine = data.draw(machines(most=3))
    model, stats = data.draw(models(most=3))
    model = replace(model, ops=())
    work = data.draw(workloads(machine.world_size, stats))
    share = data.draw(st.sampled_from([0.4, 0.7, 1.5, 8.0]))
    total = sum(table.rows * table.dim * 4 for table in model.tables)
    asked = Constraints(memory_reserve=0.0, memory_limit=int(share * total) + 2**16, min_column_width=32)
    program = Program(model, machine, work, Options(constraints=asked))
    try:
        tables = [list(placed_loads(program, table)) for table in model.tables]
    except InfeasibleError:
        assume(False)
    assume(math.prod(map(len, tables)) <= 20_000)
    # what is not the tables' takes memory too: read off a plan without a limit
    roomy = planner.compile(
        model, machine, work, constraints=replace(asked, memory_limit=2**50), time_limit=WORK
    )
    own = {purpose for table in roomy.table_plans for purpose in table.memory}
    beside = sum(size for purpose, size in roomy.memory[0].used.items() if purpose not in own)
    best = math.inf
    for choice in itertools.product(*tables):
        if sum(held for _, held in choice).max() + beside <= asked.memory_limit:  # type: ignore[attr-defined, operator]
            best = min(best, float(sum(seconds for seconds, _ in choice).max(axis=1).sum()))  # type: ignore[attr-defined]
    fixed = sum(phase_overheads(machine, work, default_calibration(machine), "train").values())
    try:
        plan = planner.compile(model, machine, work, constraints=asked, time_limit=0.05)
    except InfeasibleError:
        assert best == math.inf
        return
    check(plan, model)
    assert plan.certificate.lower_bound <= (best + fixed) * (1 + 1e-9)
    assert (best + fixed) * (1 - 1e-9) <= plan.certificate.objective <= (best + fixed) * 1.05


@FEW
@given(st.data())
def test_requests_drawn_at_random(data: st.DataObject) -> None:
    machine = data.draw(machines(most=4))
    model, stats = data.draw(models(most=4))
    work = data.draw(workloads(machine.world_size, stats))
    if data.draw(st.booleans()):
        group = SessionGroup(tuple(stats)[:2], data.draw(st.sampled_from([0.5, 0.95])))
        work = replace(work, sessions=SessionStats(8.0, (group,)))
    maybe = st.booleans()
    asked = replace(
        data.draw(limits()),
        formats=FormatRequest(max_loss=0.05) if data.draw(maybe) else None,
        tiers=TierRequest() if data.draw(maybe) else None,
        compression=CompressionRequest() if data.draw(maybe) else None,
        growth=GrowthRequest(steps=1000) if data.draw(maybe) else None,
        dense=DenseRequest() if data.draw(maybe) else None,
        towers=TowerRequest() if data.draw(st.integers(0, 3)) == 0 else None,
    )
    try:
        plan = planner.compile(model, machine, work, constraints=asked, time_limit=WORK)
    except planner.PlannerError:
        return
    check(plan, model)
    assert (
        planner.compile(model, machine, work, constraints=asked, time_limit=WORK).to_json() == plan.to_json()
    )
