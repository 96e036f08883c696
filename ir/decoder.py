"""What a decoder language model is and is fed: sizes of its matrices, sequence and batch of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.errors import InputError
from ir.reading import STRICT

Positive = Annotated[int, Field(ge=1, le=2**40)]


@dataclass(frozen=True, slots=True)
class LlmWorkload:
    """One training step of a decoder: ``global_tokens / sequence`` sequences of ``sequence`` tokens."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sequence: Positive = 8192  # tokens: Llama 3 pre-training, arXiv 2407.21783, section 3.4.1
    global_tokens: Positive = 16 * 2**20  # a step, over all ranks: the same, last stage of its batch schedule
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of GEMMs and activations
    optimizer: Literal["adam", "sgd"] = "adam"  # fp32 state: two moments or none, beside the fp32 weights

    @property
    def sequences(self) -> int:
        """Sequences a step; raises InputError where the tokens are no multiple of the sequence."""
        count, rest = divmod(self.global_tokens, self.sequence)
        if rest or not count:
            near = max(1, round(self.global_tokens / self.sequence)) * self.sequence
            raise InputError(
                f"global_tokens {self.global_tokens} is not a whole number of sequences of {self.sequence} "
                f"tokens; use {near}"
            )
        return count


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The sizes of a decoder; every weight is a matrix named here or counted as a vector."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    layers: Positive
    hidden: Positive
    ffn: Positive  # width between the two halves of the feed-forward network
    gated: bool  # two matrices into the feed-forward width (SwiGLU), else one
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    vocab: Positive
    tied: bool  # the output projection is the embedding
    layer_vectors: Annotated[int, Field(ge=0)]  # parameters of a layer outside its matrices (norms)
    outer_vectors: Annotated[int, Field(ge=0)]  # parameters outside layers, embedding and projection

    @property
    def query_width(self) -> int:
        """Elements of one token's queries over all heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys (or values) over all key-value heads."""
        return self.kv_heads * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Parameters of the query, key, value and output projections of a layer."""
        return self.hidden * (2 * self.query_width + 2 * self.kv_width)

    @property
    def ffn_matrices(self) -> int:
        """Parameters of the feed-forward matrices of a layer."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def layer_matrices(self) -> int:
        """Parameters of a layer that GEMMs read."""
        return self.attention_matrices + self.ffn_matrices

    @property
    def layer_params(self) -> int:
        """Parameters of a layer."""
        return self.layer_matrices + self.layer_vectors

    @property
    def vocab_matrix(self) -> int:
        """Parameters of the embedding, and of the output projection."""
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        """All parameters."""
        outer = self.vocab_matrix * (1 if self.tied else 2) + self.outer_vectors
        return self.layers * self.layer_params + outer

    def training_flops_per_token(self, sequence: int) -> float:
        """FLOP a token of one training step: 6 a parameter and 6 s H d a layer of causal attention.

        The second term is forward and backward of two products over half of the s x s pairs (s tokens, H d
        elements of a query); recomputation is not counted. Full attention would double it: arXiv
        2204.02311, appendix B, counts it so, arXiv 2411.01783, appendix A, halves it as here.
        """
        return 6.0 * self.params + 6.0 * self.layers * sequence * self.query_width
