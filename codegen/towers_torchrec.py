"""Towers on TorchRec's own ``EmbeddingTowerCollection``: a second back end, where it fits.

It fits where every tower sits on one host and has a module, its tables are whole, split by columns or split
by rows inside that host, and all ranks have equally many samples. Ids travel twice there (between
hosts, then inside the host), where :mod:`codegen.towers` sends them straight to the ranks that hold the rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from codegen.runtime.optimizers import fused_optimizer, ordinary_optimizers
from codegen.runtime.towers.modules import TowerModule
from codegen.torchrec import ShardedModel, check_environment
from codegen.towers import (
    LOOKUP,
    Movable,
    applied_towers,
    lookup_node,
    movable_modules,
    replace_lookup,
    trace_model,
)
from ir.errors import InputError
from ir.plan import Plan, TablePlan
from ir.towers import TowerDecision, sent_name
from ir.workload import Optimizer


class _Interaction(nn.Module):
    """A tower module on TorchRec's keyed output: ``KeyedTensor`` to (B, m D)."""

    def __init__(self, module: TowerModule, features: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.features = module, features

    def forward(self, pooled: Any) -> Tensor:
        """The flattened vectors that leave the tower."""
        sent: Tensor = self.module(torch.stack([pooled[feature] for feature in self.features], dim=1))
        return sent.flatten(1)


class _Named(nn.Module):
    """The towers' outputs by the names that the rewritten graph fetches."""

    def __init__(self, towers: nn.Module, widths: list[int]) -> None:
        super().__init__()
        self.towers, self.widths = towers, widths

    def forward(self, ids: Any) -> dict[str, Tensor]:
        """``KeyedJaggedTensor`` to ``"tower N"`` -> (B, columns)."""
        out = self.towers(ids)
        whole = out.wait() if hasattr(out, "wait") else out
        return {sent_name(n): part for n, part in enumerate(torch.split(whole, self.widths, dim=1))}


def unfit(plan: Plan) -> str:
    """Why TorchRec's towers cannot run a plan; empty if they can."""
    decision = plan.decisions.towers
    if decision is None or not decision.applied:
        return "the plan has no towers that are applied"
    if decision.module == "none":
        return "TorchRec's towers need a module, and the plan has none"
    if decision.towers[0].ranks != plan.topology.host_size:
        return "TorchRec's towers sit on one host each, the plan's on several"
    for table in plan.table_plans:
        if table.sharding_type not in ("table_wise", "table_column_wise", "table_row_wise"):
            return f"table {table.name!r} is {table.sharding_type}, which TorchRec's towers do not take"
    return ""


def torchrec_towers(
    plan: Plan,
    module: nn.Module,
    process_group: Any = None,
    *,
    optimizer: Optimizer | None = None,
    lr: float = 0.01,
    dense_optimizer: Optimizer | None = None,
    dense_lr: float | None = None,
    eps: float = 1e-8,
) -> ShardedModel:
    """``module`` with its towers in an ``EmbeddingTowerCollection`` under ``DistributedModelParallel``, on CPUs.

    Args:
        plan: see :func:`unfit`.
        module: with the plan's tower modules; consumed, its weights are kept.
        process_group: default: the default group; ``LOCAL_WORLD_SIZE`` must be the plan's host size.
        optimizer, lr: of the tables.
        dense_optimizer, dense_lr: of the rest.
        eps: of Adagrad and Adam.

    Raises:
        InputError: the plan or the model does not fit.
    """
    from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding_tower_sharding import EmbeddingTowerCollectionSharder
    from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv, ShardingPlan

    decision = applied_towers(plan)
    reason = unfit(plan)
    if reason:
        raise InputError(
            f"TorchRec's towers cannot run the plan of {plan.model.name!r}: {reason}; use plan.apply"
        )
    group = process_group if process_group is not None else dist.group.WORLD
    check_environment(plan, dist.get_world_size(group), os.environ)
    graph = trace_model(module)
    node = lookup_node(graph)
    collection: Any = graph.get_submodule(str(node.target))
    movable = sorted(movable_modules(graph, node, decision), key=lambda m: m.tower)
    if [m.tower for m in movable] != list(range(len(decision.towers))):
        raise InputError(
            "every tower of the plan needs a tower module over its features; build the model with_towers"
        )
    name: Optimizer = optimizer or plan.workload.optimizer
    towers, weights = _collection(decision, movable, collection)
    fused, arguments = fused_optimizer(name, lr, eps)
    for weight in (bag.weight for t in towers.towers for bag in t.embedding.embedding_bags.values()):
        _apply_optimizer_in_backward(fused, [weight], dict(arguments))
    graph.add_submodule(LOOKUP, _Named(towers, [m.module.out * m.module.dim_out for m in movable]))
    replace_lookup(graph, node, movable)
    shards = EmbeddingModuleShardingPlan()
    for table in plan.table_plans:
        shards[table.name] = _sharding(table)
    with _without_device_ids():
        wrapped = DistributedModelParallel(
            graph,
            env=ShardingEnv.from_process_group(group),
            device=torch.device("cpu"),
            plan=ShardingPlan(plan={f"{LOOKUP}.towers": shards}),
            sharders=[EmbeddingTowerCollectionSharder()],
        )
    _restore(wrapped, weights)
    rest = [
        p for _, p in wrapped.named_parameters() if not hasattr(p, "_in_backward_optimizers") and p.numel()
    ]
    return ShardedModel(wrapped, ordinary_optimizers([], rest, (name, lr), (dense_optimizer, dense_lr), eps))


def _collection(decision: TowerDecision, movable: list[Movable], flat: Any) -> tuple[Any, dict[str, Tensor]]:
    """TorchRec's towers over the flat collection's tables, and the tables' weights by name."""
    from torchrec import EmbeddingBagCollection
    from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection

    configs = {config.name: config for config in flat.embedding_bag_configs()}
    weights = {name: bag.weight.detach().clone() for name, bag in flat.embedding_bags.items()}
    made = []
    for tower, moved in zip(decision.towers, movable, strict=True):
        tables = EmbeddingBagCollection(
            tables=[configs[name] for name in tower.tables], device=torch.device("cpu")
        )
        made.append(EmbeddingTower(tables, _Interaction(moved.module, tower.features)))
    return EmbeddingTowerCollection(made), weights


def _sharding(table: TablePlan) -> Any:
    """A table whole on one rank is a column split into one block there."""
    from torch.distributed._shard.metadata import ShardMetadata
    from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding

    shards = sorted(table.shards, key=lambda s: (s.cols, s.col))
    spec = EnumerableShardingSpec(
        [ShardMetadata([s.row, s.col], [s.rows, s.cols], f"rank:{s.rank}/cpu") for s in shards]
    )
    kind = "table_row_wise" if table.sharding_type == "table_row_wise" else "table_column_wise"
    return ParameterSharding(kind, "fused", [s.rank for s in shards], spec)


@contextlib.contextmanager
def _without_device_ids() -> Iterator[None]:
    """TorchRec 1.8 gives its inner DDP ``device_ids``, which DDP refuses for modules on the CPU."""
    import torchrec.distributed.embedding_tower_sharding as sharding

    kept = sharding.DistributedDataParallel

    def on_cpu(*args: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return kept(*args, **kwargs)

    sharding.DistributedDataParallel = on_cpu
    try:
        yield
    finally:
        sharding.DistributedDataParallel = kept


def _restore(wrapped: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy the tables' weights into this rank's shards: TorchRec draws new ones."""
    with torch.no_grad():
        for key, target in wrapped.state_dict().items():
            if ".embedding_bags." not in key:
                continue
            whole = weights[key.split(".")[-2]]
            for shard in target.local_shards():
                (row, col), (rows, cols) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(whole[row : row + rows, col : col + cols])
