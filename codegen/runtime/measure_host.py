"""What a rank's host adds to a step: cores shared with other ranks, and the framework's own work.

:func:`core_sharing` times a product on one rank while the others wait and on all at once. :func:`framework` times
steps of TorchRec with hardly a byte in them, so that what remains is Python, autograd and the number of
collectives: two tables, ten tables, and ten tables under two sharding types; then two and ten tables under the
compressed exchange. These steps take turns, since what disturbs a shared machine comes and goes and only their
differences count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from codegen.runtime.launch import Rank
from ir.compression import Decay, Direction

_SIZE = 512  # of the product; a millisecond or two, long beside a wake-up
_FEW, _MANY = 2, 10  # tables
_ROWS, _DIM, _SAMPLES = 64, 16, 8  # of each table and of each rank's batch: nothing to speak of
_ROUNDS, _WARM_UP, _STEPS = 3, 2, 8  # of each kind of step, one kind after the other

Step = Callable[[], None]


def core_sharing(rank: Rank, repeats: int) -> float:
    """Seconds of a product with all ranks at work over those of rank 0 alone; 1 to the ranks of a host."""
    x, out = torch.ones(_SIZE, _SIZE), torch.empty(_SIZE, _SIZE)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(20):
            torch.mm(x, x, out=out)
        return time.perf_counter() - start

    together, alone = [], []
    seconds()
    for _ in range(max(repeats, 3)):
        dist.barrier()
        together.append(seconds())
        dist.barrier()
        if rank.rank == 0:
            alone.append(seconds())
    ratio = torch.zeros(1, dtype=torch.float64)
    if rank.rank == 0:
        ratio[0] = statistics.median(together) / statistics.median(alone)
    dist.broadcast(ratio, 0)
    return min(max(float(ratio), 1.0), float(rank.host_size))


def framework(rank: Rank, repeats: int) -> dict[str, Any] | None:
    """Seconds of TorchRec's steps; None where TorchRec is absent or there is one rank only."""
    try:
        import torchrec  # noqa: F401
    except ImportError:
        return None
    if rank.world_size == 1:
        return None
    kinds: dict[str, list[str]] = {
        "few": ["table_wise"] * _FEW,
        "many": ["table_wise"] * _MANY,
        "two_types": ["table_wise", "column_wise"] * (_MANY // 2),
    }
    with torch.enable_grad():
        steps = {name: _stepper(types, rank) for name, types in kinds.items()}
        steps |= {f"exchange_{name}": _exchange_stepper(len(kinds[name]), rank) for name in ("few", "many")}
        seconds = _in_turns(steps)
    return {
        "few_tables": _FEW,
        "many_tables": _MANY,
        "dense_bytes": 4 * _parameters(_MANY),
        **seconds,
    }


def _parameters(tables: int) -> int:
    return tables * _DIM + 1


def _in_turns(steps: Mapping[str, Step]) -> dict[str, float]:
    """Lower quartile of the seconds of each step, on the slowest rank: what disturbs a shared machine only adds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            for count in range(_WARM_UP + _STEPS):
                dist.barrier()
                start = time.perf_counter()
                step()
                dist.barrier()
                if count >= _WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: statistics.quantiles(row)[0] for name, row in zip(steps, slowest.tolist(), strict=True)}


def _exchange_stepper(tables: int, rank: Rank) -> Step:
    """A training step whose vectors and gradients all travel under a codec."""
    from torch import nn

    from codegen.runtime.compressed_exchange import Piece, ShardedEmbeddings, average_gradients
    from codegen.runtime.compressed_lookup import Update
    from ir.compression import Compression, ExchangeCompression, TableCompression

    pieces = [Piece(f"t{n}", _ROWS, (f"f{n}",), "sum", n % rank.world_size, 0, _DIM) for n in range(tables)]
    ways: tuple[Direction, ...] = ("forward", "backward")
    section = Compression(
        "exchange",
        Decay(),
        tuple(
            TableCompression(
                table=piece.table,
                direction=way,
                codec="lz",
                bound=0.0,
                table_class="wide",
                ratio=1.0,
                error=0.0,
                budget=0.0,
                link=0.0,
                coding=0.0,
                uncompressed=0.0,
                verdict="",
            )
            for piece in pieces
            for way in ways
        ),
        tuple(ExchangeCompression(way, 0.0, 0.0, 0.0, used=True) for way in ways),
    )
    embeddings = ShardedEmbeddings(pieces, None, section, update=Update("sgd", 0.01))
    top = nn.Linear(tables * _DIM, 1)
    optimizer = torch.optim.SGD(top.parameters(), lr=0.01)
    lengths = torch.ones(_SAMPLES, dtype=torch.int64)
    ids = {f"f{n}": (torch.arange(_SAMPLES) % _ROWS, lengths) for n in range(tables)}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        top(torch.cat(list(embeddings(ids).values()), dim=1)).mean().backward()
        average_gradients(list(top.parameters()))
        optimizer.step()

    return step


def _blocks(kind: str, table: int, world: int) -> list[tuple[int, list[int], list[int]]]:
    """(rank, offsets, sizes) of a table's shards: the whole, or two halves of its columns."""
    if kind == "table_wise":
        return [(table % world, [0, 0], [_ROWS, _DIM])]
    half = _DIM // 2
    return [((table + side) % world, [0, side * half], [_ROWS, half]) for side in (0, 1)]


def _stepper(kinds: Sequence[str], rank: Rank) -> Step:
    from torch import nn
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.types import (
        EmbeddingModuleShardingPlan,
        EnumerableShardingSpec,
        ParameterSharding,
        ShardingPlan,
    )

    names = [f"t{n}" for n in range(len(kinds))]
    features = [f"f{n}" for n in range(len(kinds))]

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = EmbeddingBagCollection(
                [
                    EmbeddingBagConfig(
                        name=name, num_embeddings=_ROWS, embedding_dim=_DIM, feature_names=[feature]
                    )
                    for name, feature in zip(names, features, strict=True)
                ],
                device=torch.device("cpu"),
            )
            self.top = nn.Linear(len(kinds) * _DIM, 1)

        def forward(self, ids: Any) -> Any:
            return self.top(self.ebc(ids).values())

    tiny = Tiny()
    for parameter in tiny.ebc.parameters():
        _apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": 0.01})
    plan = EmbeddingModuleShardingPlan()
    for n, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        blocks = _blocks(kind, n, rank.world_size)
        shards = [ShardMetadata(offsets, sizes, f"rank:{r}/cpu") for r, offsets, sizes in blocks]
        ranks = [r for r, _, _ in blocks]
        plan[name] = ParameterSharding(kind, "fused", ranks, EnumerableShardingSpec(shards))
    wrapped = DistributedModelParallel(
        tiny,
        device=torch.device("cpu"),
        plan=ShardingPlan(plan={"ebc": plan}),
        sharders=[EmbeddingBagCollectionSharder()],
    )
    optimizer = torch.optim.SGD([p for n, p in wrapped.named_parameters() if "top" in n], lr=0.01)
    count = _SAMPLES * len(kinds)
    ids = KeyedJaggedTensor(
        keys=features,
        values=torch.arange(count) % _ROWS,
        lengths=torch.ones(count, dtype=torch.int32),
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        wrapped(ids).mean().backward()
        optimizer.step()

    return step
