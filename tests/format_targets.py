"""What the format tests run on gloo ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from codegen.runtime.launch import Rank
from codegen.torchrec import sharded_model
from ir.plan import Plan
from tests.torchrec_models import Small


def inputs_of(tables: list[list[Any]], samples: int) -> tuple[Any, Any, Any]:
    """Dense features, ids and labels of one global batch."""
    from torchrec import KeyedJaggedTensor

    random = torch.Generator().manual_seed(5)
    keys = [feature for table in tables for feature in table[3]]
    rows = {feature: table[1] for table in tables for feature in table[3]}
    ids = torch.cat([torch.randint(0, rows[key], (samples,), generator=random) for key in keys])
    jagged = KeyedJaggedTensor(keys=keys, values=ids, lengths=torch.ones(len(ids), dtype=torch.int32))
    return torch.randn(samples, 3, generator=random), jagged, torch.rand(samples, generator=random).round()


def slice_of(jagged: Any, samples: int, rank: int, world: int) -> Any:
    """One rank's samples of a batch with one id a sample."""
    from torchrec import KeyedJaggedTensor

    ids = jagged.values().reshape(-1, samples).chunk(world, dim=1)[rank].reshape(-1)
    return KeyedJaggedTensor(
        keys=jagged.keys(), values=ids.contiguous(), lengths=torch.ones(len(ids), dtype=torch.int32)
    )


def train(rank: Rank, plan: dict[str, Any], tables: list[list[Any]], samples: int) -> dict[str, Any]:
    """One step under the plan; outputs before it and after it, and the types of the weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = sharded_model(Plan.from_dict(plan), Small(tables), optimizer="sgd", lr=0.5)
    dense, jagged, label = inputs_of(tables, samples)
    mine = slice(rank.rank * samples // rank.world_size, (rank.rank + 1) * samples // rank.world_size)
    ids = slice_of(jagged, samples, rank.rank, rank.world_size)
    before = model(dense[mine], ids)
    F.binary_cross_entropy_with_logits(before, label[mine]).backward()
    model.step()
    with torch.no_grad():
        after = model(dense[mine], ids)
    types = {
        name: str(shard.tensor.dtype)
        for name, value in model.module.state_dict().items()
        if hasattr(value, "local_shards")
        for shard in value.local_shards()
    }
    return {"before": before.tolist(), "after": after.tolist(), "types": types}
