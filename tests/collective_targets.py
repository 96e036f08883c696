"""What the tests of the runtime's collectives run in other processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from codegen.runtime.collectives import execute as run
from codegen.runtime.collectives.choose import SCHEDULES, gradient_hook, schedule_of
from codegen.runtime.launch import Rank


def _numbers(seed: int, *size: int) -> torch.Tensor:
    """Whole numbers, so that sums are exact in any order."""
    return torch.randint(-1000, 1000, size, generator=torch.Generator().manual_seed(seed)).float()


def _expected_and_got(collective: Any, algorithm: str, shape: list[int], rank: int) -> Any:
    world = dist.get_world_size()
    schedule = schedule_of(collective, algorithm, shape, chunks=5)
    rows, root = 3 * schedule.blocks, world - 1
    if collective == "all_reduce":
        mine = _numbers(rank, 7, 13)  # divides into nothing
        expected = mine.clone()
        dist.all_reduce(expected)
        run.all_reduce(mine, schedule)
        return expected, mine
    if collective in ("broadcast", "reduce"):
        mine = _numbers(rank, 5, 11)
        expected = mine.clone()
        if collective == "broadcast":
            dist.broadcast(expected, root)
            run.broadcast(mine, schedule, root)
        else:
            run.reduce(mine, schedule, root)
            dist.all_reduce(expected)
            expected = expected if rank == root else mine
        return expected, mine
    mine = _numbers(rank, rows * world, 2)
    if collective == "all_to_all":
        expected, got = torch.empty_like(mine), torch.empty_like(mine)
        dist.all_to_all_single(expected, mine)
        run.all_to_all(got, mine, schedule)
        return expected, got
    if collective == "all_gather":
        expected, got = torch.empty(rows * world, 2), torch.empty(rows * world, 2)
        share = mine[:rows].clone()
        dist.all_gather_into_tensor(expected, share)
        run.all_gather(got, share, schedule)
        return expected, got
    total = mine.clone()
    dist.all_reduce(total)
    got = torch.empty(rows, 2)
    run.reduce_scatter(got, mine, schedule)
    return total[rank * rows : (rank + 1) * rows], got


def compare_all(rank: Rank, shapes: list[list[int]]) -> list[str]:
    """Names of what differs from torch.distributed's own collectives, and how many were compared."""
    different, compared = [], 0
    for shape in shapes:
        for collective, algorithms in SCHEDULES.items():
            for algorithm in algorithms:
                expected, got = _expected_and_got(collective, algorithm, shape, rank.rank)
                compared += 1
                if not torch.equal(expected, got):
                    different.append(f"{collective} {algorithm} {shape}")
    return [str(compared), *different]


def train_with_hook(rank: Rank, algorithm: str) -> float:
    """Largest difference of weights after three DDP steps with and without the hook."""
    made = []
    for hooked in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.ReLU(), torch.nn.Linear(33, 1))
        ddp = torch.nn.parallel.DistributedDataParallel(net)
        if hooked:
            ddp.register_comm_hook(None, gradient_hook(algorithm, [2, rank.world_size // 2]))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            data = torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + rank.rank))
            ddp(data).square().mean().backward()
            optimizer.step()
        made.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
    return float((made[0] - made[1]).abs().max())
