"""What must hold before TorchRec sees a plan, because it would run it wrongly or fail without saying why.

:func:`check` raises one sentence; everything about the plan alone is checked without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ir.errors import InputError, did_you_mean
from ir.plan import EVERY_RANK, Plan, Shard, TablePlan
from ir.sharding import COLUMN_SPLIT, ROW_SPLIT, ShardingOption, units
from ir.torchrec_rules import CPU_DTYPES, CPU_FUSED_OPTIMIZERS, stackable, torchrec_supported
from ir.workload import Optimizer

if TYPE_CHECKING:
    from torch import nn

# DataType values of TorchRec by the plan's names
_DTYPES = {"FP32": "fp32", "FP16": "fp16", "BF16": "bf16", "INT8": "int8", "INT4": "int4", "INT2": "int2"}


@dataclass(frozen=True, slots=True)
class Config:
    """One table as the module declares it."""

    name: str
    rows: int
    dim: int
    dtype: str
    pooled: bool


@dataclass(frozen=True, slots=True)
class Collection:
    """An embedding collection of a module."""

    path: str
    configs: tuple[Config, ...]
    module: Any

    @property
    def parameters(self) -> str:
        """Name of the ``ModuleDict`` that holds the tables."""
        return "embedding_bags" if hasattr(self.module, "embedding_bags") else "embeddings"

    def weight(self, table: str) -> Any:
        """The parameter of a table."""
        return getattr(self.module, self.parameters)[table].weight


def check(
    plan: Plan,
    module: nn.Module | None = None,
    *,
    device: str | None = None,
    optimizer: Optimizer | None = None,
    one_state_per_row: bool = False,
) -> None:
    """Raise InputError unless TorchRec runs ``plan`` exactly as it is written.

    Args:
        plan: the plan.
        module: the unsharded module; without it only the plan itself is checked.
        device: ``"cpu"`` or ``"cuda"``; default the kind of the plan's device.
        optimizer: of the tables; default the workload's.
        one_state_per_row: also refuse row-wise Adagrad on tables that are split by columns, where
            TorchRec keeps one state per row and column block (see :func:`notes`).
    """
    on_cpu = (device or {"gpu": "cuda"}.get(plan.topology.device.kind, "cpu")) == "cpu"
    name = optimizer or plan.workload.optimizer
    names = [table.name for table in plan.table_plans]
    for twice in {name for name in names if names.count(name) > 1}:
        raise InputError(f"table {twice!r} is in the plan twice; remove one of the entries")
    for table in plan.table_plans:
        _check_ranks(table, plan.world_size)
        _check_coverage(table)
        _check_geometry(table, plan.world_size, plan.topology.host_size)
        _check_stacks(table)
        _check_kernel(table, name, on_cpu)
        if one_state_per_row and _splits_state(table, name):
            raise InputError(
                f"table {table.name!r} is {table.option} under row-wise Adagrad, which keeps one state per column "
                "block and so differs from the unsharded model; use adagrad or sgd, or forbid column splits"
            )
    if module is not None:
        _check_module(plan, collections_of(module))


def group_for(plan: Plan, process_group: Any = None) -> Any:
    """The group to run on, by default of all processes; raises InputError unless it is as large as the plan's world."""
    import torch.distributed as dist

    group = process_group if process_group is not None else dist.group.WORLD
    if dist.get_world_size(group) != plan.world_size:
        raise InputError(
            f"the plan is for {plan.world_size} ranks but {dist.get_world_size(group)} run; start "
            f"{plan.world_size} processes or compile for another topology"
        )
    return group


def notes(plan: Plan, optimizer: Optimizer | None = None) -> tuple[str, ...]:
    """Where TorchRec's mathematics differs from one device's by construction, one sentence each."""
    name = optimizer or plan.workload.optimizer
    return tuple(
        f"table {table.name!r} is {table.option}: row-wise Adagrad keeps one state per row and column block, "
        "where a single device keeps one per row"
        for table in plan.table_plans
        if _splits_state(table, name)
    )


def _splits_state(table: TablePlan, optimizer: Optimizer) -> bool:
    return optimizer == "rowwise_adagrad" and len(widths_of(table)) > 1


def widths_of(table: TablePlan) -> tuple[int, ...]:
    """The widths of a table's column blocks, left to right."""
    return tuple(cols for _, cols in sorted({(shard.col, shard.cols) for shard in table.shards}))


def _check_ranks(table: TablePlan, world_size: int) -> None:
    if not table.shards:
        raise InputError(
            f"table {table.name!r} has no shards, so nobody would hold it; compile the plan again"
        )
    for shard in table.shards:
        copied = table.sharding_type == "data_parallel"
        if shard.rank >= world_size or (shard.rank == EVERY_RANK and not copied):
            raise InputError(
                f"table {table.name!r} has a shard on rank {shard.rank} but the plan has ranks 0 to "
                f"{world_size - 1}; compile for the world size that you run"
            )


def _check_coverage(table: TablePlan) -> None:
    """Every row and column exactly once (once a rank for copies)."""
    if table.sharding_type == "data_parallel":
        return  # _check_geometry compares the copy
    for shard in table.shards:
        if shard.row + shard.rows > table.rows or shard.col + shard.cols > table.dim:
            raise InputError(
                f"table {table.name!r} has a shard up to row {shard.row + shard.rows} and column "
                f"{shard.col + shard.cols} but is {table.rows} x {table.dim}; compile the plan again"
            )
    filled = [shard for shard in table.shards if shard.rows and shard.cols]
    for i, one in enumerate(filled):
        for other in filled[i + 1 :]:
            if _overlap(one, other):
                raise InputError(
                    f"table {table.name!r} has shards on ranks {one.rank} and {other.rank} that overlap; "
                    "give each row and column to one shard"
                )
    covered = sum(shard.rows * shard.cols for shard in filled)
    if covered != table.rows * table.dim:
        raise InputError(
            f"table {table.name!r} has shards for {covered} of its {table.rows * table.dim} weights; "
            "add the rows or columns that are missing"
        )


def _overlap(one: Shard, other: Shard) -> bool:
    rows = one.row < other.row + other.rows and other.row < one.row + one.rows
    return rows and one.col < other.col + other.cols and other.col < one.col + one.cols


def _check_geometry(table: TablePlan, world_size: int, host_size: int) -> None:
    """The shards are those that TorchRec's own rules make of the sharding type, on ranks that it will use."""
    kind = table.sharding_type
    option = ShardingOption(kind, (table.dim,) if kind == "data_parallel" else widths_of(table))
    reason = torchrec_supported(
        table.rows,
        table.dim,
        option,
        world_size,
        host_size,
        pooling=table.pooling,
        kernel=table.compute_kernel,
    )
    if reason is not None:
        raise InputError(
            f"table {table.name!r} cannot be {table.option} in TorchRec: {reason}; choose another option"
        )
    if kind == "data_parallel":
        if table.shards != (Shard(EVERY_RANK, 0, 0, table.rows, table.dim),):
            raise InputError(
                f"table {table.name!r} is data_parallel but not one whole shard on every rank; "
                f"list one shard of the whole table with rank {EVERY_RANK}"
            )
        return
    blocks = [block for unit in units(option, table.rows, world_size, host_size) for block in unit.blocks]
    if [(s.row, s.col, s.rows, s.cols) for s in table.shards] != [
        (b.row, b.col, b.rows, b.cols) for b in blocks
    ]:
        how = (
            "ceil(rows / ranks) rows a shard, in order of rows"
            if kind in ROW_SPLIT
            else "in order of columns"
        )
        raise InputError(
            f"table {table.name!r} is {kind} with shards that are not the blocks TorchRec computes with ({how}); "
            "it would give wrong results: use those blocks"
        )
    _check_placement(table, [shard.rank for shard in table.shards], world_size, host_size)


def _check_placement(table: TablePlan, ranks: Sequence[int], world_size: int, host_size: int) -> None:
    kind = table.sharding_type
    if kind == "row_wise" and list(ranks) != list(range(world_size)):
        raise InputError(
            f"table {table.name!r} is row_wise with shards on ranks {list(ranks)[:8]}, but TorchRec puts shard i "
            "on rank i; order the shards by rank"
        )
    if kind in ("table_row_wise", "grid_shard"):
        for start in range(0, len(ranks), host_size):
            first = ranks[start]
            if first % host_size or list(ranks[start : start + host_size]) != list(
                range(first, first + host_size)
            ):
                raise InputError(
                    f"table {table.name!r} is {kind} with row shards on ranks "
                    f"{list(ranks[start : start + host_size])[:8]}, which are not the ranks of one host of "
                    f"{host_size} in order; place each column block on one whole host"
                )
    if kind == "table_column_wise" and len({rank // host_size for rank in ranks}) > 1:
        raise InputError(
            f"table {table.name!r} is table_column_wise with shards on several hosts; "
            "keep them in one host or call it column_wise"
        )


def _check_stacks(table: TablePlan) -> None:
    if table.sharding_type not in COLUMN_SPLIT:
        return
    widths: dict[int, list[int]] = {}
    for shard in table.shards:
        widths.setdefault(shard.rank, []).append(shard.cols)
    for rank, stack in widths.items():
        if not stackable(sorted(stack), table.compute_kernel):
            raise InputError(
                f"table {table.name!r} has column blocks of widths {stack} on rank {rank}, which TorchRec mixes up "
                f"under the {table.compute_kernel} kernel; use equal widths, the fused kernel, or different ranks"
            )


def _check_kernel(table: TablePlan, optimizer: Optimizer, on_cpu: bool) -> None:
    if table.sharding_type == "data_parallel" and table.compute_kernel != "dense":
        raise InputError(
            f"table {table.name!r} is data_parallel with the {table.compute_kernel} kernel, which TorchRec "
            "does not have; use the dense kernel"
        )
    if not on_cpu:
        return
    if table.dtype not in CPU_DTYPES:
        raise InputError(
            f"table {table.name!r} is {table.dtype}, for which FBGEMM has no training kernel on CPU; "
            "use fp32 or fp16, or run on GPUs"
        )
    if table.compute_kernel == "fused" and optimizer not in CPU_FUSED_OPTIMIZERS:
        raise InputError(
            f"table {table.name!r} has the fused kernel with {optimizer}, which FBGEMM does not have on CPU; "
            f"use {', '.join(sorted(CPU_FUSED_OPTIMIZERS))}, or run on GPUs"
        )


def collections_of(module: nn.Module) -> tuple[Collection, ...]:
    """The ``EmbeddingBagCollection`` and ``EmbeddingCollection`` modules inside ``module``, by path."""
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    found = []
    for path, child in module.named_modules():
        if type(child) is EmbeddingBagCollection:
            configs, pooled = child.embedding_bag_configs(), True
        elif type(child) is EmbeddingCollection:
            configs, pooled = child.embedding_configs(), False
        else:
            continue
        tables = tuple(
            Config(
                c.name,
                c.num_embeddings,
                c.embedding_dim,
                _DTYPES.get(c.data_type.name, c.data_type.name.lower()),
                pooled,
            )
            for c in configs
        )
        found.append(Collection(path, tables, child))
    return tuple(found)


def locate(table: TablePlan, collections: Sequence[Collection]) -> tuple[Collection, Config]:
    """The collection and the table in it that a decision is about; raises InputError.

    A table is found by its name, or by the last but one part of its parameter's path; of several
    collections that have it, the one at the path that was planned is meant.
    """
    parts = table.parameter.split(".")
    names = {table.name, parts[-2] if len(parts) > 1 else table.name}
    found = [(c, config) for c in collections for config in c.configs if config.name in names]
    if len(found) > 1:
        found = [(c, config) for c, config in found if c.path == table.module]
    if len(found) == 1:
        return found[0]
    known = [config.name for collection in collections for config in collection.configs]
    if not known:
        raise InputError(
            "the module has no EmbeddingBagCollection or EmbeddingCollection, so TorchRec has nothing to shard; "
            "put its embedding tables into one"
        )
    raise InputError(
        f"table {table.name!r} of the plan is in no embedding collection of the module"
        f"{did_you_mean(table.name, known)}; the plan is for another model, compile it again"
    )


def _check_module(plan: Plan, collections: Sequence[Collection]) -> None:
    planned: set[tuple[str, str]] = set()
    for table in plan.table_plans:
        collection, config = locate(table, collections)
        planned.add((collection.path, config.name))
        if (config.rows, config.dim) != (table.rows, table.dim):
            raise InputError(
                f"table {table.name!r} is {table.rows} x {table.dim} in the plan but {config.rows} x {config.dim} "
                "in the module; compile the plan for this model"
            )
        if config.pooled != (table.pooling != "none"):
            raise InputError(
                f"table {table.name!r} is {'not ' * (table.pooling == 'none')}pooled in the plan but the module has "
                f"it in an {type(collection.module).__name__}; compile the plan for this model"
            )
        if config.dtype != table.dtype:
            raise InputError(
                f"table {table.name!r} is {table.dtype} in the plan but {config.dtype} in the module; "
                "set data_type in its config or compile again"
            )
    for collection in collections:
        for config in collection.configs:
            if (collection.path, config.name) not in planned:
                raise InputError(
                    f"table {config.name!r} of {collection.path or 'the module'} is not in the plan, so TorchRec "
                    "would silently replicate or reject it; compile a plan for this whole model"
                )
