"""A plan as TorchRec runs it: the ``ShardingPlan``, and a module wrapped for training.

TorchRec 1.8 finds tables by the path of their collection in the module that is wrapped, and falls back
to replicated data-parallel for whatever the plan does not name; so paths are always looked up in the
module at hand, and :mod:`codegen.torchrec_check` refuses what TorchRec would get wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codegen.collectives import send_scheduled
from codegen.compressed import sharders
from codegen.dedup_compute import distinct_module
from codegen.dense import dense_wrapper, group_plan, groups_of
from codegen.torchrec_check import Collection, check, collections_of, locate, notes
from codegen.torchrec_formats import set_formats
from codegen.torchrec_tiers import check_tiers, tier_kernel, tier_notes, tier_parameters
from ir.errors import InputError
from ir.plan import Plan, Shard, TablePlan
from ir.workload import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger(__name__)


def to_torchrec(plan: Plan, module: nn.Module, *, device: str = "cpu", storage: str | None = None) -> Any:
    """The plan as a ``torchrec.distributed.types.ShardingPlan`` for ``module``.

    Args:
        plan: a plan whose tables are those of ``module``.
        module: the unsharded module that will be wrapped; its collections may sit at other paths than
            those of the model that was planned.
        device: ``"cpu"`` or ``"cuda"``: where the shards will live.
        storage: folder of the drive that holds tables in key-value stores.

    Raises:
        InputError: the plan does not fit the module, or TorchRec would run it wrongly or not at all.
    """
    check(plan, module, device=device)
    check_tiers(plan, device=device)
    for note in (*notes(plan), *tier_notes(plan)):
        log.info(note)
    return sharding_plan(plan, collections_of(module), device, storage)


def sharding_plan(
    plan: Plan, collections: Iterable[Collection], device: str, storage: str | None = None
) -> Any:
    """The ``ShardingPlan`` of a plan that has been checked already."""
    from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

    collections = tuple(collections)
    modules: dict[str, Any] = {}
    for table in plan.table_plans:
        collection, config = locate(table, collections)
        of_module = modules.setdefault(collection.path, EmbeddingModuleShardingPlan())
        of_module[config.name] = _parameter_sharding(table, plan, device, storage)
    return ShardingPlan(plan=modules)


def _parameter_sharding(table: TablePlan, plan: Plan, device: str, storage: str | None) -> Any:
    from torch.distributed._shard.metadata import ShardMetadata
    from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding

    if table.sharding_type == "data_parallel":
        return ParameterSharding("data_parallel", "dense", list(range(plan.world_size)), None)
    host_size = plan.topology.host_size
    shards = [
        ShardMetadata(
            shard_offsets=[shard.row, shard.col],
            shard_sizes=[shard.rows, shard.cols],
            placement=f"rank:{shard.rank}/{device if device == 'cpu' else f'{device}:{shard.rank % host_size}'}",
        )
        for shard in in_torchrec_order(table)
    ]
    return ParameterSharding(
        sharding_type=table.sharding_type,
        compute_kernel=table.compute_kernel if table.tiers is None else tier_kernel(table, plan).kernel,
        ranks=[shard.rank for shard in in_torchrec_order(table)],
        sharding_spec=EnumerableShardingSpec(shards),
        **({} if table.tiers is None else tier_parameters(table, plan, storage=storage)),
    )


def in_torchrec_order(table: TablePlan) -> tuple[Shard, ...]:
    """A table's shards, narrow column blocks first, so that several on one rank are held right.

    TorchRec puts columns together by their offsets, so the order is free; see
    :func:`ir.torchrec_rules.stackable` for why it matters.
    """
    return tuple(sorted(table.shards, key=lambda shard: (shard.cols, shard.col)))  # rows keep their order


@dataclass(slots=True)
class ShardedModel:
    """A module under ``DistributedModelParallel`` with all of its optimizers.

    Tables with fused kernels are updated inside the backward pass; :meth:`step` updates the rest.
    """

    module: Any  # torchrec.distributed.DistributedModelParallel
    optimizers: tuple[torch.optim.Optimizer, ...]  # of what is not fused
    after_step: Callable[[], None] | None = None  # synchronises groups of replicated tables

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass on this rank's slice of the batch."""
        return self.module(*args, **kwargs)

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Apply the gradients of the backward pass that has just run."""
        for optimizer in self.optimizers:
            optimizer.step()
        if self.after_step is not None:
            self.after_step()


def sharded_model(
    plan: Plan,
    module: nn.Module,
    process_group: Any = None,
    *,
    optimizer: Optimizer | None = None,
    lr: float = 0.01,
    dense_optimizer: Optimizer | None = None,
    dense_lr: float | None = None,
    eps: float = 1e-8,
    device: str = "cpu",
    storage: str | None = None,
) -> ShardedModel:
    """``module`` sharded as the plan says and ready to train; its weights are kept.

    Gradients equal those of the unsharded module on the whole batch when each rank computes the mean
    loss over an equal slice of it: TorchRec and DDP both average over ranks.

    Args:
        plan: the plan; its world size must be that of the process group.
        module: consumed: its tables are moved into the shards.
        process_group: default: the default group.
        optimizer: of the tables; default the workload's.
        lr: learning rate of the tables.
        dense_optimizer: of the rest; default the like of ``optimizer`` (Adagrad for row-wise Adagrad).
        dense_lr: learning rate of the rest; default ``lr``.
        eps: of Adagrad and Adam; the default is FBGEMM's.
        device: ``"cpu"`` or ``"cuda"``.
        storage: as :func:`to_torchrec`.

    Raises:
        InputError: as :func:`to_torchrec`; or the process group, ``LOCAL_WORLD_SIZE`` or the optimizer
            does not fit the plan.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.optim import (  # type: ignore[attr-defined]
        _apply_optimizer_in_backward,
    )
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.types import ShardingEnv

    from codegen.runtime.dense.groups import TableSync, make_groups, on_global_ranks
    from codegen.runtime.optimizers import fused_optimizer, ordinary_optimizers

    group = process_group if process_group is not None else dist.group.WORLD
    name: Optimizer = optimizer or plan.workload.optimizer
    check_environment(plan, dist.get_world_size(group), os.environ)
    module = distinct_module(plan, module)
    entire, plan, replicas = plan, group_plan(plan), groups_of(plan)
    groups = make_groups(replicas.groups) if replicas is not None else None
    check(plan, module, device=device, optimizer=name)
    check_tiers(plan, device=device, optimizer=name)
    for note in (*notes(plan, name), *tier_notes(plan)):
        log.info(note)
    collections = collections_of(module)
    set_formats(plan, module, collections, device)
    decided = sharding_plan(plan, collections, device, storage)
    if groups is not None:
        decided = on_global_ranks(decided, groups.first)
    fused, arguments = fused_optimizer(name, lr, eps)
    places = {table.name: locate(table, collections) for table in plan.table_plans}
    for table in plan.table_plans:
        if table.compute_kernel == "fused":
            collection, config = places[table.name]
            # each table gets its own dict: TorchRec writes the kernel's name into it
            _apply_optimizer_in_backward(fused, [collection.weight(config.name)], dict(arguments))
    kept = None if _has_meta(module) else module.state_dict()
    target = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    wrapped = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(groups.shards if groups is not None else group),
        device=target,
        plan=decided,
        sharders=sharders(plan, device),
        data_parallel_wrapper=dense_wrapper(entire, group if groups is not None else None),
    )
    send_scheduled(entire, wrapped, group)
    if kept is not None:
        # TorchRec draws new weights for the shards of a table on the CPU; give it back its own
        load_weights(wrapped, kept)
    names = {
        f"{c.path}.".lstrip(".") + f"{c.parameters}.{config.name}.weight" for c, config in places.values()
    }
    sync = None
    if groups is not None and replicas is not None:
        sync = TableSync(wrapped, groups, replicas.sync_every)
    tables, rest = _not_fused(wrapped, names)
    made = ordinary_optimizers(tables, rest, (name, lr), (dense_optimizer, dense_lr), eps)
    return ShardedModel(wrapped, made, sync)


def load_weights(wrapped: Any, weights: Mapping[str, Any]) -> None:
    """Copy whole tensors, by their names before sharding, into the shards that this rank holds.

    TorchRec's own ``load_state_dict`` cannot do it when a rank holds column blocks of different widths.
    """
    import torch

    from codegen.runtime.dense.shard import copy_into

    with torch.no_grad():
        for name, target in wrapped.state_dict().items():
            if not hasattr(target, "local_shards"):
                copy_into(target, weights[name])
                continue
            for shard in target.local_shards():
                (row, col), (rows, cols) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(weights[name][row : row + rows, col : col + cols])


def _has_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _not_fused(wrapped: Any, table_names: set[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters that no fused kernel updates: tables with dense kernels, and the rest."""
    tables: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for path, parameter in wrapped.named_parameters():
        if hasattr(parameter, "_in_backward_optimizers") or not parameter.numel():
            continue  # updated in the backward pass, or a table of which this rank holds nothing
        (tables if path in table_names else rest).append(parameter)
    return tables, rest


def check_environment(plan: Plan, world_size: int, environment: Mapping[str, str]) -> None:
    """Raise InputError unless the processes that run are those that the plan was made for."""
    if world_size != plan.world_size:
        raise InputError(
            f"the plan is for {plan.world_size} ranks but {world_size} run; start {plan.world_size} processes "
            f"or compile for {world_size} ranks"
        )
    by_host = [t.name for t in plan.table_plans if t.sharding_type in ("table_row_wise", "grid_shard")]
    local = environment.get("LOCAL_WORLD_SIZE")
    if by_host and local != str(plan.topology.host_size):
        raise InputError(
            f"table {by_host[0]!r} is split over hosts of {plan.topology.host_size} ranks but LOCAL_WORLD_SIZE "
            f"is {local or 'not set'}; set it to {plan.topology.host_size} or compile for hosts of that size"
        )
