"""What the launcher's tests run in other processes."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

from codegen.runtime.launch import Rank
from ir.errors import InputError


def place(rank: Rank) -> dict[str, Any]:
    total = torch.ones(1)
    dist.all_reduce(total)
    rank.report({"pid": os.getpid()})
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {"sum": float(total), **{name: int(os.environ[name]) for name in names}}


def misbehave(rank: Rank, how: str) -> None:
    dist.barrier()
    rank.report(os.getpid())
    if rank.rank == 1 and how == "raise":
        raise ValueError("table 'x' is broken")
    if rank.rank == 1 and how == "refuse":
        raise InputError("table 'x' is unusable; mend it")
    if rank.rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank.rank == 1 and how == "hang":
        time.sleep(600)
    dist.barrier()
