"""The plan's dense parallelism in what runs: TorchRec's wrapper of the dense part, and the plan of one group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from codegen.collectives import data_parallel
from ir.dtypes import nbytes
from ir.plan import Plan

if TYPE_CHECKING:
    import torch


def dense_wrapper(plan: Plan) -> Any:
    """What TorchRec's ``DistributedModelParallel`` wraps the dense part with; None leaves it TorchRec's own."""
    decided = plan.decisions.dense
    if decided is None or decided.shard == 1:
        return data_parallel(plan)
    from codegen.runtime.dense.wrapper import ShardedDataParallel

    return ShardedDataParallel(
        decided.units, decided.shard, decided.replicas, decided.reshard_after_forward, compute_type(plan)
    )


def compute_type(plan: Plan) -> torch.dtype | None:
    """Type of gathered weights and reduced gradients; None: as the parameters are (fp32, and everything on CPUs)."""
    import torch

    if plan.topology.device.kind == "cpu" or nbytes(plan.workload.compute_dtype) != 2:
        return None
    return torch.float16 if plan.workload.compute_dtype == "fp16" else torch.bfloat16
