"""The plan's collectives in what runs: DDP's bucket, the all-reduce of dense gradients, and advice for NCCL."""

from __future__ import annotations

import logging
from typing import Any

from ir.plan import Plan

log = logging.getLogger(__name__)


def bucket_mib(plan: Plan) -> float | None:
    """DDP's ``bucket_cap_mb``, in MiB; None when the plan decides none."""
    decided = plan.decisions.collectives
    if decided is None or not decided.buckets:
        return None
    size = decided.bucket_bytes / 2**20
    return int(size) if size.is_integer() else size


def advice(plan: Plan) -> dict[str, str]:
    """Environment variables that ask NCCL for the algorithm that was priced."""
    decided = plan.decisions.collectives
    return dict(decided.environment) if decided is not None else {}


def data_parallel(plan: Plan) -> Any:
    """TorchRec's wrapper of the dense part with the plan's bucket; None leaves TorchRec its own."""
    from torchrec.distributed.model_parallel import DefaultDataParallelWrapper

    size = bucket_mib(plan)
    return None if size is None else DefaultDataParallelWrapper(bucket_cap_mb=size)


def send_scheduled(plan: Plan, wrapped: Any, group: Any) -> None:
    """Give the dense part the plan's own all-reduce, where it asks for one.

    Args:
        plan: the plan.
        wrapped: a ``DistributedModelParallel``.
        group: its process group.
    """
    from torch.nn.parallel import DistributedDataParallel

    decided = plan.decisions.collectives
    chosen = [c for c in decided.choices if c.engine == "scheduled"] if decided is not None else []
    dense = wrapped._dmp_wrapped_module
    if not chosen or not isinstance(dense, DistributedDataParallel):
        return
    from codegen.runtime.collectives.choose import gradient_hook

    shape = tuple(level.fanout for level in plan.topology.levels)
    dense.register_comm_hook(None, gradient_hook(chosen[0].algorithm, shape, group))
    log.info("dense gradients: %s over %s ranks", chosen[0].algorithm, " x ".join(map(str, shape)))
