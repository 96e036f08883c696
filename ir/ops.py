"""Typed op records: what the planner knows of each node of the captured graph.

One record a node that matters for distribution, keyed by the node's name in the ``fx`` graph. All
counts are per sample of the batch unless a field says otherwise, so that a record does not depend on
the batch the model was traced with. FLOP counts one multiply-add as 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from ir.reading import STRICT


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """One embedding table, as the model declares it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str  # unique within the model
    rows: Annotated[int, Field(ge=1, le=2**50)]
    dim: Annotated[int, Field(ge=1, le=2**20)]
    features: tuple[str, ...]  # the sparse features that look it up
    pooling: Annotated[str, Field(pattern="^(sum|mean|max|none)$")] = "sum"  # "none": a sequence of rows
    dtype: str = "fp32"
    module: str = ""  # path of the module that owns it: "model.ebc", "emb.3"
    parameter: str = ""  # path of the parameter: "model.ebc.embedding_bags.t0.weight"
    weighted: bool = False

    @property
    def params(self) -> int:
        """Number of parameters."""
        return self.rows * self.dim


@dataclass(frozen=True, slots=True)
class Op:
    """One node of the captured graph.

    ``kind`` is one of :data:`OP_KINDS`; ``tables`` is filled for lookups only; ``phase`` places a
    dense op relative to the lookups: "bottom" if it does not depend on any lookup, "top" if it does.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str  # fx node name
    kind: str
    module: str = ""  # module path ("" for functional ops)
    target: str = ""  # "Linear", "EmbeddingBagCollection", "torch.cat", ...
    inputs: tuple[str, ...] = ()  # names of the producing ops
    out_shape: tuple[int, ...] = ()  # batch dimension included, as traced
    dtype: str = "fp32"
    flops: float = 0.0  # forward, per sample
    params: int = 0
    activation_bytes: float = 0.0  # output, per sample
    tables: tuple[str, ...] = ()
    phase: str = "bottom"
    gemm: tuple[int, int] | None = None  # (k, n): contraction and output width of a GEMM, per sample row
    gemm_rows: float = 1.0  # rows of the GEMM per sample (1 for a Linear over (batch, k))


OP_KINDS = (
    "input",
    "lookup",  # pooled or sequence embedding lookup
    "gemm",  # Linear, matmul
    "interaction",  # batched dot products between feature vectors, FM
    "attention",
    "norm",
    "elementwise",
    "reshape",  # moves or renames bytes: cat, view, index
    "output",
)
