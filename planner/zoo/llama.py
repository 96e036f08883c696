"""Llama 3: a plain decoder with grouped-query attention, SwiGLU and rotary positions.

"The Llama 3 Herd of Models" (arXiv 2407.21783), table 3. The vocabulary is 128,256, as in the released
configurations (the paper prints 128,000), which gives the published parameter counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.workload import Workload


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): pairs (i, i + d/2) turned by the angle of their position.

    Args:
        x: (batch, heads, tokens, d).
        cos, sin: (tokens, d / 2).
    """
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    """Causal grouped-query attention: (batch, tokens, hidden) to the same."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend to the tokens before."""
        q = rotate(self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), cos, sin)
        k = rotate(self.k(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), cos, sin)
        v = self.v(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) to the same."""
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    """One decoder layer with norms before its two halves."""

    def __init__(self, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.attention = Attention(hidden, heads, kv_heads, head_dim)
        self.ffn_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.ffn = FeedForward(hidden, ffn)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, hidden) to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Llama(nn.Module):
    """A Llama: token ids (batch, ``sequence``) to logits (batch, ``sequence``, vocab)."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        layers: int,
        hidden: int,
        ffn: int,
        heads: int,
        kv_heads: int,
        *,
        vocab: int,
        sequence: int,
        rope_theta: float = 500_000.0,  # arXiv 2407.21783, table 3
    ) -> None:
        super().__init__()
        if hidden % heads or heads % kv_heads or min(layers, ffn, vocab, sequence) < 1:
            raise InputError(
                f"a Llama needs heads that divide hidden and key-value heads that divide heads, not {hidden}, "
                f"{heads} and {kv_heads}"
            )
        head_dim = hidden // heads
        self.sequence = sequence
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, ffn, heads, kv_heads, head_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.output = nn.Linear(hidden, vocab, bias=False)
        cos = sin = self.embedding.weight.new_empty((sequence, head_dim // 2))
        if not cos.is_meta:
            exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=cos.device) / head_dim
            position = torch.arange(sequence, dtype=torch.float32, device=cos.device)
            angle = torch.outer(position, rope_theta**-exponent)
            cos, sin = angle.cos().to(cos.dtype), angle.sin().to(cos.dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits: Tensor = self.output(self.norm(x))
        return logits

    def example_inputs(self, batch: int) -> tuple[Tensor]:
        """Token ids of the right shape, on the meta device."""
        return (torch.empty((batch, self.sequence), dtype=torch.int64, device="meta"),)


def build_llama(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int = 8,
    vocab: int = 128_256,
    sequence: int = LlmWorkload().sequence,
    global_tokens: int = LlmWorkload().global_tokens,
    device: str | torch.device = "meta",
) -> tuple[Llama, Workload]:
    """A Llama 3 and the last stage of its pre-training: AdamW in bf16, 16 M tokens of 8,192 a step."""
    with torch.device(device):
        module = Llama(layers, hidden, ffn, heads, kv_heads, vocab=vocab, sequence=sequence)
    fed = LlmWorkload(sequence, global_tokens)
    workload = Workload(
        global_batch=fed.sequences,
        optimizer="adam",
        compute_dtype="bf16",
        exchange_dtype="bf16",
        origin="Llama 3 pre-training, arXiv 2407.21783, section 3.4.1",
        llm=fed,
    )
    return module, workload
