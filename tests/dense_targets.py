"""What the tests of the dense part run in other processes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from codegen.runtime.dense.shard import dense_mesh, shard_dense, whole
from codegen.runtime.dense.tensor import split_pairs, tensor_mesh
from codegen.runtime.launch import Rank
from ir.dense_plan import TensorPair

UNITS = [["0"], ["2", "4"], ["6"]]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(16, 16, bias=False), nn.ReLU()]
    return nn.Sequential(*layers)


def _batch(step: int, world: int) -> torch.Tensor:
    return torch.randn(4 * world, 16, generator=torch.Generator().manual_seed(step))


def messages(rank: Rank, shard: int, replicas: int, reshard: bool) -> dict[str, Any]:
    """Bytes of the collectives' buffers in the second step, and the difference to the unsharded model."""
    module = shard_dense(net(), UNITS, dense_mesh(shard, replicas, "cpu"), reshard_after_forward=reshard)
    alone, sent = net(), []
    originals = {name: getattr(dist, name) for name in _COUNTED}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            sent.append(max(t.numel() * t.element_size() for t in tensors) * _COUNTED[name])
            return originals[name](*args, **kwargs)

        return call

    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, alone)]
    for step in range(2):
        data = _batch(step, rank.world_size)
        mine = data.chunk(rank.world_size)[rank.rank]
        sent.clear()
        with patch.multiple(dist, **{name: counting(name) for name in _COUNTED}):
            module(mine).square().mean().backward()
        alone(data).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(module.parameters(), alone.parameters(), strict=True)
    difference = max(float((whole(a) - b).detach().abs().max()) for a, b in pairs)
    size = sum(p.numel() * p.element_size() for p in alone.parameters())
    return {"sent": sum(sent), "parameters": size, "difference": difference}


# an all-reduce is a reduce-scatter and an all-gather
_COUNTED = {"all_gather_single": 1, "reduce_scatter_single": 1, "all_reduce": 2}


def pair(rank: Rank, tensor: int) -> dict[str, Any]:
    """Two split layers with biases between others, trained beside the unsharded net; messages of the second step."""
    mesh = tensor_mesh(tensor, "cpu")
    module, alone = net(), net()
    for one in (module, alone):
        torch.manual_seed(1)
        one[4], one[6] = nn.Linear(16, 24), nn.Linear(24, 16)
    named = split_pairs(module, [TensorPair("4", "6", 24, 24 * 33, 16, 16)], mesh)
    held = sum(p.to_local().numel() for n, p in module.named_parameters() if n in named)
    rest = [p for n, p in module.named_parameters() if n not in named]
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=False) for m in (module, alone)
    ]
    sent: list[int] = []

    def counting(name: str, original: Any) -> Any:
        def call(out: torch.Tensor, given: torch.Tensor, **kwargs: Any) -> Any:
            sent.append(max(out.numel(), given.numel()))
            return original(out, given, **kwargs)

        return call

    for step in range(2):
        data = _batch(step, rank.world_size)
        mine = data.chunk(rank.world_size)[rank.rank]
        sent.clear()
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
        with patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in names}):
            module(mine).square().mean().backward()
        for p in rest:
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= rank.world_size
        alone(data).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(module.parameters(), alone.parameters(), strict=True)
    difference = max(float((whole(a) - b).detach().abs().max()) for a, b in pairs)
    return {"difference": difference, "held": held, "sent": sum(sent), "samples": len(mine)}
