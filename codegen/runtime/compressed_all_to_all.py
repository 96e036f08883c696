"""An all-to-all of matrices under codecs, on any ``torch.distributed`` group, forwards and backwards.

Every rank sends each other rank a list of matrices. Sizes travel first, then one payload of bytes a pair of ranks,
receives posted first (:mod:`codegen.runtime.posted`); what a rank sends itself is handed over as it is. Where no
matrix has a codec the matrices travel as float32. The payload is asynchronous: :func:`start` returns when it is on
its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.codecs import absolute_bound, decode_at
from codegen.runtime.codecs.frame import HEADER, capacity, encode_into
from codegen.runtime.posted import Posted, all_to_all
from ir.compression import CodecName, codec_of
from ir.errors import InputError

_PAYLOAD = 6  # tag

Shape = tuple[int, int]
Matrices = Sequence[Sequence[Tensor]]  # [peer][n] (rows, dim) float32
Shapes = Sequence[Sequence[Shape]]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one matrix travels: the codec, and its bound relative to the matrix's root mean square."""

    codec: CodecName = "none"
    bound: float = 0.0


PLAIN = Rule()


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank sent to others: as float32, and as they travelled."""

    raw: int = 0
    sent: int = 0


@dataclass(slots=True)
class Pending:
    """An exchange under way; :meth:`wait` gives ``[peer][n]`` float32 matrices."""

    work: Posted
    received: Tensor
    sizes: list[int]
    shapes: Shapes
    own: list[Tensor]
    rank: int
    plain: bool
    kept: Tensor  # what is being sent must live until it has gone

    def wait(self) -> list[list[Tensor]]:
        """Wait for the payload and decode it; raises InputError when it was damaged."""
        self.work.wait()
        parts = torch.split(self.received, self.sizes)
        return [
            self.own if peer == self.rank else self._decode(part, self.shapes[peer])
            for peer, part in enumerate(parts)
        ]

    def _decode(self, part: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        if self.plain:
            pieces = torch.split(part, [rows * dim for rows, dim in shapes])
            return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        found, at, data = [], 0, part.numpy()
        for rows, dim in shapes:
            matrix, at = decode_at(data, at, rows, dim)
            found.append(matrix)
        if at != len(data):
            raise InputError(
                f"an exchange brought {len(data) - at} bytes more than its matrices; it was damaged"
            )
        return found


def start(
    send: Matrices,
    receive: Shapes,
    rules: Sequence[Sequence[Rule]],
    *,
    plain: bool,
    group: Any = None,
    traffic: Traffic | None = None,
) -> Pending:
    """Issue an exchange.

    Args:
        send: ``send[peer][n]``, one list a rank of the group, float32 on the CPU.
        receive: the shapes that each peer sends.
        rules: like ``send``.
        plain: no rule of any rank has a codec; all ranks must say the same.
        group: default: the default group.
        traffic: bytes are added to it.

    Raises:
        InputError: lists that do not fit the group, or a peer that announces more than its matrices can take.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if not len(send) == len(receive) == len(rules) == world:
        raise InputError(f"an exchange over {world} ranks needs {world} lists of matrices, not {len(send)}")
    own = [matrix.detach() for matrix in send[rank]]
    outgoing = [[] if peer == rank else list(matrices) for peer, matrices in enumerate(send)]
    expected = [[] if peer == rank else list(shapes) for peer, shapes in enumerate(receive)]
    raw = 4 * sum(m.numel() for matrices in outgoing for m in matrices)
    if plain:
        payload, sizes = _flat(outgoing)
        awaited = [sum(rows * dim for rows, dim in shapes) for shapes in expected]
    else:
        payload, sizes = _coded(outgoing, rules)
        awaited = _exchange_sizes(sizes, expected, group)
    received = torch.empty(sum(awaited), dtype=payload.dtype)
    work = all_to_all(received, payload, awaited, sizes, group, _PAYLOAD)
    if traffic is not None:
        traffic.raw += raw
        traffic.sent += payload.numel() * payload.element_size() + (0 if plain else 8 * (world - 1))
    return Pending(work, received, awaited, receive, own, rank, plain, payload)


def _flat(outgoing: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[int]]:
    parts = [m.detach().reshape(-1) for matrices in outgoing for m in matrices]
    sizes = [sum(m.numel() for m in matrices) for matrices in outgoing]
    return (torch.cat(parts) if parts else torch.empty(0)), sizes


def _coded(outgoing: Sequence[Sequence[Tensor]], rules: Sequence[Sequence[Rule]]) -> tuple[Tensor, list[int]]:
    payload = np.empty(sum(capacity(matrix) for row in outgoing for matrix in row), np.uint8)
    at, sizes = 0, []
    for matrices, how in zip(outgoing, rules, strict=True):
        start = at
        for matrix, rule in zip(matrices, how, strict=bool(matrices)):
            x = matrix.detach().contiguous()  # once, for the bound and for the codec
            bound = absolute_bound(x, rule.bound) if codec_of(rule.codec).bounded else 0.0
            at += encode_into(payload[at:], x, rule.codec, bound)
        sizes.append(at - start)
    return torch.from_numpy(payload[:at]), sizes


def _exchange_sizes(sizes: Sequence[int], expected: Sequence[Sequence[Shape]], group: Any) -> list[int]:
    told = torch.empty(len(sizes), dtype=torch.int64)
    dist.all_to_all_single(told, torch.tensor(sizes, dtype=torch.int64), group=group)
    awaited: list[int] = told.tolist()
    for peer, (size, shapes) in enumerate(zip(awaited, expected, strict=True)):
        most = sum(HEADER.size + 4 * rows * dim for rows, dim in shapes)
        if not HEADER.size * len(shapes) <= size <= most:
            raise InputError(
                f"rank {peer} announces {size} bytes where its matrices take at most {most}; the ranks disagree "
                "about the batch or the plan"
            )
    return awaited


@dataclass(slots=True)
class Exchange:
    """One differentiable exchange.

    Attributes:
        send: shapes of what is sent, ``[peer][n]``.
        receive: shapes of what is received.
        forward: rules of what is sent.
        backward: rules of the gradients of what is received.
        plain: (forward, backward): no rank has a codec in that direction.
        scale: gradients are multiplied by it where they arrive.
    """

    send: list[list[Shape]]
    receive: list[list[Shape]]
    forward: list[list[Rule]]
    backward: list[list[Rule]]
    plain: tuple[bool, bool]
    group: Any = None
    scale: float = 1.0
    traffic: tuple[Traffic, Traffic] = field(default_factory=lambda: (Traffic(), Traffic()))
    pending: Pending | None = None
    returning: Pending | None = None

    def start(self, matrices: Matrices) -> Tensor:
        """Issue the exchange; pass what this returns to :meth:`finish`."""
        # a rank that sends nothing must still take part in the backward pass
        anchor = torch.zeros(1, requires_grad=True)
        token: Tensor = _Start.apply(self, anchor, *(m for row in matrices for m in row))  # type: ignore[no-untyped-call]
        return token

    def finish(self, token: Tensor) -> list[list[Tensor]]:
        """What has been received, ``[peer][n]``."""
        flat = _Finish.apply(self, token)  # type: ignore[no-untyped-call]
        return _rows(flat, self.receive)


def _rows(flat: Sequence[Tensor], shapes: Shapes) -> list[list[Tensor]]:
    found, at = [], 0
    for row in shapes:
        found.append(list(flat[at : at + len(row)]))
        at += len(row)
    return found


class _Start(torch.autograd.Function):
    """Sends forwards; backwards waits for the gradients of what was sent."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, anchor: Tensor, *flat: Tensor) -> Tensor:
        e = ctx.exchange = exchange
        e.pending = start(
            _rows(flat, e.send),
            e.receive,
            e.forward,
            plain=e.plain[0],
            group=e.group,
            traffic=e.traffic[0],
        )
        return torch.zeros(1)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        e: Exchange = ctx.exchange
        assert e.returning is not None
        grads = [grad for row in e.returning.wait() for grad in row]
        e.returning = None
        return None, None, *(grad if e.scale == 1.0 else grad * e.scale for grad in grads)


class _Finish(torch.autograd.Function):
    """Waits forwards; backwards sends the gradients of what was received."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, token: Tensor) -> tuple[Tensor, ...]:
        e = ctx.exchange = exchange
        assert e.pending is not None
        received = e.pending.wait()
        e.pending = None
        return tuple(matrix for row in received for matrix in row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        e: Exchange = ctx.exchange
        e.returning = start(
            _rows(grads, e.receive),
            e.send,
            e.backward,
            plain=e.plain[1],
            group=e.group,
            traffic=e.traffic[1],
        )
        return None, torch.zeros(1)
