"""Tabu search on the load above given targets: moves and swaps of pieces between ranks and between hosts.

Options stay as they are. A step takes a rank above a target and applies the best of all moves and swaps of
its pieces, and of the pieces on its host; what moved stays for a while (Glover 1989, Tabu search). Targets at
which nothing overflows are met by a placement.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from passes.assignment.budget import Budget
from passes.assignment.compiled import HOST, Compiled
from passes.assignment.problem import Floats

STEP_WORK = 3e-4  # seconds a step, measured on one core of the development machine
PAIR_WORK = 5e-8  # seconds a pair of pieces and phase, measured likewise
TENURE = 10  # steps that a piece stays at least
HOST_TENURE = 40  # and one of a host
PARTNERS = 3000  # pieces looked at for a swap, drawn when there are more

Ints = NDArray[np.int64]
Move = tuple[float, int, int, int]  # change, piece, partner or -1, new place


class _Kind:
    """The movable pieces of one scope; ``width`` ranks a place."""

    def __init__(
        self, pieces: list[tuple[tuple[float, ...], float, int, int, int]], width: int, phases: int
    ) -> None:
        self.width = width
        self.load: Floats = np.array([p[0] for p in pieces], dtype=np.float64).reshape(-1, phases)
        self.memory: Floats = np.array([p[1] for p in pieces], dtype=np.float64)
        self.at: Ints = np.array([p[2] for p in pieces], dtype=np.int64)
        self.where = [(p[3], p[4]) for p in pieces]  # (table, index in its placement)
        self.until: Ints = np.zeros(len(pieces), dtype=np.int64)


class Overflow:
    """One placement and its movable pieces; pieces of options with rules of their own stay."""

    def __init__(self, compiled: Compiled, choices: list[int], places: list[list[int]], seed: int) -> None:
        problem = compiled.problem
        self.hosts, self.size, self.capacity = problem.hosts, problem.host_size, problem.capacity
        self.loads = np.zeros((problem.ranks, len(problem.phases)))
        self.memory = np.zeros(problem.ranks)
        self.random = random.Random(seed)
        rank: list[tuple[tuple[float, ...], float, int, int, int]] = []
        host: list[tuple[tuple[float, ...], float, int, int, int]] = []
        for t, j in enumerate(choices):
            choice = compiled.choices[t][j]
            self.memory += choice.fixed_memory
            for group in choice.groups:
                for i in range(group.first, group.first + group.copies):
                    self._add(np.asarray(group.phases), group.memory, places[t][i], group.scope, 1.0)
                    if choice.plain:
                        kind = host if group.scope == HOST else rank
                        kind.append((group.phases, group.memory, places[t][i], t, i))
        phases = len(problem.phases)
        self.rank, self.host = _Kind(rank, 1, phases), _Kind(host, self.size, phases)
        self.fixed: Floats = np.sum(
            [compiled.everywhere[compiled.start[t] + j] for t, j in enumerate(choices)], axis=0
        )

    def _add(self, load: Floats, memory: float, place: int, scope: int, sign: float) -> None:
        width = self.size if scope == HOST else 1
        self.loads[place * width : (place + 1) * width] += sign * load
        self.memory[place * width : (place + 1) * width] += sign * memory

    @property
    def value(self) -> float:
        """The objective, seconds."""
        return float((self.loads.max(axis=0) + self.fixed).sum())

    def place(self, places: list[list[int]]) -> list[list[int]]:
        """``places`` with the pieces where they are now."""
        made = [list(row) for row in places]
        for kind in (self.rank, self.host):
            for (t, i), at in zip(kind.where, kind.at, strict=True):
                made[t][i] = int(at)
        return made

    def run(self, targets: Floats, steps: int, budget: Budget) -> float:
        """Search; stay at the best objective seen, and return it."""
        best, kept = self.value, (self.rank.at.copy(), self.host.at.copy())
        self.rank.until[:] = self.host.until[:] = 0
        over = self._over(self.loads, targets)
        for step in range(1, steps + 1):
            bad = np.flatnonzero(over > 0)
            if not len(bad) or budget.spent():
                break
            rank = int(bad[self.random.randrange(len(bad))])
            budget.spend(STEP_WORK)
            changed = self._step(rank, step, targets, over, budget)
            over[changed] = self._over(self.loads[changed], targets)
            if self.value < best * (1 - 1e-12):
                best, kept = self.value, (self.rank.at.copy(), self.host.at.copy())
        self._return(kept)
        return best

    @staticmethod
    def _over(loads: Floats, targets: Floats) -> Floats:
        made: Floats = np.maximum(loads - targets, 0.0).sum(axis=-1)
        return made

    def _step(self, rank: int, step: int, targets: Floats, over: Floats, budget: Budget) -> list[int]:
        """Apply the best move or swap that takes a piece off a rank or its host; the ranks that changed."""
        found: list[tuple[Move, _Kind, int]] = []
        for kind, place in ((self.rank, rank), (self.host, rank // self.size)):
            mine = np.flatnonzero((kind.at == place) & (kind.until < step))
            if not len(mine):
                continue
            shape = (-1, kind.width, self.loads.shape[1])
            loads, memory = self.loads.reshape(shape), self.memory.reshape(-1, kind.width).max(axis=1)
            base = over.reshape(-1, kind.width).sum(axis=1)
            found.append((self._move(kind, place, mine, loads, memory, base, targets), kind, place))
            partners = np.flatnonzero((kind.at != place) & (kind.until < step))
            if len(partners) > PARTNERS:
                partners = np.sort(np.array(self.random.sample(partners.tolist(), PARTNERS)))
            if len(partners):
                budget.spend(PAIR_WORK * len(mine) * len(partners) * loads[0].size)
                swap = self._swap(kind, place, mine, partners, loads, memory, base, targets)
                found.append((swap, kind, place))
        if not found:
            return []
        (change, piece, partner, target), kind, place = min(found, key=lambda entry: entry[0][0])
        if not np.isfinite(change):
            return []
        self._shift(kind, piece, target, step)
        if partner >= 0:
            self._shift(kind, partner, place, step)
        return [r for p in (place, target) for r in range(p * kind.width, (p + 1) * kind.width)]

    def _move(
        self,
        kind: _Kind,
        place: int,
        mine: Ints,
        loads: Floats,
        memory: Floats,
        base: Floats,
        targets: Floats,
    ) -> Move:
        load = kind.load[mine][:, None, :]  # (pieces, 1, K)
        gain = self._over(loads[place][None] - load, targets).sum(axis=1) - base[place]
        change = gain[:, None] + self._over(loads[None] + load[:, None], targets).sum(axis=2) - base[None]
        change[:, place] = np.inf
        change[memory[None] + kind.memory[mine][:, None] > self.capacity] = np.inf
        i, target = np.unravel_index(int(change.argmin()), change.shape)
        return float(change[i, target]), int(mine[i]), -1, int(target)

    def _swap(
        self,
        kind: _Kind,
        place: int,
        mine: Ints,
        partners: Ints,
        loads: Floats,
        memory: Floats,
        base: Floats,
        targets: Floats,
    ) -> Move:
        there = kind.at[partners]
        shift = (kind.load[partners][None] - kind.load[mine][:, None])[
            :, :, None, :
        ]  # (mine, partners, 1, K)
        change = self._over(loads[place][None, None] + shift, targets).sum(axis=2) - base[place]
        change += self._over(loads[there][None] - shift, targets).sum(axis=2) - base[there][None]
        more = kind.memory[partners][None] - kind.memory[mine][:, None]
        change[(memory[place] + more > self.capacity) | (memory[there][None] - more > self.capacity)] = np.inf
        i, k = np.unravel_index(int(change.argmin()), change.shape)
        return float(change[i, k]), int(mine[i]), int(partners[k]), int(there[k])

    def _shift(self, kind: _Kind, piece: int, target: int, step: int) -> None:
        scope = HOST if kind is self.host else 1 - HOST
        load, memory = kind.load[piece], float(kind.memory[piece])
        self._add(load, memory, int(kind.at[piece]), scope, -1.0)
        self._add(load, memory, target, scope, 1.0)
        kind.at[piece] = target
        tenure = HOST_TENURE if kind is self.host else TENURE
        kind.until[piece] = step + tenure + self.random.randrange(tenure)

    def _return(self, kept: tuple[Ints, Ints]) -> None:
        for kind, at in zip((self.rank, self.host), kept, strict=True):
            scope = HOST if kind is self.host else 1 - HOST
            for i in np.flatnonzero(kind.at != at):
                self._add(kind.load[i], float(kind.memory[i]), int(kind.at[i]), scope, -1.0)
                self._add(kind.load[i], float(kind.memory[i]), int(at[i]), scope, 1.0)
            kind.at = at.copy()
