"""Ring attention that passes keys and values: N - 1 transfers, each hidden behind one partial attention.

The message of a rank is all its keys and values, cached and new. Outputs are merged where the queries
live. The backward pass sends keys and values round once more, and behind them the sums of their
gradients, which arrive home after N transfers (Ring Attention, arXiv 2310.01889, appendix; arXiv
2411.01783, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codegen.runtime.context_parallel.merge import work_dtype
from codegen.runtime.context_parallel.ring import Passing, Ring, Transfer, offsets
from codegen.runtime.context_parallel.trace import Trace, span
from ir.errors import InputError

_KV, _GRADIENT = 1, 2  # tags: gradients follow keys on the same wire


def pass_kv(ring: Ring, q: Tensor, kv: Sequence[Tensor], trace: Trace | None = None) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks, without gradients.

    Args:
        ring: the layout.
        q: (t, H, D), this rank's queries, packed by sequence.
        kv: per sequence (n, 2, G, D), this rank's keys and values by position (:class:`KVCache`).
        trace: records each step.

    Returns:
        Output (t, H, D) in the type of q, and its log-sum-exp (t, H) in fp32 (fp64 for fp64).

    Raises:
        InputError: tensors that do not fit the layout.
    """
    ring.check_queries(q)
    ring.check_keys(kv)
    with torch.no_grad():
        block = torch.cat(list(kv)) if kv else _no_keys(ring)
        return _forward(ring, q, block, trace)


def _no_keys(ring: Ring) -> Tensor:
    return torch.empty(0, 2, ring.kv_heads, ring.head_dim, dtype=ring.cache, device=ring.device)


def _forward(ring: Ring, q: Tensor, block: Tensor, trace: Trace | None) -> tuple[Tensor, Tensor]:
    sums = ring.accumulator(ring.rank)
    passing = Passing(ring, block, ring.keys, _KV, trace)
    for step in range(ring.size):
        source, transfer = ring.source(step), None
        if step + 1 < ring.size:
            transfer = passing.start(block, step)
        with span(trace, "attention", step=step, source=source):
            ring.attend(sums, q, ring.split_keys(block, source), ring.rank, source)
        if transfer is not None:
            block = transfer.wait()
    return sums.out.to(q.dtype), sums.lse


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, trace: Trace | None) -> Tensor:
        block = torch.stack((k, v), dim=1)
        out, lse = _forward(ring, q, block, trace)
        ctx.save_for_backward(q, block, out, lse)
        ctx.ring, ctx.trace = ring, trace
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, block, out, lse = ctx.saved_tensors
        d_q, d_block = _backward(ctx.ring, grad.contiguous(), q, block, out, lse, ctx.trace)
        return d_q, d_block[:, 0], d_block[:, 1], None, None


def _backward(
    ring: Ring, grad: Tensor, q: Tensor, block: Tensor, out: Tensor, lse: Tensor, trace: Trace | None
) -> tuple[Tensor, Tensor]:
    """Gradients of q (t, H, D) and of this rank's keys and values (n, 2, G, D)."""
    kind = work_dtype(q.dtype)
    d_q = torch.zeros_like(q, dtype=kind)
    lse = lse.to(kind)
    passing = Passing(ring, block, ring.keys, _KV, trace)
    travelling: Transfer | None = None  # gradients of the block of this step, from the ranks before
    for step in range(ring.size):
        source, transfer = ring.source(step), None
        if step + 1 < ring.size:
            transfer = passing.start(block, step)
        mine = torch.zeros_like(block, dtype=kind)
        with span(trace, "attention", step=step, source=source, backward=True):
            _gradients(ring, grad, q, block, out, lse, source, d_q, mine)
        if travelling is not None:
            mine += travelling.wait()
        if ring.size > 1:
            after = ring.keys.rows(ring.source(step + 1))
            travelling = ring.exchange(
                mine, mine.new_empty(after, *mine.shape[1:]), trace, step + 1, _GRADIENT
            )
        if transfer is not None:
            block = transfer.wait()
    total = mine if travelling is None else travelling.wait()
    return d_q.to(q.dtype), total.to(q.dtype)


def _gradients(
    ring: Ring,
    grad: Tensor,
    q: Tensor,
    block: Tensor,
    out: Tensor,
    lse: Tensor,
    source: int,
    d_q: Tensor,
    d_block: Tensor,
) -> None:
    """Add what this rank's queries contribute to d_q and to the gradients of the keys of ``source``."""
    rows = offsets(ring.queries.counts[ring.rank].tolist())
    keys = offsets(ring.keys.counts[source].tolist())
    for sequence, parts in ring.pieces(ring.rank, source):
        for part in parts:
            a, b = rows[sequence] + part.rows[0], rows[sequence] + part.rows[1]
            c, d = keys[sequence] + part.keys[0], keys[sequence] + part.keys[1]
            found = ring.kernel.backward(
                grad[a:b], q[a:b], block[c:d, 0], block[c:d, 1], out[a:b], lse[a:b], part, ring.scale
            )
            d_q[a:b] += found[0]
            d_block[c:d, 0] += found[1]
            d_block[c:d, 1] += found[2]


def ring_attention(ring: Ring, q: Tensor, k: Tensor, v: Tensor, trace: Trace | None = None) -> Tensor:
    """Pass-KV attention with gradients, for training: queries and keys are the same tokens.

    Args:
        ring: a layout without a cache.
        q: (t, H, D), this rank's queries, packed by sequence.
        k, v: (t, G, D), the keys and values of the same tokens.
        trace: records each step of the forward and of the backward pass.

    Returns:
        (t, H, D) in the type of q. Gradients are summed in fp32 (fp64 for fp64).

    Raises:
        InputError: tensors that do not fit the layout, or a layout with a cache.
    """
    if ring.keys is not ring.queries:
        raise InputError("training attends to the batch alone; make the ring without keys, or use pass_kv")
    ring.check_queries(q)
    shape = (ring.queries.rows(ring.rank), ring.kv_heads, ring.head_dim)
    for what, tensor in (("k", k), ("v", v)):
        ring.check_tensor(what, tensor, shape)
    found: Tensor = _RingAttention.apply(q, k, v, ring, trace)  # type: ignore[no-untyped-call]
    return found
