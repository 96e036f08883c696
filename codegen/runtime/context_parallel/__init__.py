"""Context-parallel attention: sequences spread over ranks, exact attention by a ring of messages.

Inference::

    prompt = balanced(lengths, world_size)
    ring = Ring(prompt, heads=32, kv_heads=8, head_dim=128)          # once a batch, for all layers
    cache = KVCache(len(lengths), 8, 128)                            # one a layer
    cache.append(prompt, ring.rank, k, v)
    out, _ = pass_kv(ring, q, cache.local)

    token = round_robin(ring.keys.lengths, world_size, step)         # decode
    ring = ring.advance(token)
    cache.append(token, ring.rank, k, v)
    out, _ = pass_q(ring, q, cache.local)

Training: ``out = ring_attention(ring, q, k, v)``.

Sources: Ring Attention (arXiv 2310.01889); Context Parallelism for Scalable Million-Token Inference
(arXiv 2411.01783). See docs/context_parallel.md.
"""

from codegen.runtime.context_parallel.cache import KVCache
from codegen.runtime.context_parallel.merge import Accumulator, merge
from codegen.runtime.context_parallel.pass_kv import pass_kv, ring_attention
from codegen.runtime.context_parallel.pass_q import pass_q
from codegen.runtime.context_parallel.placement import Placement, balanced, contiguous, empty, round_robin
from codegen.runtime.context_parallel.ring import Ring
from codegen.runtime.context_parallel.trace import Trace

__all__ = [
    "Accumulator",
    "KVCache",
    "Placement",
    "Ring",
    "Trace",
    "balanced",
    "contiguous",
    "empty",
    "merge",
    "pass_kv",
    "pass_q",
    "ring_attention",
    "round_robin",
]
