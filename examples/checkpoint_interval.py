"""A pass and its cost model in one file: how often to save, and what saving and losing work cost a step.

``python examples/checkpoint_interval.py`` plans DLRM-DCNv2 for 128 H100 with the pass and prints what it decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import planner
from ir.errors import InputError
from ir.plan import Assumption, Event, Timeline
from ir.program import Program
from passes.pipeline import pipeline

# 419 unexpected interruptions of 16,384 GPUs in 54 days: arXiv 2407.21783, section 3.3.4
GPU_SECONDS_PER_FAILURE = 16_384 * 54 * 86_400 / 419


def overhead(interval: float, save: float, mtbf: float) -> float:
    """Share of time lost to saves of ``save`` seconds and to work done again (Young 1974)."""
    return save / interval + interval / (2 * mtbf)


def best_interval(save: float, mtbf: float) -> float:
    """Seconds between checkpoints that make :func:`overhead` least: sqrt(2 save mtbf)."""
    return math.sqrt(2 * save * mtbf)


@dataclass(frozen=True, slots=True)
class CheckpointInterval:
    """Adds the cost of checkpoints to the step; each rank writes ``bandwidth`` bytes/s."""

    name: ClassVar[str] = "checkpoint"
    bandwidth: float

    def run(self, program: Program) -> Program:
        """The program with a longer step; raises InputError before memory and step."""
        if program.memory is None or program.timeline is None:
            raise InputError("pass checkpoint needs memory and step: put it after them")
        kept = ("weights", "optimizer", "dense_weights", "dense_optimizer")
        state = max(sum(rank.used.get(use, 0) for use in kept) for rank in program.memory)
        save = state / self.bandwidth
        mtbf = GPU_SECONDS_PER_FAILURE / program.topology.world_size
        every, step = best_interval(save, mtbf), program.timeline.step
        lost = step * overhead(every, save, mtbf)
        event = Event("checkpoint", "compute", step, lost, critical=True)
        source = f"Young 1974: {save:.2f} s to save, mtbf {mtbf:.0f} s"
        said = Assumption("checkpoint_every", f"{every:.0f} s", source)
        return replace(
            program,
            timeline=Timeline(step + lost, (*program.timeline.events, event)),
            assumptions=(*program.assumptions, said),
        )


def main() -> None:
    """Print the decision and its price."""
    passes = (*pipeline(), CheckpointInterval(bandwidth=0.5e9))
    plan = planner.compile("dlrm-dcnv2", "h100-16x8", passes=passes)
    said, event = plan.assumptions[-1], plan.timeline.events[-1]
    print(f"save every {said.value} ({said.source})")
    print(f"{event.duration / plan.timeline.step:.2%} of the modelled step")


if __name__ == "__main__":
    main()
