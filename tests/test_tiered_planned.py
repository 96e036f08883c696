"""Plans with tiers run here: their ranges, caches and page sizes, and the same result as a table in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from codegen.runtime.tiered.planned import tiered_bag, tiered_layout
from codegen.runtime.tiered.table import Range
from ir.errors import InputError
from ir.plan import Plan
from ir.tier_plan import RowCache, RowRange, TableTiers
from planner.presets import preset
from tests.plans import Decision, Table, make_plan

ROWS, DIM = 3000, 16


def plan(tiers: TableTiers | None, pooling: str = "sum", topology: str = "h100-cxl-nand-1x1") -> Plan:
    made = make_plan([Table("t", ROWS, DIM, pooling=pooling)], {"t": Decision("table_wise")}, 1, 1)
    placed = tuple(replace(t, tiers=tiers) for t in made.table_plans)
    return replace(made, table_plans=placed, topology=preset(topology))


SPLIT = TableTiers(
    (
        RowRange("hbm", 200, 0.5),
        RowRange("ddr", 300, 0.2),
        RowRange("cxl", 1000, 0.2),
        RowRange("nand", 1500, 0.1),
    ),
    prefetch_depth=2,
)


def test_ranges_follow_the_plan_and_pages_the_tier() -> None:
    layout = tiered_layout(plan(SPLIT).tables["t"], plan(SPLIT), batch_rows=200)
    assert layout.ranges == (Range("ram", 500), Range("mapped", 1000, 4096), Range("block", 1500, 4096))
    assert (layout.cache_rows, layout.depth) == (800, 2)
    optane = plan(
        TableTiers((RowRange("optane", ROWS, 1.0),), RowCache(600, "lfu", 0.8), 1), topology="a100-optane-1x1"
    )
    layout = tiered_layout(optane.tables["t"], optane, batch_rows=100)
    assert layout.ranges == (Range("block", ROWS, 512),)
    assert (layout.cache_rows, layout.policy) == (600, "lfu")
    half = tiered_layout(optane.tables["t"], optane, batch_rows=100, rows=ROWS // 2)
    assert (half.ranges[0].rows, half.cache_rows) == (ROWS // 2, 300)


@pytest.mark.parametrize("tiers", [None, SPLIT])
def test_a_planned_table_trains_like_one_in_memory(tmp_path: Path, tiers: TableTiers | None) -> None:
    start = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))
    bag, depth = tiered_bag(plan(tiers), "t", tmp_path / "t", batch_rows=200, weights=start, lr=0.1)
    table = torch.nn.EmbeddingBag(ROWS, DIM, mode="sum", _weight=start.clone())
    step = torch.optim.SGD(table.parameters(), lr=0.1)
    random = np.random.default_rng(0)
    batches = [
        (torch.from_numpy((random.random(200) ** 3 * ROWS).astype(np.int64)), torch.arange(0, 200, 4))
        for _ in range(15)
    ]
    for ids, offsets in bag.pipeline(batches, depth):
        step.zero_grad()
        for module in (bag, table):
            module(ids, offsets).pow(2).sum().backward()
        step.step()
    assert torch.equal(bag.weight(), table.weight.detach())
    bag.close()


def test_what_cannot_be_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table 'T'"):
        tiered_bag(plan(SPLIT), "T", tmp_path / "t", batch_rows=10)
    with pytest.raises(InputError, match="pooled by 'none'"):
        tiered_bag(plan(SPLIT, pooling="none"), "t", tmp_path / "t", batch_rows=10)
    with pytest.raises(InputError, match="tier 'cxl', which h100-nand-1x1 does not have"):
        tiered_bag(plan(SPLIT, topology="h100-nand-1x1"), "t", tmp_path / "t", batch_rows=10)
