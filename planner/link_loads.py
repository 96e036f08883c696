"""Bytes that every link of the machine carries in a step of a plan, from the plan's decisions.

Level l joins domains of D(l-1) ranks, D(-1) = 1, to domains of D(l). A communicator of n ranks has m(l) of them in
the domain D(l) of each of its ranks. What leaves a domain of D(l-1) ranks passes that level's link, from the second level
on also when it goes further up; the first level, the fabric of a host, carries what stays in the host.

============  =====================================  ==========================================
a rank sends  through the first level                through level l
============  =====================================  ==========================================
all-to-all    S (m(0) - 1) / n                       S (n - m(l-1)) / n
ring          P (1 - 1/m(0)), or P inside one host   P / m(l-1) where it leaves the domain
============  =====================================  ==========================================

S is the buffer, an equal part for each rank; P what a rank passes on, (n-1)/n S for each gather or reduce-scatter:
rings of as many channels as a domain has members leave it in one of them. Bytes are those of one direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cost_models.calibration import default_calibration
from cost_models.embedding import LENGTH_BYTES, traffic
from cost_models.placed import option_of, placed_units, table_of
from ir.compression import Direction
from ir.dtypes import nbytes
from ir.plan import Plan
from ir.topology import Topology
from ir.towers import sent_name

Bytes = npt.NDArray[np.float64]
Dimensions = tuple[tuple[int, int], ...]
"""(size, stride) of each mesh dimension of a communicator, innermost first."""


@dataclass(frozen=True, slots=True)
class LinkLoad:
    """One level of the machine.

    Attributes:
        level, link: names.
        bandwidth: bytes/s that collectives reach through the link of one device, one direction.
        sent: bytes a step, an entry a rank.
        parts: bytes of the busiest rank by what it sends them for, the largest first.
    """

    level: str
    link: str
    bandwidth: float
    sent: Bytes
    parts: dict[str, float]


def members(dimensions: Dimensions, domain: int) -> int:
    """Ranks of a communicator in one aligned domain of ``domain`` ranks."""
    count = 1
    for size, stride in dimensions:
        count *= max(1, min(size, domain // stride))
    return count


class LinkCounter:
    """Adds up what communicators send, by level, purpose and rank."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._sent: list[dict[str, Bytes]] = [{} for _ in topology.levels]

    def all_to_all(self, name: str, over: Dimensions, size: float | Bytes) -> None:
        """``size`` bytes of each rank (one figure, or one a rank), an equal part for each of the communicator."""
        ranks, inner, first = members(over, self._topology.world_size), 1, True
        for index, level in enumerate(self._topology.levels):
            domain = inner * level.fanout
            crossing = members(over, domain) - 1 if first else ranks - members(over, inner)
            self._add(index, name, size, crossing / ranks)
            inner, first = domain, False

    def ring(self, name: str, over: Dimensions, passed: float | Bytes) -> None:
        """``passed`` bytes from each rank to its neighbours in rings over the communicator."""
        ranks, inner = members(over, self._topology.world_size), 1
        for index, level in enumerate(self._topology.levels):
            inside = members(over, inner)
            inner *= level.fanout
            if ranks == inside:
                return
            here = members(over, inner)
            leaves = 1 / inside
            if index == 0:
                leaves = 1.0 if here == ranks else 1 - 1 / here
            self._add(index, name, passed, leaves)

    def gather(self, name: str, over: Dimensions, size: float | Bytes, times: float = 1.0) -> None:
        """``times`` all-gathers or reduce-scatters of ``size`` bytes in all; an all-reduce is two."""
        ranks = members(over, self._topology.world_size)
        self.ring(name, over, np.asarray(size, dtype=float) * (times * (ranks - 1) / ranks))

    def _add(self, level: int, name: str, size: float | Bytes, share: float) -> None:
        if share > 0:
            kept = self._sent[level].setdefault(name, np.zeros(self._topology.world_size))
            kept += np.asarray(size, dtype=float) * share

    def loads(self) -> tuple[LinkLoad, ...]:
        """One record a level, the host first."""
        calibration = default_calibration(self._topology)
        made = []
        for level, parts in zip(self._topology.levels, self._sent, strict=True):
            total = sum(parts.values(), np.zeros(self._topology.world_size))
            busiest = int(np.argmax(total))
            named = {name: float(sent[busiest]) for name, sent in parts.items() if sent[busiest] > 0}
            ordered = dict(sorted(named.items(), key=lambda item: -item[1]))
            bandwidth = calibration.link_bandwidth(level.link)
            made.append(LinkLoad(level.name, level.link.name, bandwidth, total, ordered))
        return tuple(made)


def link_loads(plan: Plan) -> tuple[LinkLoad, ...]:
    """What each level carries in a step (of a serving plan: in a prompt); empty where tables have replicas in groups."""
    counter = LinkCounter(plan.topology)
    if plan.decisions.parallelism is not None:
        if plan.decisions.parallelism.layout.world != plan.world_size:
            return ()  # not a sound plan; verify says so
        from planner.link_loads_llm import count_training

        count_training(plan, counter)
    elif plan.decisions.serving is not None:
        from planner.link_loads_llm import count_prompt

        count_prompt(plan, counter)
    else:
        dense = plan.decisions.dense
        if dense is not None and dense.sparse is not None and dense.sparse.groups > 1:
            return ()
        _count_tables(plan, counter)
        _count_dense(plan, counter)
    return counter.loads()


def _count_tables(plan: Plan, counter: LinkCounter) -> None:
    """Ids to the tables, vectors back, and their gradients; replicas' gradients."""
    world, g, hosts = plan.world_size, plan.topology.host_size, plan.topology.hosts
    everyone: Dimensions = ((world, 1),)
    towers = plan.decisions.towers
    split = towers is not None and towers.applied
    for name, scope, sent in _volumes(plan):
        if name == "replicas":
            counter.gather("gradients of copied tables", everyone, sent, 2)
        elif name == "ids":
            counter.all_to_all("ids", everyone, sent)
        elif split and towers is not None:
            counter.all_to_all(f"{name} in the tower", ((towers.towers[0].ranks, 1),), sent)
        elif scope == "rank":
            counter.all_to_all(name, everyone, sent)
        elif scope == "host":
            counter.gather(name, ((g, 1),), sent)
            counter.all_to_all(name, ((hosts, g),), sent / g)
        else:
            counter.gather(name, everyone, sent)
    if split:
        _count_peers(plan, counter)


def _volumes(plan: Plan) -> Iterator[tuple[str, str, Bytes]]:
    """(purpose, scope of the sharding, bytes a rank) of every exchange of the tables."""
    train, work = plan.mode == "train", plan.workload
    # codecs of a plan in tower form serve the exchange between peers only
    inside = plan.decisions.towers is not None and plan.decisions.towers.applied
    total: dict[tuple[str, str], Bytes] = {}

    def add(name: str, scope: str, ranks: Sequence[int], size: float) -> None:
        load = total.setdefault((name, scope), np.zeros(plan.world_size))
        np.add.at(load, list(ranks), size)

    for table in plan.table_plans:
        record, option = table_of(table), option_of(table)
        for unit, ranks in placed_units(table, plan.topology):
            block = unit.blocks[0]
            if table.sharding_type == "data_parallel":
                if train:
                    add("replicas", "all", ranks, block.rows * block.cols * nbytes(work.compute_dtype))
                continue
            load = traffic(record, option, unit, plan.topology, work)
            ids = load.ids * work.id_bytes + load.lengths * LENGTH_BYTES + load.weight_bytes
            add("ids", "rank", ranks, ids)
            vectors = load.outputs * block.cols * nbytes(work.exchange_dtype)
            add(
                "vectors",
                option.scope,
                ranks,
                vectors / (1.0 if inside else _ratio(plan, table.name, "forward")),
            )
            if train:
                add(
                    "gradients",
                    option.scope,
                    ranks,
                    vectors / (1.0 if inside else _ratio(plan, table.name, "backward")),
                )
    for (name, scope), sent in total.items():
        yield name, scope, sent


def _ratio(plan: Plan, table: str, direction: Direction) -> float:
    """Uncompressed bytes of a table's messages (or of what a tower's module sends) over the bytes on the link."""
    section = plan.decisions.compression
    if section is None or not section.uses(direction):
        return 1.0
    found = section.of(table, direction)
    return found.ratio if found is not None else 1.0


def _count_peers(plan: Plan, counter: LinkCounter) -> None:
    """Between ranks of equal position: a rank hands its part of the batch of its tower to every other tower."""
    section = plan.decisions.towers
    assert section is not None
    towers, item = section.towers, nbytes(plan.workload.exchange_dtype)
    over: Dimensions = ((len(towers), towers[0].ranks),)
    ways: tuple[Direction, ...] = ("forward", "backward") if plan.mode == "train" else ("forward",)
    for direction, name in zip(ways, ("vectors to peers", "gradients to peers"), strict=False):
        sent = np.zeros(plan.world_size)
        for number, tower in enumerate(towers):
            if section.module != "none":
                columns = tower.width_out / _ratio(plan, sent_name(number), direction)
            else:
                mine = [plan.tables[table] for table in tower.tables if table in plan.tables]
                columns = sum(t.dim * len(t.features) / _ratio(plan, t.name, direction) for t in mine)
            size = plan.workload.global_batch / tower.ranks * columns * item
            sent[tower.first_rank : tower.first_rank + tower.ranks] = size
        counter.all_to_all(name, over, sent)


def _count_dense(plan: Plan, counter: LinkCounter) -> None:
    """Gradients of the dense part, and its weights where they are split."""
    if plan.mode != "train" or not plan.model.dense_params:
        return
    world, section = plan.world_size, plan.decisions.dense
    size = float(plan.model.dense_params * nbytes(plan.workload.compute_dtype))
    everyone: Dimensions = ((world, 1),)
    if section is None or section.strategy == "ddp":
        counter.gather("dense gradients", everyone, size, 2)
        return
    if section.strategy == "tp":
        host: Dimensions = ((section.tensor, 1),)
        cut = sum(pair.params for pair in section.pairs) * nbytes(plan.workload.compute_dtype)
        outer = ((world // section.tensor, section.tensor),)
        across = 2 * (size - cut) * (world - 1) / world + 2 * cut / section.tensor * (1 - 1 / outer[0][0])
        counter.gather("dense gradients", everyone, size - cut, 2)
        counter.gather("dense gradients", outer, cut / section.tensor, 2)
    else:
        host, outer = ((section.shard, 1),), ((section.replicas, section.shard),)
        across = 2 * size / section.shard * (1 - 1 / section.replicas)
        counter.gather("dense gradients", outer, size / section.shard, 2)
    name = "activations of split layers" if section.strategy == "tp" else "dense weights and gradients"
    counter.ring(name, host, max(0.0, section.wire_bytes - across))
