"""Where MLPerf's DLRM submissions put their tables, and what the cost models say of it.

DLRM-DCNv2: the plan of NVIDIA's planner (``hugectr_expert_plans.json`` where it is published, else the same
heuristic run here). A bucket is a GPU in one host, and a host whose GPUs split the rows when there are
several. DLRM v1 (rounds up to v2.1): HugeCTR's hybrid embedding, which replicates the rows that are looked
up often and spreads the others evenly over all GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from benchmarks.mlperf_replay import Configuration, model, popularity, read, topology, workload
from cost_models.calibration import Calibration
from cost_models.collectives import all_reduce, all_to_all, network
from cost_models.embedding import PHASES, phase_overheads, unit_seconds
from cost_models.step import step_timeline
from ir.constraints import ShardingType
from ir.ops import EmbeddingTable
from ir.plan import Timeline
from ir.sharding import Block, ShardingOption, Unit
from ir.topology import Topology
from ir.workload import Workload

# by "one host": hugectr_expert_plans.json
DP_THRESHOLD = {True: 0.008e9, False: 0.0125e9}  # bytes at 8 a parameter under which a table is replicated
SHARD_COST = {True: 7 / 4, False: 67 / 4}  # cost of one more shard, in lookups per sample
BUCKET_BYTES = 60e9  # per GPU


@dataclass(frozen=True, slots=True)
class Placement:
    """Replicated tables, and for each bucket (GPU, or host when there are several) the tables sharded there."""

    replicated: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]

    def split(self, table: int) -> int:
        """Shards of a table."""
        return sum(bucket.count(table) for bucket in self.buckets)


_EXPERT = {
    ("H100", 1, 8): "h100_1x8",
    ("A100", 1, 8): "h100_1x8",
    ("H100-PCIe", 1, 8): "h100_1x8",
    ("H200", 1, 8): "h200_1x8",
    ("H100", 8, 8): "n8_hier",
    ("A100", 8, 8): "n8_hier",
    ("H100", 16, 8): "n16_hier",
}


@cache
def placement(config: Configuration) -> Placement:
    """The published expert plan, else HugeCTR's algorithm for the configuration."""
    name = _EXPERT.get((config.accelerator, config.nodes, config.per_node))
    if name is None:
        return lpt_placement(config)
    plans = read("measured/hugectr_expert_plans.json")["plans"]
    plan = plans.get(f"{name}_{config.expert}", plans[name]) if config.expert else plans[name]
    return Placement(tuple(plan["dp_tables"]), tuple(tuple(bucket) for bucket in plan["shard_matrix"]))


def lpt_placement(config: Configuration) -> Placement:
    """HugeCTR's heuristic: longest processing time first, then halve the costliest shard; the best is kept."""
    dcn, one = model(config.benchmark), config.nodes == 1
    load = workload(config.benchmark, config.batch)
    sizes = [8.0 * table.params for table in dcn.tables]
    hot = [load.stats(table.name).pooling_factor for table in dcn.tables]
    replicated = tuple(i for i, size in enumerate(sizes) if size < DP_THRESHOLD[one])
    count = config.per_node if one else config.nodes
    room = BUCKET_BYTES * (1 if one else config.per_node)
    split = {i: 1 for i in range(len(sizes)) if i not in replicated}
    best: tuple[float, list[list[int]]] = (float("inf"), [])
    for _ in range(20):
        shards = sorted((i for i in split for _ in range(split[i])), key=lambda i: (-hot[i] / split[i], i))
        buckets: list[list[int]] = [[] for _ in range(count)]
        cost, used = [0.0] * count, [0.0] * count
        for i in shards:
            free = [b for b in range(count) if i not in buckets[b] and used[b] + sizes[i] / split[i] <= room]
            if not free:
                cost[0] = float("inf")
                break
            b = min(free, key=lambda b: (cost[b], b))
            buckets[b].append(i)
            cost[b] += hot[i] / split[i] + SHARD_COST[one]
            used[b] += sizes[i] / split[i]
        if max(cost) < best[0]:
            best = (max(cost), buckets)
        able = [i for i in split if split[i] * 2 <= count]
        if not able:
            break
        # too large to place: halve the largest; else the most looked-up
        key = sizes if max(cost) == float("inf") else hot
        split[max(able, key=lambda i: (key[i] / split[i], -i))] *= 2
    if not best[1]:
        raise ValueError(f"the tables of {config.benchmark} do not fit {config.label}")
    return Placement(replicated, tuple(tuple(bucket) for bucket in best[1]))


def _priced(
    table: EmbeddingTable,
    kind: ShardingType,
    shards: int,
    topo: Topology,
    load: Workload,
    calibration: Calibration,
) -> dict[str, float]:
    option = ShardingOption(kind, (table.dim,))
    block = Block(0, 0, -(-table.rows // shards), table.dim)
    return unit_seconds(table, option, Unit(option.scope, (block,)), topo, load, calibration, "train")


def _hybrid(
    config: Configuration, topo: Topology, load: Workload, calibration: Calibration
) -> dict[str, float]:
    """Phases under HugeCTR's hybrid embedding: hot rows replicated, the rest spread evenly.

    A row is hot when replicating it moves fewer bytes: its gradient is all-reduced once, 2 (n-1)/n bytes
    through the ring, where otherwise each of its ids a batch, 1/n of them on this rank, travels twice.
    """
    net = network(topo, calibration)
    per_id = 2 * all_to_all(1.0, net) / topo.world_size
    often = all_reduce(1.0, net) / per_id
    total = phase_overheads(topo, load, calibration, "train")
    # index lists are made with the next batch, outside the step (use_train_precompute_indices)
    total["lookup_backward"] = calibration.kernel_seconds
    for table in model(config.benchmark).tables:
        probability, counts = popularity(table.rows)
        hot = load.global_batch * probability > often
        rows = max(1, int(counts[hot].sum()))
        served = float((probability * counts)[hot].sum())
        for kind, part, share, scale in (
            ("data_parallel", rows, served, 1.0),
            ("table_wise", max(1, table.rows - rows), 1.0 - served, 1.0 / topo.world_size),
        ):
            if share <= 1e-12:
                continue
            piece = replace(table, rows=part)
            stats = replace(load.stats(table.name), pooling_factor=share)
            here = replace(load, features={table.name: stats})
            price = _priced(piece, kind, 1, topo, here, calibration)
            exchanged = share if kind == "table_wise" else 1.0  # only the vectors that are needed travel
            for phase in PHASES:
                factor = exchanged if phase in ("output_dist", "gradient_dist") else 1.0
                total[phase] += price[phase] * scale * factor
    return total


def phase_seconds(config: Configuration, calibration: Calibration) -> dict[str, float]:
    """Seconds of each embedding phase on the slowest rank, overheads included."""
    topo, net = topology(config), model(config.benchmark)
    load = workload(config.benchmark, config.batch)
    copied, buckets = dict.fromkeys(PHASES, 0.0), []
    if config.benchmark == "dlrm_v1":
        return _hybrid(config, topo, load, calibration)
    plan = placement(config)
    replicated = plan.replicated
    for bucket in plan.buckets:
        total = dict.fromkeys(PHASES, 0.0)
        for i in bucket:
            kind, parts = ("table_wise", 1) if config.nodes == 1 else ("table_row_wise", config.per_node)
            price = _priced(net.tables[i], kind, plan.split(i) * parts, topo, load, calibration)
            total = {phase: total[phase] + price[phase] for phase in PHASES}
        buckets.append(total)
    for i in replicated:
        price = _priced(net.tables[i], "data_parallel", 1, topo, load, calibration)
        copied = {phase: copied[phase] + price[phase] for phase in PHASES}
    fixed = phase_overheads(topo, load, calibration, "train")
    return {phase: fixed[phase] + copied[phase] + max(b[phase] for b in buckets) for phase in PHASES}


def replay(config: Configuration, calibration: Calibration) -> Timeline:
    """The modelled step of a configuration."""
    topo, load = topology(config), workload(config.benchmark, config.batch)
    phases = phase_seconds(config, calibration)
    return step_timeline(model(config.benchmark), phases, topo, load, calibration, "train")
