"""The IR verifier: what must hold before and after each pass.

Model
    - names of tables and of ops are unique;
    - a table has rows and columns;
    - the kind of an op is known, its inputs are earlier ops, its counts are finite and not negative;
    - a lookup names tables that exist, and only lookups name tables.

Sharding decisions, once made
    - each table has one decision, of the model's rows, columns and element type;
    - ranks exist; a column split is of a type that allows it, its widths are multiples of 4 and its
      blocks cover each column exactly once;
    - data_parallel: one whole copy on every rank, kernel "dense";
    - table_wise, column_wise, table_column_wise: each column block has all rows on one rank; for
      table_column_wise all of them in one host;
    - row_wise: block i of :func:`ir.sharding.row_blocks` over all ranks lies on rank i; table_row_wise
      and grid_shard: the same over the ranks of one host (empty blocks may be left out);
    - so each row and column of a table is covered exactly once (or once a rank).

Other decisions, once made
    - the certificate's bound is not above its objective;
    - one memory record a rank, in order, nothing negative, and the sum within the limit;
    - events start and last zero seconds or more, end by the end of the step, and do not overlap on
      their stream;
    - towers hold each table once and together cover the ranks once, in order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ir.errors import IRError
from ir.ops import OP_KINDS, Op
from ir.plan import EVERY_RANK, Certificate, RankMemory, Shard, TablePlan, Timeline
from ir.program import Model, Program
from ir.sharding import COLUMN_MULTIPLE, COLUMN_SPLIT, row_blocks
from ir.topology import Topology
from ir.towers import faults as tower_faults

SHOWN = 10  # faults in the message
SLACK = 1e-9  # relative, for sums of floats


def verify_program(program: Program) -> None:
    """Check every invariant of the module's list; raises IRError that lists the faults."""
    faults = list(model_faults(program.model))
    if program.tables is not None:
        faults += _decisions(program.model, program.tables, program.topology)
    if program.certificate is not None:
        faults += _certificate(program.certificate)
    if program.memory is not None:
        faults += _memory(program.memory, program.topology.world_size)
    if program.timeline is not None:
        faults += _timeline(program.timeline)
    if program.decisions.towers is not None:
        names = [table.name for table in program.model.tables]
        faults += tower_faults(program.decisions.towers, program.topology.world_size, names)
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise IRError(f"the IR of {program.model.name} is broken: {'; '.join(faults[:SHOWN])}{more}")


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _count(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def model_faults(model: Model) -> Iterator[str]:
    """What is wrong with a model's tables and ops, one sentence each."""
    for name in _twice([table.name for table in model.tables]):
        yield f"two tables are called {name!r}"
    for name in _twice([op.name for op in model.ops]):
        yield f"two ops are called {name!r}"
    for table in model.tables:
        if table.rows < 1 or table.dim < 1:
            yield f"table {table.name!r} has shape ({table.rows}, {table.dim})"
    tables = {table.name for table in model.tables}
    earlier: set[str] = set()
    for op in model.ops:
        yield from _op(op, earlier, tables)
        earlier.add(op.name)


def _op(op: Op, earlier: set[str], tables: set[str]) -> Iterator[str]:
    if op.kind not in OP_KINDS:
        yield f"op {op.name!r} is of unknown kind {op.kind!r}"
    if op.phase not in ("bottom", "top"):
        yield f"op {op.name!r} is of unknown phase {op.phase!r}"
    for source in op.inputs:
        if source not in earlier:
            yield f"op {op.name!r} reads {source!r}, which is no earlier op"
    if any(size < 0 for size in op.out_shape):
        yield f"op {op.name!r} has the shape {op.out_shape}"
    if not (_count(op.flops) and _count(op.params) and _count(op.activation_bytes) and _count(op.gemm_rows)):
        yield f"op {op.name!r} has a count that is negative or not finite"
    if op.gemm is not None and min(op.gemm) < 0:
        yield f"op {op.name!r} has the GEMM {op.gemm}"
    if (op.kind == "lookup") != bool(op.tables):
        yield f"op {op.name!r} is of kind {op.kind!r} and looks up {len(op.tables)} tables"
    for table in op.tables:
        if table not in tables:
            yield f"op {op.name!r} looks up {table!r}, which is no table"


def _decisions(model: Model, plans: Sequence[TablePlan], topology: Topology) -> Iterator[str]:
    for name in _twice([plan.name for plan in plans]):
        yield f"table {name!r} is decided twice"
    decided = {plan.name: plan for plan in plans}
    known = {table.name: table for table in model.tables}
    for name in decided.keys() - known.keys():
        yield f"a decision is for {name!r}, which is no table"
    for table in model.tables:
        plan = decided.get(table.name)
        if plan is None:
            yield f"table {table.name!r} has no decision"
        elif (plan.rows, plan.dim, plan.dtype) != (table.rows, table.dim, table.dtype):
            yield (
                f"table {table.name!r} is decided as {plan.rows} x {plan.dim} {plan.dtype}, "
                f"the model has {table.rows} x {table.dim} {table.dtype}"
            )
        else:
            yield from _sharding(plan, topology)


def _sharding(plan: TablePlan, topology: Topology) -> Iterator[str]:
    what = f"table {plan.name!r} ({plan.sharding_type})"
    if not plan.shards:
        yield f"{what} has no shards"
        return
    if plan.sharding_type == "data_parallel":
        yield from _copies(plan, what)
        return
    ranks = [shard.rank for shard in plan.shards]
    if min(ranks) < 0 or max(ranks) >= topology.world_size:
        yield f"{what} has shards on ranks {min(ranks)}..{max(ranks)} of {topology.world_size}"
        return
    blocks: dict[tuple[int, int], Sequence[Shard]] = _by_columns(plan.shards)
    yield from _columns(plan, what, sorted(blocks))
    for (col, _), shards in blocks.items():
        yield from _rows(plan, f"{what}, columns from {col}", shards, topology)
    hosts = {topology.host_of(rank) for rank in ranks}
    if plan.sharding_type == "table_column_wise" and len(hosts) > 1:
        yield f"{what} is spread over hosts {sorted(hosts)}"


def _by_columns(shards: Sequence[Shard]) -> dict[tuple[int, int], Sequence[Shard]]:
    """Shards by column block; most tables have one, whose shards need no sorting."""
    columns = {(shard.col, shard.cols) for shard in shards}
    if len(columns) == 1:
        return {columns.pop(): shards}
    blocks: dict[tuple[int, int], list[Shard]] = {}
    for shard in shards:
        blocks.setdefault((shard.col, shard.cols), []).append(shard)
    return dict(blocks)


def _copies(plan: TablePlan, what: str) -> Iterator[str]:
    if [shard.rank for shard in plan.shards] != [EVERY_RANK]:
        yield f"{what} is not one shard on every rank"
    whole = (0, 0, plan.rows, plan.dim)
    if any((shard.row, shard.col, shard.rows, shard.cols) != whole for shard in plan.shards):
        yield f"{what} has a copy that is not the whole table"
    if plan.compute_kernel != "dense":
        yield f"{what} has kernel {plan.compute_kernel!r}; copies train with 'dense'"


def _columns(plan: TablePlan, what: str, blocks: Sequence[tuple[int, int]]) -> Iterator[str]:
    if len(blocks) > 1 and plan.sharding_type not in COLUMN_SPLIT:
        yield f"{what} has its columns split"
    end = 0
    for col, width in blocks:
        if col != end or width < 1:
            yield f"{what}: columns {min(col, end)}..{max(col, end)} are not covered exactly once"
            return
        end = col + width
    if end != plan.dim:
        yield f"{what}: its blocks end at column {end} of {plan.dim}"
    if len(blocks) > 1 and any(width % COLUMN_MULTIPLE for _, width in blocks):
        yield f"{what}: widths {[width for _, width in blocks]} are not multiples of {COLUMN_MULTIPLE}"


def _rows(plan: TablePlan, what: str, shards: Sequence[Shard], topology: Topology) -> Iterator[str]:
    if plan.sharding_type in ("table_wise", "column_wise", "table_column_wise"):
        if len(shards) != 1 or (shards[0].row, shards[0].rows) != (0, plan.rows):
            yield f"{what}: not exactly one shard with all {plan.rows} rows"
        return
    if plan.sharding_type == "row_wise":
        first, ranks = 0, topology.world_size
    else:
        first, ranks = topology.host_of(shards[0].rank) * topology.host_size, topology.host_size
    blocks = enumerate(row_blocks(plan.rows, ranks), first)
    wanted = [(rank, start, count) for rank, (start, count) in blocks if count]
    found = [(shard.rank, shard.row, shard.rows) for shard in shards if shard.rows]
    if found != wanted and sorted(found) != wanted:
        yield (
            f"{what}: its row blocks are not ceil({plan.rows} / {ranks}) rows a rank, in order, "
            f"from rank {first}"
        )


def _certificate(certificate: Certificate) -> Iterator[str]:
    if not (_count(certificate.objective) and _count(certificate.lower_bound)):
        yield f"the certificate has objective {certificate.objective} and bound {certificate.lower_bound}"
    elif certificate.lower_bound > certificate.objective * (1 + SLACK):
        yield f"the proved bound {certificate.lower_bound} is above the objective {certificate.objective}"


def _memory(memory: Sequence[RankMemory], world: int) -> Iterator[str]:
    if [record.rank for record in memory] != list(range(world)):
        yield f"memory is not given for ranks 0..{world - 1} in order"
    for record in memory:
        negative = [purpose for purpose, used in record.used.items() if used < 0]
        if negative:
            yield f"rank {record.rank} uses a negative number of bytes for {negative[0]!r}"
        if record.total > record.limit:
            yield f"rank {record.rank} uses {record.total} bytes of {record.limit}"


def _timeline(timeline: Timeline) -> Iterator[str]:
    if not _count(timeline.step):
        yield f"the step lasts {timeline.step} s"
        return
    slack = SLACK * max(timeline.step, 1e-12)
    streams: dict[str, list[tuple[float, float, str]]] = {}
    for event in timeline.events:
        if not (_count(event.start) and _count(event.duration)):
            yield f"event {event.name!r} starts at {event.start} s and lasts {event.duration} s"
            continue
        if event.start + event.duration > timeline.step + slack:
            yield f"event {event.name!r} ends after the step"
        streams.setdefault(event.stream, []).append((event.start, event.duration, event.name))
    for stream, events in streams.items():
        for (start, duration, name), (following, _, other) in pairwise(sorted(events)):
            if start + duration > following + slack:
                yield f"events {name!r} and {other!r} overlap on stream {stream!r}"
