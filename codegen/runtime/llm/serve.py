"""A decoder served on context ranks: prompts in 2N chunks, persistent keys and values, decoding round robin.

Weights and cache are kept in the plan's formats: feed-forward layers but the first and the last in row-wise FP8 with
dynamic scales of the inputs (Llama 3, arXiv 2407.21783, section 6.2), the rest bf16; keys and values bf16 or
float8_e4m3 without a scale, in which they also travel.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from codegen.runtime.context_parallel import (
    KVCache,
    Placement,
    Ring,
    balanced,
    empty,
    pass_kv,
    pass_q,
    round_robin,
)
from codegen.runtime.format_modules import FrozenLinear, GemmFormats, narrow_linear, replace_modules
from ir.errors import InputError
from ir.serving import Exchange, Serving

# section 6.2 of the paper bounds the dynamic scales of activations, not those of weights
_FP8 = GemmFormats(weight="fp8_row", activation="fp8_row:bound=1200")
_CACHE = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_FEED_FORWARD = ("gate", "up", "down")


class ServedDecoder:
    """A decoder on this rank of the default process group.

    Args:
        made: the plan's section.
        whole: the model with real fp32 weights, the same on every rank; it is not changed.
        exact: compute and keep everything in fp32, to tell what the formats change from what the layout does.

    Raises:
        InputError: tensor or pipeline ranks, a process group of another size, or a model of another kind.
    """

    def __init__(self, made: Serving, whole: nn.Module, *, exact: bool = False) -> None:
        layout = made.chosen.layout
        if layout.tensor * layout.pipeline > 1:
            raise InputError(
                f"only context ranks are served here and the plan is {layout.label}; compile with "
                "constraints.serving.tensor: 1 and pipeline: 1, or emit for vllm"
            )
        if dist.get_world_size() != layout.context:
            raise InputError(
                f"the plan serves on {layout.context} ranks, the process group has {dist.get_world_size()}"
            )
        self.exchange: Exchange = made.chosen.exchange
        self.rank, self.ranks = dist.get_rank(), layout.context
        self._model: Any = _in_formats(whole, exact, layout.weights == "fp8_row")
        dtype = torch.float32 if exact else torch.bfloat16
        cache = torch.float32 if exact else _CACHE[layout.cache]
        shape, sequences = made.model, made.request.batch
        self._ring = Ring(
            empty(sequences, self.ranks),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            cache=cache,
        )
        self._caches = [
            KVCache(sequences, shape.kv_heads, shape.head_dim, dtype=cache) for _ in range(shape.layers)
        ]
        self._steps = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that this rank keeps."""
        return sum(cache.bytes for cache in self._caches)

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits (sequences, vocab) after new tokens (sequences, T), which follow those served before."""
        lengths = [tokens.shape[1]] * tokens.shape[0]
        return self._run(tokens, balanced(lengths, self.ranks, self._ring.keys.lengths), self.exchange)

    def decode(self, tokens: Tensor) -> Tensor:
        """Logits (sequences, vocab) after one more token (sequences,) of each."""
        new = round_robin(self._ring.keys.lengths, self.ranks, self._steps)
        self._steps += 1
        return self._run(tokens.unsqueeze(1), new, "pass_q")

    @torch.no_grad()
    def _run(self, tokens: Tensor, new: Placement, exchange: Exchange) -> Tensor:
        if tokens.shape[0] != len(self._ring.keys.owners):
            raise InputError(
                f"the plan serves {len(self._ring.keys.owners)} sequences, not {tokens.shape[0]}"
            )
        self._ring = self._ring.advance(new)
        positions = [torch.from_numpy(new.positions(self.rank, s)) for s in range(tokens.shape[0])]
        own = torch.cat(positions)
        if len(self._model.cos) < max(self._ring.keys.lengths):
            raise InputError(
                f"the model has rotary angles of {len(self._model.cos)} positions; build it for more"
            )
        x = self._model.embedding(tokens.reshape(-1)[torch.from_numpy(new.index(self.rank))]).unsqueeze(0)
        cos, sin = self._model.cos[own], self._model.sin[own]
        for layer, cache in zip(self._model.layers, self._caches, strict=True):
            with _Attention(self._ring, cache, new, exchange):
                x = layer(x, cos, sin)
        return self._logits(x[0], new)

    def _logits(self, x: Tensor, new: Placement) -> Tensor:
        """From the hidden states of each sequence's last token, wherever it lies."""
        last = torch.zeros(len(new.owners), x.shape[1], dtype=torch.float32)
        start = 0
        for sequence, owner in enumerate(new.owners):
            count = int(new.counts[self.rank, sequence])
            if owner[-1] == self.rank:
                last[sequence] = x[start + count - 1].float()
            start += count
        dist.all_reduce(last)
        logits: Tensor = self._model.output(self._model.norm(last.to(x.dtype)))
        return logits.float()


class _Attention(TorchFunctionMode):
    """Causal attention of (1, heads, tokens, d) becomes a ring over what the cache holds after these tokens."""

    def __init__(self, ring: Ring, cache: KVCache, new: Placement, exchange: Exchange) -> None:
        self._ring, self._cache, self._new, self._exchange = ring, cache, new, exchange

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x[0].transpose(0, 1).to(self._ring.dtype) for x in args[:3])
        self._cache.append(self._new, self._ring.rank, k, v)
        if self._exchange.startswith("pass_q"):
            returns: Any = "eager" if self._exchange == "pass_q_eager" else "all_to_all"
            out, _ = pass_q(self._ring, q, self._cache.local, returns=returns)
        else:  # an all-gather gives what the ring gives, and one rank needs neither
            out, _ = pass_kv(self._ring, q, self._cache.local)
        return out.transpose(0, 1).unsqueeze(0)


def _in_formats(whole: nn.Module, exact: bool, fp8: bool) -> nn.Module:
    """A copy in the types that are served."""
    source: Any = whole
    lacking = [
        name for name in ("embedding", "layers", "norm", "output", "cos", "sin") if not hasattr(source, name)
    ]
    if lacking:
        raise InputError(
            f"{type(whole).__name__} has no {lacking[0]!r}; decoders are served that are built as llama-tiny is"
        )
    made = copy.deepcopy(whole).eval()
    if exact:
        return made.float()
    made = made.to(torch.bfloat16)
    if fp8:
        for index in range(1, len(source.layers) - 1):
            for name in _FEED_FORWARD:
                path = f"layers.{index}.ffn.{name}"
                narrow = narrow_linear(whole.get_submodule(path), _FP8, training=False)  # type: ignore[arg-type]
                # without a kernel for its width the layer is emulated, in the type it is fed
                replace_modules(
                    made, {path: narrow.to(torch.bfloat16) if isinstance(narrow, FrozenLinear) else narrow}
                )
    return made
