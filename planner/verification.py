"""Independent check of a plan: feasibility re-derived from the plan file alone.

Nothing here calls the passes or the cost models. Coverage is counted cell by cell over the rectangles
the shards cut a table into; memory is re-added from rows, widths and the optimizer's state; geometry is
checked against what each sharding type means. Checks, in order: ``format``, ``tables``, ``ranks``,
``coverage``, ``geometry``, ``kernels``, ``memory``, ``formats``, ``tiers``, ``certificate``, ``timeline``, ``dedup``,
``dense``, ``towers``, ``composition``, ``parallelism``, ``parallel_memory``, ``model``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ir.ops import EmbeddingTable
from ir.plan import EVERY_RANK, FORMAT_VERSION, Plan, Shard, TablePlan
from ir.units import format_bytes
from planner.verify_collectives import check_collectives
from planner.verify_composition import check_composition
from planner.verify_compression import compression_faults
from planner.verify_dedup import check_dedup
from planner.verify_dense import check_dense
from planner.verify_growth import check_growth
from planner.verify_llm import check_parallel_memory, check_parallelism
from planner.verify_serving import check_serving
from planner.verify_storage import check_formats, check_tiers, device_share, state_share, weight_bytes
from planner.verify_towers import check_towers

_WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# bytes of optimizer state a parameter, and a row
_STATE_BYTES = {"sgd": (0, 0), "adagrad": (4, 0), "rowwise_adagrad": (0, 4), "adam": (8, 0)}


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of one check; ``faults`` is empty when it holds."""

    check: str
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """The check holds."""
        return not self.faults


def verify(plan: Plan, tables: tuple[EmbeddingTable, ...] | None = None) -> tuple[Finding, ...]:
    """Run every check; with ``tables`` also that the plan is for that model."""
    checks: list[tuple[str, Callable[[Plan], Iterator[str]]]] = [
        ("format", _format),
        ("tables", _tables),
        ("ranks", _ranks),
        ("coverage", _coverage),
        ("geometry", _geometry),
        ("kernels", _kernels),
        ("memory", _memory),
        ("formats", check_formats),
        ("tiers", check_tiers),
        ("certificate", _certificate),
        ("timeline", _timeline),
        ("dedup", check_dedup),
        ("dense", check_dense),
        ("towers", check_towers),
        ("growth", check_growth),
        ("compression", compression_faults),
        ("collectives", check_collectives),
        ("composition", check_composition),
        ("parallelism", check_parallelism),
        ("parallel_memory", check_parallel_memory),
        ("serving", check_serving),
    ]
    findings = []
    for name, check in checks:
        findings.append(Finding(name, tuple(check(plan))))
        if name == "ranks" and findings[-1].faults:
            break  # the later checks index by rank
    if tables is not None:
        findings.append(Finding("model", tuple(_model(plan, tables))))
    return tuple(findings)


def _format(plan: Plan) -> Iterator[str]:
    if plan.format_version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        yield f"format_version {plan.format_version} is not {FORMAT_VERSION}"


def _tables(plan: Plan) -> Iterator[str]:
    seen: set[str] = set()
    for table in plan.table_plans:
        if table.name in seen:
            yield f"table {table.name!r} is decided twice"
        seen.add(table.name)
        if not table.shards:
            yield f"table {table.name!r} has no shards"
    if not plan.table_plans and plan.decisions.parallelism is None and plan.decisions.serving is None:
        yield "the plan decides no table"


def _ranks(plan: Plan) -> Iterator[str]:
    world = plan.world_size
    for table in plan.table_plans:
        copied = table.sharding_type == "data_parallel"
        for shard in table.shards:
            if (shard.rank == EVERY_RANK) != copied:
                where = "every rank" if shard.rank == EVERY_RANK else f"rank {shard.rank} alone"
                yield f"table {table.name!r} is {table.sharding_type} but has a shard on {where}"
                break
        bad = [shard.rank for shard in table.shards if shard.rank >= world]
        if bad:
            yield f"table {table.name!r} has a shard on rank {bad[0]}; the topology has {world} ranks"
    if [entry.rank for entry in plan.memory] != list(range(world)):
        yield f"memory is not listed for ranks 0..{world - 1} in order"


def _coverage(plan: Plan) -> Iterator[str]:
    """Each row and column exactly once; the one shard of a copied table stands for a copy on every rank."""
    for table in plan.table_plans:
        fault = _tiling_fault(table, list(table.shards))
        if fault:
            yield f"table {table.name!r}: {fault}"


def _tiling_fault(table: TablePlan, shards: list[Shard]) -> str:
    """Sweep over the row edges: between two edges the shards present must tile the columns."""
    for s in shards:
        if s.row + s.rows > table.rows or s.col + s.cols > table.dim:
            return f"a shard reaches row {s.row + s.rows}, column {s.col + s.cols} outside {table.rows} x {table.dim}"
    shards = [s for s in shards if s.rows and s.cols]
    edges = sorted({0, table.rows, *(s.row for s in shards), *(s.row + s.rows for s in shards)})
    for top, bottom in itertools.pairwise(edges):
        spans = sorted((s.col, s.col + s.cols) for s in shards if s.row <= top and bottom <= s.row + s.rows)
        reached = 0
        for left, right in spans:
            if left > reached:
                return f"rows {top}..{bottom - 1}, columns {reached}..{left - 1} are on no rank"
            if left < reached:
                return f"rows {top}..{bottom - 1}, columns {left}..{reached - 1} are held twice"
            reached = right
        if reached < table.dim:
            return f"rows {top}..{bottom - 1}, columns {reached}..{table.dim - 1} are on no rank"
    return ""


def _geometry(plan: Plan) -> Iterator[str]:
    for table in plan.table_plans:
        fault = _geometry_fault(plan, table)
        if fault:
            yield f"table {table.name!r} ({table.sharding_type}): {fault}"


def _geometry_fault(plan: Plan, table: TablePlan) -> str:
    kind, shards = table.sharding_type, table.shards
    columns = sorted({(s.col, s.cols) for s in shards})
    host = plan.topology.host_size
    if len(columns) > 1 and any(cols % 4 for _, cols in columns):
        return "a column block is not a multiple of 4 wide"
    if kind in ("data_parallel", "table_wise", "row_wise", "table_row_wise") and len(columns) > 1:
        return "columns are split"
    if kind in ("data_parallel", "table_wise") and len(shards) != 1:
        return f"{len(shards)} shards where one is meant"
    if kind in ("column_wise", "table_column_wise") and any(s.rows != table.rows for s in shards):
        return "rows are split"
    if table.pooling == "max" and any(s.rows != table.rows for s in shards):
        return "rows are split, and partial maxima of a bag are not to be summed"
    if kind == "table_column_wise" and len({s.rank // host for s in shards}) != 1:
        return "shards on more than one host"
    if kind == "row_wise":
        return _row_split_fault(list(shards), table.rows, 0, plan.world_size)
    if kind in ("table_row_wise", "grid_shard"):
        for column in columns:
            block = [s for s in shards if (s.col, s.cols) == column]
            fault = _row_split_fault(block, table.rows, min(s.rank for s in block) // host * host, host)
            if fault:
                return fault
    return ""


def _row_split_fault(shards: list[Shard], rows: int, first: int, ranks: int) -> str:
    """TorchRec runs ceil(rows / ranks) rows a rank, in rank order, and nothing else."""
    each = (rows + ranks - 1) // ranks
    by_rank = {s.rank: s for s in shards}
    if len(shards) != ranks or set(by_rank) != set(range(first, first + ranks)):
        return f"row blocks must sit one each on ranks {first}..{first + ranks - 1}"
    for i in range(ranks):
        shard = by_rank[first + i]
        expected = max(0, min(each, rows - i * each))
        if shard.rows != expected or (expected and shard.row != i * each):
            return f"rank {first + i} holds {shard.rows} rows from {shard.row}, {expected} from {i * each} are meant"
    return ""


def _kernels(plan: Plan) -> Iterator[str]:
    for table in plan.table_plans:
        if table.sharding_type == "data_parallel" and table.compute_kernel != "dense":
            yield f"table {table.name!r}: data-parallel tables run with the dense kernel only"
        if table.dtype not in _WEIGHT_BYTES:
            yield f"table {table.name!r}: no training kernel for {table.dtype} tables"


def _memory(plan: Plan) -> Iterator[str]:
    """Weights and optimizer state re-added; the plan's figure may not be below, nor above the limit."""
    needed = [0.0] * plan.world_size
    state_element, state_row = _STATE_BYTES[plan.workload.optimizer] if plan.mode == "train" else (0, 0)
    for table in plan.table_plans:
        held, state = device_share(plan, table), state_share(table)
        for shard in table.shards:
            size = weight_bytes(table, shard.cols) + (shard.cols * state_element + state_row) * state
            size *= shard.rows * held
            for rank in range(plan.world_size) if shard.rank == EVERY_RANK else (shard.rank,):
                needed[rank] += size
    capacity = plan.constraints.memory_limit or plan.topology.device.tiers[0].capacity
    usable = int(capacity * (1 - plan.constraints.memory_reserve))
    for entry in plan.memory:
        if entry.limit > usable:
            yield f"rank {entry.rank} claims a limit of {format_bytes(entry.limit)}, the device has {format_bytes(usable)}"
        if entry.total > usable:
            yield f"rank {entry.rank} uses {format_bytes(entry.total)} of {format_bytes(usable)}"
        if entry.total < needed[entry.rank] * (1 - 1e-9):
            yield (
                f"rank {entry.rank} claims {format_bytes(entry.total)}, its shards alone need "
                f"{format_bytes(needed[entry.rank])}"
            )


def _certificate(plan: Plan) -> Iterator[str]:
    certificate = plan.certificate
    if certificate.lower_bound > certificate.objective * (1 + 1e-9):
        yield f"the lower bound {certificate.lower_bound} is above the objective {certificate.objective}"
    if certificate.status == "optimal" and certificate.gap > 1e-6:
        yield f"the status is optimal but the gap is {100 * certificate.gap:.3f} %"


def _timeline(plan: Plan) -> Iterator[str]:
    """No two events of a stream overlap, and the step ends with the last of them."""
    events = plan.timeline.events
    for stream in dict.fromkeys(event.stream for event in events):
        reached = 0.0
        for event in sorted((e for e in events if e.stream == stream), key=lambda e: (e.start, e.duration)):
            if event.start < reached - 1e-12:
                yield f"{event.name} starts on stream {stream} before the one before it ends"
            reached = max(reached, event.start + event.duration)
    if events:
        end = max(event.start + event.duration for event in events)
        if abs(end - plan.timeline.step) > 1e-9 * max(end, plan.timeline.step):
            yield f"the step is {plan.timeline.step} s but the last event ends at {end} s"


def _model(plan: Plan, tables: tuple[EmbeddingTable, ...]) -> Iterator[str]:
    model = {table.name: table for table in tables}
    for name in sorted(set(model) - set(plan.tables)):
        yield f"the model's table {name!r} is not in the plan"
    for name, decided in plan.tables.items():
        table = model.get(name)
        if table is None:
            yield f"the plan's table {name!r} is not in the model"
        elif (table.rows, table.dim) != (decided.rows, decided.dim):
            yield f"table {name!r} is {decided.rows} x {decided.dim} in the plan, {table.rows} x {table.dim} in the model"
