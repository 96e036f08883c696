"""One layer's keys and values on one rank, kept for the tokens to come (persistent KV)."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.runtime.context_parallel.placement import Placement
from ir.errors import InputError


class KVCache:
    """This rank's share of the keys and values of a batch of sequences.

    Args:
        sequences: of the batch.
        kv_heads, head_dim: of one rank, G and D.
        dtype, device: of keys and values; float8 keeps values without a scale, saturated at its largest.

    A sequence's buffer doubles when it is full, so that appending one token costs O(1) on average.
    """

    def __init__(
        self,
        sequences: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = (2, kv_heads, head_dim)
        self._buffers = [torch.empty(0, *self._shape, dtype=dtype, device=device) for _ in range(sequences)]
        self._used = [0] * sequences

    def append(self, new: Placement, rank: int, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values (t, G, D) of the tokens that ``new`` gives this rank, packed by sequence.

        Raises:
            InputError: tensors of another shape than the placement gives this rank.
        """
        wanted = (new.rows(rank), *self._shape[1:])
        if len(new.owners) != len(self._used) or tuple(k.shape) != wanted or tuple(v.shape) != wanted:
            raise InputError(
                f"keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit a cache of {len(self._used)} "
                f"sequences whose placement gives rank {rank} {wanted}; append what the placement says"
            )
        start = 0
        for sequence, count in enumerate(new.counts[rank].tolist()):
            if not count:
                continue
            used = self._used[sequence]
            buffer = self._room(sequence, used + count)
            buffer[used : used + count, 0] = _saturated(k[start : start + count].detach(), buffer.dtype)
            buffer[used : used + count, 1] = _saturated(v[start : start + count].detach(), buffer.dtype)
            self._used[sequence] = used + count
            start += count

    def _room(self, sequence: int, wanted: int) -> Tensor:
        buffer = self._buffers[sequence]
        if wanted > len(buffer):
            used = self._used[sequence]
            grown = buffer.new_empty(max(wanted, 2 * used), *self._shape)
            grown[:used] = buffer[:used]
            self._buffers[sequence] = buffer = grown
        return buffer

    @property
    def local(self) -> list[Tensor]:
        """Per sequence (n, 2, G, D), keys then values, by position: views, not copies."""
        return [buffer[:used] for buffer, used in zip(self._buffers, self._used, strict=True)]

    @property
    def bytes(self) -> int:
        """Bytes in use on this rank."""
        return sum(view.numel() * view.element_size() for view in self.local)


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` within what ``dtype`` holds; a float8 conversion of more would be NaN."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest) if dtype.itemsize == 1 else x
