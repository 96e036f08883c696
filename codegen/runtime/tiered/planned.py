"""A tiered table as a plan decided it, with the tiers that this machine can have.

========================== ==============================================================
tier of the plan           here
========================== ==============================================================
the device's, host DRAM    "ram": held in memory
CXL, persistent memory     "mapped": a memory-mapped file (put it on such memory, mounted)
SSD (a tier with IOPS)     "block": a file read past the page cache, in the tier's granule
========================== ==============================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codegen.runtime.tiered.bag import TieredEmbeddingBag
from codegen.runtime.tiered.pages import page_bytes_for
from codegen.runtime.tiered.table import Kind, Policy, Range, Shape
from ir.errors import InputError, did_you_mean
from ir.plan import Plan, TablePlan
from ir.topology import MemoryTier, Topology
from ir.workload import Optimizer

DRAM = ("ddr", "lpddr")  # names of host tiers that are the processor's own memory


@dataclass(frozen=True, slots=True)
class Layout:
    """What :meth:`TieredEmbeddingBag.create` needs besides the table."""

    ranges: tuple[Range, ...]
    cache_rows: int
    policy: Policy
    depth: int  # batches to prefetch


def tiered_layout(
    table: TablePlan,
    plan: Plan,
    *,
    batch_rows: int,
    rows: int | None = None,
    optimizer: Optimizer | None = None,
) -> Layout:
    """Ranges, cache and prefetch depth of a table, or of the share of it that one rank holds.

    Args:
        batch_rows: most distinct rows of a batch: without a cache in the plan, slots for the batches in flight are
            all that is needed.
        rows: that this rank holds; default all. Ranges and cache shrink in proportion.
        optimizer: default the workload's.

    Raises:
        InputError: the table names a tier that the topology lacks.
    """
    whole = table.rows if rows is None else rows
    kind = optimizer or plan.workload.optimizer
    if table.tiers is None:
        return Layout((Range("ram", whole),), 0, "lru", 0)
    cuts, seen = [0], 0
    for part in table.tiers.ranges:
        seen += part.rows
        cuts.append(round(seen * whole / table.rows))
    record = 4 * Shape(1, table.dim, kind, (Range("ram", 1),)).record
    ranges: list[Range] = []
    for part, start, stop in zip(table.tiers.ranges, cuts[:-1], cuts[1:], strict=True):
        if stop == start:
            continue
        tier = _tier(part.tier, plan.topology, table.name)
        here = _kind(tier, plan.topology)
        page = page_bytes_for(record, tier.granule if here == "block" else 4096)
        if ranges and here == ranges[-1].kind == "ram":
            ranges[-1] = Range("ram", ranges[-1].rows + stop - start, page)
        else:
            ranges.append(Range(here, stop - start, page))
    depth = table.tiers.prefetch_depth
    cached = table.tiers.cache
    wanted = round(cached.rows * whole / table.rows) if cached is not None else 0
    outside = sum(r.rows for r in ranges if r.kind != "ram")
    # the batch in use, those under way, and the one that is taken while the last is let go
    slots = max(wanted, (depth + 2) * batch_rows)
    return Layout(tuple(ranges), min(slots, outside), cached.policy if cached is not None else "lru", depth)


def tiered_bag(
    plan: Plan,
    name: str,
    folder: str | Path,
    *,
    batch_rows: int,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> tuple[TieredEmbeddingBag, int]:
    """A new tiered bag for a table of the plan, and how many batches to prefetch.

    Args:
        batch_rows, optimizer: as :func:`tiered_layout`.
        options: others of :meth:`TieredEmbeddingBag.create`, such as ``weights``, ``order`` and ``lr``.

    Raises:
        InputError: no such table, or one that is not summed or averaged.
    """
    if name not in plan.tables:
        raise InputError(f"the plan has no table {name!r}{did_you_mean(name, plan.tables)}")
    table = plan.tables[name]
    if table.pooling not in ("sum", "mean"):
        raise InputError(f"table {name!r} is pooled by {table.pooling!r}; a tiered bag takes sums and means")
    layout = tiered_layout(table, plan, batch_rows=batch_rows, optimizer=optimizer)
    bag = TieredEmbeddingBag.create(
        folder,
        table.rows,
        table.dim,
        layout.ranges,
        optimizer=optimizer or plan.workload.optimizer,
        cache_rows=layout.cache_rows,
        policy=layout.policy,
        mode="mean" if table.pooling == "mean" else "sum",
        **options,
    )
    return bag, layout.depth


def _tier(name: str, topology: Topology, table: str) -> MemoryTier:
    try:
        return topology.tier(name)
    except KeyError:
        raise InputError(
            f"table {table!r} is in tier {name!r}, which {topology.name} does not have; compile the plan again"
        ) from None


def _kind(tier: MemoryTier, topology: Topology) -> Kind:
    if tier in topology.device.tiers or tier.name in DRAM:
        return "ram"
    return "mapped" if tier.iops is None else "block"
