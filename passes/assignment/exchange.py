"""Move a piece off the slowest rank, or swap it with a piece elsewhere.

Options stay as they are. All moves and swaps of one rank's pieces are priced at once by the change of
the soft maximum (see :mod:`passes.assignment.polish`), which they change on two ranks only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from passes.assignment.budget import Budget
from passes.assignment.compiled import RANK, Compiled
from passes.assignment.insertion import State
from passes.assignment.problem import Floats

PAIR_WORK = 6e-8  # seconds a pair of pieces and phase, measured on one core of the development machine
STEP_WORK = 1.5e-4  # seconds a step, measured likewise
MOST_PARTNERS = 4000  # pieces looked at for a swap; those of the least loaded ranks when there are more


class Exchange:
    """The movable pieces of one placement, as arrays."""

    def __init__(self, compiled: Compiled, state: State, choice: list[int], places: list[list[int]]) -> None:
        self.state, self.places = state, places
        loads, memory, rank, where = [], [], [], []
        extra: list[tuple[float, ...]] = []
        for t, (j, at) in enumerate(zip(choice, places, strict=True)):
            option = compiled.choices[t][j]
            if not option.plain:
                continue
            for group in option.groups:
                if group.scope != RANK:
                    continue
                for i in range(group.first, group.first + group.copies):
                    loads.append(group.phases)
                    memory.append(group.memory)
                    extra.append(group.extra)
                    rank.append(at[i])
                    where.append((t, i))
        self.loads: Floats = np.array(loads, dtype=np.float64).reshape(len(loads), state.loads.shape[1])
        self.memory: Floats = np.array(memory, dtype=np.float64)
        self.extra: Floats | None = None  # further resources (pieces, E)
        if state.extra is not None:
            self.extra = np.array(extra, dtype=np.float64).reshape(len(extra), state.extra.shape[1])
        self.rank: NDArray[np.int64] = np.array(rank, dtype=np.int64)
        self.where = where

    def improve(self, tau: float, budget: Budget) -> None:
        """Apply the best moves and swaps off the slowest rank of each phase until none helps."""
        if not len(self.rank):
            return
        stuck = 0
        phases = self.state.loads.shape[1]
        turn = 0
        while stuck < phases and not budget.spent():
            rank = int(self.state.loads[:, turn % phases].argmax())
            turn += 1
            stuck = 0 if self._step(rank, tau, budget) else stuck + 1

    def _step(self, rank: int, tau: float, budget: Budget) -> bool:
        state = self.state
        mine = np.flatnonzero(self.rank == rank)
        budget.spend(STEP_WORK)
        if not len(mine):
            return False
        peaks = state.loads.max(axis=0)
        weight = np.exp((state.loads - peaks) / tau)
        total = weight.sum(axis=0)
        best = self._best_move(rank, mine, weight, total, tau)
        swap = self._best_swap(rank, mine, weight, total, tau, budget)
        if swap is not None and (best is None or swap[0] < best[0]):
            best = swap
        if best is None or best[0] > -1e-9 * float(peaks.sum()):
            return False
        _, i, other, target = best
        self._shift(i, target)
        if other >= 0:
            self._shift(other, rank)
        return True

    def _best_move(
        self, rank: int, mine: NDArray[np.int64], weight: Floats, total: Floats, tau: float
    ) -> tuple[float, int, int, int] | None:
        """(change of Phi, piece, -1, new rank)."""
        state = self.state
        up = np.exp(self.loads[mine] / tau)
        change = (weight[rank] * (1 / up - 1))[:, None, :] + weight[None] * (up - 1)[:, None, :]
        delta = _phi(change, total, tau)
        delta[:, rank] = np.inf
        delta[self.memory[mine][:, None] > (state.problem.capacity - state.memory)[None]] = np.inf
        if self.extra is not None and state.extra is not None:
            delta[(self.extra[mine][:, None] > (state.room - state.extra)[None]).any(axis=2)] = np.inf
        i, target = np.unravel_index(int(delta.argmin()), delta.shape)
        value = float(delta[i, target])
        return (value, int(mine[i]), -1, int(target)) if np.isfinite(value) else None

    def _best_swap(
        self,
        rank: int,
        mine: NDArray[np.int64],
        weight: Floats,
        total: Floats,
        tau: float,
        budget: Budget,
    ) -> tuple[float, int, int, int] | None:
        """(change of Phi, piece, partner, partner's rank)."""
        state = self.state
        partners = np.flatnonzero(self.rank != rank)
        if len(partners) > MOST_PARTNERS:
            light = np.argsort(state.loads.sum(axis=1)[self.rank[partners]], kind="stable")
            partners = np.sort(partners[light[:MOST_PARTNERS]])
        if not len(partners):
            return None
        budget.spend(PAIR_WORK * len(mine) * len(partners) * len(total))
        there = self.rank[partners]
        change = self.loads[mine][:, None, :] - self.loads[partners][None]
        up = np.exp(np.clip(change / tau, -60, 60))
        delta = _phi(weight[rank] * (1 / up - 1) + weight[there][None] * (up - 1), total, tau)
        free = state.problem.capacity - state.memory
        extra = self.memory[mine][:, None] - self.memory[partners][None]
        delta[(extra > free[there][None]) | (-extra > free[rank])] = np.inf
        if self.extra is not None and state.extra is not None:
            open_ = state.room - state.extra
            shift = self.extra[mine][:, None] - self.extra[partners][None]
            delta[((shift > open_[there][None]) | (-shift > open_[rank])).any(axis=2)] = np.inf
        i, k = np.unravel_index(int(delta.argmin()), delta.shape)
        value = float(delta[i, k])
        return (value, int(mine[i]), int(partners[k]), int(there[k])) if np.isfinite(value) else None

    def _shift(self, piece: int, target: int) -> None:
        state, source = self.state, int(self.rank[piece])
        state.loads[source] -= self.loads[piece]
        state.loads[target] += self.loads[piece]
        state.memory[source] -= self.memory[piece]
        state.memory[target] += self.memory[piece]
        if self.extra is not None and state.extra is not None:
            state.extra[source] -= self.extra[piece]
            state.extra[target] += self.extra[piece]
        self.rank[piece] = target
        t, i = self.where[piece]
        self.places[t][i] = target


def _phi(change: Floats, total: Floats, tau: float) -> Floats:
    """Change of the soft maximum, summed over phases, for changes of the weights (..., K)."""
    made: Floats = tau * np.log(np.maximum(1 + change / total, 1e-300)).sum(axis=-1)
    return made
