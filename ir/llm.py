"""Decoder language models as captured: op records of every layer, shape and attention ops.

A decoder is a stack of equal layers between a vocabulary embedding and an output projection. Its sample
is one sequence, so that ``Workload.global_batch`` counts sequences. The vocabulary embedding is split
with the layers (tensor parallelism, first pipeline stage); it is a dense op, never an embedding table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from ir.decoder import DecoderShape, Positive
from ir.ops import Op
from ir.program import Model
from ir.reading import STRICT, digest, dump_record


@dataclass(frozen=True, slots=True)
class AttentionOp:
    """What one attention node of the graph computes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    op: str  # name of the op
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    causal: bool
    query_length: Positive  # new tokens
    cached_length: Annotated[int, Field(ge=0)] = 0  # tokens before them


@dataclass(frozen=True, slots=True)
class DecoderModel(Model):
    """A captured decoder: op records of every layer, its shape and its attention."""

    shape: DecoderShape
    attentions: tuple[AttentionOp, ...]

    @property
    def sequence(self) -> int:
        """Tokens of the sample that the records describe."""
        return self.attentions[0].query_length

    def at(self, sequence: int) -> DecoderModel:
        """The records for samples of another length; causal attention grows with its square."""
        old = self.sequence
        if sequence == old:
            return self
        ratio = sequence / old
        pairs = sequence * (sequence + 1) / (old * (old + 1))
        attends = {attention.op for attention in self.attentions}

        def scaled(op: Op) -> Op:
            return replace(
                op,
                out_shape=tuple(sequence if size == old else size for size in op.out_shape),
                flops=op.flops * (pairs if op.name in attends else ratio),
                activation_bytes=op.activation_bytes * ratio,
                gemm_rows=op.gemm_rows * ratio if op.gemm is not None else op.gemm_rows,
            )

        return replace(
            self,
            ops=tuple(scaled(op) for op in self.ops),
            attentions=tuple(replace(attention, query_length=sequence) for attention in self.attentions),
        )

    @property
    def digest(self) -> str:
        """Content digest over ops, attention and shape."""
        return digest(
            {
                "shape": dump_record(self.shape),
                "attentions": [dump_record(attention) for attention in self.attentions],
                "ops": [dump_record(op) for op in self.ops],
            }
        )
