"""Embedding bags sharded over ranks, with the exchanges of outputs and gradients under a plan's codecs.

A step: ids go to the ranks that hold their tables (sizes first), are looked up there, and the vectors come
back under the codecs; in the backward pass gradients go the other way under theirs. Whole tables and column
blocks are held by one rank each (``table_wise``, ``column_wise``, ``table_column_wise``), replicated tables by
all. TorchRec's own exchange cannot carry messages whose size depends on their content
(``QuantizedCommCodec.calc_quantized_size`` sees only the number of elements), hence this module.

A gradient is the mean over ranks of the ranks' gradients, as TorchRec and DDP make it. Tables under an
:class:`Update` apply it in the backward pass; other owners' parameters take it from ``.grad`` like those of any module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from codegen.runtime.compressed_all_to_all import PLAIN, Exchange, Rule, Traffic
from codegen.runtime.compressed_lookup import FusedTables, Update
from codegen.runtime.ids_wire import Ids, pack, unpack
from codegen.runtime.posted import all_to_all
from ir.compression import Compression, Direction
from ir.errors import InputError
from ir.plan import EVERY_RANK, Plan, TablePlan


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of columns of a table, all rows, on one rank (or on all)."""

    table: str
    rows: int
    features: tuple[str, ...]
    pooling: str
    rank: int
    col: int
    cols: int

    @property
    def key(self) -> str:
        """Its name among the module's parameters."""
        return f"{self.table.replace('.', '_')}__{self.col}"


def pieces_of(plan: Plan) -> tuple[Piece, ...]:
    """The pieces of a plan's tables; raises InputError for what this module does not run."""
    return tuple(piece for table in plan.table_plans for piece in _pieces(table))


def _pieces(table: TablePlan) -> list[Piece]:
    if table.sharding_type not in ("table_wise", "column_wise", "table_column_wise", "data_parallel"):
        raise InputError(
            f"table {table.name!r} is {table.sharding_type}; the compressed exchange runs table_wise, column_wise, "
            "table_column_wise and data_parallel tables, so pin it to one of them or leave compression out"
        )
    if table.pooling not in ("sum", "mean"):
        raise InputError(
            f"table {table.name!r} has pooling {table.pooling!r}; the compressed exchange pools sums and means"
        )
    return [
        Piece(table.name, table.rows, table.features, table.pooling, s.rank, s.col, s.cols)
        for s in sorted(table.shards, key=lambda s: s.col)
    ]


class Lookup:
    """A lookup under way; :meth:`wait` gives feature -> (samples, dim)."""

    def __init__(
        self, owner: ShardedEmbeddings, exchange: Exchange, token: Tensor, local: dict[str, Tensor]
    ) -> None:
        self._owner, self._exchange, self._token, self._local = owner, exchange, token, local

    def wait(self) -> dict[str, Tensor]:
        """Pooled vectors of this rank's samples."""
        received = self._exchange.finish(self._token)
        blocks: dict[str, list[tuple[int, Tensor]]] = {}
        for pieces, matrices in zip(self._owner.by_rank, received, strict=True):
            slots = [(piece, feature) for piece in pieces for feature in piece.features]
            for (piece, feature), matrix in zip(slots, matrices, strict=True):
                blocks.setdefault(feature, []).append((piece.col, matrix))
        found = {
            feature: torch.cat([m for _, m in sorted(parts, key=lambda part: part[0])], dim=1)
            if len(parts) > 1
            else parts[0][1]
            for feature, parts in blocks.items()
        }
        found.update(self._local)
        return {feature: found[feature] for feature in self._owner.features}


class ShardedEmbeddings(nn.Module):
    """The tables of a plan, each piece on its rank.

    Args:
        pieces: what lies where; the same on every rank.
        weights: whole tables by name, (rows, dim) float32, of which this rank copies its pieces; None leaves
            them normal with deviation ``rows ** -0.5``.
        compression: the plan's section; None exchanges float32.
        group: default: the default group.
        sparse: gradients of tables are sparse tensors.
        update: of the pieces that this rank alone holds, where a fused kernel has it; their parameters then take
            no gradient. None leaves all updates to the caller.

    ``step`` counts training steps for the decay of bounds; ``traffic`` counts the bytes sent (forward,
    backward).
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        weights: Mapping[str, Tensor] | None = None,
        compression: Compression | None = None,
        *,
        group: Any = None,
        sparse: bool = False,
        update: Update | None = None,
    ) -> None:
        super().__init__()
        self.group, self.sparse = group, sparse
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        far = [piece for piece in pieces if piece.rank >= self.world]
        if far:
            raise InputError(
                f"table {far[0].table!r} is on rank {far[0].rank} but {self.world} ranks run; start more"
            )
        self.by_rank = tuple(tuple(p for p in pieces if p.rank == rank) for rank in range(self.world))
        self.copies = tuple(piece for piece in pieces if piece.rank == EVERY_RANK)
        self.features = tuple(dict.fromkeys(f for piece in pieces for f in piece.features))
        _one_table_a_feature(pieces)
        # of each rank the features that its pieces look up, each once, with the rows of their tables
        self._wanted = [{f: piece.rows for piece in row for f in piece.features} for row in self.by_rank]
        self.weights = nn.ParameterDict(
            {p.key: _weight(p, weights) for p in (*self.by_rank[self.rank], *self.copies)}
        )
        self._fused = self._fuse(update) if update is not None else ()
        self.compression = compression
        self.step = 0
        self.traffic = (Traffic(), Traffic())

    def forward(self, ids: Mapping[str, Ids]) -> dict[str, Tensor]:
        """Feature -> (samples, dim) of feature -> (ids, ids of each sample); see :meth:`start`."""
        return self.start(ids).wait()

    def start(self, ids: Mapping[str, Ids]) -> Lookup:
        """Exchange ids, look up, and issue the exchange of vectors; ranks may have different numbers of samples.

        Raises:
            InputError: a feature is missing, or features disagree about the number of samples.
        """
        samples = _samples(ids, self.features)
        batches = self._exchange_ids(ids, samples)
        exchange = self._exchange(samples, [count for count, _ in batches])
        token = exchange.start(self._look_up(batches))
        local = {f: self._bag(p, *ids[f]) for p in self.copies for f in p.features}
        if self.training:
            self.step += 1
        return Lookup(self, exchange, token, local)

    def _fuse(self, update: Update) -> tuple[FusedTables, ...]:
        """Move this rank's pieces into fused kernels, one a pooling mode."""
        made = []
        fit = [piece for piece in self.by_rank[self.rank] if update.fuses(piece.cols)]
        for pooling in sorted({piece.pooling for piece in fit}):
            pieces = [piece for piece in fit if piece.pooling == pooling]
            made.append(FusedTables(pieces, update))
            for piece, rows in zip(pieces, made[-1].weights, strict=True):
                rows.copy_(self.weights[piece.key].detach())
                self.weights[piece.key] = nn.Parameter(rows, requires_grad=False)
        return tuple(made)

    def _look_up(self, batches: Sequence[tuple[int, dict[str, Ids]]]) -> list[list[Tensor]]:
        """Of each rank the vectors it asked for, ``[rank][n]``, in the order of pieces and their features."""
        slots = [(piece, feature) for piece in self.by_rank[self.rank] for feature in piece.features]
        found: list[dict[tuple[str, str], Tensor]] = [{} for _ in batches]
        for tables in self._fused:
            keys = [(piece.key, feature) for piece, feature in tables.slots]
            for vectors, row in zip(found, tables(batches), strict=True):
                vectors.update(zip(keys, row, strict=True))
        for vectors, (_, asked) in zip(found, batches, strict=True):
            for piece, feature in slots:
                if (piece.key, feature) not in vectors:
                    vectors[piece.key, feature] = self._bag(piece, *asked[feature])
        return [[vectors[piece.key, feature] for piece, feature in slots] for vectors in found]

    def _bag(self, piece: Piece, ids: Tensor, lengths: Tensor) -> Tensor:
        offsets = torch.cumsum(lengths, 0) - lengths
        weight = self.weights[piece.key]
        return F.embedding_bag(ids, weight, offsets, mode=piece.pooling, sparse=self.sparse)

    def _exchange(self, samples: int, counts: Sequence[int]) -> Exchange:
        """Shapes and rules of this step."""
        mine = self.by_rank[self.rank]
        sent = [(piece, piece.cols) for piece in mine for _ in piece.features]
        got = [[(piece, piece.cols) for piece in pieces for _ in piece.features] for pieces in self.by_rank]
        return Exchange(
            send=[[(count, cols) for _, cols in sent] for count in counts],
            receive=[[(samples, cols) for _, cols in row] for row in got],
            forward=[[self._rule(piece, "forward") for piece, _ in sent] for _ in counts],
            backward=[[self._rule(piece, "backward") for piece, _ in row] for row in got],
            plain=(self._plain("forward"), self._plain("backward")),
            group=self.group,
            scale=1.0 / self.world,
            traffic=self.traffic,
        )

    def _plain(self, direction: Direction) -> bool:
        return self.compression is None or not self.compression.uses(direction)

    def _rule(self, piece: Piece, direction: Direction) -> Rule:
        if self.compression is None or self._plain(direction):
            return PLAIN
        decided = self.compression.of(piece.table, direction)
        if decided is None:
            return PLAIN
        factor = self.compression.decay.factor(self.step) if self.training else 1.0
        return Rule(decided.codec, decided.bound * factor)

    def _exchange_ids(self, ids: Mapping[str, Ids], samples: int) -> list[tuple[int, dict[str, Ids]]]:
        """Of each rank its number of samples and what it asks of this one's tables."""
        parts = [
            [data for f, rows in wanted.items() for data in pack(ids[f], rows, f)] for wanted in self._wanted
        ]
        given = torch.from_numpy(np.concatenate([data for row in parts for data in row] or [_NOTHING]))
        sizes = torch.tensor([[samples, sum(map(len, row))] for row in parts], dtype=torch.int64)
        told = torch.empty_like(sizes)
        dist.all_to_all_single(told, sizes, group=self.group)
        lengths: list[int] = told[:, 1].tolist()
        received = torch.empty(sum(lengths), dtype=torch.uint8)
        all_to_all(received, given, lengths, sizes[:, 1].tolist(), self.group, _IDS).wait()
        counts: list[int] = told[:, 0].tolist()
        mine = self._wanted[self.rank]
        return [
            (count, dict(zip(mine, unpack(part.numpy(), count, list(mine.values())), strict=True)))
            for count, part in zip(counts, torch.split(received, lengths), strict=True)
        ]

    def held(self) -> list[tuple[Piece, nn.Parameter]]:
        """The pieces of this rank alone, with their parameters."""
        return [(piece, self.weights[piece.key]) for piece in self.by_rank[self.rank]]

    def fused_state(self) -> list[tuple[Piece, dict[str, Tensor]]]:
        """State of the optimizer of the pieces that a fused kernel updates."""
        return [one for tables in self._fused for one in tables.state()]

    def replicated(self) -> list[nn.Parameter]:
        """Parameters of tables that every rank holds; their gradients want :func:`average_gradients`."""
        return [self.weights[piece.key] for piece in self.copies]


_NOTHING = np.empty(0, np.uint8)
_IDS = 5  # tag


def _samples(ids: Mapping[str, Ids], features: Sequence[str]) -> int:
    missing = [feature for feature in features if feature not in ids]
    if missing:
        raise InputError(
            f"the batch lacks feature {missing[0]!r}; pass (ids, lengths) of every feature of the plan"
        )
    counts = {len(ids[feature][1]) for feature in features}
    if len(counts) > 1:
        raise InputError(f"the features of a batch have different numbers of samples: {sorted(counts)}")
    return counts.pop() if counts else 0


def _one_table_a_feature(pieces: Sequence[Piece]) -> None:
    owner: dict[str, str] = {}
    for piece in pieces:
        for feature in piece.features:
            if owner.setdefault(feature, piece.table) != piece.table:
                raise InputError(
                    f"feature {feature!r} is looked up in tables {owner[feature]!r} and {piece.table!r}; the "
                    "compressed exchange needs one table a feature"
                )


def _weight(piece: Piece, weights: Mapping[str, Tensor] | None) -> nn.Parameter:
    if weights is None:
        return nn.Parameter(torch.randn(piece.rows, piece.cols) * piece.rows**-0.5)
    if piece.table not in weights:
        raise InputError(f"no weights are given for table {piece.table!r}")
    whole = weights[piece.table]
    return nn.Parameter(whole[:, piece.col : piece.col + piece.cols].detach().float().clone().contiguous())


def average_gradients(parameters: Sequence[nn.Parameter], group: Any = None) -> None:
    """Replace the gradients of replicated parameters by their mean over ranks, in one all-reduce."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    grads = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
    if not grads:
        return
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
