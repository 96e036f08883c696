"""Seconds of embedding work that one unit of a sharding option puts on each rank holding it.

Symbols: B global batch, W ranks, g ranks a host, k hosts; L ids per sample of the table (all its
features), F its features (pooled outputs a sample; L for sequences), p the part of the rows a rank
holds, w the unit's columns, e bytes of a weight, x bytes of an element on the wire, I = B L p ids
(data-parallel: I = B L / W, and B / W samples).

================= ==========================================================================
lookup_forward    ids + rows gathered + outputs written:
                  ( I id + (U + (I - U) / h) ceil(w e / G) G + B F w x ) / (r M)
lookup_backward   ids sorted + gradient rows gathered + distinct rows and state read and written:
                  ( I (id + 4) 2 P + (O + (I - O) / h) w x + 2 U (w e + s) ) / (r M)
                  (w e: bytes of the row as its number format stores it, scales and padding included)
                  with P = ceil(log2(rows) / 8) radix passes, s bytes of state a row, O = min(B F, I)
input_dist        all_to_all of I id + 4 B F bytes (lengths), received
output_dist       rank scope: all_to_all of S = B F w x
                  host scope: reduce-scatter of S in the host, all-to-all of S / g between hosts
                  all scope: reduce-scatter of S over all ranks
gradient_dist     the same exchange backwards; data-parallel: all-reduce of rows w c,
                  c bytes of the compute type, as the dense gradients
================= ==========================================================================

U = min(u I, rows p) distinct rows, u the workload's ``unique_fraction`` (1 when unknown); M the peak
bandwidth of the device's first memory tier, G its granule, r ``row_efficiency``; a row read again comes
from cache, h = ``cache_speedup`` times faster. The exchange of a table-wise unit is charged to the rank
that sends it (outputs) or receives it (ids); the other side of each exchange is spread evenly and never
larger than the largest sender. Data-parallel tables update every row each step, as dense optimizers do.
Sources: the data flows of TorchRec's sharding types; RecShard (ASPLOS 22) and TorchRec's estimator for
bytes over bandwidth; radix sort with 8-bit digits as in CUB; collectives in
:mod:`cost_models.collectives`.

Costs add up per rank. What a phase costs however little it moves is in :func:`phase_overheads`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.collectives import (
    Network,
    all_gather,
    all_reduce,
    all_to_all,
    cross_host_all_to_all,
    host_all_gather,
    host_reduce_scatter,
    network,
    reduce_scatter,
)
from cost_models.formats import bits_per_element, storage_bytes
from ir.dtypes import nbytes
from ir.ops import EmbeddingTable
from ir.program import Mode
from ir.sharding import ShardingOption, Unit
from ir.topology import Topology
from ir.workload import Workload

PHASES: tuple[str, ...] = ("input_dist", "lookup_forward", "output_dist", "gradient_dist", "lookup_backward")
"""The phases of embedding work in a step; each ends in a wait for the slowest rank."""

LENGTH_BYTES = 4  # int32 lengths of a KeyedJaggedTensor
SORT_VALUE_BYTES = 4  # position carried through the sort beside the id
RADIX_BITS = 8  # digit of one radix pass (CUB's onesweep)
FORWARD_KERNELS = 2  # gather, layout of the outputs: FBGEMM's table-batched embedding
BACKWARD_KERNELS = 12  # 4 sort passes of 2, run lengths, segment lists, updates by warp and by block: FBGEMM

_ELEMENT_TYPES = ("fp64", "fp32", "tf32", "bf16", "fp16")  # stored without scales

_STATE_PER_ROW = {"sgd": 0.0, "rowwise_adagrad": 4.0, "adagrad": 0.0, "adam": 0.0}  # bytes, fp32
_STATE_PER_ELEMENT = {"sgd": 0.0, "rowwise_adagrad": 0.0, "adagrad": 4.0, "adam": 8.0}  # bytes, fp32


def state_bytes(optimizer: str, width: int, stored: str = "fp32") -> float:
    """Bytes of optimizer state of one row block of ``width`` columns.

    sgd 0; rowwise_adagrad 4 a row; adagrad 4 and adam 8 an element (fp32 state), less where the state is
    ``stored`` in a narrower format.
    """
    whole = _STATE_PER_ROW[optimizer] + _STATE_PER_ELEMENT[optimizer] * width
    return whole if stored == "fp32" else whole * bits_per_element(stored) / 32


def stored_bytes(dtype: str, width: int) -> float:
    """Bytes of one stored row of ``width`` columns: of an element type or of a number format."""
    if dtype in _ELEMENT_TYPES:
        return width * nbytes(dtype)
    return float(storage_bytes(dtype, (1, width)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a unit's holder looks up in one step.

    Attributes:
        ids: ids looked up on one rank, mean.
        outputs: output rows (pooled or not) written on one rank.
        lengths: lengths received by one rank.
        distinct: distinct rows among the ids.
        weight_bytes: bytes of per-sample weights that travel with the ids.
    """

    ids: float
    outputs: float
    lengths: float
    distinct: float
    weight_bytes: float


def traffic(
    table: EmbeddingTable, option: ShardingOption, unit: Unit, topology: Topology, workload: Workload
) -> Traffic:
    """Ids, outputs and distinct rows of one step on the rank that holds the unit's largest block."""
    rows = unit.blocks[0].rows  # the first block of a row split is the largest
    share = rows / table.rows
    samples = workload.global_batch
    if option.sharding_type == "data_parallel":
        samples = workload.global_batch / topology.world_size  # type: ignore[assignment]
    ids = outputs = lengths = distinct = weights = 0.0
    for feature in table.features:
        stats, repeats = workload.stats(feature), workload.dedup.get(feature, 1.0)
        carried = samples / repeats  # deduplication drops repeated samples, not distinct rows
        here = carried * stats.pooling_factor * share
        ids += here
        outputs += here if table.pooling == "none" else carried
        lengths += carried
        distinct += here * min(1.0, stats.unique_fraction * repeats)
        weights += 4.0 * here if stats.weighted or table.weighted else 0.0
    return Traffic(ids, outputs, lengths, min(distinct, rows), weights)


def _row_bytes(width: int, dtype: str, granule: int) -> float:
    return math.ceil(stored_bytes(dtype, width) / granule) * granule


def _forward_seconds(
    moved: Traffic, width: int, dtype: str, topology: Topology, workload: Workload, calibration: Calibration
) -> float:
    tier = topology.device.tiers[0]
    gathered = moved.distinct + (moved.ids - moved.distinct) / calibration.cache_speedup
    read = moved.ids * workload.id_bytes + moved.weight_bytes
    read += gathered * _row_bytes(width, dtype, tier.granule)
    written = moved.outputs * width * nbytes(workload.exchange_dtype)
    seconds = read / tier.read_bandwidth + written / tier.write_bandwidth
    return seconds / calibration.row_efficiency


def _backward_seconds(
    moved: Traffic,
    width: int,
    rows: int,
    dtype: str,
    state: str,
    copied: bool,
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
) -> float:
    tier = topology.device.tiers[0]
    row = _row_bytes(width, dtype, tier.granule)
    passes = math.ceil(math.log2(max(rows, 2)) / RADIX_BITS)
    sort = moved.ids * (workload.id_bytes + SORT_VALUE_BYTES) * passes
    first = min(moved.outputs, moved.ids)
    gradient = (
        (first + (moved.ids - first) / calibration.cache_speedup) * width * nbytes(workload.exchange_dtype)
    )
    # a dense gradient is zeroed, accumulated and read, and then every row is updated
    updated = rows if copied else moved.distinct
    touched = updated * (row + state_bytes(workload.optimizer, width, state) + (row if copied else 0))
    seconds = (sort + gradient + touched) / tier.read_bandwidth + (sort + touched) / tier.write_bandwidth
    return seconds / calibration.row_efficiency


def _exchange_seconds(option: ShardingOption, size: float, net: Network) -> float:
    """Seconds a holder needs to hand on ``size`` bytes of outputs."""
    if option.scope == "rank":
        return all_to_all(size, net)
    if option.scope == "host":
        return host_reduce_scatter(size, net) + cross_host_all_to_all(size / net.host_size, net)
    return reduce_scatter(size, net)


def _return_seconds(option: ShardingOption, size: float, net: Network) -> float:
    """Seconds a holder needs to be handed the gradients of ``size`` bytes of outputs: the same way back."""
    if option.scope == "rank":
        return all_to_all(size, net)
    if option.scope == "host":
        return host_all_gather(size, net) + cross_host_all_to_all(size / net.host_size, net)
    return all_gather(size, net)


def unit_seconds(
    table: EmbeddingTable,
    option: ShardingOption,
    unit: Unit,
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    mode: Mode,
    state: str = "fp32",
) -> dict[str, float]:
    """Seconds by phase that ``unit`` adds to each rank holding it, its largest block counted.

    The backward phases are 0 in inference. Additive over the units of a rank. ``table.dtype`` is the element
    type or the number format of the stored rows, ``state`` the format of the optimizer state.
    """
    moved = traffic(table, option, unit, topology, workload)
    net = network(topology, calibration)
    width, rows = unit.blocks[0].cols, unit.blocks[0].rows
    copied = option.sharding_type == "data_parallel"
    seconds = dict.fromkeys(PHASES, 0.0)
    seconds["lookup_forward"] = _forward_seconds(moved, width, table.dtype, topology, workload, calibration)
    size = moved.outputs * width * nbytes(workload.exchange_dtype)
    if not copied:
        index = moved.ids * workload.id_bytes + moved.lengths * LENGTH_BYTES + moved.weight_bytes
        seconds["input_dist"] = all_to_all(index, net)
        seconds["output_dist"] = _exchange_seconds(option, size, net)
    if mode == "train":
        seconds["lookup_backward"] = _backward_seconds(
            moved, width, rows, table.dtype, state, copied, topology, workload, calibration
        )
        seconds["gradient_dist"] = (
            all_reduce(rows * width * nbytes(workload.compute_dtype), net)
            if copied
            else _return_seconds(option, size, net)
        )
    return seconds


def phase_overheads(
    topology: Topology, workload: Workload, calibration: Calibration, mode: Mode
) -> dict[str, float]:
    """Seconds by phase that no assignment changes: collective latency and kernel launches.

    Ids travel in two collectives (lengths, then ids). A lookup is a gather and a change of layout; its
    backward pass is a radix sort of two kernels a pass, then run lengths, segment lists and updates.
    """
    net = network(topology, calibration)
    kernel = calibration.kernel_seconds
    train = mode == "train"
    return {
        "input_dist": 2 * net.latency,
        "lookup_forward": FORWARD_KERNELS * kernel,
        "output_dist": net.latency,
        "gradient_dist": net.latency if train else 0.0,
        "lookup_backward": BACKWARD_KERNELS * kernel if train else 0.0,
    }
