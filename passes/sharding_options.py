"""Which sharding options a table has: the columns of the sharding problem.

Options that are the same on a given topology are offered once, under the simpler name: inside one
host ``table_row_wise`` is ``row_wise`` and ``table_column_wise`` is ``column_wise``. An option the user
asks for by name is offered under that name.
"""

from __future__ import annotations

from collections.abc import Iterator

from ir.constraints import SHARDING_TYPES, Constraints, ShardingType
from ir.errors import InfeasibleError
from ir.ops import EmbeddingTable
from ir.sharding import COLUMN_SPLIT, ShardingOption, even_widths
from ir.topology import Topology
from ir.torchrec_rules import deduplication_excludes, torchrec_supported
from ir.workload import Workload

# Column counts tried: powers of two and their midpoints, so that neighbours differ by at most 1.5x.
_COLUMN_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def table_options(
    table: EmbeddingTable, topology: Topology, workload: Workload, constraints: Constraints
) -> tuple[ShardingOption, ...]:
    """The options of one table.

    Raises:
        InfeasibleError: the user's constraints leave none; names each rejected sharding type and why.
    """
    rule = constraints.for_table(table.name)
    asked = rule.sharding_types
    offered: list[ShardingOption] = []
    refused: list[str] = []
    for kind in asked or SHARDING_TYPES:
        reason = _not_offered(kind, table, topology, workload, constraints, explicit=asked is not None)
        if reason:
            refused.append(f"{kind}: {reason}")
            continue
        narrowest = rule.min_column_width or constraints.min_column_width
        options = tuple(_of_type(kind, table, topology, narrowest))
        if not options:
            refused.append(
                f"{kind}: {table.dim} columns have no split over these ranks into blocks of {narrowest} or more "
                "(min_column_width)"
            )
        for option in options:
            unsupported = torchrec_supported(
                table.rows,
                table.dim,
                option,
                topology.world_size,
                topology.host_size,
                pooling=table.pooling,
            )
            if unsupported:
                refused.append(f"{option.label}: {unsupported}")
            else:
                offered.append(option)
    if rule.ranks is not None:
        offered = [option for option in offered if option.sharding_type == "table_wise"]
        bad = [rank for rank in rule.ranks if rank >= topology.world_size]
        if bad:
            refused.append(f"rank {bad[0]} does not exist, the topology has {topology.world_size}")
            offered = []
    if not offered:
        raise InfeasibleError(
            f"table {table.name!r} has no sharding option left ({'; '.join(refused) or 'ranks need table_wise'})",
            conflict=(f"tables[{table.name}].sharding_types",),
            relaxation=f"allow table_wise for {table.name!r}",
        )
    return tuple(offered)


def _not_offered(
    kind: ShardingType,
    table: EmbeddingTable,
    topology: Topology,
    workload: Workload,
    constraints: Constraints,
    *,
    explicit: bool,
) -> str:
    """Why a sharding type makes no sense here; empty if it does."""
    world, hosts, host_size = topology.world_size, topology.hosts, topology.host_size
    if workload.dedup and kind in deduplication_excludes(topology.device.kind):
        return f"TorchRec cannot feed {kind} tables on a {topology.device.kind} with deduplicated batches"
    if world == 1 and kind != "table_wise" and not explicit:
        return "one rank holds every table whole"
    if kind in ("table_row_wise", "table_column_wise") and hosts == 1 and not explicit:
        return "the same as the simpler type inside one host"
    if kind == "grid_shard" and host_size == 1 and not explicit:
        return "the same as column_wise with one rank a host"
    if kind == "table_row_wise" and host_size == 1 and not explicit:
        return "the same as table_wise with one rank a host"
    if table.pooling == "none" and kind in (
        "data_parallel",
        "table_row_wise",
        "table_column_wise",
        "grid_shard",
    ):
        return "sequence embeddings run table-, column- and row-wise only"
    if kind in COLUMN_SPLIT and workload.optimizer == "rowwise_adagrad" and not constraints.allow_state_split:
        return "row-wise Adagrad keeps one state per row, which a column split would multiply"
    return ""


def _of_type(
    kind: ShardingType, table: EmbeddingTable, topology: Topology, min_width: int
) -> Iterator[ShardingOption]:
    if kind not in COLUMN_SPLIT:
        yield ShardingOption(kind, (table.dim,))
        return
    most = table.dim // max(4, min_width)
    places = {
        "column_wise": topology.world_size,
        "table_column_wise": topology.host_size,
        "grid_shard": topology.hosts,
    }[kind]
    for parts in _COLUMN_COUNTS:
        widths = even_widths(table.dim, parts) if parts <= min(most, places) else None
        if widths is not None:
            yield ShardingOption(kind, widths)
