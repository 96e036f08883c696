"""One step in tower form as ops on two streams, in the order of :mod:`cost_models.step`.

::

    compute: lookup_forward | bottom forward | tower_forward | top forward | top backward | bottom backward |
             tower_backward | lookup_backward | dense update
    network: in_tower | peer | ids of the next batch | all-reduce of full buckets | peer_gradient | in_tower_gradient |
             all-reduce of the rest | tower_reduce

A dense part that is split over ranks is gathered and reduced as in :mod:`cost_models.dense_step`; the two exchanges and
the modules stand where the flat exchange stands there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cost_models.calibration import Calibration
from cost_models.compute import BACKWARD_FACTOR, sgd_seconds
from cost_models.dense_step import ShardedDense, sharded_ops
from cost_models.gemm_formats import format_seconds
from cost_models.step import DenseReduction, dense_seconds, ring_reduction
from cost_models.timeline import TimedOp, schedule
from ir.dtypes import nbytes
from ir.format_plan import FormatPlan
from ir.ops import Op
from ir.plan import Timeline
from ir.program import Mode, Model
from ir.topology import Topology
from ir.workload import Workload


def tower_timeline(
    over_arch: Model,
    phases: Mapping[str, float],
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    mode: Mode,
    reduction: DenseReduction | ShardedDense | None = None,
    formats: FormatPlan | None = None,
    fetch_seconds: float = 0.0,
) -> Timeline:
    """The step: the bottom MLP hides the exchange inside the tower, ids of the next batch travel
    during this one where the calibration says so, and dense gradients are reduced bucket by bucket.

    Args:
        over_arch: the model's dense ops above (and beside) the lookups.
        phases: of :func:`cost_models.towers.tower_seconds`.
        topology, workload, calibration, mode: as everywhere.
        reduction: of the over-arch's gradients; default :func:`cost_models.step.ring_reduction`. Or how a dense part that
            is split over ranks is gathered and reduced.
        formats: number formats of the over-arch's GEMM operands.
        fetch_seconds: of rows that the busiest memory tier hands over for a later step, beside this one.
    """
    forward = dense_seconds(over_arch, topology, workload, calibration)
    train = mode == "train"
    if formats is not None:
        forward |= format_seconds(
            over_arch.ops, formats, forward, topology, workload, calibration, train=train
        )
    ops = [TimedOp("framework", "compute", phases["framework"])] if phases.get("framework") else []
    first: tuple[str, ...] = ()
    ahead = train and calibration.ids_ahead
    if not ahead:
        # the thread that starts the exchange is the one that does the host's work
        ops.append(TimedOp("input_dist", "network", phases["input_dist"], tuple(op.name for op in ops[-1:])))
        first = ("input_dist",)
    if fetch_seconds > 0:
        ops.append(TimedOp("fetch_rows_next", "host", fetch_seconds))
    if isinstance(reduction, ShardedDense):
        return schedule(
            ops + _split(over_arch, forward, phases, reduction, topology, workload, calibration, first)
        )
    bottom = [op for op in over_arch.ops if op.phase == "bottom"]
    top = [op for op in over_arch.ops if op.phase != "bottom"]
    ops += [
        TimedOp("lookup_forward", "compute", phases["lookup_forward"], first),
        TimedOp("bottom_forward", "compute", sum(forward[op.name] for op in bottom)),
        *_exchange(phases),
        TimedOp("top_forward", "compute", sum(forward[op.name] for op in top), ("peer",)),
    ]
    if ahead:
        ops.append(TimedOp("input_dist_next", "network", phases["input_dist"]))
    if train:
        made = reduction or ring_reduction(topology, calibration)
        ops += _backward(bottom, top, forward, phases, topology, workload, calibration, made)
    return schedule(ops)


def _exchange(phases: Mapping[str, float]) -> list[TimedOp]:
    """From the lookups to the vectors of every tower."""
    return [
        TimedOp("in_tower", "network", phases["in_tower"], ("lookup_forward",)),
        TimedOp("tower_forward", "compute", phases["tower_forward"], ("in_tower",)),
        TimedOp("peer", "network", phases["peer"], ("tower_forward",)),
    ]


def _exchange_back(phases: Mapping[str, float], after: tuple[str, ...]) -> list[TimedOp]:
    """From the gradients of the vectors to those of the lookups."""
    return [
        TimedOp("peer_gradient", "network", phases["peer_gradient"], after),
        TimedOp("tower_backward", "compute", phases["tower_backward"], ("peer_gradient",)),
        TimedOp("in_tower_gradient", "network", phases["in_tower_gradient"], ("tower_backward",)),
    ]


_STANDS_FOR = {"output_dist": "peer", "gradient_dist": "in_tower_gradient"}  # what waits for it waits for


def _split(
    over_arch: Model,
    forward: Mapping[str, float],
    phases: Mapping[str, float],
    dense: ShardedDense,
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    first: tuple[str, ...],
) -> list[TimedOp]:
    """The step of a split dense part with the tower exchange in the place of the flat one."""
    flat = {name: phases[name] for name in ("lookup_forward", "lookup_backward")}
    flat |= {"output_dist": 0.0, "gradient_dist": 0.0, "input_dist": 0.0 if first else phases["input_dist"]}
    item = nbytes(workload.compute_dtype)
    ops: list[TimedOp] = []
    for op in sharded_ops(over_arch, forward, flat, item, dense, topology, calibration, first):
        if op.name == "output_dist":
            ops += _exchange(phases)
        elif op.name == "gradient_dist":
            ops += _exchange_back(phases, op.after)
        else:
            after = tuple(_STANDS_FOR.get(name, name) for name in op.after)
            if op.name == "dense_update" and phases.get("tower_reduce"):
                ops.append(TimedOp("tower_reduce", "network", phases["tower_reduce"], ("tower_backward",)))
                after += ("tower_reduce",)
            ops.append(replace(op, after=after))
    return ops


def _backward(
    bottom: Sequence[Op],
    top: Sequence[Op],
    forward: Mapping[str, float],
    phases: Mapping[str, float],
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    reduction: DenseReduction,
) -> list[TimedOp]:
    item = nbytes(workload.compute_dtype)
    ops: list[TimedOp] = []
    reduced: list[str] = []

    def chunk(name: str, part: Sequence[Op], after: str) -> str:
        ops.append(TimedOp(name, "compute", BACKWARD_FACTOR * sum(forward[op.name] for op in part), (after,)))
        return name

    def reduce(name: str, params: float, after: str) -> None:
        if params > 0 and topology.world_size > 1:
            ops.append(reduction.op(name, params * item, after))
            reduced.append(name)

    last, waiting = "top_forward", 0.0
    pending: list[Op] = []
    for op in reversed(top):
        pending.append(op)
        waiting += op.params
        if waiting * item >= reduction.bucket_bytes:
            last = chunk(f"top_backward_{len(ops)}", pending, last)
            reduce(f"all_reduce_{len(ops)}", waiting, last)
            pending, waiting = [], 0.0
    last = chunk("top_backward_last", pending, last)
    # the towers wait for the gradient of the vectors: exchanged before the rest is reduced
    exchange = _exchange_back(phases, (last,))
    ops.append(exchange[0])
    last = chunk("bottom_backward", bottom, last)
    ops += exchange[1:]
    reduce("all_reduce_last", waiting + sum(op.params for op in bottom), last)
    if phases.get("tower_reduce"):
        ops.append(TimedOp("tower_reduce", "network", phases["tower_reduce"], ("tower_backward",)))
        reduced.append("tower_reduce")
    ops.append(TimedOp("lookup_backward", "compute", phases["lookup_backward"], ("in_tower_gradient",)))
    params = float(sum(op.params for op in (*bottom, *top)))
    update = sgd_seconds(params, topology.device, calibration)
    ops.append(TimedOp("dense_update", "compute", update, tuple(reduced)))
    return ops
