"""Context parallelism of a stage: calls of scaled_dot_product_attention become ring attention.

Each rank holds 2 of 2N chunks of every sequence (:func:`codegen.runtime.context_parallel.balanced`); rotary
angles are those of the positions it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from codegen.runtime.context_parallel import Ring, balanced, ring_attention
from codegen.runtime.llm.stages import Stage
from ir.errors import InputError


def held_tokens(sequence: int, ranks: int, rank: int) -> Tensor:
    """Positions of a sequence that a context-parallel rank holds, ascending."""
    return torch.from_numpy(balanced([sequence], ranks).positions(rank, 0))


class _RingMode(TorchFunctionMode):
    """Replaces causal attention of (batch, heads, tokens, d) by a ring over the group."""

    def __init__(self, ring: Callable[[int, int, int, int], Ring]) -> None:
        self._ring = ring

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not options.pop("is_causal", False) or options.pop("attn_mask", None) is not None:
            raise InputError("context parallelism runs causal attention without a mask only")
        batch, heads, tokens, width = q.shape
        ring = self._ring(batch, heads, k.shape[1], width)

        def packed(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(batch * tokens, x.shape[1], width)

        out = ring_attention(ring, packed(q), packed(k), packed(v))
        return out.reshape(batch, tokens, heads, width).transpose(1, 2)


def split_context(stage: Stage, sequence: int, group: dist.ProcessGroup) -> None:
    """Make the stage work on this rank's tokens of each sequence, in place."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    own = held_tokens(sequence, ranks, rank)
    stage.cos, stage.sin = stage.cos[own], stage.sin[own]
    rings: dict[tuple[int, int, int, int], Ring] = {}

    def ring(batch: int, heads: int, kv_heads: int, width: int) -> Ring:
        key = (batch, heads, kv_heads, width)
        if key not in rings:
            # every rank derives the same layout from the plan, so it is not compared again
            rings[key] = Ring(
                balanced([sequence] * batch, ranks),
                heads=heads,
                kv_heads=kv_heads,
                head_dim=width,
                group=group,
                check=False,
            )
        return rings[key]

    for layer in stage.layers.values():
        _under_mode(layer.get_submodule("attention"), ring)


def _under_mode(attention: nn.Module, ring: Callable[[int, int, int, int], Ring]) -> None:
    inner = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _RingMode(ring):
            return inner(*args, **kwargs)

    attention.forward = forward
