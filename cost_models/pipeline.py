"""Pipeline schedules: seconds of a step, and how much is in flight on each rank.

Symbols: p ranks, V chunks of layers a rank (virtual stages), m micro-batches, N micro-batches that pass
through a chunk one after the other, f, b, w seconds of one chunk and micro-batch forward, backward for the
inputs, backward for the weights; c seconds of one message to the next stage.

================= ======================== ======================== =======================================
schedule          bubble                   in flight on rank r      exposed messages
================= ======================== ======================== =======================================
gpipe             (p-1)(f+b+w)             m                        2 (p-1) c
1f1b              (p-1)(f+b+w)             min(m, p-r)              2 (p-1) c (1 + (m-1)/p)
interleaved_1f1b  (p-1)(f+b+w)             min(Vm, 2(p-r-1) +       2 (p-1) c + (V-1)(max(0, pc - (N-p) f)
                                           (V-1) N + 1)             + max(0, pc - (N-p)(b+w)))
zero_bubble       (p-1)(f+                 as 1f1b or interleaved   as 1f1b or interleaved
                  max(0, b-min(f,w)))
================= ======================== ======================== =======================================

The time is m max_r sum_v (f+b+w) + bubble + messages, with the chunk of most seconds in the bubble. For
equal chunks without messages it is exact (zero_bubble: within 6 % from p micro-batches on); with messages or
a light first and last chunk of three or more ranks it is within some per cent of a simulation of the schedule.
"In flight" counts chunks of micro-batches whose activations are held. Under zero_bubble rank r defers r
weight gradients (the H1 schedule), which hold their inputs and the gradients of their outputs.

Sources: GPipe arXiv 1811.06965; interleaving and its bubble (p-1)/(Vm) arXiv 2104.04473, section 2.2; N
arXiv 2407.21783, section 3.3.2; zero bubble arXiv 2401.10241, section 2 (its table 2 gives the bubble of H1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ir.parallelism import Schedule


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A schedule and its sizes."""

    schedule: Schedule
    ranks: int
    virtual_stages: int
    micro_batches: int
    contiguous: int

    @property
    def split_backward(self) -> bool:
        """Weight gradients are an op of their own."""
        return self.schedule == "zero_bubble"


@dataclass(frozen=True, slots=True)
class ChunkSeconds:
    """Seconds of one chunk and micro-batch."""

    forward: float
    backward: float  # gradients of the inputs
    weight: float  # gradients of the weights

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.weight


@dataclass(frozen=True, slots=True)
class PipelineSeconds:
    """A step of the slowest rank without data parallelism."""

    work: float
    bubble: float
    messages: float  # exposed

    @property
    def total(self) -> float:
        """The sum."""
        return self.work + self.bubble + self.messages


def pipeline_seconds(pipe: Pipeline, slowest: float, widest: ChunkSeconds, message: float) -> PipelineSeconds:
    """Modelled seconds of a step.

    Args:
        pipe: the schedule.
        slowest: seconds of one micro-batch through all chunks of the rank that needs most.
        widest: the chunk that needs most.
        message: seconds to hand a micro-batch to the next stage.
    """
    work = pipe.micro_batches * slowest
    if pipe.ranks == 1:
        return PipelineSeconds(work, 0.0, 0.0)
    return PipelineSeconds(
        work, (pipe.ranks - 1) * idle_seconds(pipe, widest), _messages(pipe, widest, message)
    )


def idle_seconds(pipe: Pipeline, chunk: ChunkSeconds) -> float:
    """Bubble of one other rank: what filling and draining past it costs."""
    if pipe.split_backward:
        return chunk.forward + max(0.0, chunk.backward - min(chunk.weight, chunk.forward))
    return chunk.total


def _messages(pipe: Pipeline, chunk: ChunkSeconds, message: float) -> float:
    """Exposed seconds of messages between stages."""
    p, n = pipe.ranks, pipe.contiguous
    ends = 2 * (p - 1) * message
    if pipe.schedule == "gpipe":
        return ends
    if pipe.virtual_stages == 1:
        return ends * (1 + (pipe.micro_batches - 1) / p)
    back = chunk.backward if pipe.split_backward else chunk.backward + chunk.weight
    late = max(0.0, p * message - (n - p) * chunk.forward) + max(0.0, p * message - (n - p) * back)
    return ends + (pipe.virtual_stages - 1) * late


def in_flight(pipe: Pipeline, rank: int) -> int:
    """Chunks of micro-batches whose activations one pipeline rank holds at its peak."""
    whole = pipe.virtual_stages * pipe.micro_batches
    if pipe.schedule == "gpipe":
        return whole
    return min(whole, _warmup(pipe, rank) + 1)


def _warmup(pipe: Pipeline, rank: int) -> int:
    """Forwards before the first backward of a rank."""
    after = pipe.ranks - rank - 1
    if pipe.virtual_stages == 1:
        return after
    return 2 * after + (pipe.virtual_stages - 1) * pipe.contiguous


def deferred(pipe: Pipeline, rank: int) -> int:
    """Weight gradients that a rank holds back at its peak."""
    return min(rank, pipe.virtual_stages * pipe.micro_batches) if pipe.split_backward else 0


def peak_held(pipe: Pipeline, rank: int, sizes: tuple[int, ...]) -> int:
    """The most that a rank holds at once when a micro-batch in flight in chunk v holds ``sizes[v]``."""
    if min(sizes) == max(sizes):
        return in_flight(pipe, rank) * sizes[0]
    # the pattern repeats after the warm-up and one group of micro-batches
    groups = -(-(_warmup(pipe, rank) + 1) // (pipe.virtual_stages * pipe.contiguous)) + 2
    count = min(pipe.micro_batches, groups * pipe.contiguous)
    warmup = pipe.virtual_stages * count if pipe.schedule == "gpipe" else _warmup(pipe, rank)
    return _walk(warmup, count, pipe.contiguous, sizes)


@lru_cache(maxsize=65536)
def _walk(warmup: int, micro_batches: int, contiguous: int, sizes: tuple[int, ...]) -> int:
    """Run forwards and backwards in the order of the interleaved schedule and note the peak."""
    runs = [min(contiguous, micro_batches - start) for start in range(0, micro_batches, contiguous)]
    forward = [size for run in runs for size in sizes for _ in range(run)]
    backward = [size for run in runs for size in reversed(sizes) for _ in range(run)]
    held = peak = sum(forward[: min(warmup, len(forward))])
    for done, size in enumerate(forward[warmup:]):
        held += size
        peak = max(peak, held)
        held -= backward[done]
    return peak
