"""One attention layout on one process group: who holds what, what each step computes, and the transfers.

A :class:`Ring` is made once for a batch layout and used by every layer. At step s, rank r works on the
block that began on rank (r - s) mod N, while it sends that block to rank r + 1 and receives the next one
from rank r - 1 (Ring Attention, arXiv 2310.01889).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.context_parallel.kernels import choose
from codegen.runtime.context_parallel.merge import Accumulator
from codegen.runtime.context_parallel.pieces import Piece, between
from codegen.runtime.context_parallel.placement import Placement
from codegen.runtime.context_parallel.trace import Trace, span
from codegen.runtime.posted import Posted, post
from ir.errors import InputError

Pieces = tuple[tuple[int, tuple[Piece, ...]], ...]


class Ring:
    """Causal grouped-query attention of ``queries`` over ``keys``, both spread over a process group.

    Args:
        queries: the new tokens of each sequence (:func:`placement.balanced`, :func:`placement.round_robin`).
        keys: all tokens to attend to, new ones included; default the queries (no cache).
        heads, kv_heads, head_dim: of the attention on one rank, after tensor parallelism.
        dtype, device: of q, k and v.
        group: of N ranks; default all.
        causal: a query sees keys of its sequence at its position or before; False sees all of them.
        scale: of the scores, default head_dim ** -0.5.
        kernel: "auto", "flash" or "blockwise" (:mod:`kernels`).
        check: compare the layout between ranks once, which is a collective call.
        cache: of kept keys and values where it is another type than ``dtype``, such as float8; they travel in it and
            are widened where they are attended to.

    Raises:
        InputError: head counts that do not divide, a placement for another number of ranks, or ranks that
            disagree; then every rank raises.
    """

    def __init__(
        self,
        queries: Placement,
        keys: Placement | None = None,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
        causal: bool = True,
        scale: float | None = None,
        kernel: str = "auto",
        check: bool = True,
        cache: torch.dtype | None = None,
    ) -> None:
        self.queries = queries
        self.keys = queries if keys is None else keys
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.dtype, self.device = dtype, torch.device(device)
        self.cache = cache or dtype
        self.group = group
        self.causal, self.check = causal, check
        if min(heads, kv_heads, head_dim) < 1 or heads % kv_heads:
            raise InputError(
                f"{heads} query heads of dimension {head_dim} cannot share {kv_heads} key-value heads; "
                f"grouped-query attention needs a multiple"
            )
        self.scale = head_dim**-0.5 if scale is None else scale
        self.kernel_name = kernel
        self.kernel = choose(kernel, dtype, self.device, head_dim)
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if check:
            self._agree()
        if not self.queries.world_size == self.keys.world_size == self.size:
            raise InputError(
                f"the queries are placed on {self.queries.world_size} ranks and the keys on "
                f"{self.keys.world_size}, but the group has {self.size}; place both on {self.size}"
            )
        if len(self.queries.owners) != len(self.keys.owners):
            raise InputError(
                f"there are queries of {len(self.queries.owners)} sequences and keys of "
                f"{len(self.keys.owners)}; give a sequence without new tokens length 0"
            )
        self._pieces: dict[tuple[int, int], Pieces] = {}

    def advance(self, new: Placement) -> Ring:
        """The ring of the next round: ``new`` queries over the present keys and ``new`` itself.

        Ranks agreed once; the next layouts follow from the same calls and are not compared again.
        """
        return Ring(
            new,
            self.keys.extend(new),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            group=self.group,
            causal=self.causal,
            scale=self.scale,
            kernel=self.kernel_name,
            check=False,
            cache=self.cache,
        )

    def _agree(self) -> None:
        facts = {
            "number of sequences": len(self.queries.owners),
            "new tokens": self.queries.tokens,
            "tokens in all": self.keys.tokens,
            "placement of the queries": self.queries.digest,
            "placement of the keys": self.keys.digest,
            "query heads": self.heads,
            "key-value heads": self.kv_heads,
            "head dimension": self.head_dim,
            "element size in bytes": self.dtype.itemsize,
            "precision in bits": int(-math.log2(torch.finfo(self.dtype).eps)),
            "causal mask": int(self.causal),
        }
        mine = torch.tensor(list(facts.values()), dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        table = torch.stack(everyone).cpu()
        for column, what in enumerate(facts):
            values = table[:, column].tolist()
            odd = [rank for rank, value in enumerate(values) if value != values[0]]
            if odd:
                shown = "" if what.startswith("placement") else f" ({values[odd[0]]} against {values[0]})"
                raise InputError(
                    f"rank {odd[0]} and rank 0 disagree about the {what}{shown}; "
                    f"every rank of the group must be given the same batch and model"
                )

    def neighbour(self, offset: int) -> int:
        """Global rank of the process ``offset`` places further round the ring."""
        peer = (self.rank + offset) % self.size
        return peer if self.group is None else dist.get_global_rank(self.group, peer)

    def source(self, step: int) -> int:
        """The rank on which the block of ``step`` began."""
        return (self.rank - step) % self.size

    def pieces(self, query_rank: int, key_rank: int) -> Pieces:
        """What is visible between two ranks' tokens; worked out once."""
        pair = (query_rank, key_rank)
        if pair not in self._pieces:
            self._pieces[pair] = between(self.queries, query_rank, self.keys, key_rank, self.causal)
        return self._pieces[pair]

    def check_queries(self, q: Tensor) -> None:
        """Raise InputError unless ``q`` is this rank's (t, H, D) part."""
        self.check_tensor("q", q, (self.queries.rows(self.rank), self.heads, self.head_dim))

    def check_keys(self, kv: Sequence[Tensor]) -> None:
        """Raise InputError unless ``kv`` is this rank's part: per sequence (n, 2, G, D), keys then values."""
        counts = self.keys.counts[self.rank].tolist()
        if len(kv) != len(counts):
            raise InputError(
                f"kv has {len(kv)} sequences but the layout has {len(counts)}; give one tensor each"
            )
        for sequence, (part, count) in enumerate(zip(kv, counts, strict=True)):
            shape = (count, 2, self.kv_heads, self.head_dim)
            self.check_tensor(f"kv of sequence {sequence}", part, shape, self.cache)

    def check_tensor(
        self, what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> None:
        """Raise InputError unless ``tensor`` has this shape and type, by default that of the ring."""
        wanted = dtype or self.dtype
        if tuple(tensor.shape) != shape or tensor.dtype != wanted:
            raise InputError(
                f"{what} on rank {self.rank} is {tuple(tensor.shape)} of {tensor.dtype}, but the layout "
                f"gives this rank {shape} of {wanted}; shard the batch with the placement of the ring"
            )

    def split_keys(self, packed: Tensor, rank: int) -> list[Tensor]:
        """Views of each sequence's rows in the packed keys and values of ``rank``."""
        return list(torch.split(packed, self.keys.counts[rank].tolist()))

    def attend(
        self, sums: Accumulator, q: Tensor, kv: Sequence[Tensor], query_rank: int, key_rank: int
    ) -> None:
        """Add to ``sums`` the attention of ``query_rank``'s packed queries over ``key_rank``'s keys."""
        starts = offsets(self.queries.counts[query_rank].tolist())
        for sequence, parts in self.pieces(query_rank, key_rank):
            first = starts[sequence]
            for part in parts:
                a, b = first + part.rows[0], first + part.rows[1]
                block = kv[sequence][part.keys[0] : part.keys[1]].to(self.dtype)
                out, lse = self.kernel.forward(q[a:b], block[:, 0], block[:, 1], part, self.scale)
                sums.add(a, b, out, lse)

    def accumulator(self, rank: int) -> Accumulator:
        """Empty sums for the queries of ``rank``."""
        return Accumulator(self.queries.rows(rank), self.heads, self.head_dim, self.dtype, self.device)

    def exchange(
        self,
        sent: Tensor,
        received: Tensor,
        trace: Trace | None,
        step: int,
        tag: int,
        hop: int = 1,
        expected: Posted | None = None,
    ) -> Transfer:
        """Start to send ``sent`` to the rank ``hop`` places on and to receive from as many places back.

        Both sides know both sizes; a message of no bytes is not sent. ``expected``: the receive, if it has been posted.
        """
        start = None if trace is None else trace.mark()
        receives = [] if expected else [(received, self.neighbour(-hop))]
        posted = post(receives, [(sent, self.neighbour(hop))], group=self.group, tag=tag)
        if expected:
            posted = Posted([*expected.works, *posted.works])
        if trace is not None:
            trace.add("post", start, trace.mark(), step=step, tag=tag)
        return Transfer(posted, (sent, received), trace, start, step, tag)


class Passing:
    """A block that goes round the ring, whose receives are posted one step ahead.

    What tells a sender that its receiver is ready shares the card with the data of other ranks of the host. Sent a
    step early, it does not hold up the next block. NCCL matches messages in the order of both sides' calls, so
    there a receive is posted with its send.

    Args:
        ring: the layout.
        block: what is passed on first.
        rows: whose rows on a rank are the first dimension of the block that began there.
        tag: of the messages.
        trace: records them.
    """

    def __init__(self, ring: Ring, block: Tensor, rows: Placement, tag: int, trace: Trace | None) -> None:
        self._ring, self._like, self._rows, self._tag, self._trace = ring, block, rows, tag, trace
        self._expected: dict[int, tuple[Tensor, Posted]] = {}
        self._ahead = dist.get_backend(ring.group) == "gloo"
        if self._ahead:
            self._expect(1)

    def _buffer(self, step: int) -> Tensor:
        return self._like.new_empty(self._rows.rows(self._ring.source(step)), *self._like.shape[1:])

    def _expect(self, step: int) -> None:
        if step < self._ring.size:
            buffer, ring = self._buffer(step), self._ring
            posted = post([(buffer, ring.neighbour(-1))], [], group=ring.group, tag=self._tag)
            self._expected[step] = buffer, posted

    def start(self, block: Tensor, step: int) -> Transfer:
        """Send the block of ``step`` on and receive that of the next step."""
        if self._ahead:
            self._expect(step + 2)
        received, expected = self._expected.pop(step + 1, None) or (self._buffer(step + 1), None)
        return self._ring.exchange(block, received, self._trace, step + 1, self._tag, expected=expected)


class Transfer:
    """A send and a receive under way."""

    def __init__(
        self,
        posted: Posted,
        tensors: tuple[Tensor, Tensor],
        trace: Trace | None,
        start: Any,
        step: int,
        tag: int,
    ) -> None:
        self._posted = posted
        self._tensors = tensors  # kept alive until the wait
        self._trace, self._start, self._step, self._tag = trace, start, step, tag

    def wait(self) -> Tensor:
        """Wait for both; returns what was received."""
        sent, received = self._tensors
        with span(self._trace, "wait", step=self._step, tag=self._tag):
            self._posted.wait()
        if self._trace is not None:
            size = sent.numel() * sent.element_size()
            args = {"step": self._step, "tag": self._tag, "bytes": size}
            self._trace.add("transfer", self._start, self._trace.mark(), **args)
        return received


def offsets(counts: list[int]) -> list[int]:
    """Where each sequence starts in a packed tensor."""
    found, total = [], 0
    for count in counts:
        found.append(total)
        total += count
    return found
