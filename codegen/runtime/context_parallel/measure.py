"""Times of the attention kernel on this machine, all ranks of a group at once, without a message between them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from codegen.runtime.context_parallel.kernels import choose
from codegen.runtime.context_parallel.merge import Accumulator
from codegen.runtime.context_parallel.pieces import Piece

_SPAN = 0.1  # seconds that one repetition fills; many turns of a scheduler
_MOST_CALLS = 200


def _agreed(calls: int) -> int:
    most = torch.tensor(calls)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of ``work`` on the slowest rank, all ranks at once; the same on every rank."""
    seconds, calls = [], 1
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        seconds.append((time.perf_counter() - started) / calls)
        # ranks that share a core take turns of some milliseconds: only longer work shows what each gets
        calls = _agreed(min(_MOST_CALLS, math.ceil(_SPAN / seconds[0])))
    slowest = torch.tensor(statistics.median(seconds[1:]), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def attention_times(
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Seconds of (new, keys) attentions without a mask, and of causal ones where both are equal.

    Args:
        heads, kv_heads, head_dim: of one rank.
        lengths: tokens of queries and of keys.
        dtype: of all three.
        repeats: behind each median, after one to warm up.

    Returns:
        ``{"flops", "seconds", "masked"}`` of each, on the slowest rank, the same on every rank.
    """
    kernel = choose("auto", dtype, torch.device("cpu"), head_dim)
    found = []
    for new, keys in lengths:
        q = torch.randn(new, heads, head_dim).to(dtype)
        k, v = (torch.randn(keys, kv_heads, head_dim).to(dtype) for _ in range(2))
        piece = Piece((0, new), (0, keys), "square" if new == keys else "full")
        seconds = _seconds(partial(kernel.forward, q, k, v, piece, head_dim**-0.5), repeats)
        flops = 4.0 * heads * head_dim * piece.pairs
        found.append({"flops": flops, "seconds": seconds, "masked": new == keys})
    return found


def merge_seconds(
    heads: int, head_dim: int, rows: int, *, dtype: torch.dtype = torch.float32, repeats: int = 5
) -> float:
    """Seconds an element of adding a partial output (rows, heads, head_dim) to the running sums.

    Measured as :func:`attention_times`.
    """
    sums = Accumulator(rows, heads, head_dim, dtype, torch.device("cpu"))
    out, lse = torch.randn(rows, heads, head_dim).to(dtype), torch.randn(rows, heads)
    return _seconds(partial(sums.add, 0, rows, out, lse), repeats) / out.numel()
