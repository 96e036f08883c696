"""Ruin and recreate under a soft maximum, for any number of phases.

The objective, a sum over phases of a maximum over ranks, is flat almost everywhere; its soft maximum

    Phi  =  sum_p tau log sum_r exp(load[r, p] / tau)

is not, and exceeds it by at most K tau log(ranks). Tables are taken out and put back one by one, each
with the option and the places that raise Phi least (Schrimpf et al. 2000, Record breaking optimization
results using the ruin and recreate principle; exponential weights as in Plotkin, Shmoys, Tardos 1995,
Fast approximation algorithms for fractional packing and covering problems).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from passes.assignment.budget import Budget
from passes.assignment.compiled import HOST, Choice, Compiled, Group
from passes.assignment.exchange import Exchange
from passes.assignment.insertion import State, insert
from passes.assignment.problem import Floats
from passes.assignment.progress import tell
from passes.assignment.relaxation import piece_floor
from passes.assignment.target_search import Incumbent

TEMPERATURES = (0.04, 0.015, 0.006)  # tau as a fraction of the bound; tuned on the project's own prices
RUIN = 4  # most tables taken out at once
OPTIONS = 6  # options tried for a table: the cheapest on average
EXCHANGE_EVERY = 25  # steps between rounds of moves and swaps
STEEP = 60.0  # exponents are cut here: an option that large is never the best
INSERT_WORK = 90e-6  # seconds an option tried, measured on one core of the development machine
CELL_WORK = 1.5e-8  # seconds a rank and phase of an option tried, measured likewise


class SoftPrice:
    """Rise of Phi that each copy of a piece causes on each place, to first order; see ``Price``."""

    def __init__(self, state: State, tau: float) -> None:
        self.tau = tau
        self.peaks = state.loads.max(axis=0)
        self.weight = np.exp((state.loads - self.peaks) / tau)
        self.total = self.weight.sum(axis=0)
        size = state.problem.host_size
        self.by_host: Floats = self.weight.reshape(state.problem.hosts, size, -1).sum(axis=1)

    @property
    def value(self) -> float:
        """Phi, seconds."""
        return float((self.peaks + self.tau * np.log(self.total)).sum())

    def refresh(self, state: State, ranks: NDArray[np.int64]) -> bool:
        """Follow a change of some ranks' loads; False when it is too large for the stored exponents."""
        if not len(ranks):
            return True
        exponent = (state.loads[ranks] - self.peaks) / self.tau
        if exponent.max() > STEEP:
            return False
        new = np.exp(exponent)
        self.total = self.total + (new - self.weight[ranks]).sum(axis=0)
        self.weight[ranks] = new
        size = state.problem.host_size
        hosts = np.unique(ranks // size)
        self.by_host[hosts] = self.weight.reshape(len(self.by_host), size, -1)[hosts].sum(axis=1)
        return bool((self.total > 1e-6).all())

    def __call__(self, state: State, group: Group, levels: int) -> Floats:
        """Price a group, shape (levels, places)."""
        weight = self.by_host if group.scope == HOST else self.weight
        steep = np.minimum(np.asarray(group.phases) / self.tau, STEEP)
        first = np.expm1(steep) / self.total
        table = np.empty((levels, weight.shape[0]))
        for level in range(levels):
            table[level] = weight @ (first * np.exp(np.minimum(level * steep, STEEP)))
        return table

    def rise(self, choice: Choice, fixed: Sequence[float], places: Sequence[int]) -> float:
        """Rise of Phi when the option is placed there."""
        growth = np.zeros_like(self.total)
        for group in choice.groups:
            weight = self.by_host if group.scope == HOST else self.weight
            where, copies = np.unique(
                np.asarray(places[group.first : group.first + group.copies]), return_counts=True
            )
            steep = np.asarray(group.phases)[None, :] * copies[:, None] / self.tau
            growth += (weight[where] * np.expm1(np.minimum(steep, 2 * STEEP))).sum(axis=0)
        return float(sum(fixed) + self.tau * np.log1p(growth / self.total).sum())


class Polisher:
    """Improves one placement; deterministic for a given seed and budget."""

    def __init__(
        self,
        compiled: Compiled,
        bound: float,
        budget: Budget,
        seed: int,
        prices: Floats | None = None,
    ) -> None:
        self.compiled, self.bound, self.budget = compiled, bound, budget
        # seconds (N,) that what an option takes of memory, further resources and budgets is worth; only joint
        # problems have them, and there a table whose choice fits nowhere may take another
        self.prices = prices
        self.left = np.asarray(compiled.problem.budgets) * (1 + 1e-12)  # of each budget
        self.problem = compiled.problem
        self.random = random.Random(seed + 1)
        self.floor = piece_floor(compiled)
        self.state = State(
            self.problem,
            np.zeros((self.problem.ranks, len(self.problem.phases))),
            np.zeros(self.problem.ranks),
        )
        self.choice: list[int] = [-1] * compiled.tables
        self.places: list[list[int]] = [[] for _ in range(compiled.tables)]
        self._fixed = [
            [self._fixed_part(t, j) for j in range(len(options))]
            for t, options in enumerate(compiled.choices)
        ]
        self.base = np.zeros(len(self.problem.phases))  # seconds on every rank, kept out of the state
        self._soft: SoftPrice | None = None
        self._menu: dict[int, list[int]] = {}

    def _fixed_part(self, t: int, j: int) -> tuple[float, ...]:
        pieces = [p for p in self.problem.options[t][j].pieces if p.scope == "all"]
        return tuple(sum(p.load[k] * p.count for p in pieces) for k in range(len(self.problem.phases)))

    def run(self, best: Incumbent, stop: float) -> None:
        """Improve ``best`` in place until the budget is spent or the gap is at most ``stop``."""
        for theta in TEMPERATURES:
            self._rebuild(best.choice, theta * self.bound)
            self._exchange(theta * self.bound)
            self._record(best)
        if best.placement:  # else the choice does not fit
            self.refine(best, stop)

    def refine(self, best: Incumbent, stop: float, temperatures: Sequence[float] = TEMPERATURES) -> None:
        """The same from the placement of ``best``, without placing its choice anew."""
        self._load(best)
        self._menu = {t: self._options(t, best.value) for t in range(self.compiled.tables)}
        if not any(self._menu.values()):
            return  # every option of every table is too large for a better solution
        turn = 0
        while not self.budget.spent() and best.value > self.bound * (1 + stop):
            tau = temperatures[turn % len(temperatures)] * self.bound
            turn += 1
            self._step(tau)
            if turn % EXCHANGE_EVERY == 0:
                self._exchange(TEMPERATURES[-1] * self.bound)
            if self._record(best):
                self._exchange(TEMPERATURES[-1] * self.bound)
                self._record(best)

    def _exchange(self, tau: float) -> None:
        if -1 in self.choice:
            return
        self.places = [list(places) for places in self.places]
        self._soft = None
        Exchange(self.compiled, self.state, self.choice, self.places).improve(tau, self.budget)

    def objective(self) -> float:
        """Of the current placement, seconds."""
        return float((self.state.loads.max(axis=0) + self.base).sum())

    def _record(self, best: Incumbent) -> bool:
        value = self.objective()
        if -1 in self.choice or not self.state.fits() or value >= best.value * (1 - 1e-12):
            return False
        best.value = value
        best.choice, best.placement = list(self.choice), [list(p) for p in self.places]
        tell(value, self.bound)
        return True

    def _price(self, tau: float) -> SoftPrice:
        if self._soft is None or self._soft.tau != tau:
            self._soft = SoftPrice(self.state, tau)
        return self._soft

    def _changed(self, choice: Choice, places: Sequence[int]) -> None:
        """Keep the stored price in step with the state."""
        if self._soft is None:
            return
        size = self.problem.host_size
        ranks = [
            rank
            for group in choice.groups
            for place in places[group.first : group.first + group.copies]
            for rank in (range(place * size, (place + 1) * size) if group.scope == HOST else (place,))
        ]
        if not self._soft.refresh(self.state, np.unique(np.array(ranks, dtype=np.int64))):
            self._soft = None

    def _load(self, best: Incumbent) -> None:
        self._clear()
        for t, (j, places) in enumerate(zip(best.choice, best.placement, strict=True)):
            self._put(t, j, list(places))

    def _clear(self) -> None:
        self.state.loads[:] = 0
        self.base[:] = 0
        self._soft = None
        self.state.memory[:] = 0
        if self.state.extra is not None:
            self.state.extra[:] = 0
        self.left = np.asarray(self.problem.budgets) * (1 + 1e-12)
        self.choice = [-1] * self.compiled.tables

    def _put(self, t: int, j: int, places: list[int]) -> None:
        choice = self.compiled.choices[t][j]
        self.base += self._fixed[t][j]
        self.left = self.left - np.asarray(choice.cost)
        self.state.add_everywhere(choice)
        self.state.add(choice, places)
        self._changed(choice, places)
        self.choice[t], self.places[t] = j, places

    def _take(self, t: int) -> None:
        j = self.choice[t]
        choice = self.compiled.choices[t][j]
        self.state.add(choice, self.places[t], -1.0)
        self._changed(choice, self.places[t])
        self.base -= self._fixed[t][j]
        self.left = self.left + np.asarray(choice.cost)
        self.state.add_everywhere(choice, -1.0)
        self.choice[t] = -1

    def _options(self, t: int, value: float) -> list[int]:
        """The options of a table worth trying, cheapest on average first."""
        span = slice(int(self.compiled.start[t]), int(self.compiled.start[t + 1]))
        hopeful = self.compiled.usable[span] & (self.floor[span] < value)
        share = self.compiled.total_share[span]
        if self.prices is not None:
            share = share + self.prices[span]
        order = np.argsort(share, kind="stable")
        return [int(j) for j in order if hopeful[j]][:OPTIONS]

    def _rebuild(self, choices: Sequence[int], tau: float) -> None:
        """Place a choice from nothing, the tables with the largest pieces (time or memory) first."""
        compiled = self.compiled
        self._clear()
        flat = compiled.start[:-1] + np.asarray(choices)
        memory = compiled.peak_memory[flat] / self.problem.capacity
        size = np.maximum(compiled.total_biggest[flat] / self.bound, memory)
        if self.state.extra is not None:
            size = np.maximum(size, (compiled.mean_extra[flat] / self.state.room).max(axis=1))
        for t in np.argsort(-size, kind="stable"):
            if not self._best(int(t), [choices[t]], tau) and not self._repair(int(t), tau):
                return

    def _repair(self, t: int, tau: float) -> bool:
        """Another option for a table whose own fits nowhere, in joint problems.

        Their choices come from averages over ranks, which do not see how whole pieces pack.
        """
        if self.prices is None:
            return False
        span = slice(int(self.compiled.start[t]), int(self.compiled.start[t + 1]))
        return self._best(t, [int(j) for j in np.flatnonzero(self.compiled.usable[span])], tau)

    def _best(self, t: int, options: Sequence[int], tau: float) -> bool:
        """Put a table back where Phi rises least; False if nothing fits."""
        price = self._price(tau)
        cells = self.state.loads.size
        found: tuple[float, int, list[int]] | None = None
        for j in options:
            choice = self.compiled.choices[t][j]
            self.budget.spend(INSERT_WORK + CELL_WORK * cells)
            cost = np.asarray(choice.cost)
            if (cost > self.left).any():
                continue
            self.state.add_everywhere(choice)
            places = insert(self.state, choice, price)
            self.state.add_everywhere(choice, -1.0)
            if places is None:
                continue
            rise = price.rise(choice, self._fixed[t][j], places)
            if self.prices is not None:
                rise += float(self.prices[int(self.compiled.start[t]) + j])
            if found is None or rise < found[0]:
                found = rise, j, places
        if found is None:
            return False
        self._put(t, found[1], found[2])
        return True

    def _step(self, tau: float) -> None:
        """Ruin, recreate, and go back unless Phi fell (or barely rose)."""
        before = self._price(tau).value + float(self.base.sum())
        saved, base, left = self.state.copy(), self.base.copy(), self.left
        victims = self._victims()
        old = [(t, self.choice[t], self.places[t]) for t in victims]
        for t in victims:
            self._take(t)
        whole = all(self._best(t, self._menu[t], tau) for t in victims)
        if whole:
            rise = self._price(tau).value + float(self.base.sum()) - before
            if rise <= 1e-12 or self.random.random() < math.exp(-rise / (0.05 * tau)):
                return
        self.state, self.base, self.left = saved, base, left
        self._soft = None
        for t, j, places in old:
            self.choice[t], self.places[t] = j, places

    def _victims(self) -> list[int]:
        """One table on the slowest rank of a random phase, and a few others, in random order."""
        phase = self.random.randrange(len(self.problem.phases))
        rank = int(self.state.loads[:, phase].argmax())
        there = [t for t in self._near(rank) if self._menu[t]]
        count = self.random.randint(1, RUIN)
        victims = [there[self.random.randrange(len(there))]] if there else []
        while len(victims) < min(count, self.compiled.tables):
            t = self.random.randrange(self.compiled.tables)
            if t not in victims:
                victims.append(t)
        self.random.shuffle(victims)
        return victims

    def _near(self, rank: int) -> list[int]:
        """Tables with a movable piece on a rank."""
        host = rank // self.problem.host_size
        found = []
        for t, (j, places) in enumerate(zip(self.choice, self.places, strict=True)):
            for group in self.compiled.choices[t][j].groups:
                where = places[group.first : group.first + group.copies]
                if (host if group.scope == HOST else rank) in where:
                    found.append(t)
                    break
        return found
