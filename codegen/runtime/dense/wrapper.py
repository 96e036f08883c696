"""FSDP, HSDP or split layers in the place of TorchRec's DDP: the dense part of a ``DistributedModelParallel``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.model_parallel import DataParallelWrapper, DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingEnv

from codegen.runtime.dense.shard import dense_mesh, shard_dense
from codegen.runtime.dense.tensor import split_pairs, tensor_mesh
from ir.dense_plan import TensorPair


@dataclass
class ShardedDataParallel(DataParallelWrapper):  # type: ignore[misc]
    """TorchRec's seam for the dense part, filled with ``fully_shard``; arguments as in :func:`shard_dense`."""

    units: Sequence[Sequence[str]]
    shard: int
    replicas: int
    reshard_after_forward: bool
    compute_dtype: torch.dtype | None = None
    group: Any = None  # over whose ranks; default: those of the tables

    def wrap(self, dmp: Any, env: Any, device: torch.device) -> None:
        """Split what TorchRec has not sharded; called once, when all weights are allocated."""
        from torch.distributed.fsdp import FSDPModule

        module = dmp._dmp_wrapped_module
        if isinstance(module, FSDPModule):
            return
        sharded = set(DistributedModelParallel._sharded_parameter_names(module))
        ignored = {parameter for name, parameter in module.named_parameters() if name in sharded}
        shard_dense(
            module.to(device),
            self.units,
            dense_mesh(self.shard, self.replicas, device.type, self.group or env.process_group),
            reshard_after_forward=self.reshard_after_forward,
            ignored=ignored,
            compute_dtype=self.compute_dtype,
        )


@dataclass
class TensorDataParallel(DataParallelWrapper):  # type: ignore[misc]
    """TorchRec's seam for the dense part: pairs of layers split over the ranks of a host, the rest under DDP."""

    pairs: Sequence[TensorPair]
    tensor: int

    def wrap(self, dmp: Any, env: Any, device: torch.device) -> None:
        """Split the pairs and replicate the rest; called once, when all weights are allocated."""
        from torch.nn.parallel import DistributedDataParallel

        module = dmp._dmp_wrapped_module
        if isinstance(module, DistributedDataParallel):
            return
        own = set(DistributedModelParallel._sharded_parameter_names(module))
        mesh = tensor_mesh(self.tensor, device.type, env.process_group)
        own |= split_pairs(module.to(device), self.pairs, mesh)
        if all(name in own for name, p in module.named_parameters() if p.requires_grad):
            return
        # DDP's own hook for parameters that are no replicas; TorchRec uses it for its shards
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(own))  # type: ignore[no-untyped-call]
        dmp._dmp_wrapped_module = DistributedDataParallel(
            module,
            device_ids=None if device.type == "cpu" else [device],
            process_group=env.process_group,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )


@dataclass
class _OverGroup(DataParallelWrapper):  # type: ignore[misc]
    """A wrapper of the dense part over other ranks than the tables'."""

    inner: Any
    group: Any

    def wrap(self, dmp: Any, env: Any, device: torch.device) -> None:
        """As ``inner`` does, over ``group``."""
        self.inner.wrap(dmp, ShardingEnv.from_process_group(self.group), device)


def over_group(wrapper: Any, group: Any) -> Any:
    """``wrapper`` (None: TorchRec's own) for a dense part that is parallel over ``group``."""
    return _OverGroup(wrapper if wrapper is not None else DefaultDataParallelWrapper(), group)
