"""What each rank measures of its machine: memory, GEMMs, embedding lookups, links by message size, collectives.

:func:`measure` runs on every rank of an initialised gloo group and returns the same record on each. Every
rank works at the same time throughout, because ranks that share a machine share its cores and memory: what counts is what a
rank gets while the others do the same. Times are the slowest rank's, medians over repetitions.

=============  ==================================================================================================
memory         read (sum), write (fill), copy and add over arrays larger than the last-level cache, and reads of an array
               that fits it: bytes/s
gemm           (m, k) x (k, n) products in fp32 and bf16: FLOP/s
lookup         pooled lookups of uniformly drawn rows, forward, and backward with the row-wise update: seconds
links          ping-pong between two ranks by message size, one way: seconds; flood: every rank sends to and receives from
               a rank of its own host (intra) or of the next host (inter) at once: bytes/s a rank, one direction
collectives    all-to-all (the library's, and "posted", the project's own), all-reduce, reduce-scatter and all-gather by
               bytes of the whole buffer, in each host at once (intra) and over all ranks (inter); one_way: the largest
               all-to-all with only the first half of the hosts sending
core_sharing   seconds of a product with all ranks at work over those of one rank alone
codecs         speeds of this project's and of TorchRec's codecs, on normal vectors that repeat as ids do: bytes/s
               (:mod:`codegen.runtime.codecs.speeds`)
framework      steps of TorchRec, and under the compressed exchange, with hardly a byte in them
               (:mod:`codegen.runtime.measure_host`)
=============  ==================================================================================================
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from codegen.runtime.codecs.speeds import LIBRARY, at_once
from codegen.runtime.launch import Rank
from codegen.runtime.measure_host import core_sharing, framework
from codegen.runtime.posted import all_to_all

Record = dict[str, Any]

_ARRAY_BYTES = 64 * 2**20  # beyond the last-level cache share of a rank on current servers
_CACHED_BYTES = 2**20  # within the last-level cache share of a rank, beyond its first level
_GEMMS = ((256, 256, 256), (512, 512, 512), (1024, 512, 256), (1024, 1024, 1024))  # DLRM-like and square
_LOOKUP_DIMS = (16, 64, 128)  # widths of published recommenders
_LOOKUP_IDS = 16384
_LOOKUP_POOLING = 8  # ids a bag
_CODED_ROWS, _CODED_DIM = 512, 64  # vectors of a message: what a rank of a small batch asks of one table
_CODED_IDS, _CODED_ZIPF = (
    4096,
    1.1,
)  # rows of the table, and exponent of its ids as in Criteo's larger features
_LINK_BYTES = tuple(4**power for power in range(12))  # 1 B to 4 MiB
_FLOOD_SECONDS = 0.4  # aimed length of one flood repetition; long beside a link's burst and a scheduler tick
_FLOOD_BYTES = (
    8 * 2**20
)  # the most a rank sends in one repetition over a fast link: the size of a large exchange
_COLLECTIVE_BYTES = (1024, 65536, 2**18, 2**20, 2**22)
_SPAN = 0.05  # seconds that the repetitions of one measurement fill together
_MOST_REPEATS = 40
_SMALL = 4096  # bytes; messages up to this are timed in batches
_SLOW = 0.6  # seconds: once a message takes this long, larger ones are left out


def measure(rank: Rank, repeats: int = 5) -> Record:
    """Everything above, on every rank of the default group at once.

    Args:
        rank: this rank's place; ``rank.report`` is told the name of each stage as it starts.
        repeats: repetitions behind each median.
    """
    record: Record = {
        "world_size": rank.world_size,
        "host_size": rank.host_size,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // rank.host_size,
        "repeats": repeats,
    }
    stages: tuple[tuple[str, Callable[[Rank, int], Any]], ...] = (
        ("memory", _memory),
        ("gemm", _gemms),
        ("kernel_seconds", _kernel_seconds),
        ("lookup", _lookups),
        ("links", _links),
        ("collectives", _collectives),
        ("core_sharing", core_sharing),
        ("codecs", _codecs),
        ("framework", framework),
    )
    for name, stage in stages:
        rank.report({"stage": name})
        with torch.no_grad():
            record[name] = stage(rank, repeats)
    return record


def _agreed(seconds: Sequence[float]) -> float:
    """Median over repetitions of the slowest rank's time; the same number on every rank."""
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(statistics.median(slowest.tolist()))


def _typical(seconds: Sequence[float]) -> float:
    """Median over repetitions and ranks; the same number on every rank."""
    mine = torch.tensor(seconds, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return float(statistics.median(torch.cat(everyone).tolist()))


def _repetitions(seconds: float, repeats: int) -> int:
    """How often to repeat what took rank 0 ``seconds`` once: short work more often, so that a passing
    disturbance is outvoted; the same number on every rank."""
    wanted = torch.tensor([min(_MOST_REPEATS, int(_SPAN / max(seconds, 1e-9)))])
    dist.broadcast(wanted, 0)
    return max(repeats, int(wanted))


def _timed(work: Callable[[], object], repeats: int, inner: int = 1) -> float:
    """Seconds of ``work`` on all ranks at once, after one run to warm up; ``inner`` runs a repetition."""
    work()
    start = time.perf_counter()
    work()
    count = _repetitions(inner * (time.perf_counter() - start), repeats)
    seconds = []
    dist.barrier()
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(inner):
            work()
        seconds.append((time.perf_counter() - start) / inner)
    return _typical(seconds)


def _memory(rank: Rank, repeats: int) -> Record:
    count = _ARRAY_BYTES // 4
    a, b, c = (torch.ones(count) for _ in range(3))
    size = float(_ARRAY_BYTES)
    cached = a[: _CACHED_BYTES // 4]
    return {
        "cache": _CACHED_BYTES / _timed(cached.sum, repeats, inner=100),
        "read": size / _timed(a.sum, repeats),
        "write": size / _timed(lambda: a.fill_(1.0), repeats),
        "copy": 2 * size / _timed(lambda: b.copy_(a), repeats),
        "add": 3 * size / _timed(lambda: torch.add(a, b, out=c), repeats),
    }


def _gemms(rank: Rank, repeats: int) -> list[Record]:
    rows = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for m, k, n in _GEMMS:
            x, w = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
            out = torch.empty(m, n, dtype=dtype)
            seconds = _timed(partial(torch.mm, x, w, out=out), repeats, 3)
            rows.append({"dtype": name, "m": m, "k": k, "n": n, "flops": 2.0 * m * k * n / seconds})
    return rows


def _kernel_seconds(rank: Rank, repeats: int) -> float:
    tiny = torch.ones(16)
    return _timed(lambda: torch.relu(tiny), repeats, inner=1000)


def _lookups(rank: Rank, repeats: int) -> list[Record]:
    rows = []
    for dim in _LOOKUP_DIMS:
        count = _ARRAY_BYTES // (4 * dim)
        generator = torch.Generator().manual_seed(rank.rank)
        ids = torch.randint(0, count, (_LOOKUP_IDS,), generator=generator)
        offsets = torch.arange(0, _LOOKUP_IDS + 1, _LOOKUP_POOLING)
        (kernel, optimizer), forward, backward = _kernel(count, dim)
        out = forward(ids, offsets)
        gradient = torch.ones_like(out)
        fed = _timed(partial(forward, ids, offsets), repeats, 5)
        both = _timed(partial(backward, ids, offsets, gradient), repeats, 5)
        table, gathered = torch.ones(count, dim), torch.empty(_LOOKUP_IDS, dim)
        picked = _timed(partial(torch.index_select, table, 0, ids, out=gathered), repeats, 5)
        rows.append(
            {
                "kernel": kernel,
                "optimizer": optimizer,
                "dim": dim,
                "rows": count,
                "ids": _LOOKUP_IDS,
                "pooling": _LOOKUP_POOLING,
                "gather_seconds": picked,
                "forward_seconds": fed,
                "backward_seconds": max(both - fed, 0.0),
                "distinct": int(torch.unique(ids).numel()),
            }
        )
    return rows


Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Backward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def _kernel(rows: int, dim: int) -> tuple[tuple[str, str], Forward, Backward]:
    """FBGEMM's fused bags as TorchRec runs them on a CPU; EmbeddingBag with SGD where FBGEMM is absent.

    The backward function runs forward, backward and update; its caller subtracts the forward time.
    """
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except ImportError:
        return _plain_kernel(rows, dim)
    bags: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
    )

    def backward(ids: torch.Tensor, offsets: torch.Tensor, gradient: torch.Tensor) -> None:
        with torch.enable_grad():
            bags(ids, offsets).backward(gradient)

    return ("fbgemm", "rowwise_adagrad"), lambda ids, offsets: bags(ids, offsets), backward


def _plain_kernel(rows: int, dim: int) -> tuple[tuple[str, str], Forward, Backward]:
    bag = torch.nn.EmbeddingBag(rows, dim, mode="sum", sparse=True, include_last_offset=True)
    optimizer = torch.optim.SGD(bag.parameters(), lr=0.01)

    def backward(ids: torch.Tensor, offsets: torch.Tensor, gradient: torch.Tensor) -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            bag(ids, offsets).backward(gradient)
            optimizer.step()

    return ("EmbeddingBag", "sgd"), lambda ids, offsets: bag(ids, offsets), backward


def _codecs(rank: Rank, repeats: int) -> Record:
    """Vectors of ids drawn by Zipf's law, other ones on each rank."""
    draw = np.random.default_rng(rank.rank)
    vectors = draw.standard_normal((_CODED_IDS, _CODED_DIM), dtype=np.float32)
    often = np.arange(1, _CODED_IDS + 1) ** -_CODED_ZIPF
    ids = draw.choice(_CODED_IDS, _CODED_ROWS, p=often / often.sum())
    message = [torch.from_numpy(vectors[ids])]
    return {
        "own": at_once(message, repeats=repeats),
        # TorchRec codes the vectors of all tables in one call, beside which the cost of a call is small
        "library": at_once([message[0].repeat(8, 1)], LIBRARY, repeats=repeats, library=True),
    }


def _links(rank: Rank, repeats: int) -> Record:
    """Ping-pong and flood at each level that exists."""
    levels: Record = {}
    size, world = rank.host_size, rank.world_size
    if size > 1:
        levels["intra"] = {"points": _ping_pong(rank, 1, repeats)}
        host = rank.rank - rank.rank % size
        around = (host + (rank.rank + 1) % size, host + (rank.rank - 1) % size)
        levels["intra"]["flood"] = _flood(around, levels["intra"]["points"], 1, repeats)
    if world > size:
        levels["inter"] = {"points": _ping_pong(rank, size, repeats)}
        around = ((rank.rank + size) % world, (rank.rank - size) % world)
        levels["inter"]["flood"] = _flood(around, levels["inter"]["points"], size, repeats)
    return levels


def _ping_pong(rank: Rank, other: int, repeats: int) -> list[Record]:
    """One-way seconds by message size between rank 0 and ``other`` while the rest wait."""
    points: list[Record] = []
    dist.barrier()  # else a rank still at the stage before takes a core from the first sizes
    for size in _LINK_BYTES:
        message = torch.zeros(size, dtype=torch.uint8)
        # small messages are timed in batches, so that a timer tick or one wake-up does not count
        inner = 20 if size <= _SMALL else 1
        _round_trip(rank.rank, other, message, inner)
        count = _repetitions(_round_trip(rank.rank, other, message, inner) * inner, repeats)
        trips = [_round_trip(rank.rank, other, message, inner) for _ in range(count)]
        shared = torch.tensor([statistics.median(trips) / 2], dtype=torch.float64)
        dist.broadcast(shared, 0)
        points.append({"bytes": size, "seconds": float(shared)})
        if points[-1]["seconds"] > _SLOW:
            break
    return points


def _round_trip(rank: int, other: int, message: torch.Tensor, inner: int) -> float:
    """Seconds of one of ``inner`` round trips as rank 0 sees them; other ranks' figures mean nothing."""
    start = time.perf_counter()
    for _ in range(inner):
        if rank == 0:
            dist.send(message, other)
            dist.recv(message, other)
        elif rank == other:
            dist.recv(message, 0)
            dist.send(message, 0)
    return (time.perf_counter() - start) / inner


def _flood(around: tuple[int, int], points: Sequence[Record], sharers: int, repeats: int) -> Record:
    """Bytes/s a rank, one direction, while every rank sends to one and receives from another.

    The message is what the ping-pong says ``sharers`` ranks on one link send in the aimed time, in
    several pieces so that the link never idles.
    """
    to, source = around
    pieces, largest = 4, points[-1]
    rate = largest["bytes"] / max(largest["seconds"], 1e-9)
    size = int(min(_FLOOD_BYTES, max(2**18, rate * _FLOOD_SECONDS / sharers)) / pieces)
    out, into = (
        torch.zeros(size, dtype=torch.uint8),
        [torch.empty(size, dtype=torch.uint8) for _ in range(pieces)],
    )

    def exchange() -> None:
        waiting = [dist.irecv(piece, source, tag=tag) for tag, piece in enumerate(into)]
        waiting += [dist.isend(out, to, tag=tag) for tag in range(pieces)]
        for one in waiting:
            assert one is not None
            one.wait()

    return {"bytes": size * pieces, "bandwidth": size * pieces / _collective_time(exchange, None, repeats)}


def _collective_time(
    work: Callable[[], object], group: dist.ProcessGroup | None, repeats: int, inner: int = 1
) -> float:
    """Seconds of a collective on the slowest rank; ``inner`` of them back to back a repetition."""
    work()
    start = time.perf_counter()
    work()
    count = _repetitions(inner * (time.perf_counter() - start), repeats)
    seconds = []
    for _ in range(count):
        dist.barrier(group)
        start = time.perf_counter()
        for _ in range(inner):
            work()
        seconds.append((time.perf_counter() - start) / inner)
    return _agreed(seconds)


def _collectives(rank: Rank, repeats: int) -> list[Record]:
    rows: list[Record] = []
    size, world = rank.host_size, rank.world_size
    if size > 1:
        hosts = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        rows += _sweep("intra", hosts[rank.rank // size], size, repeats)
    if world > size:
        rows += _sweep("inter", dist.group.WORLD, world, repeats)
        both = [row for row in rows if row["op"] == "all_to_all" and row["level"] == "inter"]
        rows.append(_one_way(rank, both[-1]["bytes"], repeats))
    return rows


def _one_way(rank: Rank, size: int, repeats: int) -> Record:
    """An all-to-all of ``size`` bytes to which only the ranks of the first half of the hosts send."""
    world = rank.world_size
    senders = max(world // rank.host_size // 2, 1) * rank.host_size
    part = size // 4 // world
    sent = [part if rank.rank < senders else 0] * world
    taken = [part if peer < senders else 0 for peer in range(world)]
    given, into = torch.zeros(sum(sent)), torch.zeros(sum(taken))
    seconds = _collective_time(partial(dist.all_to_all_single, into, given, taken, sent), None, repeats)
    return {"op": "one_way", "level": "inter", "ranks": world, "bytes": 4 * part * world, "seconds": seconds}


def _sweep(level: str, group: dist.ProcessGroup | None, ranks: int, repeats: int) -> list[Record]:
    rows = []
    for name in ("all_to_all", "posted", "all_reduce", "reduce_scatter", "all_gather"):
        for size in _COLLECTIVE_BYTES:
            count = size // 4 // ranks * ranks
            work = _work(name, count, ranks, group)
            # ranks leave a barrier at different times, which would drown a short collective
            seconds = _collective_time(work, group, repeats, 20 if size <= _SMALL else 1)
            rows.append({"op": name, "level": level, "ranks": ranks, "bytes": count * 4, "seconds": seconds})
            if seconds > _SLOW:
                break
    return rows


def _work(name: str, count: int, ranks: int, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """One collective over a buffer of ``count`` float32, called as TorchRec and DDP call it."""
    given, taken = torch.zeros(count), torch.zeros(count)
    if name == "all_to_all":
        return partial(dist.all_to_all_single, taken, given, group=group)
    part = torch.zeros(count // ranks)
    if name == "posted":
        parts = [count // ranks] * ranks
        return lambda: all_to_all(taken, given, parts, parts, group).wait()
    if name == "reduce_scatter":
        return partial(dist.reduce_scatter_tensor, part, given, group=group)
    if name == "all_gather":
        return partial(dist.all_gather_into_tensor, taken, part, group=group)
    return partial(dist.all_reduce, given, group=group)
