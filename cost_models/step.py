"""One training or serving step of a recommender as ops on two streams.

Training, with the streams in the order their ops are issued (a synchronous pipeline that exchanges the
ids of the next batch during this one, as TorchRec's sparse-dist pipeline does)::

    compute: lookup_forward | bottom forward | top forward | top backward, bucket by bucket |
             bottom backward | lookup_backward | dense optimizer
    network: output_dist | input_dist of the next batch | all-reduce of each bucket finished before
             the last | gradient_dist | all-reduce of the rest

Bottom ops depend on no lookup, top ops do. The network stream is one physical fabric, so its
collectives queue. Dense gradients travel in the compute type. In inference the ids of this batch come
first and nothing follows the top forward pass; so they do in training where the calibration says that they do
not travel ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.collectives import all_reduce, network
from cost_models.compute import BACKWARD_FACTOR, input_bytes, op_seconds, sgd_seconds
from cost_models.dense_step import ShardedDense, sharded_ops
from cost_models.dense_tensor import TensorDense, tensor_ops
from cost_models.gemm_formats import format_seconds
from cost_models.timeline import TimedOp, schedule
from ir.dtypes import nbytes
from ir.format_plan import FormatPlan
from ir.ops import Op
from ir.plan import Timeline
from ir.program import Mode, Model
from ir.topology import Topology
from ir.workload import Workload


@dataclass(frozen=True, slots=True)
class DenseReduction:
    """How dense gradients are summed over ranks.

    Attributes:
        bucket_bytes: gathered before one all-reduce starts.
        price: from the bytes of a bucket to the seconds of its all-reduce by term.
    """

    bucket_bytes: float
    price: Callable[[float], dict[str, float]]

    def op(self, name: str, size: float, after: str) -> TimedOp:
        """The all-reduce of a bucket of ``size`` bytes, once ``after`` has filled it."""
        terms = self.price(size)
        return TimedOp(name, "network", sum(terms.values()), (after,), terms)


def ring_reduction(topology: Topology, calibration: Calibration) -> DenseReduction:
    """The calibration's bucket, summed around a ring."""
    net = network(topology, calibration)
    return DenseReduction(
        calibration.bucket_bytes,
        lambda size: {"transfer": all_reduce(size, net), "latency": net.latency},
    )


def dense_seconds(
    model: Model, topology: Topology, workload: Workload, calibration: Calibration
) -> dict[str, float]:
    """Forward seconds of each dense op on one rank's samples."""
    samples = workload.global_batch / topology.world_size
    fed, repeats = input_bytes(model.ops), workload.dedup_ops
    return {
        op.name: op_seconds(
            op,
            samples / repeats.get(op.name, 1.0),
            fed[op.name],
            workload.compute_dtype,
            topology.device,
            calibration,
        )
        for op in model.ops
    }


def _buckets(ops: Sequence[Op], item: float, limit: float) -> Iterator[list[Op]]:
    """Ops in backward order, cut where the gradients of a bucket reach ``limit`` bytes."""
    bucket: list[Op] = []
    size = 0.0
    for op in reversed(ops):
        bucket.append(op)
        size += op.params * item
        if size >= limit:
            yield bucket
            bucket, size = [], 0.0
    if bucket:
        yield bucket


def step_timeline(
    model: Model,
    phase_seconds: Mapping[str, float],
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    mode: Mode,
    formats: FormatPlan | None = None,
    fetch_seconds: float = 0.0,
    reduction: DenseReduction | ShardedDense | TensorDense | None = None,
    host_seconds: float = 0.0,
) -> Timeline:
    """The modelled step.

    Args:
        model: its dense ops are priced here.
        phase_seconds: seconds of each embedding phase on its slowest rank, overheads included.
        topology: where.
        workload: batch and element types.
        calibration: constants.
        mode: "train" or "inference".
        formats: number formats of GEMM operands and of cached keys and values.
        fetch_seconds: of rows that the busiest memory tier hands over for a later step, beside this one.
        reduction: of dense gradients; default :func:`ring_reduction`. Or how a dense part that is split over ranks is
            gathered and reduced (:mod:`cost_models.dense_step`, :mod:`cost_models.dense_tensor`).
        host_seconds: of the framework's own work, which on a CPU runs in line with the kernels.
    """
    reduction = reduction or ring_reduction(topology, calibration)
    forward = dense_seconds(model, topology, workload, calibration)
    if formats is not None:
        train = mode == "train"
        forward |= format_seconds(model.ops, formats, forward, topology, workload, calibration, train=train)
    bottom = [op for op in model.ops if op.phase == "bottom"]
    top = [op for op in model.ops if op.phase != "bottom"]
    below = {op.name: forward[op.name] for op in bottom if forward[op.name] > 0}
    above = {op.name: forward[op.name] for op in top if forward[op.name] > 0}
    ops: list[TimedOp] = [TimedOp("fetch_rows_next", "host", fetch_seconds)] if fetch_seconds > 0 else []
    lookup_after: tuple[str, ...] = ()
    ahead = mode == "train" and calibration.ids_ahead
    if host_seconds > 0:
        ops.append(TimedOp("framework", "compute", host_seconds))
    if not ahead:
        # the thread that starts the exchange is the one that does the host's work
        before = ("framework",) if host_seconds > 0 else ()
        ops.append(TimedOp("input_dist", "network", phase_seconds["input_dist"], before))
        lookup_after = ("input_dist",)
    if not isinstance(reduction, DenseReduction):
        item = nbytes(workload.compute_dtype)
        phases = dict(phase_seconds) if ahead else {**phase_seconds, "input_dist": 0.0}
        if isinstance(reduction, TensorDense):
            laid = tensor_ops(model, forward, phases, item, reduction, topology, calibration, lookup_after)
        else:
            laid = sharded_ops(model, forward, phases, item, reduction, topology, calibration, lookup_after)
        return schedule(ops + laid)
    ops += [
        TimedOp("lookup_forward", "compute", phase_seconds["lookup_forward"], lookup_after),
        TimedOp("bottom_forward", "compute", sum(below.values()), (), below),
        TimedOp("output_dist", "network", phase_seconds["output_dist"], ("lookup_forward",)),
        TimedOp("top_forward", "compute", sum(above.values()), ("output_dist",), above),
    ]
    if ahead:
        # the next batch's ids: the slot between the two output exchanges is the free one
        ops.append(TimedOp("input_dist_next", "network", phase_seconds["input_dist"]))
    if mode == "train":
        ops += _backward(bottom, top, forward, phase_seconds, topology, workload, calibration, reduction)
    return schedule(ops)


def _backward(
    bottom: Sequence[Op],
    top: Sequence[Op],
    forward: Mapping[str, float],
    phase_seconds: Mapping[str, float],
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    reduction: DenseReduction,
) -> list[TimedOp]:
    """Backward passes, gradient exchanges and the dense update, in issue order."""
    item = nbytes(workload.compute_dtype)
    ops: list[TimedOp] = []
    reduced: list[str] = []

    def chunk(name: str, part: Sequence[Op], after: tuple[str, ...]) -> str:
        terms = {op.name: BACKWARD_FACTOR * forward[op.name] for op in part if forward[op.name] > 0}
        ops.append(TimedOp(name, "compute", sum(terms.values()), after, terms))
        return name

    def reduce(name: str, part: Sequence[Op], after: str) -> None:
        size = sum(op.params for op in part) * item
        if size > 0 and topology.world_size > 1:
            ops.append(reduction.op(name, size, after))
            reduced.append(name)

    # buckets follow the backward pass and may span the top and the bottom, as DDP's do
    buckets = list(_buckets([*bottom, *top], item, reduction.bucket_bytes)) or [[]]
    below = {op.name for op in bottom}
    last, exchanged = "top_forward", False
    for index, bucket in enumerate(buckets):
        upper = [op for op in bucket if op.name not in below]
        if upper:
            last = chunk(f"top_backward_{index}", upper, (last,))
        if len(upper) < len(bucket) or index == len(buckets) - 1:
            if not exchanged:
                # the lookups wait for the gradients of the embeddings: exchanged first
                ops.append(TimedOp("gradient_dist", "network", phase_seconds["gradient_dist"], (last,)))
                exchanged = True
            lower = [op for op in bucket if op.name in below]
            last = chunk(f"bottom_backward_{index}", lower, (last,)) if lower else last
        reduce(f"all_reduce_{index}", bucket, last)
    ops.append(TimedOp("lookup_backward", "compute", phase_seconds["lookup_backward"], ("gradient_dist",)))
    params = float(sum(op.params for op in (*bottom, *top)))
    update = sgd_seconds(params, topology.device, calibration)
    ops.append(TimedOp("dense_update", "compute", update, tuple(reduced)))
    return ops
