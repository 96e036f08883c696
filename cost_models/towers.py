"""Seconds of the phases of a step in tower form: the exchange in two steps, and tower modules.

Symbols as in :mod:`cost_models.embedding`; T towers of G ranks on k hosts each, W ranks, x bytes of an
element on the wire, D columns of a vector, V_t and O_t columns of tower t before and after its module.

============== =============================================================================
in_tower       all-to-all among the G ranks of a tower; a rank sends its lookups' outputs,
               S = sum over its shards of B F w x, and lays what it receives side by side
tower_forward  the module on B / G samples
peer           all-to-all among T ranks of equal position, all of it between hosts: a rank sends
               (B / G) O_t x (T-1)/T and receives (B / W) x (sum of the other towers' O)
peer_gradient, in_tower_gradient, tower_backward   the same backwards
============== =============================================================================

The flat exchange sends S (W-g)/W between hosts; without modules the two-step exchange sends about as much
(V_t B/G is a tower's whole output divided over its ranks), so what it saves is latency, which these formulae
do not grow with the ranks, and what it costs is the exchange inside the tower. Modules divide what crosses
hosts by V_t / O_t, and shrink the over-arch. Source: Luo et al. 2024 (arXiv 2403.00877).

What a host adds to a step (:mod:`cost_models.shared`) it adds to a step in tower form too, which has one more
kind of exchange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration
from cost_models.collectives import Network, all_reduce, all_to_all, network
from cost_models.compute import BACKWARD_FACTOR, gemm_seconds, stream_seconds
from cost_models.placed import rank_seconds
from cost_models.shared import framework_seconds, phase_seconds, shared_seconds, staging_seconds
from ir.dtypes import nbytes
from ir.plan import TablePlan
from ir.program import Mode
from ir.topology import Topology
from ir.towers import ModuleKind, Tower
from ir.workload import Workload

_WUKONG_RANK = 24  # codegen.runtime.towers.modules.WukongTower
# codegen.runtime.towers.sptt: rows in the order of their members, blocks side by side
_COPIES = 2
_EXCHANGES = 2  # kinds of exchange of vectors, each with its own layout: in the tower, between peers

Gemm = tuple[float, float, float]  # rows a sample, contraction, columns


@dataclass(frozen=True, slots=True)
class ModuleWork:
    """Parameters and forward FLOP per sample of a tower module, and the products they are made of."""

    params: int
    flops: float
    gemms: tuple[Gemm, ...]


def module_work(kind: ModuleKind, vectors: int, dim: int, out: int, dim_out: int = 0) -> ModuleWork:
    """The work of :func:`codegen.runtime.towers.modules.tower_module`'s modules, by their formulae."""
    columns = dim_out or dim
    flat, wide = vectors * dim, out * columns
    mix: Gemm = (columns, vectors, out)
    gemms: tuple[Gemm, ...] = ()
    params = 0
    if kind in ("projection", "dhen"):
        gemms += ((1, flat, wide),)  # sums and projections of vectors are added to its weights
        params += flat * wide + wide
        params += dim * columns if columns < dim else 0
        params += vectors * out if out < vectors else 0
    if kind in ("cross", "dhen"):
        gemms += ((1, flat, dim), (1, dim, flat), (1, flat, wide))
        params += 2 * flat * dim + flat + flat * wide + wide
    if kind == "dhen":
        params += 2 * dim
    if kind == "wukong":
        rank, machine = min(vectors, _WUKONG_RANK), (out + 1) // 2
        gemms = ((dim, vectors, rank), (vectors, dim, rank), (1, vectors * rank, machine * dim), mix)
        params = vectors * rank * 3 + vectors * rank * machine * dim + machine * dim + vectors * out + 2 * dim
        if out > machine:
            gemms += ((dim, vectors, out - machine),)
            params += vectors * (out - machine)
    return ModuleWork(params, sum(2.0 * m * k * n for m, k, n in gemms), gemms)


def output_bytes(plans: Sequence[TablePlan], world: int, workload: Workload) -> npt.NDArray[np.float64]:
    """Bytes of pooled vectors (or partial sums) that each rank's lookups give in a step."""
    size = np.zeros(world)
    item = nbytes(workload.exchange_dtype)
    for plan in plans:
        for shard in plan.shards:
            if shard.rank >= 0 and shard.rows:
                size[shard.rank] += workload.global_batch * len(plan.features) * shard.cols * item
    return size


def tower_topology(topology: Topology, ranks: int) -> Topology:
    """The machine that one tower of ``ranks`` ranks sees: its own whole hosts, and the links between them."""
    hosts = max(1, ranks // topology.host_size)
    if len(topology.levels) == 1:
        return topology
    reach = 1
    for level in topology.levels[1:]:
        reach *= level.fanout
        if reach >= hosts:
            break
    return replace(topology, levels=(topology.levels[0], replace(level, fanout=hosts)))


@dataclass(frozen=True, slots=True)
class TowerSeconds:
    """Seconds of one step in tower form on the slowest rank, by phase; latency included."""

    phases: dict[str, float]
    cross_host_bytes: float  # sent to other hosts by the busiest rank, forward and backward
    peer_bytes: float  # of them between peers, each way


def tower_seconds(
    plans: Sequence[TablePlan],
    towers: Sequence[Tower],
    kind: ModuleKind,
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    mode: Mode,
    overheads: Mapping[str, float],
) -> TowerSeconds:
    """Phases of the exchange, the lookups and the modules.

    Args:
        plans: tables on the ranks of their towers.
        towers: with the widths that cross to the peers.
        kind: of the modules; "none" where ``width_out`` is ``width``.
        topology, workload, calibration, mode: as everywhere.
        overheads: :func:`cost_models.embedding.phase_overheads`.
    """
    placed = {
        phase: phase_seconds(phase, seconds, topology.host_size, calibration) + overheads[phase]
        for phase, seconds in rank_seconds(plans, topology, workload, calibration, mode).items()
    }
    net, item = network(topology, calibration), nbytes(workload.exchange_dtype)
    ranks, count = towers[0].ranks, len(towers)
    inside = network(tower_topology(topology, ranks), calibration)
    sent = output_bytes(plans, topology.world_size, workload)
    samples = workload.global_batch / ranks  # of a module; a rank's own are 1 / T of them
    widest = max(tower.width_out for tower in towers)
    total = sum(tower.width_out for tower in towers)
    narrowest = min(tower.width_out for tower in towers)
    out = samples * widest * item * (count - 1) / count
    received = samples / count * item * (total - narrowest)
    link = _in_tower_seconds(sent, inside, topology, calibration)
    peer = _peer_seconds(max(out, received), net, topology, calibration) if count > 1 else 0.0
    if topology.device.kind == "cpu" and count > 1:  # as the flat exchange: packed, and laid out by feature
        peer += staging_seconds(samples * widest * item, topology.device.tiers[0].read_bandwidth, calibration)
    forward = max(_module_seconds(tower, kind, samples, workload, topology, calibration) for tower in towers)
    train = mode == "train"
    phases = {
        "framework": framework_seconds(len(plans), _EXCHANGES if ranks > 1 else 1, calibration),
        "input_dist": placed["input_dist"],
        "lookup_forward": placed["lookup_forward"],
        "in_tower": link,
        "tower_forward": forward,
        "peer": peer,
        "peer_gradient": peer if train else 0.0,
        "tower_backward": BACKWARD_FACTOR * forward if train else 0.0,
        "in_tower_gradient": link if train else 0.0,
        "lookup_backward": placed["lookup_backward"],
    }
    params = max(tower.params for tower in towers)
    if train and params and ranks > 1:
        phases["tower_reduce"] = all_reduce(params * nbytes(workload.compute_dtype), inside) + inside.latency
    spread = (inside.hosts - 1) / inside.hosts * float(sent.max())
    return TowerSeconds(phases, (out + spread) * (2 if train else 1), out if topology.hosts > 1 else 0.0)


def _peer_seconds(size: float, net: Network, topology: Topology, calibration: Calibration) -> float:
    """An exchange of ``size`` bytes between towers; over gloo its receives are posted first (codegen.runtime.posted)."""
    if not calibration.posted_efficiency:
        return size / net.inter + net.latency
    return size / (calibration.posted_efficiency * topology.inter_link.bandwidth) + calibration.posted_seconds


def _in_tower_seconds(
    sent: npt.NDArray[np.float64], inside: Network, topology: Topology, calibration: Calibration
) -> float:
    """The exchange inside a tower; a tower of one rank has none, and nothing to lay side by side."""
    if inside.ranks == 1:
        return 0.0
    seconds = np.array([all_to_all(float(size), inside) for size in sent])
    # ranks share a host's card, not the fabric inside it
    sharing = calibration.card_sharing if inside.hosts > 1 else 1.0
    moved = _COPIES * float(sent.max())
    copies = stream_seconds(moved, moved, topology.device, calibration)
    return shared_seconds(seconds, topology.host_size, sharing) + inside.latency + copies


def _module_seconds(
    tower: Tower,
    kind: ModuleKind,
    samples: float,
    workload: Workload,
    topology: Topology,
    calibration: Calibration,
) -> float:
    if kind == "none":
        return 0.0
    work = module_work(kind, len(tower.features), tower.dim, tower.vectors_out, tower.columns_out)
    return sum(
        gemm_seconds(samples * rows, k, n, workload.compute_dtype, topology.device, calibration)
        for rows, k, n in work.gemms
    )


def flat_cross_bytes(plans: Sequence[TablePlan], topology: Topology, workload: Workload, mode: Mode) -> float:
    """Embedding bytes that the busiest rank of a flat plan sends to other hosts in a step."""
    world, local, hosts = topology.world_size, topology.host_size, topology.hosts
    whole = [p for p in plans if p.sharding_type not in ("table_row_wise", "grid_shard")]
    by_host = [p for p in plans if p.sharding_type in ("table_row_wise", "grid_shard")]
    # sums over the rows of a host are scattered in it before they leave it
    sent = output_bytes(whole, world, workload) * (world - local) / world
    sent += output_bytes(by_host, world, workload) / local * (hosts - 1) / hosts
    return float(sent.max()) * (2 if mode == "train" else 1)
