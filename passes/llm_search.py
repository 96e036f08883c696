"""Search for the fastest layouts that fit: exhaustive over the legal space, with bounds.

Degrees are visited in the order of their bound (:func:`cost_models.llm_step.work_bound`), layouts of one
product of degrees in the order of theirs. A layout is left out only if its bound is at or above the step of
the worst layout ranked so far, or if a device would hold more than its limit; so the ranked ones are the best
of all that are legal and fit, and the first is proved optimal for this cost model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cost_models.llm import Training
from cost_models.llm_memory import stage_memory
from cost_models.llm_step import StepCost, step_bound, step_cost, work_bound
from ir.errors import InfeasibleError
from ir.parallelism import RECOMPUTE, Layout, ParallelismConstraints, SearchReport
from ir.units import format_bytes
from passes.llm_layouts import Degrees, copies, count_layouts, degrees, head_layers, layouts, stage_layers

Stages = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that fits, with its price."""

    layout: Layout
    stages: Stages
    cost: StepCost
    memory: tuple[dict[str, int], ...]  # by pipeline rank

    @property
    def fullest(self) -> int:
        """Bytes of the fullest device."""
        return max(sum(used.values()) for used in self.memory)

    @property
    def rank_key(self) -> tuple[float, int, str]:
        """Faster first; of equals, the one that needs less memory."""
        return (self.cost.step, self.fullest, self.layout.label + self.layout.details)


@dataclass(slots=True)
class _Board:
    """The best layout of each product of degrees, and the counts of the search."""

    size: int
    best: dict[tuple[int, ...], Candidate] = field(default_factory=dict)
    legal: int = 0
    evaluated: int = 0
    too_large: int = 0
    cut: int = 0
    worst: float = math.inf  # seconds of the last one that is ranked
    smallest: tuple[int, str] | None = None  # fullest device of the least layout that does not fit

    def threshold(self, made: Degrees) -> float:
        """A layout of these degrees must be faster than this to be ranked."""
        own = self.best[made[:4]].cost.step if made[:4] in self.best else math.inf
        return min(own, self.worst)

    def add(self, candidate: Candidate) -> None:
        layout = candidate.layout
        made = (layout.tensor, layout.context, layout.pipeline, layout.data)
        known = self.best.get(made)
        if known is None or candidate.rank_key < known.rank_key:
            self.best[made] = candidate
            steps = sorted(other.cost.step for other in self.best.values())
            self.worst = steps[self.size - 1] if len(steps) >= self.size else math.inf


def search(
    training: Training, limit: int, rules: ParallelismConstraints
) -> tuple[tuple[Candidate, ...], SearchReport]:
    """The best layouts of different degrees, best first, and what was looked at.

    Args:
        training: model, batch, machine and constants.
        limit: bytes a device may use.
        rules: what the user fixed.

    Raises:
        InfeasibleError: no legal layout, or none that fits.
    """
    shape, world = training.shape, training.topology.world_size
    groups = [
        (work_bound(training, d[0], d[1], d[2], d[4], training.sequences // (d[3] * d[4])), d)
        for d in degrees(shape, training.sequence, training.sequences, world, rules)
    ]
    board = _Board(rules.alternatives)
    for bound, made in sorted(groups):
        _visit(training, limit, rules, board, bound, made)
    ranked = sorted(board.best.values(), key=lambda candidate: candidate.rank_key)[: rules.alternatives]
    if not ranked:
        raise _infeasible(training, limit, board)
    report = SearchReport(
        legal=board.legal,
        evaluated=board.evaluated,
        too_large=board.too_large,
        cut=board.cut,
        bound=min(bound for bound, _ in groups),
    )
    return tuple(ranked), report


def _visit(
    training: Training,
    limit: int,
    rules: ParallelismConstraints,
    board: _Board,
    bound: float,
    made: Degrees,
) -> None:
    """Rank what is worth ranking of one product of degrees and micro-batch."""
    replications = copies(made, rules, _domains(training))
    count = count_layouts(training.shape, training.sequences, made, rules, replications)
    board.legal += count
    if bound >= board.threshold(made):
        board.cut += count
        return
    found = list(layouts(training.shape, training.sequences, made, rules, replications))
    layer = training.layer(made[0], made[1], made[4])
    one = {name: layer.chunk(name) for name in RECOMPUTE}
    timed = sorted(
        (step_bound(training.shape.layers, layout, one[layout.recompute]), i)
        for i, layout in enumerate(found)
    )
    for position, (least, index) in enumerate(timed):
        if least >= board.threshold(made):
            board.cut += len(found) - position
            return
        layout = found[index]
        stages = _stages(training, layout)
        memory = fits(training, layout, stages, limit, board)
        if memory is None:
            board.too_large += 1
            continue
        board.evaluated += 1
        board.add(Candidate(layout, stages, step_cost(training, layout, stages), memory))


def _domains(training: Training) -> tuple[int, ...]:
    """Ranks of a domain of each level but the last, which holds all."""
    sizes, size = [], 1
    for level in training.topology.levels[:-1]:
        size *= level.fanout
        sizes.append(size)
    return tuple(sizes)


def _stages(training: Training, layout: Layout) -> Stages:
    return stage_layers(
        training.shape.layers,
        layout.pipeline,
        layout.virtual_stages,
        layout.slots,
        head_layers(training.shape),
    )


def fits(
    training: Training,
    layout: Layout,
    stages: Sequence[Sequence[int]],
    limit: int,
    board: _Board | None = None,
) -> tuple[dict[str, int], ...] | None:
    """Bytes by pipeline rank; None where a device would hold more than ``limit``."""
    count = layout.pipeline
    made: dict[int, dict[str, int]] = {}
    # the second rank usually holds most: a late first backward and no empty chunk
    for rank in dict.fromkeys((min(1, count - 1), 0, count - 1, *range(count))):
        made[rank] = stage_memory(training, layout, stages, rank)
        total = sum(made[rank].values())
        if total > limit:
            if board is not None and (board.smallest is None or total < board.smallest[0]):
                board.smallest = (total, f"{layout.label} ({layout.details})")
            return None
    return tuple(made[rank] for rank in range(count))


def _infeasible(training: Training, limit: int, board: _Board) -> InfeasibleError:
    world = training.topology.world_size
    if not board.legal:
        return InfeasibleError(
            f"no tensor, context, pipeline and data parallelism divides {training.shape.heads} heads, "
            f"{training.sequence} tokens and {training.sequences} sequences over {world} ranks under the constraints",
            ("parallelism", "workload.llm"),
            "another batch (global_tokens), another number of ranks, or fewer fixed degrees",
        )
    assert board.smallest is not None
    least, which = board.smallest
    return InfeasibleError(
        f"none of {board.legal} legal layouts fits {format_bytes(limit)} a device; the nearest is {which} with at "
        f"least {format_bytes(least)}",
        ("memory_limit", "parallelism"),
        f"at least {format_bytes(least)} of usable memory a device, or more devices",
    )
