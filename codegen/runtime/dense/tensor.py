"""Pairs of linear layers split over the ranks of a host, which compute their units for each other's samples.

``first`` keeps rows of its weight (units), ``second`` the columns that read them. Samples are gathered before the pair and
sums are scattered after it, so what is around a pair sees this rank's samples only. Weights are DTensors, so state dicts
and optimizers know them whole; gradients are averaged over all ranks, as DDP's are. Ranks of a host must have equally many
samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ir.dense_plan import TensorPair
from ir.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def tensor_mesh(tensor: int, device: str, group: Any = None) -> DeviceMesh:
    """(replicas, tensor): consecutive ranks split a pair, ranks at one place hold the same shard.

    Raises:
        InputError: the ranks of ``group`` do not divide by ``tensor``, or are not all ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size(group)
    if world % tensor or world != dist.get_world_size():
        raise InputError(
            f"the plan splits layers over {tensor} ranks of a host, and {world} of {dist.get_world_size()} ranks train the "
            "dense part; start a multiple"
        )
    return init_device_mesh(device, (world // tensor, tensor), mesh_dim_names=("replicate", "tensor"))


class _Gather(torch.autograd.Function):
    """(b, ...) of each rank to (g b, ...); the gradients of a rank's samples are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _scattered(gradients[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    """(g b, ...) partial sums to this rank's (b, ...) sums; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _gathered(gradients[0], ctx.group), None


class _Averaged(torch.autograd.Function):
    """A shard as it is; its gradient, a sum over the host's samples, averaged over all ranks."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, replicas: Any, world: int) -> Tensor:
        ctx.how = (replicas, world)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        replicas, world = ctx.how
        gradient = gradients[0].contiguous().clone()
        if dist.get_world_size(replicas) > 1:
            dist.all_reduce(gradient, group=replicas)
        return gradient / world, None, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    size = dist.get_world_size(group)
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scattered(x: Tensor, group: Any) -> Tensor:
    out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


class _Split(nn.Module):
    """What both layers of a pair share."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, source: nn.Linear, mesh: DeviceMesh, dim: int) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.host, self.replicas = mesh.get_group("tensor"), mesh.get_group("replicate")
        self.weight = _shard(source.weight, mesh, dim)

    def _whole(self, shard: Tensor) -> Tensor:
        local: Any = shard
        made: Tensor = _Averaged.apply(local.to_local(), self.replicas, dist.get_world_size())  # type: ignore[no-untyped-call]
        return made

    def extra_repr(self) -> str:
        """Sizes of the unsplit layer."""
        return f"{self.in_features}, {self.out_features}, split over {dist.get_world_size(self.host)} ranks"


def _shard(parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    from torch.distributed.tensor import Shard, distribute_tensor

    # every rank has the same weights already: nothing is sent
    made = distribute_tensor(parameter.detach(), mesh["tensor"], [Shard(dim)], src_data_rank=None)
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


class FirstOfPair(_Split):
    """(b, ..., K) of this rank to (g b, ..., H / g) of the host."""

    def __init__(self, source: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__(source, mesh, 0)
        self.bias = None if source.bias is None else _shard(source.bias, mesh, 0)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's units of all samples of the host."""
        gathered: Tensor = _Gather.apply(x, self.host)  # type: ignore[no-untyped-call]
        bias = None if self.bias is None else self._whole(self.bias)
        return F.linear(gathered, self._whole(self.weight), bias)


class SecondOfPair(_Split):
    """(g b, ..., H / g) of the host to (b, ..., N) of this rank. The bias is replicated."""

    def __init__(self, source: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__(source, mesh, 1)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        """Sums over all units for this rank's samples."""
        partial = F.linear(x, self._whole(self.weight))
        y: Tensor = _Scatter.apply(partial, self.host)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def split_pairs(module: nn.Module, pairs: Iterable[TensorPair], mesh: DeviceMesh) -> set[str]:
    """Split the pairs of ``module`` in place; the names of the parameters that are shards now.

    Raises:
        InputError: a layer that the model lacks, that is no ``nn.Linear``, or of another width than planned.
    """
    names: set[str] = set()
    for pair in pairs:
        for path, made in ((pair.first, FirstOfPair), (pair.second, SecondOfPair)):
            owner, _, last = path.rpartition(".")
            try:
                source = module.get_submodule(path)
            except AttributeError:
                source = None
            if not isinstance(source, nn.Linear):
                raise InputError(
                    f"the model has no linear layer {path!r}, which the plan splits; plan this model"
                )
            units = source.out_features if made is FirstOfPair else source.in_features
            if units != pair.units:
                raise InputError(
                    f"layer {path!r} has {units} units where the plan has {pair.units}; plan this model"
                )
            module.get_submodule(owner).add_module(last, made(source, mesh))
        names.add(f"{pair.first}.weight")
        names.add(f"{pair.second}.weight")
        if module.get_submodule(pair.first).bias is not None:
            names.add(f"{pair.first}.bias")
    return names
