"""How a decoder is trained over a cluster: tensor, context, pipeline and data parallelism.

Rank ``r`` has the coordinates of a mixed-radix number, innermost first: tensor, context, pipeline, data
(the order of Llama 3, arXiv 2407.21783, section 3.3.2), so tensor-parallel groups are neighbours and
data-parallel groups are spread widest. Optimizer state, and gradients and weights as far as the ZeRO level
says, are sharded over context x data, whose ranks hold the same weights; with ``replicate`` R over context and
the inner data / R data ranks only, and the R groups add up their shards' gradients (hybrid sharding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.decoder import DecoderShape
from ir.reading import STRICT

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]
Recompute = Literal["none", "elementwise", "full"]
Zero = Literal[1, 2, 3]
Degree = Annotated[int, Field(ge=1, le=2**24)]

SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble")
"""All forwards then all backwards (arXiv 1811.06965); one forward, one backward (1806.03377); the same over
several virtual stages a rank (2104.04473); backward split so that weight gradients fill the drain (2401.10241)."""

RECOMPUTE: tuple[Recompute, ...] = ("none", "elementwise", "full")
"""What the backward pass computes again. "elementwise": outputs of norms and of the gated product, by fused
kernels, no GEMM and no attention; "full": the whole layer from its input."""

ORDER = ("tensor", "context", "pipeline", "data")
"""Dimensions of the mesh, innermost first."""


@dataclass(frozen=True, slots=True)
class ParallelismConstraints:
    """What the user fixes; None leaves it to the planner."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tensor: Degree | None = None
    context: Degree | None = None
    pipeline: Degree | None = None
    data: Degree | None = None
    micro_batch: Degree | None = None  # sequences
    virtual_stages: Degree | None = None
    contiguous: Degree | None = None
    schedules: Annotated[tuple[Schedule, ...], Field(min_length=1)] | None = None
    recompute: Annotated[tuple[Recompute, ...], Field(min_length=1)] | None = None
    zero: Annotated[tuple[Zero, ...], Field(min_length=1)] | None = None
    replicate: Degree | None = None  # groups that each hold a whole copy; 1 shards over all
    alternatives: Annotated[int, Field(ge=1, le=50)] = 5  # layouts to rank, the chosen one included


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to train; degrees multiply to the world size."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tensor: Degree
    context: Degree
    pipeline: Degree
    data: Degree
    micro_batch: Degree  # sequences of one micro-batch
    micro_batches: Degree  # of one data-parallel replica and step
    schedule: Schedule
    virtual_stages: Degree  # chunks of layers a pipeline rank holds
    contiguous: Degree  # micro-batches that run one after the other through a chunk (interleaved schedules)
    recompute: Recompute
    zero: Zero  # 1 shards optimizer state, 2 also gradients, 3 also weights
    slots: Degree  # layers that the fullest pipeline rank may hold
    replicate: Degree = 1  # groups of data ranks that each hold a whole copy of the sharded state

    @property
    def label(self) -> str:
        """``"TP8 CP1 PP16 DP64"``."""
        return f"TP{self.tensor} CP{self.context} PP{self.pipeline} DP{self.data}"

    @property
    def details(self) -> str:
        """The rest in one phrase."""
        chunks = f" V={self.virtual_stages} N={self.contiguous}" if self.virtual_stages > 1 else ""
        copies = f" in {self.replicate} copies" if self.replicate > 1 else ""
        return (
            f"{self.schedule}{chunks}, {self.micro_batches} x {self.micro_batch} sequences, ZeRO-{self.zero}{copies}, "
            f"recompute {self.recompute}"
        )

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights: context x data."""
        return self.context * self.data

    @property
    def shards(self) -> int:
        """Ranks that the state of one copy is sharded over."""
        return self.context * self.data // self.replicate

    @property
    def sequence_parallel(self) -> bool:
        """Norms and residuals are split over the tensor-parallel ranks.

        Always with tensor parallelism: an all-reduce becomes a reduce-scatter and an all-gather of the same
        bytes, while activations and element-wise work fall (arXiv 2205.05198, section 4.2.2).
        """
        return self.tensor > 1

    def stage_of(self, rank: int) -> int:
        """Pipeline coordinate of a rank."""
        return rank // (self.tensor * self.context) % self.pipeline


@dataclass(frozen=True, slots=True)
class RankedLayout:
    """A layout with what it is modelled to cost."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    layout: Layout
    step: float  # seconds
    tflops: float  # 1e12 model FLOP/s a device
    memory: int  # bytes of the fullest rank
    reason: str  # why it is not the chosen one


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What the search looked at; the four counts of layouts add up to ``legal``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    legal: int  # layouts that obey every rule of divisibility
    evaluated: int  # priced, memory and time
    too_large: int  # more memory than a device has
    cut: int  # bound above the worst layout that is ranked
    bound: float  # seconds: no legal layout is faster, fits or not


@dataclass(frozen=True, slots=True)
class Parallelism:
    """The decision."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: DecoderShape
    layout: Layout
    stages: tuple[tuple[int, ...], ...]  # [pipeline rank][chunk]: layers; embedding first, projection last
    seconds: dict[str, float]  # what the step is made of, slowest pipeline rank; adds up to the step
    hidden: dict[str, float]  # seconds of communication that runs behind compute
    bubble: float  # idle seconds of pipeline fill and drain over seconds of work
    flops: float  # model FLOP of a step, all ranks
    tflops: float  # 1e12 model FLOP/s a device
    mfu: float  # of the device's peak in the compute type
    alternatives: tuple[RankedLayout, ...]  # the best of other degrees, best first
    search: SearchReport
