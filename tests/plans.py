"""Plans made by hand for tests: decisions in, shards from the geometry of :mod:`ir.sharding`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ir.constraints import Constraints, ShardingType
from ir.plan import EVERY_RANK, Certificate, ModelSummary, Plan, RankMemory, Shard, TablePlan, Timeline
from ir.sharding import ShardingOption, even_widths, units
from ir.topology import Device, Level, Link, MemoryTier, Topology
from ir.torchrec_rules import kernel_for
from ir.workload import FeatureStats, Optimizer, Workload


@dataclass(frozen=True)
class Table:
    """A table of a test model; its feature is ``f_<name>`` unless others are given."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...] = ()
    pooling: str = "sum"
    dtype: str = "fp32"
    module: str = "ebc"
    parameter: str = ""


@dataclass(frozen=True)
class Decision:
    """How a table is sharded: ``places`` names the rank (or the host, for row splits) of each column block."""

    sharding_type: ShardingType
    places: tuple[int, ...] = (0,)
    widths: tuple[int, ...] | None = None
    kernel: str | None = None


def topology(hosts: int, host_size: int) -> Topology:
    """A local CPU topology; its speeds matter to no test that uses it."""
    link = Link("loopback", 1e10)
    device = Device("cpu", "cpu", {"fp32": 1e11}, (MemoryTier("ddr", 2**34, 1e10, 1e10),))
    levels = [Level("host", host_size, link)]
    if hosts > 1:
        levels.append(Level("cluster", hosts, link))
    return Topology(f"test-{hosts}x{host_size}", device, tuple(levels))


def table_plan(table: Table, decision: Decision, hosts: int, host_size: int) -> TablePlan:
    """A table's decision with its shards."""
    world = hosts * host_size
    kind = decision.sharding_type
    whole = kind in ("data_parallel", "table_wise", "row_wise", "table_row_wise")
    widths = decision.widths or ((table.dim,) if whole else even_widths(table.dim, len(decision.places)))
    assert widths is not None
    option = ShardingOption(kind, widths)
    shards: list[Shard] = []
    for index, unit in enumerate(units(option, table.rows, world, host_size)):
        if kind == "data_parallel":
            shards.append(Shard(EVERY_RANK, 0, 0, table.rows, table.dim))
            continue
        first = {"rank": 1, "host": host_size, "all": 0}[unit.scope] * (
            decision.places[index] if unit.scope != "all" else 0
        )
        shards += [Shard(first + i, b.row, b.col, b.rows, b.cols) for i, b in enumerate(unit.blocks)]
    return TablePlan(
        name=table.name,
        rows=table.rows,
        dim=table.dim,
        dtype=table.dtype,
        features=table.features or (f"f_{table.name}",),
        pooling=table.pooling,
        module=table.module,
        parameter=table.parameter or f"{table.module}.embedding_bags.{table.name}.weight".lstrip("."),
        sharding_type=kind,
        compute_kernel=decision.kernel or kernel_for(option),  # type: ignore[arg-type]
        shards=tuple(shards),
        terms={},
        memory={},
    )


def make_plan(
    tables: Sequence[Table],
    decisions: Mapping[str, Decision],
    hosts: int,
    host_size: int,
    *,
    batch: int = 32,
    optimizer: Optimizer = "sgd",
    pooling: float = 1.5,
) -> Plan:
    """A whole plan around the decisions."""
    made = tuple(table_plan(table, decisions[table.name], hosts, host_size) for table in tables)
    features = {feature: FeatureStats(pooling_factor=pooling) for table in made for feature in table.features}
    return Plan(
        model=ModelSummary("test", "sha256:0", sum(t.rows * t.dim for t in tables), 0, 0.0),
        topology=topology(hosts, host_size),
        workload=Workload(batch, features, optimizer=optimizer),
        constraints=Constraints(),
        mode="train",
        table_plans=made,
        memory=tuple(RankMemory(rank, 2**34, {}) for rank in range(hosts * host_size)),
        timeline=Timeline(0.0, ()),
        certificate=Certificate("none", 0.0, 0.0, "feasible", "none"),
    )
