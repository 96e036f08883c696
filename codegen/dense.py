"""The plan's dense parallelism in what runs: TorchRec's wrapper of the dense part, and the plan of one group."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from codegen.collectives import data_parallel
from ir.constraints import ShardingType
from ir.dense_plan import GroupTable, SparseReplicas
from ir.dtypes import nbytes
from ir.errors import InputError
from ir.plan import Plan, RankMemory, Shard, TablePlan
from ir.sharding import ShardingOption, units
from ir.topology import Level, Topology

if TYPE_CHECKING:
    import torch


def dense_wrapper(plan: Plan, group: Any = None) -> Any:
    """What TorchRec's ``DistributedModelParallel`` wraps the dense part with; None leaves it TorchRec's own.

    Args:
        plan: the plan.
        group: over whose ranks the dense part is parallel; default: those of the tables.
    """
    decided = plan.decisions.dense
    if decided is not None and decided.tensor > 1:
        from codegen.runtime.dense.wrapper import TensorDataParallel

        if group is not None:
            raise InputError(
                "layers that are split over a host do not run beside groups of tables; ask for one of them"
            )
        return TensorDataParallel(decided.pairs, decided.tensor)
    if decided is None or decided.shard == 1:
        if group is None:
            return data_parallel(plan)
        from codegen.runtime.dense.wrapper import over_group

        return over_group(data_parallel(plan), group)
    from codegen.runtime.dense.wrapper import ShardedDataParallel

    return ShardedDataParallel(
        decided.units,
        decided.shard,
        decided.replicas,
        decided.reshard_after_forward,
        compute_type(plan),
        group,
    )


def groups_of(plan: Plan) -> SparseReplicas | None:
    """The groups that tables are replicated over; None for one."""
    dense = plan.decisions.dense
    found = dense.sparse if dense is not None else None
    return found if found is not None and found.groups > 1 else None


def group_plan(plan: Plan) -> Plan:
    """The tables of one group as a plan of T/M ranks; ``plan`` itself where there is one group.

    Its dense section, timeline and memory limits are the whole plan's.

    Raises:
        InputError: a table that every rank of a group would hold a copy of.
    """
    groups = groups_of(plan)
    if groups is None:
        return plan
    ranks = plan.world_size // groups.groups
    level = plan.topology.levels[0]
    machine = replace(plan.topology, levels=(Level(level.name, ranks, level.link),))
    found = {table.name: table for table in groups.tables}
    copied = [table.name for table in groups.tables if table.sharding_type == "data_parallel"]
    if copied:
        raise InputError(
            f"table {copied[0]!r} is data_parallel in {groups.groups} groups: TorchRec fills its copies from rank 0 of all "
            "ranks, which is in the first group only; compile again, or plan without dense.sparse_groups"
        )
    return replace(
        plan,
        topology=machine,
        workload=replace(plan.workload, global_batch=plan.workload.global_batch // groups.groups),
        table_plans=tuple(_in_group(table, found[table.name], machine) for table in plan.table_plans),
        memory=tuple(RankMemory(rank, plan.memory[rank].limit, {}) for rank in range(ranks)),
        decisions=replace(plan.decisions, dense=None),
    )


def _in_group(table: TablePlan, entry: GroupTable, machine: Topology) -> TablePlan:
    kind = cast(ShardingType, entry.sharding_type)
    option = ShardingOption(kind, tuple(cols for _, cols, _ in entry.columns))
    shards = []
    made = units(option, table.rows, machine.world_size, machine.host_size)
    for unit, (_, _, rank) in zip(made, entry.columns, strict=True):
        shards += [Shard(rank + i, b.row, b.col, b.rows, b.cols) for i, b in enumerate(unit.blocks)]
    return replace(table, sharding_type=kind, compute_kernel="fused", shards=tuple(shards))


def compute_type(plan: Plan) -> torch.dtype | None:
    """Type of gathered weights and reduced gradients; None: as the parameters are (fp32, and everything on CPUs)."""
    import torch

    if plan.topology.device.kind == "cpu" or nbytes(plan.workload.compute_dtype) != 2:
        return None
    return torch.float16 if plan.workload.compute_dtype == "fp16" else torch.bfloat16


def script_values(plan: Plan) -> dict[str, Any]:
    """What the emitted script says of the dense part and of groups.

    Raises:
        InputError: groups of a CPU topology, which TorchRec's ``DMPCollection`` does not run on; or split layers.
    """
    groups, dense = groups_of(plan), plan.decisions.dense
    if dense is not None and dense.tensor > 1:
        raise InputError(
            "the emitted script has no tensor parallelism; run the plan with plan.apply, or leave tp out of "
            "dense.strategies"
        )
    if groups is not None and plan.topology.device.kind == "cpu":
        raise InputError(
            f"TorchRec runs {groups.groups} groups of tables on GPUs only; on CPUs use plan.apply, or plan without "
            "dense.sparse_groups"
        )
    split = dense is not None and dense.shard > 1
    return {
        "group_size": plan.world_size // (groups.groups if groups is not None else 1),
        "sync_every": groups.sync_every if groups is not None else 0,
        "dense_units": [list(unit) for unit in dense.units] if dense is not None and split else [],
        "dense_split": (dense.shard, dense.replicas, dense.reshard_after_forward)
        if dense is not None and split
        else (),
        "dense_dtype": str(compute_type(plan) or ""),
    }
