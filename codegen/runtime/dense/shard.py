"""FSDP and HSDP of a module by ``torch.distributed.fsdp.fully_shard``, in the units that a plan names.

Works on NCCL and on gloo. Gradients are averaged over all ranks, as DDP's are.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ir.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def dense_mesh(shard: int, replicas: int, device: str, group: dist.ProcessGroup | None = None) -> DeviceMesh:
    """The mesh of a split: shards over ``shard`` consecutive ranks, replicas over the rest.

    Raises:
        InputError: the process group has another number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size(group)
    if world != shard * replicas:
        raise InputError(
            f"the plan splits the dense part over {shard} x {replicas} ranks, {world} run; compile for {world} ranks"
        )
    if replicas == 1:
        return init_device_mesh(device, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, shard), mesh_dim_names=("replicate", "shard"))


def shard_dense(
    module: nn.Module,
    units: Sequence[Sequence[str]],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool,
    ignored: Collection[nn.Parameter] = (),
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Split the parameters of ``module`` over ``mesh`` in place, except those ``ignored``.

    Args:
        module: its weights are kept; the same on all ranks.
        units: paths of the modules that are gathered together, in the order of the forward pass. All other parameters
            are gathered before the forward pass.
        mesh: of :func:`dense_mesh`.
        reshard_after_forward: as in ``fully_shard``.
        ignored: parameters that somebody else shards.
        compute_dtype: of gathered weights and reduced gradients; None: that of the parameters.

    Raises:
        InputError: a path that the module lacks.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=compute_dtype)
    left = set(ignored)
    known = dict(module.named_modules())
    made: list[FSDPModule] = []
    for unit in units:
        lost = [path for path in unit if path not in known]
        if lost:
            raise InputError(f"the model has no module {lost[0]!r}, which the plan gathers; plan this model")
        parts = [known[path] for path in unit]
        fully_shard(
            parts,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            ignored_params=left,
            mp_policy=policy,
        )
        if isinstance(parts[0], FSDPModule):
            made.append(parts[0])
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=left, mp_policy=policy)
    # the next unit's weights travel while this one computes
    for this, following in itertools.pairwise(made):
        this.set_modules_to_forward_prefetch([following])
        if reshard_after_forward:
            following.set_modules_to_backward_prefetch([this])
    return module


def whole(value: Tensor) -> Tensor:
    """All of a parameter, on every rank; collective where it is split."""
    gather = getattr(value, "full_tensor", None)
    found: Tensor = gather() if gather is not None else value
    return found.detach()


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter that may be split."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.to(target.dtype), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(value)
