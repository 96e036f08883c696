"""What removing hidden units saves: which layers allow it, and the records of the smaller model.

A hidden unit is a row of one linear layer and a column of each linear layer that reads it, with
element-wise functions between. Removing the fraction s of the units of a layer leaves (1 - s) of its
FLOP where one side of it shrinks and (1 - s)^2 where both do.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import networkx as nx

from cost_models.calibration import Calibration
from cost_models.collectives import network
from cost_models.compute import stream_seconds
from cost_models.embedding import state_bytes
from ir.dtypes import nbytes
from ir.growth import PrunedLayer
from ir.ops import Op
from ir.plan import EVERY_RANK, Shard, TablePlan
from ir.program import Model
from ir.topology import Topology
from ir.workload import Workload


def prunable_layers(model: Model, exclude: Sequence[str] = ()) -> tuple[PrunedLayer, ...]:
    """The hidden layers of ``model`` whose units only linear layers read, in graph order.

    A module that is called twice, or whose output reaches anything but element-wise functions of one
    input and linear layers, keeps its width; so do modules that a glob of ``exclude`` matches.
    """
    calls = Counter(op.module for op in model.ops if op.module)
    readers: dict[str, list[Op]] = {op.name: [] for op in model.ops}
    for op in model.ops:
        for name in op.inputs:
            readers[name].append(op)
    layers = []
    for op in model.ops:
        if not _linear(op, calls) or any(fnmatch.fnmatchcase(op.module, glob) for glob in exclude):
            continue
        consumers = _consumers(op, readers, calls)
        if consumers:
            assert op.gemm is not None
            layers.append(PrunedLayer(op.module, tuple(reader.module for reader in consumers), op.gemm[1]))
    return tuple(layers)


def _linear(op: Op, calls: Mapping[str, int]) -> bool:
    return op.kind == "gemm" and op.target == "Linear" and op.gemm is not None and calls[op.module] == 1


def _consumers(op: Op, readers: Mapping[str, list[Op]], calls: Mapping[str, int]) -> list[Op] | None:
    """The linear layers behind ``op``; None when something else reads its units."""
    found: list[Op] = []
    for reader in readers[op.name]:
        if _linear(reader, calls):
            found.append(reader)
            continue
        if reader.kind != "elementwise" or len(reader.inputs) != 1 or reader.out_shape != op.out_shape:
            return None
        behind = _consumers(reader, readers, calls)
        if behind is None:
            return None
        found += behind
    return found or None


def shrunk(model: Model, layers: Sequence[PrunedLayer], kept: Sequence[int]) -> Model:
    """``model`` with ``kept[i]`` units in ``layers[i]``: GEMMs, FLOP, parameters and activations."""
    rows = {layer.producer: count for layer, count in zip(layers, kept, strict=True)}
    columns = {c: count for layer, count in zip(layers, kept, strict=True) for c in layer.consumers}
    width: dict[str, float] = {}  # of each op's output, relative to the whole model's
    ops = []
    for op in model.ops:
        if op.gemm is not None and (op.module in rows or op.module in columns):
            ops.append(_resized(op, columns.get(op.module, op.gemm[0]), rows.get(op.module, op.gemm[1])))
            width[op.name] = rows.get(op.module, op.gemm[1]) / op.gemm[1]
            continue
        narrow = len(op.inputs) == 1 and op.kind == "elementwise"
        ratio = width[op.name] = width[op.inputs[0]] if narrow else 1.0
        if ratio < 1:
            shape = (*op.out_shape[:-1], round(op.out_shape[-1] * ratio))
            op = replace(op, out_shape=shape, activation_bytes=op.activation_bytes * ratio)
        ops.append(op)
    return replace(model, ops=tuple(ops))


def _resized(op: Op, k: int, n: int) -> Op:
    """A linear layer of another width."""
    assert op.gemm is not None
    was_k, was_n = op.gemm
    biases = n if op.params > was_k * was_n else 0
    return replace(
        op,
        gemm=(k, n),
        flops=op.flops * (k * n) / (was_k * was_n),
        params=k * n + biases if op.params else 0,
        activation_bytes=op.activation_bytes * n / was_n,
        out_shape=(*op.out_shape[:-1], n),
    )


def overlap(a: Shard, b: Shard) -> int:
    """Elements two blocks share."""
    rows = min(a.row + a.rows, b.row + b.rows) - max(a.row, b.row)
    cols = min(a.col + a.cols, b.col + b.cols) - max(a.col, b.col)
    return max(0, rows) * max(0, cols)


def move_bytes(
    before: Sequence[TablePlan], after: Sequence[TablePlan], topology: Topology, workload: Workload
) -> tuple[int, ...]:
    """Bytes of weights and optimizer state that each rank receives when tables are sharded anew.

    What a rank holds before and after stays where it is. Row-wise state goes with the rows of each block.
    """
    received = [0.0] * topology.world_size
    old = {table.name: table for table in before}
    for table in after:
        if table.shards == old[table.name].shards:
            continue
        for shard in table.shards:
            state = state_bytes(workload.optimizer, shard.cols) / shard.cols if shard.cols else 0.0
            element = nbytes(table.dtype) + state
            for rank in range(topology.world_size) if shard.rank == EVERY_RANK else (shard.rank,):
                held = sum(overlap(shard, had) for had in old[table.name].on_rank(rank))
                received[rank] += (shard.rows * shard.cols - held) * element
    return tuple(math.ceil(size) for size in received)


def move_seconds(moved: int, dense_params: float, topology: Topology, calibration: Calibration) -> float:
    """Seconds to start a phase: ``moved`` bytes into the busiest rank, and one rewriting of the dense part.

    Every byte is priced at the slower of the two link levels: where it comes from is not looked at. The
    dense part (weights and two moments, fp32) is read and written once.
    """
    net = network(topology, calibration)
    slower = net.intra if net.hosts == 1 else net.inter if net.host_size == 1 else min(net.intra, net.inter)
    size = 12 * dense_params
    resizing = stream_seconds(size, size, topology.device, calibration)
    return resizing + (moved / slower + net.latency if moved else 0.0)


def cheapest_path(
    steps: Sequence[Sequence[float | None]], moves: Mapping[tuple[int, int, int], float]
) -> tuple[int, ...]:
    """The candidate of each phase that makes the whole training shortest: a shortest path.

    Args:
        steps: seconds of phase i under candidate c, all its steps; None where it does not fit.
        moves: seconds before phase i from candidate a to b, keyed ``(i, a, b)``; 0 where not listed.

    Raises:
        networkx.NetworkXNoPath: a phase that no candidate fits.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(("start", "end"))
    for i, row in enumerate(steps):
        for b, seconds in enumerate(row):
            if seconds is None:
                continue
            if i == 0:
                graph.add_edge("start", (0, b), weight=seconds)
            else:
                for a, other in enumerate(steps[i - 1]):
                    if other is not None:
                        graph.add_edge((i - 1, a), (i, b), weight=seconds + moves.get((i, a, b), 0.0))
            if i == len(steps) - 1:
                graph.add_edge((i, b), "end", weight=0.0)
    path = nx.shortest_path(graph, "start", "end", weight="weight")
    return tuple(candidate for _, candidate in path[1:-1])
