"""Collectives of the tower exchange, with the seam where a codec may sit.

All are all-to-alls with uneven parts. :data:`Move` is the one that moves float payloads, forwards and
backwards; a function with the same signature that encodes what it sends can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime import posted

Move = Callable[[Tensor, Sequence[int], Sequence[int], Any], Tensor]
"""``move(flat, send, receive, group)``: a 1-D tensor cut into ``send[i]`` elements for member ``i`` of the
group; returns what the members sent, ``receive[i]`` elements from member ``i``, one after the other."""


def all_to_all(flat: Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> Tensor:
    """The plain :data:`Move`: every element arrives as it was sent.

    Over gloo receives are posted before sends, so that links work in both directions (:mod:`codegen.runtime.posted`).
    """
    if dist.get_world_size(group) == 1:
        return flat.clone()
    out = flat.new_empty(sum(receive))
    if dist.get_backend(group) == "gloo":
        posted.all_to_all(out, flat.contiguous(), receive, send, group).wait()
        return out
    dist.all_to_all_single(out, flat.contiguous(), list(receive), list(send), group=group)
    return out


class Exchange(torch.autograd.Function):
    """A :data:`Move` whose gradient moves back the same way, multiplied by ``scale``."""

    @staticmethod
    def forward(
        ctx: Any,
        flat: Tensor,
        send: list[int],
        receive: list[int],
        group: Any,
        move: Move,
        scale: float,
    ) -> Tensor:
        """``flat`` moved."""
        ctx.way = (receive, send, group, move, scale)
        return move(flat, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradient of what was received, moved back."""
        receive, send, group, move, scale = ctx.way
        gradient = gradients[0]
        if scale != 1.0:
            gradient = gradient * scale
        return move(gradient.contiguous(), receive, send, group), None, None, None, None, None


def exchange_rows(
    rows: Tensor,
    counts: Sequence[int],
    widths: Sequence[int],
    group: Any,
    *,
    move: Move = all_to_all,
    scale: float = 1.0,
) -> Tensor:
    """Send blocks of rows to the members of a group, and lay what they send side by side.

    Args:
        rows: (sum of ``counts``, W): the first ``counts[0]`` rows go to member 0, and so on.
        counts: rows for each member; every member sends this one ``counts[own position]`` rows.
        widths: columns that each member sends; W at the own position.
        group: process group.
        move: how the payload travels.
        scale: factor on the gradient on its way back.

    Returns:
        (counts[own position], sum of ``widths``), columns in member order.
    """
    me = dist.get_rank(group)
    mine, width = counts[me], rows.shape[1]
    send = [count * width for count in counts]
    receive = [mine * other for other in widths]
    flat: Tensor = Exchange.apply(rows.reshape(-1), send, receive, group, move, scale)  # type: ignore[no-untyped-call]
    if len(widths) == 1:
        return flat.view(mine, width)
    parts = torch.split(flat, receive)
    return torch.cat([part.view(mine, other) for part, other in zip(parts, widths, strict=True)], dim=1)
