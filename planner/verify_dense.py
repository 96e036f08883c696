"""Independent check of a plan's dense section: meshes, units, bytes, and groups of tables; no pass, no cost model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ir.dense_plan import DensePlan, GroupTable, SparseReplicas
from ir.dtypes import nbytes
from ir.plan import Plan
from ir.units import format_bytes

_COPY = 4 + 4 + 8  # bytes a parameter: fp32 weight and gradient, two fp32 moments
_SLACK = 1.0  # bytes: rounding
# TorchRec 1.8: process groups of kinds by hosts are of all ranks, copies are broadcast from rank 0 of all ranks
_IN_GROUPS = ("table_wise", "column_wise", "row_wise")


def check_dense(plan: Plan) -> Iterator[str]:
    """The split covers the ranks, units name modules once, bytes follow from the split, memory holds the share."""
    section = plan.decisions.dense
    if section is None:
        return
    host, world = plan.topology.host_size, plan.world_size
    meant = {"ddp": 1, "tp": 1, "hsdp": host, "fsdp": world}[section.strategy]
    if section.shard != meant or section.shard * section.replicas != world:
        yield (
            f"{section.strategy} splits over {section.shard} ranks with {section.replicas} replicas; "
            f"{meant} with {world // meant} are meant"
        )
    twice = [m for m, count in Counter(m for unit in section.units for m in unit).items() if count > 1]
    if twice:
        yield f"module {twice[0]!r} is gathered in two units"
    yield from _pairs(plan, section)
    request = plan.constraints.dense
    allowed = None if request is None else request.strategies
    if allowed is not None and section.candidates and section.strategy not in allowed:
        yield f"{section.strategy} is not among the strategies asked for"
    if section.candidates:
        yield from _bytes(plan, section)
    yield from _memory(plan, section)
    if section.sparse is not None:
        yield from _groups(plan, section.sparse)


def _pairs(plan: Plan, section: DensePlan) -> Iterator[str]:
    """Layers split by tensor parallelism: each once, over the ranks of a host, in whole units."""
    if (section.strategy == "tp") != bool(section.pairs) or (section.tensor > 1) != bool(section.pairs):
        yield f"{section.strategy} splits {len(section.pairs)} pairs of layers over {section.tensor} ranks"
        return
    if section.pairs and section.tensor != plan.topology.host_size:
        yield f"layers are split over {section.tensor} ranks, a host has {plan.topology.host_size}"
    twice = [m for m, n in Counter(m for p in section.pairs for m in (p.first, p.second)).items() if n > 1]
    if twice:
        yield f"layer {twice[0]!r} is split in two pairs"
    for pair in section.pairs:
        if pair.units % section.tensor:
            yield f"the {pair.units} units of {pair.first!r} do not divide over {section.tensor} ranks"
    if sum(pair.params for pair in section.pairs) > plan.model.dense_params:
        yield "more parameters are split than the dense part has"
    decided = plan.decisions
    beside = [decided.compression is not None, decided.towers is not None and decided.towers.applied]
    if section.pairs and (any(beside) or any(table.tiers is not None for table in plan.table_plans)):
        yield "split layers run beside TorchRec's tables, without towers, codecs and tiers"


def _pair_bytes(plan: Plan, section: DensePlan) -> float:
    """Of a step's collectives around and of split layers, one collective at a time."""
    item = nbytes(plan.workload.compute_dtype)
    samples = plan.workload.global_batch / plan.world_size * section.tensor
    sent = 0.0
    for pair in section.pairs:
        for elements in (pair.inputs, pair.outputs):
            sent += 2 * elements * samples * item  # one way forward, the other backward
        if plan.world_size > section.tensor:
            sent += 2 * pair.params / section.tensor * item
        sent -= 2 * pair.params * item  # not among the replicated gradients
    return sent


def _bytes(plan: Plan, section: DensePlan) -> Iterator[str]:
    """Messages counted one collective at a time."""
    size = plan.model.dense_params * nbytes(plan.workload.compute_dtype)
    sent = _pair_bytes(plan, section)
    if section.shard > 1:
        sent += size  # reduce-scatter
        sent += size * (2 if section.reshard_after_forward else 1)  # gathers
        sent += 2 * size / section.shard if section.replicas > 1 else 0.0
    elif section.replicas > 1:
        sent += 2 * size
    if abs(section.message_bytes - sent) > _SLACK:
        yield f"a step's collectives have {section.message_bytes} bytes of buffers, {sent:.0f} are meant"
    fitting = [c.step_seconds for c in section.candidates if c.step_seconds is not None]
    mine = [
        c.step_seconds
        for c in section.candidates
        if (c.strategy, c.reshard_after_forward, c.unit_bytes)
        == (section.strategy, section.reshard_after_forward, section.unit_bytes)
    ]
    if len(mine) != 1 or mine[0] is None:
        yield "the decision is not among the candidates that fit"
    elif mine[0] > min(fitting) * 1.001 * (1 + 1e-9):
        yield f"a candidate of {min(fitting)} s is faster than the decision's {mine[0]} s"


def _memory(plan: Plan, section: DensePlan) -> Iterator[str]:
    """A rank's share of weights, gradients and state, and one gathered copy where weights are kept gathered."""
    if plan.mode != "train":
        return
    split = sum(pair.params for pair in section.pairs)
    share = (plan.model.dense_params - split + split / section.tensor) * _COPY / section.shard
    if section.shard > 1 and not section.reshard_after_forward:
        share += plan.model.dense_params * nbytes(plan.workload.compute_dtype)
    for entry in plan.memory:
        claimed = sum(size for purpose, size in entry.used.items() if purpose.startswith("dense"))
        if claimed + _SLACK * len(entry.used) < share:
            yield (
                f"rank {entry.rank} claims {format_bytes(claimed)} for the dense part, its share is {format_bytes(share)}"
            )
            return


def _groups(plan: Plan, sparse: SparseReplicas) -> Iterator[str]:
    if plan.world_size % sparse.groups:
        yield f"{sparse.groups} groups do not divide {plan.world_size} ranks"
        return
    if sparse.groups == 1:
        if sparse.tables:
            yield "one group has a sharding of its own"
        return
    ranks = plan.world_size // sparse.groups
    held = {table.name: table for table in sparse.tables}
    for name in sorted(set(plan.tables) ^ set(held)):
        yield f"table {name!r} is in the plan or in its groups only"
    copy = 0.0
    for table in plan.table_plans:
        found = held.get(table.name)
        if found is not None:
            yield from _columns(found, table.dim, ranks)
            copy += table.rows * table.dim  # no table type is narrower than a byte
    if sparse.extra_bytes < copy * (sparse.groups - 1) / plan.world_size - _SLACK:
        yield (
            f"{sparse.groups} copies of {copy:.0f} elements add {sparse.extra_bytes} bytes a rank, fewer than elements"
        )


def _columns(table: GroupTable, dim: int, ranks: int) -> Iterator[str]:
    if table.sharding_type not in _IN_GROUPS:
        yield (
            f"{table.name!r} is {table.sharding_type} in a group, and TorchRec sets that up over all ranks; "
            f"{', '.join(_IN_GROUPS)} run in a group"
        )
        return
    reached = 0
    for col, cols, rank in sorted(table.columns):
        if col != reached:
            yield f"columns of {table.name!r} are not covered once at {col} in a group"
        reached = col + cols
        if not 0 <= rank < ranks:
            yield f"{table.name!r} lies on rank {rank} of a group of {ranks}"
    if reached != dim:
        yield f"{reached} of the {dim} columns of {table.name!r} are covered in a group"
