"""One rank of benchmarks/peak_memory.py: a few steps of a plan, and the most memory the process ever held."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch.nn import functional as F

from codegen.runtime.batches import Batch
from codegen.runtime.launch import Rank
from codegen.torchrec import sharded_model
from ir.plan import Plan
from planner.zoo import build


def model(tables: list[dict[str, Any]], device: str = "meta") -> Any:
    """A DLRM over ``tables``; on meta, so that no rank ever holds whole tables that it shards."""
    dim = tables[0]["dim"]
    return build("dlrm", tables=tables, dense_features=4, bottom=(64, dim), top=(64, 1), device=device).module


def train(place: Rank, plan: dict[str, Any], tables: list[dict[str, Any]], steps: int) -> int:
    """Bytes of resident memory at its peak."""
    decided = Plan.from_dict(plan)
    torch.manual_seed(place.rank)
    torch.set_num_threads(1)
    trained = sharded_model(decided, model(tables), lr=0.01)
    size = decided.workload.global_batch // place.world_size
    drawn = model(tables)
    for step in range(steps):
        values = drawn.random_batch(size, decided.workload, 100 * step + place.rank)
        batch = Batch(values[:-1], values[-1])
        trained.zero_grad()
        F.binary_cross_entropy_with_logits(trained(*batch.inputs), batch.labels).backward()
        trained.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
