"""Choose options and pack them at once: local search on the choice, judged by the packing it allows.

The relaxation proposes the options of least average load; they pack badly when their pieces are large.
The search changes the option of one or two tables at a time, packs the whole again under a target one
per cent below the best known, and walks by simulated annealing on the overflow (Kirkpatrick, Gelatt,
Vecchi 1983). A walk without overflow is a better solution; the target then moves down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from passes.assignment.budget import Budget
from passes.assignment.compiled import Compiled
from passes.assignment.packing import BY_LOAD, BY_MEMORY, ORDERS, Packed, Packer
from passes.assignment.progress import tell
from passes.assignment.relaxation import piece_floor

STEP = 0.01  # the target is this fraction below the incumbent; tuned on the DCNv2 cases of vs_torchrec
HEAT = 0.01  # temperature as a fraction of the bound; tuned likewise
SPREAD = 0.02  # options cost this fraction of the bound more per factor e of being tried less often
EXPLORE = 0.15  # chance of drawing evenly among options within REACH; tuned likewise
REACH = 0.15  # of the bound
PAIR = 0.4  # share of moves that change two tables
CLASS = 0.15  # share of moves that give many tables of equal options the same one
REORDER = 0.1  # share of moves that change the packing order
NEAR = 1.005  # with several phases, packings within this factor of the best are evaluated in full
STARTS = 3  # starting choices that are packed in every order
WORTHWHILE = 20  # packings that a walk needs for each table beyond the first FEW; tuned on 26 to 856 tables
FEW = 20
SHORT_WALKS = 3  # walks from different starts before the long one
SHORT_SHARE = 0.2  # of the work left, for each of them
PIECE_WORK = 1.3e-6  # seconds a packed piece, measured on one core of the development machine
PACK_WORK = 12e-6  # seconds a packing, measured likewise
TABLE_WORK = 0.8e-6  # seconds a table in a packing, measured likewise


@dataclass(slots=True)
class Incumbent:
    """Best packing found so far; ``value`` is the objective, infinity before the first feasible one."""

    value: float = math.inf
    scalar: float = math.inf  # largest load, all phases together
    choice: list[int] = field(default_factory=list)
    placement: list[list[int]] = field(default_factory=list)


class TargetSearch:
    """One run over one problem; deterministic for a given seed and budget.

    ``value`` turns a choice and a placement into the objective; None takes the largest load (one phase).
    """

    def __init__(
        self,
        compiled: Compiled,
        bound: float,
        price: float,
        budget: Budget,
        seed: int,
        value: Callable[[Sequence[int], list[list[int]]], float] | None,
    ) -> None:
        self.compiled, self.bound, self.budget = compiled, bound, budget
        self.packer = Packer(compiled)
        self.value = value
        self.random = random.Random(seed)
        self.best = Incumbent()
        self.packing_work = 0.0  # of the last packing
        self.last = math.inf  # objective of the last packing, if it was evaluated
        self.starting = False  # evaluate every packing
        self.scale = max(bound, 1e-300)
        self.price = price
        self.floor = piece_floor(compiled)
        self.weights: list[list[float]] = []
        self.free: list[int] = []
        self.twins: list[list[int]] = []  # tables with the same options, where there is more than one

    def _weigh(self) -> None:
        """Chances of the options of each table, without those that cannot be in a better solution."""
        compiled = self.compiled
        cost = compiled.total_share + self.price * compiled.mean_memory
        hopeful = compiled.usable & (self.floor < self.best.value)
        cost = np.where(hopeful, cost, np.inf)
        self.weights = []
        for t in range(compiled.tables):
            row = cost[compiled.start[t] : compiled.start[t + 1]]
            if not np.isfinite(row).any():
                self.free = []  # every option of a table is too large: the incumbent is optimal
                return
            excess = (row - row.min()) / self.scale
            chance = np.exp(-excess / SPREAD)
            near = (excess < REACH).astype(float)
            chance = (1 - EXPLORE) * chance / chance.sum() + EXPLORE * near / near.sum()
            self.weights.append(list(np.cumsum(chance)))
        self.free = [t for t, row in enumerate(self.weights) if not _settled(row)]
        classes: dict[int, list[int]] = {}
        for t in self.free:
            classes.setdefault(id(compiled.choices[t]), []).append(t)  # compile_problem shares equal ones
        self.twins = [members for members in classes.values() if len(members) > 1]

    def pack(self, choice: Sequence[int], target: float, order: int) -> Packed:
        """Pack, pay for it, and remember a feasible result that beats the incumbent."""
        packed = self.packer.pack(choice, target, order)
        self.packing_work = PACK_WORK + PIECE_WORK * packed.pieces + TABLE_WORK * len(choice)
        self.budget.spend(self.packing_work)
        self.last = math.inf
        if packed.excess <= 0:
            self._offer(choice, target, order, packed)
        return packed

    def _offer(self, choice: Sequence[int], target: float, order: int, packed: Packed) -> None:
        best = self.best
        if self.value is None:
            self.last = packed.largest
            if packed.largest >= best.value * (1 - 1e-12):
                return
        elif packed.largest > min(best.scalar * NEAR, best.value) and not self.starting:
            return
        placement = self.packer.pack(choice, target, order, keep=True).placement
        assert placement is not None
        if self.value is not None:
            self.last = self.value(choice, placement)
        best.scalar = min(best.scalar, packed.largest)
        if self.last < best.value:
            best.value, best.choice, best.placement = self.last, list(choice), placement
            tell(best.value, self.bound)

    def multifit(self, choice: Sequence[int], order: int, steps: int) -> float:
        """Bisect the target for one choice and one packing order; the best objective on the way."""
        flat = self.compiled.start[:-1] + np.asarray(choice)
        low = max(self.bound, float(self.compiled.total_share[flat].sum()))
        high = 2 * max(low, float(self.compiled.total_biggest[flat].max()))
        reached = best = math.inf
        for _ in range(steps):
            target = 0.5 * (low + high)
            packed = self.pack(choice, target, order)
            if packed.excess <= 0:
                reached = min(reached, packed.largest)
                best = min(best, self.last)
            if packed.overflow > 0 or packed.excess > 0:
                low = target
            high = min(high, reached if packed.overflow > 0 else target)
            if high - low < 1e-3 * high or self.budget.spent():
                break
        return best

    def start(self, choices: Sequence[Sequence[int]], steps: int = 4) -> list[Sequence[int]]:
        """Pack every choice once and the best few in every order; the choices, best first."""
        reached: list[tuple[float, int]] = []
        self.starting = True
        for i, choice in enumerate(choices):
            flat = self.compiled.start[:-1] + np.asarray(choice)
            average = float(self.compiled.total_share[flat].sum())
            target = max(self.bound, 1.05 * average, float(self.compiled.total_biggest[flat].max()))
            packed = self.pack(choice, target, BY_LOAD)
            reached.append((self.last if packed.excess <= 0 else math.inf, i))
        reached.sort()
        walking = self._worth_walking()
        for rank, (value, i) in enumerate(reached[: STARTS if walking else len(reached)]):
            orders = ORDERS if math.isfinite(value) else (*ORDERS, BY_MEMORY)
            fitted = min(
                self.multifit(choices[i], order, steps if walking else 2 * steps) for order in orders
            )
            reached[rank] = (min(value, fitted), i)
            if self.budget.spent():
                break
        self.starting = False
        return [choices[i] for _, i in sorted(reached)]

    def _worth_walking(self) -> bool:
        left = self.budget.limit - self.budget.work
        return self.packing_work * WORTHWHILE * max(0, self.compiled.tables - FEW) <= left

    def walks(self, starts: Sequence[Sequence[int]], stop: float) -> None:
        """Short walks from the starts, then a long one from the best solution.

        None at all where the work left pays for too few packings for a walk to get anywhere.
        """
        whole = self.budget
        if not self._worth_walking():
            return
        for choice in starts:
            self.budget = whole.slice(SHORT_SHARE)
            self.walk(choice, stop)
            whole.spend(self.budget.work)
        self.budget = whole
        self.walk(self.best.choice or starts[0], stop)

    def _neighbour(self, choice: list[int]) -> list[int]:
        new = list(choice)
        if self.twins and self.random.random() < CLASS:
            twins = self.twins[int(self.random.random() * len(self.twins))]
            j = _draw(self.weights[twins[0]], self.random.random())
            count = 1 + int(self.random.random() * len(twins))
            for t in twins[:count]:
                new[t] = j
            return new
        for _ in range(2 if self.random.random() < PAIR else 1):
            t = self.free[int(self.random.random() * len(self.free))]
            row = self.weights[t]
            new[t] = _draw(row, self.random.random())
        return new

    def walk(self, choice: Sequence[int], stop: float = 0.0) -> None:
        """Anneal from a choice until the budget is spent or the gap to the bound is below ``stop``."""
        self._weigh()
        if not self.free:
            return
        here, order = list(choice), BY_LOAD
        target, energy = self._retarget(here, order)
        heat = HEAT * self.scale
        while not self.budget.spent() and self.best.value > self.bound * (1 + stop):
            new, new_order = self._neighbour(here), order
            if self.random.random() < REORDER:
                new_order = int(self.random.random() * (len(ORDERS) + 1))
            if new == here and new_order == order:
                self.budget.spend(2e-6)  # a draw without a packing, measured likewise
                continue
            scalar = self.best.scalar
            packed = self.pack(new, target, new_order)
            there = self._energy(packed)
            better = self.best.scalar < scalar
            if better or there <= energy or self.random.random() < math.exp((energy - there) / heat):
                here, order, energy = new, new_order, there
            if better or energy <= 0:
                target, energy = self._retarget(here, order)

    def _energy(self, packed: Packed) -> float:
        return packed.overflow + self.scale * packed.excess / self.packer.capacity

    def _retarget(self, choice: list[int], order: int) -> tuple[float, float]:
        goal = self.best.scalar if math.isfinite(self.best.scalar) else 2 * self.scale
        target = max(self.bound, goal * (1 - STEP))
        return target, self._energy(self.pack(choice, target, order))


def _settled(row: list[float]) -> bool:
    """Whether one option has nearly all the chance: a table that is left alone."""
    steps = [b - a for a, b in zip([0.0, *row[:-1]], row, strict=True)]
    return max(steps) > 0.98


def _draw(row: list[float], u: float) -> int:
    for i, edge in enumerate(row):
        if u < edge:
            return i
    return max(i for i in range(len(row)) if row[i] > (row[i - 1] if i else 0.0))
