"""TorchRec's greedy partitioner over priced options: the same ranks, a hundredth of the objects.

Source: torchrec.distributed.planner.partitioners 1.8, ``GreedyPerfPartitioner`` with its defaults. Times
are added field by field in its order, so that ties and roundings fall as they do there.
"""

from __future__ import annotations

import functools
import heapq
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks._torchrec_space import Priced, Unit

Heap = list[tuple[float, int, int]]  # time so far, local rank, rank


class _Full(Exception):
    """Something fits nowhere."""


class Placer:
    """Places proposals on the ranks of a topology after the storage reservation."""

    def __init__(self, reserved: Any) -> None:
        self.world, self.local = reserved.world_size, reserved.local_world_size
        self.group = reserved.intra_group_size
        devices = reserved.devices
        self.room = np.array([(d.storage.hbm, d.storage.ddr, d.storage.ssd) for d in devices])
        self.fields = np.array(
            [
                (
                    d.perf.fwd_compute,
                    d.perf.bwd_compute,
                    d.perf.fwd_comms,
                    d.perf.bwd_comms,
                    d.perf.prefetch_compute,
                )
                for d in devices
            ],
            dtype=np.float64,
        )
        self._columns: dict[int, tuple[Priced, Any, Any]] = {}

    @property
    def capacity(self) -> list[int]:
        """HBM of each rank, bytes."""
        return [int(hbm) for hbm in self.room[:, 0]]

    def place(self, proposal: Sequence[Priced]) -> list[list[int]] | None:
        """The rank of every shard of every option, or None when something does not fit."""
        try:
            state = _State(self, [o for o in proposal if o.option.partition_by == "uniform"])
            ranks: list[list[int]] = [list(range(self.world)) for _ in proposal]
            others = [i for i, o in enumerate(proposal) if o.option.partition_by != "uniform"]
            for i in sorted(others, key=lambda i: proposal[i].storage, reverse=True):
                ranks[i] = state.put(proposal[i])
        except _Full:
            return None
        return ranks

    def column(self, priced: Priced) -> tuple[Any, Any]:
        """Times and storage of an option with one shard a rank, as arrays (ranks, 5) and (ranks, 3)."""
        kept = self._columns.get(id(priced))
        if kept is None:
            fields = np.array([unit.fields for unit in priced.each()])
            storage = np.array([unit.storage for unit in priced.each()], dtype=np.int64)
            kept = self._columns[id(priced)] = (priced, fields, storage)
        return kept[1:]


class _State:
    """Times and room of every rank while one proposal is placed."""

    def __init__(self, placer: Placer, everywhere: Sequence[Priced]) -> None:
        self.local, self.group = placer.local, placer.group
        fields, room = placer.fields.copy(), placer.room.copy()
        for priced in everywhere:
            if len(priced.shards) != placer.world:
                raise _Full
            times, storage = placer.column(priced)
            fields += times
            room -= storage
        if (room < 0).any():
            raise _Full
        self.fields: list[list[float]] = fields.tolist()
        self.room: list[list[int]] = room.tolist()
        self.total = [_total(times) for times in self.fields]
        self.hosts = [range(h, h + self.group) for h in range(0, placer.world, self.group)]
        self.host_load: list[float | None] = [None] * len(self.hosts)
        self.heap: Heap | None = None

    def put(self, priced: Priced) -> list[int]:
        """Place one option; changes the state only if it fits."""
        by = priced.option.partition_by
        if by == "device":
            if self.heap is None:
                self.heap = self._heap(range(len(self.total)), self.local)
            return [self._on_best(self.heap, unit) for unit in priced.each()]
        self.heap = None
        return self._on_one_host(priced) if by == "host" else self._on_hosts(priced)

    def _heap(self, ranks: Sequence[int], local: int) -> Heap:
        heap = [(self.total[rank], rank % local, rank) for rank in ranks]
        heapq.heapify(heap)
        return heap

    def _on_best(self, heap: Heap, unit: Unit) -> int:
        """The shard to the least loaded rank with room for it."""
        passed = []
        while heap:
            _, local, rank = heap[0]
            if self._fits(rank, unit):
                self._add(rank, unit)
                heapq.heapreplace(heap, (self.total[rank], local, rank))
                break
            passed.append(heapq.heappop(heap))
        else:
            raise _Full
        for entry in passed:
            heapq.heappush(heap, entry)
        return rank

    def _on_one_host(self, priced: Priced) -> list[int]:
        for host in self._by_load():
            ranks = self.hosts[host]
            if any(
                need > functools.reduce(operator.add, (self.room[rank][kind] for rank in ranks), 0)
                for kind, need in enumerate(priced.storage)
            ):
                continue
            before = self._snapshot(ranks)
            try:
                if priced.option.sharding_type == "table_row_wise":
                    return self._one_each(ranks, priced)
                heap = self._heap(ranks, len(ranks))
                return [self._on_best(heap, unit) for unit in priced.each()]
            except _Full:
                self._restore(before)
        raise _Full

    def _on_hosts(self, priced: Priced) -> list[int]:
        """Column blocks on hosts that follow each other by load, rows over the ranks of each."""
        wanted, rest = divmod(len(priced.shards), self.group)
        if rest:
            raise _Full
        order = self._by_load()
        windows = (
            [[order[i % len(order)] for i in range(wanted)]]
            if wanted >= len(order)
            else [order[start : start + wanted] for start in range(len(order) - wanted + 1)]
        )
        for window in windows:
            ranks = [rank for host in window for rank in self.hosts[host]]
            before = self._snapshot(sorted(set(ranks)))
            try:
                return self._one_each(ranks, priced)
            except _Full:
                self._restore(before)
        raise _Full

    def _one_each(self, ranks: Sequence[int], priced: Priced) -> list[int]:
        if len(ranks) != len(priced.shards):
            raise _Full
        for rank, unit in zip(ranks, priced.each(), strict=True):
            if not self._fits(rank, unit):
                raise _Full
            self._add(rank, unit)
        return list(ranks)

    def _by_load(self) -> list[int]:
        loads = self.host_load
        for host, ranks in enumerate(self.hosts):
            if loads[host] is None:
                loads[host] = functools.reduce(operator.add, self.total[ranks.start : ranks.stop], 0.0)
        return sorted(range(len(loads)), key=loads.__getitem__)  # type: ignore[arg-type]

    def _fits(self, rank: int, unit: Unit) -> bool:
        room, need = self.room[rank], unit.storage
        return need[0] <= room[0] and need[1] <= room[1] and need[2] <= room[2]

    def _add(self, rank: int, unit: Unit) -> None:
        times = self.fields[rank] = [a + b for a, b in zip(self.fields[rank], unit.fields, strict=True)]
        self.total[rank] = _total(times)
        self.room[rank] = [a - b for a, b in zip(self.room[rank], unit.storage, strict=True)]
        self.host_load[rank // self.group] = None

    def _snapshot(self, ranks: Sequence[int]) -> list[tuple[int, list[float], list[int], float]]:
        return [(rank, self.fields[rank], self.room[rank], self.total[rank]) for rank in ranks]

    def _restore(self, saved: list[tuple[int, list[float], list[int], float]]) -> None:
        for rank, fields, room, total in saved:
            self.fields[rank], self.room[rank], self.total[rank] = fields, room, total
            self.host_load[rank // self.group] = None


def _total(times: Sequence[float]) -> float:
    """``Perf.total``, added in its order."""
    fwd, bwd, fwd_comms, bwd_comms, prefetch = times
    return fwd + bwd + fwd_comms + bwd_comms + prefetch
