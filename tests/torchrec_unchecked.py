"""A plan given to TorchRec without any check: what the checks are there to prevent."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from codegen.runtime.batches import RandomBatches
from codegen.runtime.launch import Rank
from codegen.torchrec import load_weights, sharding_plan
from codegen.torchrec_check import collections_of
from ir.plan import Plan
from tests.torchrec_models import Small


def wrapped(module: nn.Module, plan: Plan, path: str | None = None) -> nn.Module:
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    _apply_optimizer_in_backward(torch.optim.SGD, list(module.ebc.parameters()), {"lr": 0.1})
    decided = sharding_plan(plan, collections_of(module), "cpu")
    if path is not None:
        decided.plan = {path: decided.plan["ebc"]}
    return DistributedModelParallel(module, plan=decided, sharders=[EmbeddingBagCollectionSharder()])


def largest_error(place: Rank, plan: dict[str, Any], tables: list[Any], load: bool = True) -> float:
    """Largest difference of this rank's outputs to the unsharded model's."""
    decided = Plan.from_dict(plan)
    torch.manual_seed(0)
    module = Small(tables)
    torch.manual_seed(0)
    alone = Small(tables)
    batch = RandomBatches(alone, decided.table_plans, decided.workload, 32)(1).part(
        place.rank, place.world_size
    )
    kept = alone.state_dict()
    sharded = wrapped(module, decided)
    if load:
        load_weights(sharded, kept)
    with torch.no_grad():
        return float((sharded(*batch.inputs) - alone(*batch.inputs)).abs().max())


def sharded_modules(place: Rank, plan: dict[str, Any], tables: list[Any], path: str) -> int:
    """How many modules TorchRec has sharded."""
    from torchrec.distributed.types import ShardedModule

    model = wrapped(Small(tables), Plan.from_dict(plan), path)
    return sum(isinstance(module, ShardedModule) for module in model.modules())
