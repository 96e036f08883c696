"""Best-fit decreasing packing of a choice of options under a target load.

Pieces go, largest first, to the fullest rank or host on which they stay under the target; what fits
nowhere goes to the emptiest place and counts as overflow. Searching for the smallest target without
overflow is MULTIFIT (Coffman, Garey, Johnson 1978, An application of bin-packing to multiprocessor
scheduling). Loads are the sum over phases.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import NamedTuple

from passes.assignment.compiled import HOST, Choice, Compiled, Group

# Order in which pieces are placed.
BY_LOAD, HOSTS_FIRST, RANKS_FIRST, BY_MEMORY = 0, 1, 2, 3
ORDERS = (BY_LOAD, HOSTS_FIRST, RANKS_FIRST)


Entry = tuple[float, int, int, Group, Choice]  # key, table, index in the option, what to place


class Packed(NamedTuple):
    """The outcome of one packing."""

    overflow: float  # seconds above the target, summed over ranks
    excess: float  # bytes above the capacity, summed over ranks
    largest: float  # seconds of the fullest rank
    pieces: int
    placement: list[list[int]] | None


class Packer:
    """Packs choices of one problem; reusable, without memory between calls."""

    def __init__(self, compiled: Compiled) -> None:
        problem = compiled.problem
        self.choices = compiled.choices
        self.ranks, self.hosts, self.size = problem.ranks, problem.hosts, problem.host_size
        self.capacity = problem.capacity
        self._entries: dict[tuple[int, int, int], list[Entry]] = {}
        scale = float(compiled.total_biggest[compiled.usable].max(initial=1e-300))
        self._scale = scale

    def pack(self, chosen: Sequence[int], target: float, order: int, keep: bool = False) -> Packed:
        """Pack one option a table; ``keep`` returns the placement too."""
        fixed = memory = 0.0
        entries: list[Entry] = []
        known = self._entries
        for t, j in enumerate(chosen):
            choice = self.choices[t][j]
            fixed += choice.fixed
            memory += choice.fixed_memory
            mine = known.get((t, j, order))
            if mine is None:
                mine = known[t, j, order] = self._items(t, j, order)
            entries += mine
        entries.sort()
        bins = _Bins(self, fixed, memory, target)
        places: list[list[int]] | None = None
        if keep:
            places = [[-1] * self.choices[t][j].size for t, j in enumerate(chosen)]
        pieces = 0
        done: set[int] = set()
        for _, t, _, group, choice in entries:
            if choice.plain:
                where = bins.to_hosts(group) if group.scope else bins.to_ranks(group)
                pieces += group.copies
                if places is not None:
                    places[t][group.first : group.first + group.copies] = where
            elif t not in done:
                done.add(t)
                for group_, where in bins.place_bound(choice):
                    pieces += group_.copies
                    if places is not None:
                        places[t][group_.first : group_.first + group_.copies] = where
        return Packed(bins.overflow, bins.excess, bins.order[-1][0], pieces, places)

    def _items(self, t: int, j: int, order: int) -> list[Entry]:
        choice = self.choices[t][j]
        return [(self._key(group, order), t, i, group, choice) for i, group in enumerate(choice.groups)]

    def _key(self, group: Group, order: int) -> float:
        if order == BY_LOAD:
            return -group.load
        if order == BY_MEMORY:
            return -max(group.load / self._scale, group.memory / self.capacity)
        first = (group.scope == HOST) == (order == HOSTS_FIRST)
        return -group.load - (1e6 * self._scale if first else 0.0)


class _Bins:
    """Loads and memory of ranks and hosts, both kept sorted by load."""

    def __init__(self, packer: Packer, fixed: float, memory: float, target: float) -> None:
        self.ranks, self.hosts, self.size = packer.ranks, packer.hosts, packer.size
        self.capacity = packer.capacity
        self.target = target
        self.slack = 1e-12 * max(target, 1e-300)
        self.load = [fixed] * self.ranks
        self.memory = [memory] * self.ranks
        self.order = [(fixed, rank) for rank in range(self.ranks)]
        self.host_load = [fixed] * self.hosts  # largest load of the host's ranks
        self.host_order = [(fixed, host) for host in range(self.hosts)]
        self.overflow = max(0.0, fixed - target) * self.ranks
        self.excess = max(0.0, memory - self.capacity) * self.ranks

    def to_ranks(self, group: Group) -> list[int]:
        """Place identical pieces that may go to any rank; the inner loop of the search."""
        _, load, need, copies, _, _, _ = group
        order, loads, memory, host_load = self.order, self.load, self.memory, self.host_load
        room, size = self.capacity - need, self.size
        probe = (self.target - load + self.slack, self.ranks)
        where = []
        for _ in range(copies):
            i = bisect_right(order, probe) - 1
            while i >= 0 and memory[order[i][1]] > room:
                i -= 1
            if i < 0:
                where.append(self._to_rank(self._least_bad_rank(room, None), group))
                continue
            before, rank = order.pop(i)
            after = before + load
            loads[rank] = after
            memory[rank] += need
            insort(order, (after, rank))
            if after > host_load[rank // size]:
                self._move_host(rank // size, after)
            where.append(rank)
        return where

    def to_hosts(self, group: Group) -> list[int]:
        """Place identical pieces that may go to any host."""
        return [self._to_host(self._best_host(group, None), group) for _ in range(group.copies)]

    def place_bound(self, choice: Choice) -> list[tuple[Group, list[int]]]:
        """Place an option whose pieces must be together, distinct or on given ranks."""
        within = choice.allowed
        if choice.together:
            within = self._best_home(choice)
        made = []
        used: set[int] = set()
        for group in choice.groups:
            where = []
            for _ in range(group.copies):
                if group.scope == HOST:
                    hosts = {h for h in range(self.hosts) if self._host_inside(h, choice.allowed)}
                    place = self._to_host(self._best_host(group, hosts - used or hosts), group)
                else:
                    ranks = set(within) if within is not None else set(range(self.ranks))
                    place = self._to_rank(self._best_rank(group, ranks - used or ranks), group)
                if choice.distinct:
                    used.add(place)
                where.append(place)
            made.append((group, where))
        return made

    def _host_inside(self, host: int, allowed: frozenset[int] | None) -> bool:
        return allowed is None or all(host * self.size + i in allowed for i in range(self.size))

    def _best_home(self, choice: Choice) -> frozenset[int]:
        """The ranks of the host that takes all pieces of an option with the least overflow."""
        best: tuple[float, float, float, int] | None = None
        home: list[int] = []
        pieces = [group for group in choice.groups for _ in range(group.copies)]
        for host in range(self.hosts):
            ranks = range(host * self.size, (host + 1) * self.size)
            free = [rank for rank in ranks if choice.allowed is None or rank in choice.allowed]
            if not free:
                continue
            score = self._try_home(pieces, free, choice.distinct)
            if best is None or (*score, -self.host_load[host], host) < best:
                best, home = (*score, -self.host_load[host], host), free
        return frozenset(home)

    def _try_home(self, pieces: list[Group], free: list[int], distinct: bool) -> tuple[float, float]:
        loads = {rank: self.load[rank] for rank in free}
        memory = {rank: self.memory[rank] for rank in free}
        over = excess = 0.0
        for group in pieces:
            pool = list(loads)
            fits = [
                r
                for r in pool
                if loads[r] + group.load <= self.target + self.slack
                and memory[r] + group.memory <= self.capacity
            ]
            rank = (
                max(fits, key=lambda r: loads[r]) if fits else min(pool, key=lambda r: (memory[r], loads[r]))
            )
            over += max(0.0, loads[rank] + group.load - max(self.target, loads[rank]))
            excess += max(0.0, memory[rank] + group.memory - max(self.capacity, memory[rank]))
            loads[rank] += group.load
            memory[rank] += group.memory
            if distinct and len(loads) > 1:
                del loads[rank]
        return excess, over

    def _best_rank(self, group: Group, within: set[int] | None) -> int:
        """Position in ``order`` of the fullest rank that takes the piece, else of the least bad one."""
        order, memory, need = self.order, self.memory, self.capacity - group.memory
        i = bisect_right(order, (self.target - group.load + self.slack, self.ranks)) - 1
        while i >= 0 and (memory[order[i][1]] > need or (within is not None and order[i][1] not in within)):
            i -= 1
        return i if i >= 0 else self._least_bad_rank(need, within)

    def _least_bad_rank(self, room: float, within: set[int] | None) -> int:
        """Position of the emptiest rank with the memory, else of the one with the most memory."""
        order, memory = self.order, self.memory
        pool = [k for k in range(self.ranks) if within is None or order[k][1] in within]
        for k in pool:
            if memory[order[k][1]] <= room:
                return k
        return min(pool, key=lambda k: (memory[order[k][1]], k))

    def _to_rank(self, position: int, group: Group) -> int:
        before, rank = self.order.pop(position)
        after = before + group.load
        self.load[rank] = after
        if after > self.target:
            self.overflow += after - max(self.target, before)
        self._use_memory(rank, group.memory)
        insort(self.order, (after, rank))
        host = rank // self.size
        if after > self.host_load[host]:
            self._move_host(host, after)
        return rank

    def _use_memory(self, rank: int, amount: float) -> None:
        before = self.memory[rank]
        self.memory[rank] = before + amount
        if before + amount > self.capacity:
            self.excess += before + amount - max(self.capacity, before)

    def _move_host(self, host: int, load: float) -> None:
        self.host_order.pop(bisect_left(self.host_order, (self.host_load[host], host)))
        self.host_load[host] = load
        insort(self.host_order, (load, host))

    def _host_memory(self, host: int) -> float:
        return max(self.memory[host * self.size : (host + 1) * self.size])

    def _best_host(self, group: Group, within: set[int] | None) -> int:
        order, need = self.host_order, self.capacity - group.memory
        i = bisect_right(order, (self.target - group.load + self.slack, self.hosts)) - 1
        while i >= 0 and (
            self._host_memory(order[i][1]) > need or (within is not None and order[i][1] not in within)
        ):
            i -= 1
        if i >= 0:
            return order[i][1]
        pool = [host for _, host in order if within is None or host in within]
        for host in pool:
            if self._host_memory(host) <= need:
                return host
        return min(pool, key=lambda host: (self._host_memory(host), self.host_load[host], host))

    def _to_host(self, host: int, group: Group) -> int:
        order, target = self.order, self.target
        for rank in range(host * self.size, (host + 1) * self.size):
            before = self.load[rank]
            after = before + group.load
            order.pop(bisect_left(order, (before, rank)))
            insort(order, (after, rank))
            self.load[rank] = after
            if after > target:
                self.overflow += after - max(target, before)
            self._use_memory(rank, group.memory)
        self._move_host(host, self.host_load[host] + group.load)
        return host
