"""The passes in order, and the one seam through which they are printed, timed and checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cost_models.calibration import Calibration
from ir.program import Program
from ir.verifier import verify_program
from passes.base import Pass
from passes.collectives import Collectives
from passes.compression import CompressionBounds
from passes.dedup import Dedup
from passes.dense import DenseParallelism
from passes.dense_sparse import SparseGroups
from passes.growth import GrowthSchedule
from passes.memory import MemoryAccounting
from passes.sharding import Sharding
from passes.step import StepTimeline
from passes.towers import Towers

Observer = Callable[[str, Program], None]
"""Called as ``observer(pass name, program after it)``; first with "capture" before any pass."""


def pipeline(calibration: Calibration | None = None) -> tuple[Pass, ...]:
    """The passes in order, priced with ``calibration`` (default: the constants of the device kind)."""
    return (
        Dedup(calibration),  # changes the traffic that sharding prices
        DenseParallelism(calibration),  # its bytes are taken from what sharding may fill
        Sharding(calibration),
        MemoryAccounting(),  # needs the shards
        CompressionBounds(calibration),  # needs the shards, changes what the step waits for
        StepTimeline(calibration),  # needs the time of each phase, which the shards decide
        Collectives(calibration),  # needs the step, which its buckets change
        SparseGroups(calibration),  # weighed against the flat step
        GrowthSchedule(calibration),  # prices every phase as the passes before it price a step
        Towers(calibration),  # replaces the flat plan where it is slower, and its codecs
    )


PIPELINE: tuple[Pass, ...] = pipeline()


@dataclass(frozen=True, slots=True)
class PassTime:
    """Wall seconds of one pass; kept out of the plan."""

    name: str
    seconds: float


def run_pipeline(
    program: Program, passes: Sequence[Pass] = PIPELINE, observers: Sequence[Observer] = ()
) -> tuple[Program, tuple[PassTime, ...]]:
    """Run the passes, verify the IR after each one, and tell the observers.

    Raises:
        IRError: a pass broke an invariant (a fault of the pass, not of the input).
    """
    times = []
    verify_program(program)
    for observer in observers:
        observer("capture", program)
    for step in passes:
        started = time.perf_counter()
        program = step.run(program)
        times.append(PassTime(step.name, time.perf_counter() - started))
        verify_program(program)
        for observer in observers:
            observer(step.name, program)
    return program, tuple(times)
