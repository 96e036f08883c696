"""The step of a sharded dense part (FSDP, HSDP): gathers before use, one unit ahead, reductions behind.

::

    compute: lookup_forward | forward, unit by unit | backward, last unit first | lookup_backward | dense_update
    network: gather of the first unit | output_dist | gather of each next unit | ids of the next batch | (gather
             for the backward pass | reduce_scatter | all-reduce of the shard across hosts) of each unit

The gather of a unit is issued when the one two before it has computed, so at most two are whole at a time; the
network is one stream, as in :mod:`cost_models.step`, also where a host has its own fabric. The backward pass of a
unit takes twice its forward pass. Parameters of no unit are gathered first and reduced last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cost_models.calibration import Calibration
from cost_models.compute import BACKWARD_FACTOR, sgd_seconds
from cost_models.dense import DenseLayout, in_order, unit_params
from cost_models.timeline import TimedOp
from ir.ops import Op
from ir.program import Model
from ir.topology import Topology

Price = Callable[[float], dict[str, float]]
"""From the bytes of a whole buffer to the seconds of its collective by term."""


@dataclass(frozen=True, slots=True)
class ShardedDense:
    """A dense part that is split over ranks, with the prices of its collectives.

    Attributes:
        layout: the split.
        units: modules gathered together.
        gather: all-gather among the ranks that split the weights.
        scatter: reduce-scatter among them.
        across: all-reduce of a shard among its replicas.
        bucket_bytes: of all-reduces of whole gradients; there are none.
    """

    layout: DenseLayout
    units: tuple[tuple[str, ...], ...]
    gather: Price
    scatter: Price
    across: Price
    bucket_bytes: float = float("inf")


def shard_topology(topology: Topology, layout: DenseLayout) -> Topology:
    """The ranks that split the weights: all, or one host."""
    return topology if layout.replicas == 1 else replace(topology, levels=topology.levels[:1])


def replica_topology(topology: Topology) -> Topology:
    """The ranks that hold the same shard: one of each host."""
    return replace(topology, levels=(replace(topology.levels[0], fanout=1), *topology.levels[1:]))


@dataclass
class _Segment:
    """Consecutive ops between two gathers."""

    name: str
    unit: int | None
    ops: list[Op]
    bottom: bool
    first: bool  # of its unit
    last: bool = True


def _segments(model: Model, units: Sequence[Sequence[str]]) -> list[_Segment]:
    of = {module: i for i, unit in enumerate(units) for module in unit}
    made: list[_Segment] = []
    seen: set[int] = set()
    for op in in_order(model):
        bottom, unit = op.phase == "bottom", of.get(op.module) if op.params or op.module in of else None
        current = made[-1] if made and made[-1].bottom == bottom else None
        if current is None or (unit is not None and current.unit not in (None, unit)):
            current = _Segment(str(len(made)), unit, [], bottom, unit not in seen)
            made.append(current)
        if unit is not None and current.unit is None:
            current.unit, current.first = unit, unit not in seen
        if unit is not None:
            seen.add(unit)
        current.ops.append(op)
    return made


def sharded_ops(
    model: Model,
    forward: Mapping[str, float],
    phase_seconds: Mapping[str, float],
    item: float,
    dense: ShardedDense,
    topology: Topology,
    calibration: Calibration,
    lookup_after: tuple[str, ...] = (),
) -> list[TimedOp]:
    """The ops of a training step, in issue order.

    Args:
        model: its dense ops.
        forward: seconds of each of them.
        phase_seconds: of the embedding phases; ``input_dist`` is of the next batch's ids, 0 where they are not exchanged
            ahead.
        item: bytes of an element of a gathered weight and of a gradient.
        dense: the split.
        topology: where.
        calibration: constants.
        lookup_after: names of ops that the lookups wait for.
    """
    sizes, rest = unit_params(model, dense.units)
    bytes_of = [size * item for size in sizes]
    segments = _segments(model, dense.units)
    ops = _forward(segments, bytes_of, rest * item, forward, phase_seconds, dense, lookup_after)
    if phase_seconds["input_dist"] > 0:
        ops.append(TimedOp("input_dist_next", "network", phase_seconds["input_dist"]))
    reduced: list[str] = []

    def reduce(name: str, size: float, after: str) -> None:
        if size <= 0:
            return
        terms = dense.scatter(size)
        ops.append(TimedOp(f"reduce_scatter_{name}", "network", sum(terms.values()), (after,), terms))
        reduced.append(f"reduce_scatter_{name}")
        if dense.layout.replicas > 1:
            terms = dense.across(size / dense.layout.shard)
            ops.append(
                TimedOp(f"shard_all_reduce_{name}", "network", sum(terms.values()), (reduced[-1],), terms)
            )
            reduced[-1] = f"shard_all_reduce_{name}"

    last = f"forward_{segments[-1].name}" if segments else "lookup_forward"
    done, exchanged = [last], False
    for segment in reversed(segments):
        if segment.bottom and not exchanged:
            # the lookups wait for the gradients of the embeddings: exchanged first
            ops.append(TimedOp("gradient_dist", "network", phase_seconds["gradient_dist"], (last,)))
            exchanged = True
        waits = [last]
        if segment.unit is not None and dense.layout.reshard_after_forward:
            waits.append(
                _gather(ops, f"again_{segment.name}", bytes_of[segment.unit], (done[-2:][0],), dense)
            )
        last = f"backward_{segment.name}"
        terms = {o.name: BACKWARD_FACTOR * forward[o.name] for o in segment.ops if forward[o.name] > 0}
        ops.append(TimedOp(last, "compute", sum(terms.values()), tuple(w for w in waits if w), terms))
        done.append(last)
        if segment.unit is not None and segment.first:
            reduce(segment.name, bytes_of[segment.unit], last)
    if not exchanged:
        ops.append(TimedOp("gradient_dist", "network", phase_seconds["gradient_dist"], (last,)))
    reduce("rest", rest * item, last)
    ops.append(TimedOp("lookup_backward", "compute", phase_seconds["lookup_backward"], ("gradient_dist",)))
    params = (sum(sizes) + rest) / dense.layout.shard
    update = sgd_seconds(params, topology.device, calibration)  # of this rank's share
    ops.append(TimedOp("dense_update", "compute", update, tuple(reduced)))
    return ops


def _gather(ops: list[TimedOp], name: str, size: float, after: tuple[str, ...], dense: ShardedDense) -> str:
    """Issue a gather; its name, empty where there is nothing to gather."""
    if size <= 0:
        return ""
    terms = dense.gather(size)
    ops.append(TimedOp(f"all_gather_{name}", "network", sum(terms.values()), after, terms))
    return f"all_gather_{name}"


def _forward(
    segments: Sequence[_Segment],
    bytes_of: Sequence[float],
    rest: float,
    forward: Mapping[str, float],
    phase_seconds: Mapping[str, float],
    dense: ShardedDense,
    lookup_after: tuple[str, ...],
) -> list[TimedOp]:
    """Up to the loss; gathers of the first two segments are issued at once."""
    ops = [TimedOp("lookup_forward", "compute", phase_seconds["lookup_forward"], lookup_after)]
    kept = _gather(ops, "rest", rest, (), dense)
    ready: list[str] = []
    exchanged = False
    for index, segment in enumerate(segments):
        if not exchanged and (index == 1 or not segment.bottom):
            ops.append(TimedOp("output_dist", "network", phase_seconds["output_dist"], ("lookup_forward",)))
            exchanged = True
        before = (f"forward_{segments[index - 2].name}",) if index >= 2 else ()
        wanted = segment.unit is not None and (segment.first or dense.layout.reshard_after_forward)
        size = bytes_of[segment.unit] if wanted and segment.unit is not None else 0.0
        ready.append(_gather(ops, segment.name, size, before, dense))
        waits = [kept, ready[-1], *([] if segment.bottom else ["output_dist"])]
        terms = {op.name: forward[op.name] for op in segment.ops if forward[op.name] > 0}
        ops.append(
            TimedOp(
                f"forward_{segment.name}",
                "compute",
                sum(terms.values()),
                tuple(name for name in waits if name),
                terms,
            )
        )
    if not exchanged:
        ops.append(TimedOp("output_dist", "network", phase_seconds["output_dist"], ("lookup_forward",)))
    return ops
