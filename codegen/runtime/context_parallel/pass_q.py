"""Ring attention that passes queries: cheap to send when there are few, at the price of returning outputs.

Every rank attends to its own keys with the queries of all ranks in turn, so keys never travel. The partial
outputs and their LSE then go back to where the queries live, which merges them. Two ways back:

``"all_to_all"``  one exchange after the last step (arXiv 2411.01783, algorithm 3), all of it exposed;
``"eager"``       each partial result is sent home as soon as it is made, behind the next step's attention;
                  only the last one is exposed.

A row on the wire is H * (D elements in the type of q and one fp32 sum), sent as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from codegen.runtime.context_parallel.merge import Accumulator, merge, work_dtype
from codegen.runtime.context_parallel.ring import Passing, Ring, Transfer
from codegen.runtime.context_parallel.trace import Trace, span
from codegen.runtime.posted import all_to_all
from ir.errors import InputError, did_you_mean

Returns = Literal["all_to_all", "eager"]
_RETURNS = ("all_to_all", "eager")
_QUERY, _PARTIAL, _RETURNED = 3, 4, 5  # tags


def pass_q(
    ring: Ring,
    q: Tensor,
    kv: Sequence[Tensor],
    trace: Trace | None = None,
    returns: Returns = "all_to_all",
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks, without gradients.

    Args:
        ring: the layout.
        q: (t, H, D), this rank's queries, packed by sequence.
        kv: per sequence (n, 2, G, D), this rank's keys and values by position (:class:`KVCache`).
        trace: records each step.
        returns: how partial outputs go home.

    Returns:
        Output (t, H, D) in the type of q, and its log-sum-exp (t, H) in fp32 (fp64 for fp64).

    Raises:
        InputError: tensors that do not fit the layout, or an unknown ``returns``.
    """
    if returns not in _RETURNS:
        raise InputError(f"partial outputs cannot return by {returns!r}{did_you_mean(returns, _RETURNS)}")
    ring.check_queries(q)
    ring.check_keys(kv)
    with torch.no_grad():
        if ring.size == 1:
            sums = ring.accumulator(0)
            with span(trace, "attention", step=0, source=0):
                ring.attend(sums, q, kv, 0, 0)
            return sums.out.to(q.dtype), sums.lse
        return _round(ring, q.contiguous(), kv, trace, returns == "eager")


def _round(
    ring: Ring, q: Tensor, kv: Sequence[Tensor], trace: Trace | None, eager: bool
) -> tuple[Tensor, Tensor]:
    block, passing = q, Passing(ring, q, ring.queries, _QUERY, trace)
    partial: dict[int, Tensor] = {}  # by the rank whose queries they are
    homeward: list[Transfer] = []
    for step in range(ring.size):
        source, transfer = ring.source(step), None
        if step + 1 < ring.size:
            transfer = passing.start(block, step)
        with span(trace, "attention", step=step, source=source):
            sums = ring.accumulator(source)
            ring.attend(sums, block, kv, source, ring.rank)
            partial[source] = _encode(sums, q.dtype)
        if eager and step:
            back = partial[ring.rank].new_empty(partial[ring.rank].shape)
            homeward.append(ring.exchange(partial[source], back, trace, step, _PARTIAL, hop=-step))
        if transfer is not None:
            block = transfer.wait()
    returned = [transfer.wait() for transfer in homeward] if eager else _all_to_all(ring, partial, trace)
    with span(trace, "merge"):
        decoded = [
            _decode(part, ring.heads, ring.head_dim, q.dtype) for part in [partial[ring.rank], *returned]
        ]
        out, lse = merge(torch.stack([o for o, _ in decoded]), torch.stack([s for _, s in decoded]))
    return out.to(q.dtype), lse


def _all_to_all(ring: Ring, partial: dict[int, Tensor], trace: Trace | None) -> list[Tensor]:
    """Each rank's partial results go to the rank whose queries they are; one's own does not travel."""
    own = partial[ring.rank]
    others = [rank for rank in range(ring.size) if rank != ring.rank]
    sent = [0 if rank == ring.rank else partial[rank].numel() for rank in range(ring.size)]
    received = [0 if rank == ring.rank else own.numel() for rank in range(ring.size)]
    outgoing = torch.cat([partial[rank].reshape(-1) for rank in others])
    incoming = outgoing.new_empty(sum(received))
    with span(trace, "all_to_all", bytes=outgoing.numel()):
        all_to_all(incoming, outgoing, received, sent, ring.group, _RETURNED).wait()
    return list(incoming.reshape(len(others), *own.shape).unbind())


def _encode(sums: Accumulator, dtype: torch.dtype) -> Tensor:
    """(t, H, D) and (t, H) as (t, bytes)."""
    t, heads, head_dim = sums.out.shape
    out = sums.out.to(dtype).contiguous().view(torch.uint8)
    lse = sums.lse.contiguous().view(torch.uint8)
    width = heads * head_dim * dtype.itemsize
    return torch.cat((out.reshape(t, width), lse.reshape(t, heads * sums.lse.element_size())), dim=1)


def _decode(rows: Tensor, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`_encode`."""
    width = heads * head_dim * dtype.itemsize
    out = rows[:, :width].contiguous().view(dtype).reshape(len(rows), heads, head_dim)
    lse = rows[:, width:].contiguous().view(work_dtype(dtype)).reshape(len(rows), heads)
    return out, lse
