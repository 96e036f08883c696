"""Plans that join everything, made by hand so that every kind of decision is there, for tests that run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ir.compression import Compression, Decay, Direction, ExchangeCompression, TableCompression
from ir.dedup import DedupGroup, DedupPlan
from ir.format_plan import FormatPlan, TensorFormat
from ir.plan import Plan
from ir.tier_plan import RowCache, RowRange, TableTiers
from ir.topology import MemoryTier
from ir.towers import Tower, TowerDecision
from tests.plans import Decision, Table, make_plan

DIM = 8
ROWS = {"a": 40, "b": 64, "c": 33, "d": 96, "e": 50, "g": 128}
PAIRS = (("a", "c", "e"), ("b", "d", "g"))  # tables of each tower

DRAM = MemoryTier("ddr", 2**34, 1e10, 1e10)
CXL = MemoryTier("cxl", 2**34, 1e10, 1e10)
SSD = MemoryTier("ssd", 2**40, 3e9, 1e9, granule=4096, iops=5e5)


def entries(sizes: Mapping[str, int] = ROWS) -> list[dict[str, Any]]:
    """The tables as the zoo takes them; ``b`` has two features."""
    return [
        {"name": name, "rows": rows, "dim": DIM, "features": ["b1", "b2"] if name == "b" else [f"f_{name}"]}
        for name, rows in sizes.items()
    ]


def flat_plan(hosts: int, host_size: int, decisions: dict[str, Decision], optimizer: Any = "adagrad") -> Plan:
    tables = [Table(e["name"], e["rows"], DIM, tuple(e["features"])) for e in entries()]
    plan = make_plan(tables, decisions, hosts, host_size, optimizer=optimizer, pooling=2.0)
    return replace(plan, topology=replace(plan.topology, host_tiers=(DRAM, CXL, SSD)))


def with_decisions(plan: Plan, **sections: Any) -> Plan:
    return replace(plan, decisions=replace(plan.decisions, **sections))


def towered(plan: Plan, module: Any = "none", out: int = 2) -> Plan:
    each = plan.world_size // 2
    towers = []
    for number, names in enumerate(PAIRS):
        features = tuple(f for name in names for f in plan.tables[name].features)
        sent = len(features) if module == "none" else out
        towers.append(Tower(names, features, number * each, each, DIM, DIM * len(features), sent, sent * DIM))
    return with_decisions(plan, towers=TowerDecision(True, "test", "coherent", module, tuple(towers)))


def deduplicated(plan: Plan, *groups: tuple[str, ...]) -> Plan:
    made = tuple(DedupGroup(g, 4.0, 100.0, 1.0, 1.0, 0.1, True, "test") for g in groups)
    return with_decisions(plan, dedup=DedupPlan(8.0, made))


def formatted(plan: Plan, formats: dict[str, str], states: dict[str, str]) -> Plan:
    tables = tuple(
        replace(t, format=formats.get(t.name, "fp32"), state_format=states.get(t.name))
        for t in plan.table_plans
    )
    tensors = tuple(
        TensorFormat(name, kind, format, 1.0, 8.0, 0.0)  # type: ignore[arg-type]
        for kind, chosen in (
            ("table", {t.name: t.format for t in tables}),
            ("state", {f"{name}.state": format for name, format in states.items()}),
            ("weight", {k: v for k, v in formats.items() if k.endswith(".weight")}),
            ("activation", {k: v for k, v in formats.items() if k.endswith(".input")}),
        )
        for name, format in chosen.items()
    )
    section = FormatPlan("step", 1.0, 1.0, 0.0, 0.0, 8.0, 1.0, 0.0, "test", tensors)
    return with_decisions(replace(plan, table_plans=tables), formats=section)


def tiered(plan: Plan) -> Plan:
    """``d`` in DRAM and on the drive, ``g`` behind a cache in mapped memory."""
    chosen = {
        "d": TableTiers((RowRange("ddr", 20, 0.6), RowRange("ssd", ROWS["d"] - 20, 0.4))),
        "g": TableTiers((RowRange("cxl", ROWS["g"], 1.0),), RowCache(16, "lfu", 0.5)),
    }
    return replace(plan, table_plans=tuple(replace(t, tiers=chosen.get(t.name)) for t in plan.table_plans))


def compressed(plan: Plan, codecs: dict[str, tuple[str, float]]) -> Plan:
    """Table -> (codec, bound), the same in both directions; the others travel as they are."""
    ways: tuple[Direction, ...] = ("forward", "backward")
    rows = tuple(
        TableCompression(name, way, codec, bound, "wide", 2.0, bound**2 / 3, 1.0, 1.0, 0.0, 2.0, "test")  # type: ignore[arg-type]
        for way in ways
        for name, (codec, bound) in codecs.items()
    )
    exchanges = tuple(ExchangeCompression(way, 2.0, 1.0, 0.1, True) for way in ways)
    return with_decisions(plan, compression=Compression("exchange", Decay(), rows, exchanges))


TOWERS_2X2 = {
    "a": Decision("table_row_wise", (0,)),
    "b": Decision("table_column_wise", (3, 2)),
    "c": Decision("table_wise", (1,)),
    "d": Decision("table_wise", (2,)),
    "e": Decision("table_wise", (0,)),
    "g": Decision("table_row_wise", (1,)),
}
FLAT_2 = {
    "a": Decision("table_wise", (0,)),
    "b": Decision("column_wise", (1, 0)),
    "c": Decision("data_parallel"),
    "d": Decision("table_wise", (1,)),
    "e": Decision("table_wise", (0,)),
    "g": Decision("table_wise", (1,)),
}
FORMATS = {"a": "fp16", "b": "bf16", "d": "mxfp8_e4m3", "e": "int8", "g": "fp16"}
STATES = {"a": "fp16", "d": "bf16"}
LOSSLESS = dict.fromkeys(ROWS, ("lz", 0.0))
BOUNDED = {"a": ("eb_lz", 1e-3), "b": ("eb_entropy", 1e-3), "d": ("eb_lz_entropy", 1e-3), "e": ("lz", 0.0)}

MODEL: dict[str, dict[str, Any]] = {
    "wukong-small": {"bottom": (16, DIM), "fmb": 4, "lcb": 3, "rank": 4, "hidden": (16,), "top": (16, 1)},
    "dhen-small": {"bottom": (16, DIM), "vectors": 3, "hidden": (16,), "top": (16, 1)},
}


def options(model: str, sizes: Mapping[str, int] = ROWS) -> dict[str, Any]:
    """Arguments of the zoo's builder for a model over :func:`entries`."""
    return {"tables": entries(sizes), "row_cap": None, **MODEL[model]}
