"""What the ranks of tests/test_posted.py run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from codegen.runtime.launch import Rank
from codegen.runtime.posted import all_to_all


def against_the_library(rank: Rank) -> dict[str, Any]:
    """Uneven parts, some empty: over all ranks, and over a group without rank 0, two exchanges under way at once."""
    group = dist.new_group(list(range(1, rank.world_size)))
    same = []
    for members in (None, group):
        if members is not None and rank.rank == 0:
            continue
        me, world = dist.get_rank(members), dist.get_world_size(members)
        send = [(me + peer) % 3 * 5 for peer in range(world)]  # the same seen from both sides
        started = []
        for turn in range(2):
            given = torch.arange(sum(send), dtype=torch.float32) + 1000 * rank.rank + 100_000 * turn
            taken, wanted = torch.full((2, sum(send)), -1.0)
            started.append((all_to_all(taken, given, send, send, members), taken, wanted, given))
            dist.all_to_all_single(wanted, given, send, send, group=members)
        for posted, taken, wanted, _ in reversed(started):
            posted.wait()
            same.append(bool(torch.equal(taken, wanted)))
    return {"same": same}
