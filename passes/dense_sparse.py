"""2D sparse parallelism: M groups of ranks, each with all tables sharded inside the group.

A group is T/M consecutive ranks and works on 1/M of the batch, so that the exchanges of ids and vectors stay in
it (in a host, where groups are hosts). Rank i of every group holds the same shards; every ``sync_every`` steps
their weights and optimizer state are averaged over the groups. The tables of a group are planned as
those of a machine of T/M ranks; the dense part stays parallel over all T ranks. Source: TorchRec's
``DMPCollection``.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.collective.planning import communication, dense_reduction
from cost_models.dense import replication_bytes
from cost_models.dense_prices import sharded_dense
from cost_models.embedding import PHASES, phase_overheads
from cost_models.placed import rank_memory, rank_seconds
from cost_models.step import step_timeline
from ir.constraints import Constraints, ShardingType
from ir.dense_plan import DensePlan, DenseRequest, GroupTable, SparseCandidate, SparseReplicas
from ir.errors import InfeasibleError, InputError
from ir.plan import TablePlan
from ir.program import Program
from ir.topology import Topology
from passes.compression import compressed_phases
from passes.memory import MemoryAccounting
from passes.sharding import Sharding

# TorchRec makes the process groups of kinds by hosts over all ranks, and fills copies from rank 0 of all ranks, which is
# in the first group only
_KINDS: tuple[ShardingType, ...] = ("table_wise", "column_wise", "row_wise")
WORTH = 1e-3  # of the step: below, the flat sharding stays


@dataclass(frozen=True, slots=True)
class SparseGroups:
    """Fill ``decisions.dense.sparse`` where groups are asked for."""

    name: ClassVar[str] = "sparse_groups"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Weigh every number of groups against the flat sharding.

        Raises:
            InputError: a number of groups that does not divide ranks and batch along the topology; groups beside tiers
                or formats, whose sections describe the flat sharding; a table that may take none of the kinds that run in
                a group.
        """
        request = program.options.constraints.dense
        if request is None or not request.sparse_groups or program.timeline is None:
            return program
        asked = program.options.constraints
        if asked.tiers is not None or asked.formats is not None:
            raise InputError(
                "dense.sparse_groups is planned for tables in the device's first tier and their declared formats; leave "
                "out constraints.tiers and constraints.formats"
            )
        calibration = self.calibration or default_calibration(program.topology)
        section = _weigh(program, request, calibration)
        dense = program.decisions.dense or DensePlan("ddp", 1, program.topology.world_size)
        return replace(program, decisions=replace(program.decisions, dense=replace(dense, sparse=section)))


def group_topology(topology: Topology, groups: int) -> Topology:
    """The ranks of one of ``groups`` groups of consecutive ranks.

    Raises:
        InputError: groups would cut through the topology unevenly.
    """
    left, levels = groups, []
    for level in reversed(topology.levels):
        if left % level.fanout == 0:
            left, fanout = left // level.fanout, 1
        elif level.fanout % left == 0:
            left, fanout = 1, level.fanout // left
        else:
            break
        levels.append(replace(level, fanout=fanout))
    if left != 1 or len(levels) != len(topology.levels):
        shape = " x ".join(str(level.fanout) for level in topology.levels)
        raise InputError(
            f"{groups} groups do not divide the ranks of {topology.name} ({shape}) evenly; use a divisor of the hosts, or "
            "the hosts times a divisor of their ranks"
        )
    kept = [level for level in levels[:-1] if level.fanout > 1]
    return replace(topology, name=f"{topology.name}/{groups}", levels=(levels[-1], *reversed(kept)))


def across(topology: Topology, groups: int) -> Topology:
    """One rank of each group: the outer levels, as far as groups divide them."""
    left, levels = groups, []
    for level in reversed(topology.levels):
        fanout = min(level.fanout, left)
        left //= fanout
        levels.append(replace(level, fanout=fanout))
    return replace(topology, levels=tuple(reversed(levels)))


def group_program(program: Program, groups: int) -> Program:
    """One group as a program of its own, beside this program's dense part."""
    machine = group_topology(program.topology, groups)
    if program.workload.global_batch % groups:
        raise InputError(f"global_batch {program.workload.global_batch} does not divide over {groups} groups")
    workload = replace(program.workload, global_batch=program.workload.global_batch // groups)
    return replace(
        program,
        options=replace(program.options, constraints=_rules(program)),
        topology=machine,
        workload=workload,
        tables=None,
        certificate=None,
        memory=None,
        timeline=None,
    )


def _rules(program: Program) -> Constraints:
    """The user's rules without the kinds that do not run in a group."""
    asked = program.options.constraints
    own = {}
    for table in program.model.tables:
        rule = asked.for_table(table.name)
        kinds = tuple(kind for kind in rule.sharding_types or _KINDS if kind in _KINDS)
        if not kinds:
            raise InputError(
                f"table {table.name!r} may be {' or '.join(rule.sharding_types or ())} only, which does not run in groups "
                f"(dense.sparse_groups); allow {', '.join(_KINDS)}, or leave groups out"
            )
        own[glob.escape(table.name)] = replace(rule, sharding_types=kinds)
    return replace(asked, tables=own)


def _weigh(program: Program, request: DenseRequest, calibration: Calibration) -> SparseReplicas:
    assert program.timeline is not None
    assert program.memory is not None
    flat = program.timeline.step
    candidates = [SparseCandidate(1, flat, 0.0, max(rank.total for rank in program.memory))]
    best: tuple[float, int, int, tuple[TablePlan, ...]] = (flat * (1 - WORTH), 1, 0, ())
    tried = len(set(request.sparse_groups))
    for groups in sorted(set(request.sparse_groups)):
        try:
            one = group_program(program, groups)
            one = replace(one, options=replace(one.options, time_limit=one.options.time_limit / tried))
            placed = MemoryAccounting().run(Sharding(calibration).run(one))
        except InfeasibleError:
            candidates.append(SparseCandidate(groups, None, None, None))
            continue
        assert placed.tables is not None
        assert placed.memory is not None
        step, sync, size = group_seconds(program, placed, groups, request.sync_every, calibration)
        candidates.append(SparseCandidate(groups, step, sync, max(rank.total for rank in placed.memory)))
        if step < best[0]:
            best = (step, groups, size, placed.tables)
    groups, tables = best[1], best[3]
    return SparseReplicas(
        groups=groups,
        sync_every=request.sync_every,
        sync_bytes=best[2],
        extra_bytes=round(replication_bytes(_held(tables), groups, program.topology.world_size)),
        tables=tuple(_in_group(table) for table in tables),
        candidates=tuple(candidates),
    )


def group_seconds(
    whole: Program, placed: Program, groups: int, sync_every: int, calibration: Calibration
) -> tuple[float, float, int]:
    """Seconds of a step, its share of a synchronisation included; seconds and bytes of one synchronisation.

    Args:
        whole: all ranks under the flat sharding, with its step.
        placed: one group (:func:`group_program`) with its tables.
        groups: how many.
        sync_every: steps between two synchronisations.
        calibration: constants.
    """
    size = _synchronised(placed)
    net = communication(across(whole.topology, groups), calibration)
    sync = net.ranked("all_reduce", size)[0].seconds if size else 0.0
    return _step(whole, placed, calibration) + sync / sync_every, sync, size


def _held(tables: tuple[TablePlan, ...]) -> int:
    """Weights and optimizer state of one copy of the tables, S."""
    return sum(table.memory.get("weights", 0) + table.memory.get("optimizer", 0) for table in tables)


def _synchronised(program: Program) -> int:
    """Bytes of weights and state on the rank that holds most of them."""
    assert program.tables is not None
    ranks = rank_memory(program.tables, program.topology, program.workload, program.options.mode)
    return max(int(used.get("weights", 0) + used.get("optimizer", 0)) for used in ranks)


def _step(whole: Program, group: Program, calibration: Calibration) -> float:
    """The step with the embedding phases of a group and the dense part of all ranks."""
    assert group.tables is not None
    mode = whole.options.mode
    slowest = rank_seconds(group.tables, group.topology, group.workload, calibration, mode)
    overheads = phase_overheads(group.topology, group.workload, calibration, mode)
    phases = {phase: float(slowest[phase].max()) + overheads[phase] for phase in PHASES}
    phases = compressed_phases(phases, whole.decisions.compression)
    assert whole.timeline is not None
    lasted = {event.name: event.duration for event in whole.timeline.events}
    bucket, asked = whole.decisions.collectives, whole.options.constraints.collectives
    net = communication(whole.topology, calibration)
    reduction = None
    if bucket is not None:
        scheduled, only = (asked.dense_engine == "scheduled", asked.dense_algorithm) if asked else (False, "")
        reduction = dense_reduction(net, bucket.bucket_bytes, scheduled, only)
    return step_timeline(
        whole.model,
        phases,
        whole.topology,
        whole.workload,
        calibration,
        mode,
        reduction=sharded_dense(whole.decisions.dense, whole.topology, calibration, whole.workload)
        or reduction,
        host_seconds=lasted.get("framework", 0.0),
    ).step


def _in_group(table: TablePlan) -> GroupTable:
    """A table's shards as column blocks."""
    first: dict[tuple[int, int], int] = {}
    for shard in table.shards:
        at = (shard.col, shard.cols)
        first[at] = min(first.get(at, shard.rank), shard.rank)
    return GroupTable(
        table.name,
        table.sharding_type,
        tuple((col, cols, rank) for (col, cols), rank in sorted(first.items())),
    )
