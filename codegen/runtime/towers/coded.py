"""A :data:`Move` that sends codec messages: compression of the exchange between peers, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.codecs import absolute_bound, decode, encode
from codegen.runtime.towers.exchange import all_to_all
from ir.compression import codec_of
from ir.errors import InputError


@dataclass(slots=True)
class CodedMove:
    """Sends each peer one message of :mod:`codegen.runtime.codecs`; what stays on the rank is not coded.

    Args:
        codec: a name of :data:`ir.compression.CODECS`.
        relative: error bound of the bounded codecs over the root mean square of a peer's part.
        dim: columns of the vectors that are sent; every part is a whole number of them.

    ``plain_bytes`` and ``sent_bytes`` add up what the parts for other ranks would have been and were.

    Raises:
        InputError: an unknown codec, or a part that is no whole number of vectors.
    """

    codec: str
    relative: float = 0.0
    dim: int = 1
    plain_bytes: int = field(default=0, init=False)
    sent_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        codec_of(self.codec)

    def __call__(self, flat: Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> Tensor:
        """As :func:`codegen.runtime.towers.exchange.all_to_all`, within the codec's error."""
        me = dist.get_rank(group)
        parts = list(torch.split(flat.detach().cpu(), list(send)))
        messages = [
            torch.empty(0, dtype=torch.uint8) if peer == me else self._encoded(part)
            for peer, part in enumerate(parts)
        ]
        sizes = torch.tensor([len(message) for message in messages])
        ones = [1] * len(send)
        arriving = [int(n) for n in all_to_all(sizes, ones, ones, group).tolist()]
        data = all_to_all(torch.cat(messages), sizes.tolist(), arriving, group)
        self.plain_bytes += sum(4 * n for peer, n in enumerate(send) if peer != me)
        self.sent_bytes += int(sizes.sum())
        found = [
            parts[me] if peer == me else self._decoded(message, count)
            for peer, (message, count) in enumerate(zip(torch.split(data, arriving), receive, strict=True))
        ]
        return torch.cat(found).to(flat.device)

    def _encoded(self, part: Tensor) -> Tensor:
        if part.numel() % self.dim:
            raise InputError(
                f"a part of {part.numel()} elements is no whole number of vectors of {self.dim} columns; give the "
                "move the dim of the tables"
            )
        rows = part.reshape(-1, self.dim)
        return torch.from_numpy(encode(rows, self.codec, absolute_bound(rows, self.relative)))

    def _decoded(self, message: Tensor, count: int) -> Tensor:
        return decode(np.ascontiguousarray(message.numpy()), count // self.dim, self.dim).reshape(-1)
