"""Independent check of number formats and memory tiers, from the plan file alone.

Row layouts are re-derived from the identity of the format, tier capacities from rows and widths; nothing here
calls the passes or the cost models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ir.formats import FORMATS, Format, parse_format
from ir.plan import EVERY_RANK, Plan, TablePlan
from ir.tier_plan import PimTile
from ir.units import format_bytes

_PLAIN_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# bytes that a scale (and bias) takes, by its type
_SCALE_BYTES = {"none": 0, "e8m0": 1, "e4m3": 1, "fp32": 4, "fp16_bias": 4, "fp32_bias": 8}


def row_bytes(format: str, columns: int) -> float:
    """Bytes of a stored row of a table."""
    if format in _PLAIN_BYTES:
        return columns * _PLAIN_BYTES[format]
    if format not in FORMATS and ":" not in format:
        return 4.0 * columns  # the check of kernels names it
    spec = parse_format(format)
    if spec.granularity == "block":
        return -(-columns // spec.block) * _block_bytes(spec)
    scale = _SCALE_BYTES[spec.scale] if spec.granularity == "row" else 0
    size = -(-columns * spec.element.bits // 8) + scale
    return float(-(-size // spec.row_alignment) * spec.row_alignment)


def _block_bytes(spec: Format) -> int:
    pairs = spec.block // spec.sub_block if spec.sub_block else 0
    return -(-spec.block * spec.element.bits // 8) + _SCALE_BYTES[spec.scale] + -(-pairs * spec.sub_bits // 8)


def weight_bytes(table: TablePlan, columns: int) -> float:
    """Bytes of ``columns`` columns of one row of a table as the plan stores it."""
    return row_bytes(table.format or table.dtype, columns)


def state_share(table: TablePlan) -> float:
    """Size of the table's optimizer state, as a fraction of fp32 state."""
    return 1.0 if table.state_format is None else row_bytes(table.state_format, 4096) / (4 * 4096)


def device_share(plan: Plan, table: TablePlan) -> float:
    """Fraction of a table's rows that the devices themselves hold."""
    if table.tiers is None:
        return 1.0
    device = plan.topology.device.tiers[0].name
    rows = sum(piece.rows for piece in table.tiers.ranges if piece.tier == device)
    return (rows + (table.tiers.cache.rows if table.tiers.cache else 0)) / table.rows


def check_formats(plan: Plan) -> Iterator[str]:
    """Tables agree with the section, losses add up, bounds that were asked for hold."""
    section, asked = plan.decisions.formats, plan.constraints.formats
    if section is None:
        for table in plan.table_plans:
            if table.format is not None or asked is not None:
                yield f"table {table.name!r} has a format but the plan has no section on formats"
        return
    for table in plan.table_plans:
        if section.format_of(table.name) != table.format:
            yield f"table {table.name!r} is in {table.format} but its section says {section.format_of(table.name)}"
    total = sum(tensor.loss for tensor in section.tensors)
    if not math.isclose(total, section.loss, rel_tol=1e-9, abs_tol=1e-15):
        yield f"the losses of the tensors add up to {total}, the section says {section.loss}"
    if section.lower_bound > section.objective * (1 + 1e-9):
        yield f"the bound {section.lower_bound} of the formats is above their objective {section.objective}"
    if asked is None:
        yield "the plan decides formats that nobody asked for"
        return
    spent = sum(max(0.0, tensor.loss) for tensor in section.tensors)
    if asked.max_loss is not None and spent > asked.max_loss * (1 + 1e-9):
        yield f"the predicted loss {spent} exceeds formats.max_loss {asked.max_loss}"
    stored = [tensor for tensor in section.tensors if tensor.kind in ("table", "weight")]
    bits = sum(tensor.elements * tensor.bits for tensor in stored) / max(1.0, sum(t.elements for t in stored))
    if asked.average_bits is not None and bits > asked.average_bits * (1 + 1e-9):
        yield f"{bits} bits per element exceed formats.average_bits {asked.average_bits}"


def check_tiers(plan: Plan) -> Iterator[str]:
    """Every row in exactly one tier that exists; every host tier within its capacity and its operations."""
    asked = plan.constraints.tiers
    known = {tier.name for tier in (plan.topology.device.tiers[0], *plan.topology.host_tiers)}
    for table in plan.table_plans:
        if table.tiers is None:
            continue
        if asked is None:
            yield f"table {table.name!r} uses memory tiers that nobody asked for"
            return
        rows = sum(piece.rows for piece in table.tiers.ranges)
        if rows != table.rows:
            yield f"table {table.name!r}: {rows} rows are in tiers, it has {table.rows}"
        for piece in table.tiers.ranges:
            if piece.tier not in known:
                yield f"table {table.name!r}: the topology has no tier {piece.tier!r}"
                return
        if table.tiers.prefetch_depth > asked.prefetch_depth:
            depth = table.tiers.prefetch_depth
            yield f"table {table.name!r} is fetched {depth} steps ahead, {asked.prefetch_depth} are allowed"
        for before, after in itertools.pairwise(table.tiers.ranges):
            # a range ends on a whole row, so either side may be one row off the split that was priced
            hottest, coolest = before.accesses / max(1, before.rows - 1), after.accesses / (after.rows + 1)
            if hottest < coolest * (1 - 1e-6):
                yield f"table {table.name!r}: rows in {after.tier} are hotter than rows in {before.tier}"
        yield from _pooled_rows(plan, table)
    if asked is not None:
        yield from _host_capacity(plan)
        yield from _operations(plan)


def _pooled_rows(plan: Plan, table: TablePlan) -> Iterator[str]:
    """Rows that processors in a memory pool: a lookup they can do, and tiles that fit them."""
    assert table.tiers is not None
    tile = table.tiers.pim
    for piece in table.tiers.ranges:
        there = [tier for tier in plan.topology.host_tiers if tier.name == piece.tier]
        processors = there[0].processors if there and plan.mode == "inference" else None
        if processors is None or tile is None:
            if processors is not None:
                yield f"table {table.name!r}: rows in {piece.tier} are pooled there, but no tile is stated"
            continue
        if table.pooling == "none":
            yield f"table {table.name!r} returns rows, the processors of {piece.tier} return sums"
        for shard in table.shards:
            tiles = tile.row_tiles * -(-shard.cols // min(tile.cols, shard.cols))
            if tiles > processors:
                yield f"table {table.name!r}: {tiles} tiles on {processors} processors of {piece.tier}"
                return
            rows = shard.rows * piece.rows / table.rows / tile.row_tiles
            size = rows * _pooled_row_bytes(tile, min(tile.cols, shard.cols))
            if size > there[0].capacity / processors:
                yield f"table {table.name!r}: a tile of {format_bytes(size)} on one processor of {piece.tier}"
                return


def _pooled_row_bytes(tile: PimTile, columns: int) -> int:
    """Four bytes a column, rows of a tile padded to the 8 bytes that one access moves."""
    width = min(tile.cols, columns)
    return -(-columns // width) * (-(-4 * width // 8) * 8)


def _row_with_state(plan: Plan, table: TablePlan, columns: int) -> float:
    element, row = {"sgd": (0, 0), "adagrad": (4, 0), "rowwise_adagrad": (0, 4), "adam": (8, 0)}[
        plan.workload.optimizer
    ]
    state = (element * columns + row) * state_share(table) if plan.mode == "train" else 0.0
    return weight_bytes(table, columns) + state


def _host_capacity(plan: Plan) -> Iterator[str]:
    hosts = plan.world_size // plan.topology.host_size
    for tier in plan.topology.host_tiers:
        used = [0.0] * hosts
        for table in plan.table_plans:
            if table.tiers is None:
                continue
            share = sum(piece.rows for piece in table.tiers.ranges if piece.tier == tier.name) / table.rows
            pooled = table.tiers.pim if tier.processors is not None and plan.mode == "inference" else None
            for shard in table.shards if share else ():
                row = _row_with_state(plan, table, shard.cols)
                size = shard.rows * share * (_pooled_row_bytes(pooled, shard.cols) if pooled else row)
                for rank in range(plan.world_size) if shard.rank == EVERY_RANK else (shard.rank,):
                    used[rank // plan.topology.host_size] += size
        limit = tier.capacity * (1 - plan.constraints.memory_reserve)
        if max(used) > limit * (1 + 1e-6):
            yield f"host tier {tier.name} holds {format_bytes(max(used))} of {format_bytes(limit)} on one host"


def _operations(plan: Plan) -> Iterator[str]:
    """Fetches of tables that use one host tier, spread evenly over the hosts, fit its IOPS."""
    hosts = plan.world_size // plan.topology.host_size
    for tier in plan.topology.host_tiers:
        blocks = 0.0
        for table in plan.table_plans:
            if table.tiers is None:
                continue
            below = {piece.tier for piece in table.tiers.ranges} - {plan.topology.device.tiers[0].name}
            if below == {tier.name}:
                blocks += table.tiers.fetched_rows * -(
                    -_row_with_state(plan, table, table.dim) // tier.granule
                )
        if tier.iops is not None and blocks / hosts / tier.iops > plan.timeline.step * (1 + 1e-6):
            yield f"host tier {tier.name} reads {blocks / hosts:.3g} blocks a step, more than its IOPS allow"
