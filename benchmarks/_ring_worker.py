"""One rank of benchmarks/context_parallel_cluster.py: the attention kernel alone, or rings that take turns."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.context_parallel import KVCache, Ring, balanced, pass_kv, pass_q
from codegen.runtime.context_parallel.measure import attention_times, merge_seconds

DTYPE = torch.bfloat16
CALLS = 2  # in a row, as layers follow each other
RINGS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "pass_kv": pass_kv,
    "pass_q": pass_q,
    "pass_q_eager": lambda ring, q, kv: pass_q(ring, q, kv, returns="eager"),
}


def request(settings: dict[str, Any], new: int) -> tuple[Ring, Tensor, list[Tensor]]:
    """The ring, this rank's queries, and its cache with the new tokens in it."""
    total, heads = settings["total"], settings["heads"]
    shape = (settings["kv_heads"], settings["head_dim"])
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(new * world + rank)
    cached = balanced([total - new], world)
    fresh = balanced([new], world, starts=[total - new])
    cache = KVCache(1, *shape, dtype=DTYPE)
    for placement in (cached, fresh):
        k, v = (torch.randn(placement.rows(rank), *shape).to(DTYPE) for _ in range(2))
        cache.append(placement, rank, k, v)
    ring = Ring(
        fresh,
        cached.extend(fresh),
        heads=heads,
        kv_heads=shape[0],
        head_dim=shape[1],
        dtype=DTYPE,
        check=False,
    )
    q = torch.randn(fresh.rows(rank), heads, shape[1]).to(DTYPE)
    return ring, q, cache.local


def rings(settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Least seconds of one call by new tokens and algorithm, on the slowest rank of each repetition.

    The least, since the machine is shared: what disturbs a repetition only adds to it.
    """
    answer = {}
    for new in settings["new"]:
        ring, q, kv = request(settings, new)
        outputs = {name: call(ring, q, kv)[0].float() for name, call in RINGS.items()}  # also warms up
        for name, out in outputs.items():
            # bf16 has 8 bits; partial outputs are rounded once on their way home
            torch.testing.assert_close(
                out, outputs["pass_kv"], atol=2e-2, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}"
            )
        seconds: dict[str, list[float]] = {name: [] for name in RINGS}
        # short requests are disturbed most and cost least
        for _ in range(
            settings["turns"]
            * (1 if 4 * new >= settings["total"] else 8 if 32 * new >= settings["total"] else 24)
        ):
            for name, call in RINGS.items():
                dist.barrier()
                started = time.perf_counter()
                for _ in range(CALLS):
                    call(ring, q, kv)
                seconds[name].append((time.perf_counter() - started) / CALLS)
        table = torch.tensor([seconds[name] for name in RINGS], dtype=torch.float64)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        answer[str(new)] = {name: float(row.min()) for name, row in zip(RINGS, table, strict=True)}
    return answer


def main() -> None:
    """Read the settings (JSON file) and print one JSON line from rank 0."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    heads = settings["heads"], settings["kv_heads"], settings["head_dim"]
    kernel = attention_times(*heads, settings["lengths"], dtype=DTYPE)
    rows = settings["total"] // (2 * dist.get_world_size())
    merging = merge_seconds(heads[0], heads[2], rows, dtype=DTYPE)
    found = {"attention": kernel, "merge": merging, "rings": rings(settings)}
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
