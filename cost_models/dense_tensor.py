"""Tensor parallelism of wide layers: which pairs can be split, bytes on each rank and on the wire, and the step.

Symbols: g ranks of a host split a pair, b samples a rank, T ranks in all; a pair maps K elements a sample to H units and
those to N elements. Every rank computes H / g units for the g b samples of its host::

    forward   all-gather of g b K, both GEMMs, reduce-scatter of g b N
    backward  all-gather of g b N, both GEMMs, reduce-scatter of g b K, all-reduce of the shards across hosts

Weights are never gathered, so it pays where a pair has more weights than a host has activations around it. FLOP stay what
they are. Sources: arXiv 1909.08053 (the pair), arXiv 2205.05198 (gather and scatter around it).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.compute import BACKWARD_FACTOR, sgd_seconds
from cost_models.dense import in_order
from cost_models.timeline import TimedOp
from ir.dense_plan import DensePlan, TensorPair
from ir.ops import Op
from ir.program import Model
from ir.topology import Topology

Price = Callable[[float], dict[str, float]]
"""From the bytes of a whole buffer to the seconds of its collective by term."""


def tensor_pairs(model: Model, ranks: int, least: int = 0) -> tuple[TensorPair, ...]:
    """The pairs of linear layers that ``ranks`` ranks can split, with at least ``least`` weights, in graph order.

    Only the second layer reads the first, through element-wise functions of one input without parameters; both run
    once a step; the units divide by the ranks. A layer is in one pair, the first one that it fits.
    """
    calls = Counter(op.module for op in model.ops if op.module)
    readers: dict[str, list[Op]] = {op.name: [] for op in model.ops}
    for op in model.ops:
        for name in op.inputs:
            readers[name].append(op)
    found: list[TensorPair] = []
    taken: set[str] = set()
    for op in model.ops:
        if not _linear(op, calls) or op.module in taken:
            continue
        second = _only_reader(op, readers, calls)
        if second is None or second.module in taken:
            continue
        assert op.gemm is not None
        assert second.gemm is not None
        (k, units), (_, n) = op.gemm, second.gemm
        weights = op.params + units * n
        if units % ranks or weights < least:
            continue
        taken |= {op.module, second.module}
        rows = op.gemm_rows
        found.append(
            TensorPair(op.module, second.module, units, weights, math.ceil(rows * k), math.ceil(rows * n))
        )
    return tuple(found)


def _linear(op: Op, calls: Mapping[str, int]) -> bool:
    return op.kind == "gemm" and op.target == "Linear" and op.gemm is not None and calls[op.module] == 1


def _only_reader(op: Op, readers: Mapping[str, list[Op]], calls: Mapping[str, int]) -> Op | None:
    here = op
    while len(readers[here.name]) == 1:
        (reader,) = readers[here.name]
        if _linear(reader, calls):
            return reader
        plain = reader.kind == "elementwise" and len(reader.inputs) == 1 and not reader.params
        if not plain or reader.out_shape != op.out_shape:
            return None
        here = reader
    return None


def pair_params(pairs: Sequence[TensorPair]) -> int:
    """Parameters that are split."""
    return sum(pair.params for pair in pairs)


def gathered_elements(pairs: Sequence[TensorPair]) -> int:
    """Elements a sample of all buffers that are gathered or scattered, one way."""
    return sum(pair.inputs + pair.outputs for pair in pairs)


def tensor_memory(
    whole: dict[str, int], plan: DensePlan, params: int, samples: float, item: float
) -> dict[str, int]:
    """``whole`` (of a replicated dense part of ``params`` parameters) with its pairs split.

    Each rank keeps 1/g of the pairs' weights, gradients and state, and until the backward pass the gathered input of
    every pair; the widest buffer of partial sums comes on top.
    """
    split = pair_params(plan.pairs)
    share = (params - split + split / plan.tensor) / max(1, params)
    names = ("dense_weights", "dense_gradients", "dense_optimizer")
    used = {name: math.ceil(size * share) if name in names else size for name, size in whole.items()}
    kept = sum(pair.inputs for pair in plan.pairs) + max(pair.outputs for pair in plan.pairs)
    used["dense_gathered"] = math.ceil(kept * samples * plan.tensor * item)
    return used


def tensor_message_bytes(plan: DensePlan, params: int, samples: float, item: float) -> float:
    """Bytes of the buffers of a step's collectives on one rank, all-reduces counted twice."""
    split = pair_params(plan.pairs)
    hosts = plan.replicas // plan.tensor
    across = 2 * split / plan.tensor * item if hosts > 1 else 0.0
    return (
        2 * (params - split) * item
        + across
        + 2 * gathered_elements(plan.pairs) * samples * plan.tensor * item
    )


def tensor_wire_bytes(plan: DensePlan, params: int, samples: float, item: float) -> float:
    """Bytes that ring collectives send from each rank in a step."""
    split, ranks, g = pair_params(plan.pairs), plan.replicas, plan.tensor
    hosts = ranks // g
    rest = 2 * (ranks - 1) / ranks * (params - split)
    across = 2 * (hosts - 1) / hosts * split / g
    return (rest + across + 2 * (g - 1) * samples * gathered_elements(plan.pairs)) * item


@dataclass(frozen=True, slots=True)
class TensorDense:
    """Split pairs with the prices of all collectives of the dense part.

    Attributes:
        plan: the decision.
        samples: of one rank.
        gather, scatter: among the ranks of a host.
        across: all-reduce of a shard over the hosts.
        reduce: all-reduce of replicated gradients over all ranks.
        bucket_bytes: of replicated gradients.
    """

    plan: DensePlan
    samples: float
    gather: Price
    scatter: Price
    across: Price
    reduce: Price
    bucket_bytes: float


@dataclass
class _Segment:
    """Consecutive ops, of one pair or of none."""

    pair: TensorPair | None
    bottom: bool
    ops: list[Op]


def _segments(model: Model, pairs: Sequence[TensorPair]) -> list[_Segment]:
    begin, end = {pair.first: pair for pair in pairs}, {pair.second for pair in pairs}
    made: list[_Segment] = []
    closed = True
    for op in in_order(model):
        bottom = op.phase == "bottom"
        if op.module in begin:
            made.append(_Segment(begin[op.module], bottom, [op]))
            closed = False
            continue
        if closed and (not made or made[-1].pair is not None or made[-1].bottom != bottom):
            made.append(_Segment(None, bottom, []))
        made[-1].ops.append(op)
        closed = closed or op.module in end
    return made


def tensor_ops(
    model: Model,
    forward: Mapping[str, float],
    phase_seconds: Mapping[str, float],
    item: float,
    dense: TensorDense,
    topology: Topology,
    calibration: Calibration,
    lookup_after: tuple[str, ...] = (),
) -> list[TimedOp]:
    """The ops of a training step in issue order; arguments as :func:`cost_models.dense_step.sharded_ops`."""
    segments = _segments(model, dense.plan.pairs)
    moved = dense.samples * dense.plan.tensor * item
    ops = [
        TimedOp("lookup_forward", "compute", phase_seconds["lookup_forward"], lookup_after),
        TimedOp("output_dist", "network", phase_seconds["output_dist"], ("lookup_forward",)),
    ]

    def network(name: str, terms: dict[str, float], after: str) -> str:
        ops.append(TimedOp(name, "network", sum(terms.values()), (after,) if after else (), terms))
        return name

    def compute(name: str, segment: _Segment, factor: float, after: Sequence[str]) -> str:
        terms = {o.name: factor * forward[o.name] for o in segment.ops if forward[o.name] > 0}
        ops.append(TimedOp(name, "compute", sum(terms.values()), tuple(a for a in after if a), terms))
        return name

    last, upper = "", False
    for n, segment in enumerate(segments):
        waits = [last]
        if not segment.bottom and not upper:
            waits, upper = [last, "output_dist"], True
        if segment.pair is None:
            last = compute(f"forward_{n}", segment, 1.0, waits)
            continue
        gathered = network(f"all_gather_{n}", dense.gather(segment.pair.inputs * moved), waits[-1])
        computed = compute(f"forward_{n}", segment, 1.0, [*waits, gathered])
        last = network(f"reduce_scatter_{n}", dense.scatter(segment.pair.outputs * moved), computed)
    if phase_seconds["input_dist"] > 0:
        ops.append(TimedOp("input_dist_next", "network", phase_seconds["input_dist"]))
    ops += _backward(segments, last or "lookup_forward", phase_seconds, item, dense, forward)
    split = pair_params(dense.plan.pairs)
    params = model.dense_params - split + split / dense.plan.tensor
    reduced = tuple(op.name for op in ops if op.name.startswith(("all_reduce", "shard_all_reduce")))
    update = sgd_seconds(params, topology.device, calibration)  # of this rank's share
    ops.append(TimedOp("dense_update", "compute", update, reduced))
    return ops


def _backward(
    segments: Sequence[_Segment],
    last: str,
    phase_seconds: Mapping[str, float],
    item: float,
    dense: TensorDense,
    forward: Mapping[str, float],
) -> Iterator[TimedOp]:
    """Last segment first; the gradients of the embeddings leave before those of the bottom are computed."""
    moved = dense.samples * dense.plan.tensor * item
    waiting, exchanged = 0.0, False
    for n, segment in reversed(list(enumerate(segments))):
        if segment.bottom and not exchanged:
            yield TimedOp("gradient_dist", "network", phase_seconds["gradient_dist"], (last,))
            exchanged = True
        pair = segment.pair
        if pair is not None:
            terms = dense.gather(pair.outputs * moved)
            yield TimedOp(f"all_gather_gradient_{n}", "network", sum(terms.values()), (last,), terms)
            last = f"all_gather_gradient_{n}"
        terms = {o.name: BACKWARD_FACTOR * forward[o.name] for o in segment.ops if forward[o.name] > 0}
        yield TimedOp(f"backward_{n}", "compute", sum(terms.values()), (last,), terms)
        last = f"backward_{n}"
        waiting += (sum(op.params for op in segment.ops) - (pair.params if pair else 0)) * item
        if pair is not None:
            if dense.plan.replicas > dense.plan.tensor:
                terms = dense.across(pair.params / dense.plan.tensor * item)
                yield TimedOp(f"shard_all_reduce_{n}", "network", sum(terms.values()), (last,), terms)
            terms = dense.scatter(pair.inputs * moved)
            yield TimedOp(f"reduce_scatter_gradient_{n}", "network", sum(terms.values()), (last,), terms)
            last = f"reduce_scatter_gradient_{n}"
        if waiting and (waiting >= dense.bucket_bytes or n == 0):
            terms = dense.reduce(waiting)
            yield TimedOp(f"all_reduce_{n}", "network", sum(terms.values()), (last,), terms)
            waiting = 0.0
    if not exchanged:
        yield TimedOp("gradient_dist", "network", phase_seconds["gradient_dist"], (last,))
    yield TimedOp("lookup_backward", "compute", phase_seconds["lookup_backward"], ("gradient_dist",))
