"""Attention of one rank's queries against one block of keys: output and log-sum-exp, and its gradients.

Shapes: q, out (t, H, D); k, v (s, G, D) with G key-value heads, query head h reading head h // (H / G);
lse (t, H). Each forward is normalised over the keys it was given; each backward takes the output and LSE
over ALL keys, so that gradients of blocks add up (FlashAttention-2, arXiv 2307.08691, section 3.1).

==========  =======================================================================================
blockwise   any device, type and mask, in fp32 (fp64 for fp64); holds one tile of scores at a time
flash       PyTorch's CPU flash kernel (all floating types), or its CUDA flash kernel (fp16, bf16)
==========  =======================================================================================
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from codegen.runtime.context_parallel.merge import Accumulator, work_dtype
from codegen.runtime.context_parallel.pieces import Mask, Piece
from ir.errors import InputError, did_you_mean

Gradients = tuple[Tensor, Tensor, Tensor]

# Scores held at once, all heads of a tile together: 16 MiB in fp32, about the share of L2/L3 of one core.
TILE_SCORES = 4 * 2**20
_KEY_TILE = 512  # keys of a tile; columns of the GEMM, a multiple of every vector width


class Kernel(Protocol):
    """One implementation of local attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
        """Output (t, H, D) and LSE (t, H) of a piece's queries over a piece's keys."""

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: Piece,
        scale: float,
    ) -> Gradients:
        """Gradients of q, k and v from this piece; ``grad`` is that of the merged ``out``."""


def choose(name: str, dtype: torch.dtype, device: torch.device, head_dim: int) -> Kernel:
    """The kernel for a device and element type.

    "auto" takes flash where it exists and blockwise elsewhere. Raises InputError for an unknown name or a
    flash kernel that does not exist for this type.
    """
    if name not in ("auto", "flash", "blockwise"):
        known = ("auto", "flash", "blockwise")
        raise InputError(
            f"there is no attention kernel {name!r}{did_you_mean(name, known)}; use one of {known}"
        )
    if name == "blockwise":
        return Blockwise()
    if device.type == "cpu" and dtype.is_floating_point:
        return FlashCpu()
    # head_dim: limits of PyTorch's bundled FlashAttention-2
    if (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= 256
        and head_dim % 8 == 0
    ):
        return FlashCuda()
    if name == "flash":
        raise InputError(
            f"no flash attention for {dtype} with head dimension {head_dim} on {device.type}; use kernel='blockwise'"
        )
    return Blockwise()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(t, H, ...) to (G, H/G, t, ...): query heads beside the key-value head they read."""
    t, heads, *rest = x.shape
    parts = x.reshape(t, groups, heads // groups, *rest)
    return parts.permute(1, 2, 0, *range(3, parts.dim()))


def _ungrouped(x: Tensor) -> Tensor:
    """The inverse of :func:`_grouped`."""
    groups, each, t, *rest = x.shape
    return x.permute(2, 0, 1, *range(3, x.dim())).reshape(t, groups * each, *rest)


def _stacked(x: Tensor, groups: int) -> Tensor:
    """(t, H, ...) to (G, H/G * t, ...): the query heads of a group as rows of one product."""
    parts = _grouped(x, groups)
    return parts.reshape(groups, parts.shape[1] * parts.shape[2], *parts.shape[3:])


def _unstacked(x: Tensor, t: int) -> Tensor:
    """The inverse of :func:`_stacked`."""
    return _ungrouped(x.reshape(x.shape[0], x.shape[1] // t, t, *x.shape[2:]))


class FlashCpu:
    """``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward.

    Without a mask the query heads of a group are stacked as rows, so that keys are read once a group;
    the triangular mask needs one head a matrix, for which keys are repeated by a stride of 0.
    """

    def _arranged(self, mask: Mask, groups: int, k: Tensor, v: Tensor, rows: list[Tensor]) -> list[Tensor]:
        keys = [k.transpose(0, 1), v.transpose(0, 1)]  # (G, s, D)
        if mask == "full":
            return [part.unsqueeze(0) for part in ([_stacked(x, groups) for x in rows] + keys)]
        each = rows[0].shape[1] // groups
        spread = [x.unsqueeze(1).expand(-1, each, -1, -1) for x in keys]
        return [_grouped(x, groups) for x in rows] + spread

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
        """See :class:`Kernel`."""
        if piece.mask == "positions":
            return Blockwise().forward(q, k, v, piece, scale)
        rows, keys, values = self._arranged(piece.mask, k.shape[1], k, v, [q])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, 0.0, piece.mask == "square", scale=scale
        )
        if piece.mask == "square":
            return _ungrouped(out), _ungrouped(lse)
        return _unstacked(out[0], len(q)), _unstacked(lse[0], len(q))

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: Piece,
        scale: float,
    ) -> Gradients:
        """See :class:`Kernel`."""
        if piece.mask == "positions":
            return Blockwise().backward(grad, q, k, v, out, lse, piece, scale)
        arranged = self._arranged(piece.mask, k.shape[1], k, v, [grad, q, out, lse])
        d_out, rows, merged, sums, keys, values = arranged
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, rows, keys, values, merged, sums, 0.0, piece.mask == "square", scale=scale
        )
        if piece.mask == "square":
            return _ungrouped(d_q), d_k.sum(1).transpose(0, 1), d_v.sum(1).transpose(0, 1)
        return _unstacked(d_q[0], len(q)), d_k[0].transpose(0, 1), d_v[0].transpose(0, 1)


class FlashCuda:
    """``aten::_scaled_dot_product_flash_attention`` forward (it reads grouped heads natively).

    The backward is blockwise: the kernel's own backward takes generator state that a merged forward lacks.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
        """See :class:`Kernel`."""
        if piece.mask == "positions":
            return Blockwise().forward(q, k, v, piece, scale)
        rows, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            rows, keys, values, 0.0, piece.mask == "square", False, scale=scale
        )
        return found[0][0].transpose(0, 1), found[1][0, :, : len(q)].transpose(0, 1)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: Piece,
        scale: float,
    ) -> Gradients:
        """See :class:`Kernel`."""
        return Blockwise().backward(grad, q, k, v, out, lse, piece, scale)


class Blockwise:
    """Tiles of queries against tiles of keys in plain matrix products, never the whole score matrix."""

    def __init__(self, tile_scores: int = TILE_SCORES, key_tile: int = _KEY_TILE) -> None:
        self.tile_scores = tile_scores
        self.key_tile = key_tile

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
        """See :class:`Kernel`."""
        t, heads, dim = q.shape
        groups, kind = k.shape[1], work_dtype(q.dtype)
        running = Accumulator(t, heads, dim, q.dtype, q.device)
        masks = _Masks(piece, t, len(k), q.device)
        for a, b, c, d in self._tiles(t, len(k), heads, masks):
            scores, values = (
                self._scores(q[a:b], k[c:d], groups, kind, scale),
                v[c:d].to(kind).transpose(0, 1),
            )
            hidden = masks.hidden(a, b, c, d, heads // groups)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            lse = torch.logsumexp(scores, dim=-1)
            shares = scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp_()
            running.add(a, b, _unstacked(shares @ values, b - a), _unstacked(lse, b - a))
        return running.out.to(q.dtype), running.lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: Piece,
        scale: float,
    ) -> Gradients:
        """See :class:`Kernel`."""
        t, heads, _ = q.shape
        groups, kind = k.shape[1], work_dtype(q.dtype)
        d_q = torch.zeros_like(q, dtype=kind)
        d_k, d_v = torch.zeros_like(k, dtype=kind), torch.zeros_like(v, dtype=kind)
        delta = (grad.to(kind) * out.to(kind)).sum(-1)  # (t, H): row sums of dP * P
        masks = _Masks(piece, t, len(k), q.device)
        for a, b, c, d in self._tiles(t, len(k), heads, masks):
            scores = self._scores(q[a:b], k[c:d], groups, kind, scale)
            hidden = masks.hidden(a, b, c, d, heads // groups)
            shares = scores.sub_(_stacked(lse[a:b].to(kind), groups).unsqueeze(-1)).exp_()
            if hidden is not None:
                shares.masked_fill_(hidden, 0.0)
            d_out = _stacked(grad[a:b].to(kind), groups)  # (G, H/G * rows, D)
            d_v[c:d] += (shares.transpose(1, 2) @ d_out).transpose(0, 1)
            d_shares = d_out @ v[c:d].to(kind).permute(1, 2, 0)
            d_scores = shares * (d_shares - _stacked(delta[a:b], groups).unsqueeze(-1)) * scale
            d_q[a:b] += _unstacked(d_scores @ k[c:d].to(kind).transpose(0, 1), b - a)
            d_k[c:d] += (d_scores.transpose(1, 2) @ _stacked(q[a:b].to(kind), groups)).transpose(0, 1)
        return d_q, d_k, d_v

    def _scores(self, q: Tensor, k: Tensor, groups: int, kind: torch.dtype, scale: float) -> Tensor:
        """(G, H/G * rows, keys)."""
        return _stacked(q.to(kind) * scale, groups) @ k.to(kind).permute(1, 2, 0)

    def _tiles(self, t: int, s: int, heads: int, masks: _Masks) -> list[tuple[int, int, int, int]]:
        """(first row, last row, first key, last key) of the tiles that hold a visible pair."""
        keys = min(s, self.key_tile)
        rows = max(1, self.tile_scores // (heads * max(1, keys)))
        return [
            (a, min(a + rows, t), c, min(c + keys, s))
            for a in range(0, t, rows)
            for c in range(0, s, keys or 1)
            if masks.any_visible(min(a + rows, t) - 1, c)
        ]


class _Masks:
    """The positions of a piece, as a tile needs them."""

    def __init__(self, piece: Piece, t: int, s: int, device: torch.device) -> None:
        self.rows: Tensor | None = None
        if piece.mask == "square":
            self.rows, self.keys = torch.arange(t), torch.arange(s)
        elif piece.mask == "positions":
            self.rows = torch.as_tensor(piece.query_positions)
            self.keys = torch.as_tensor(piece.key_positions)
        self.device = device

    def any_visible(self, last_row: int, first_key: int) -> bool:
        """Whether the last row of a tile sees its first key (positions are sorted)."""
        return self.rows is None or bool(self.rows[last_row] >= self.keys[first_key])

    def hidden(self, a: int, b: int, c: int, d: int, each: int) -> Tensor | None:
        """(each * rows, keys), True where a key lies after the query; None when all are visible."""
        if self.rows is None or bool(self.rows[a] >= self.keys[d - 1]):
            return None
        later = self.keys[c:d].unsqueeze(0) > self.rows[a:b].unsqueeze(1)
        return later.repeat(each, 1).to(self.device)
