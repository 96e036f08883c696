"""Polish a placement by solving all disjoint pairs of places exactly, many pairs at once.

A round pairs the ranks at random (or each of the slowest with several partners, of which it takes the best), draws a
few pieces on either side, and gives each pair the split of its pieces that lowers the soft maximum

    Phi  =  sum_p ( fixed_p + tau log sum_r exp(load[r, p] / tau) )

most, among all ``2**pieces`` splits. Phi is a sum over ranks inside a concave function, so by its tangent every pair
may be solved by itself: all gains together are at least their sum. The same move splits host pieces between two hosts,
tables between a rank and a host, and tables between a rank or host and all ranks. The temperature ``tau`` falls from
round to round, as in deterministic annealing (Rose 1998, Deterministic annealing for clustering, compression,
classification, regression, and related optimization problems); the neighbourhood is that of Ahuja and others (2002, A
survey of very large-scale neighborhood search techniques), solved by enumeration.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from passes.assignment.budget import Budget
from passes.assignment.compiled import HOST, RANK, Choice, Compiled
from passes.assignment.problem import Floats
from passes.assignment.progress import tell
from passes.assignment.target_search import Incumbent

ALL = 2  # besides RANK and HOST: a table on all ranks
KINDS = (RANK, HOST, ALL)
FEWER = 3  # pieces drawn where one side is a host, whose ranks are all looked at
PARTNERS = (1, 3, 15)  # of a place, in rounds between ranks
WEIGHT = (
    1e3  # of a share of the memory beside a load in units of tau: exceeding it by a hundredth costs exp(10)
)
STEEP = 60.0  # exponents are cut here
EXACT = 50  # rounds after which loads are added up anew
SIDE_WORK = 1.5e-4  # seconds a side of a move, measured on one core of the development machine
CELL_WORK = 2.5e-9  # seconds a split, rank and row, measured likewise

Ints = NDArray[np.int64]
Singles = NDArray[np.float32]


class Cooling(NamedTuple):
    """tau at first and at last, as a fraction of the bound; the rounds in turn; pieces drawn on either side of a pair."""

    hot: float
    cold: float
    moves: tuple[str, ...]
    pieces: int


# Tuned on 10,000 synthetic tables, whose placements start far from even:
FAR = Cooling(
    hot=0.03,
    cold=4e-4,
    moves=("ranks", "hosts", "ranks", "rank and all", "hosts", "rank and host", "hosts", "host and all"),
    pieces=3,
)
_OFTEN_RANKS = (
    *(
        "ranks",
        "hosts",
        "ranks",
        "rank and host",
        "ranks",
        "hosts",
        "ranks",
        "rank and all",
        "ranks",
        "hosts",
    ),
    *("ranks", "host and all"),
)
# For placements whose hosts have the right tables at the start, tuned on 856 tables on 128 ranks; where the start is
# less good, hotter ones end lower:
NEAR = Cooling(hot=0.003, cold=1.5e-4, moves=_OFTEN_RANKS, pieces=4)
WARM = Cooling(hot=0.015, cold=2e-4, moves=_OFTEN_RANKS, pieces=4)


class Side(NamedTuple):
    """One side of many pairs: what the pieces drawn cost there in each split, and what is there without them."""

    kind: int
    places: Ints  # (pairs,) ranks or hosts
    energy: Singles  # (splits, pairs); bit i of a split's number says that piece i is on this side
    base: Floats  # (pairs, ranks of a place, rows) loads without the pieces drawn


class PairPolish:
    """The movable pieces of one placement as arrays; rows are the phases, in seconds, and the share of the memory.

    Tables with one piece may change between a rank, a host and all ranks; the pieces of others move alone.
    """

    def __init__(self, compiled: Compiled, best: Incumbent, seed: int) -> None:
        problem = compiled.problem
        self.compiled, self.best = compiled, best
        self.size, self.phases = problem.host_size, len(problem.phases)
        self.count = {RANK: problem.ranks, HOST: problem.hosts, ALL: 1}
        self.random = np.random.default_rng(seed)
        self.still = np.zeros((problem.ranks, self.phases + 1))  # loads of what does not move
        self.still_fixed = np.zeros(self.phases + 1)
        self.owner: list[tuple[int, int]] = []  # table and index in its placement
        self.options: list[tuple[int, int, int] | None] = []  # on a rank, a host, all ranks; None: a piece
        vectors: list[list[tuple[float, ...]]] = []
        kinds, places = [], []
        for t, j in enumerate(best.choice):
            for kind, place, rows in self._items(t, j, best.placement[t]):
                kinds.append(kind)
                places.append(place)
                vectors.append(rows)
        made = np.array(vectors, dtype=np.float64).reshape(len(kinds), len(KINDS), self.phases + 1)
        self.can: NDArray[np.bool_] = np.isfinite(made[:, :, 0]).T
        self.rows: Floats = np.where(np.isfinite(made), made, 0.0).transpose(1, 0, 2)  # (kinds, pieces, rows)
        self.kind: Ints = np.array(kinds, dtype=np.int64)
        self.at: Ints = np.array(places, dtype=np.int64)
        self._add_up()

    def _vector(self, phases: tuple[float, ...] | Floats, memory: float) -> tuple[float, ...]:
        return (*(float(x) for x in phases), memory / self.compiled.problem.capacity)

    def _items(self, t: int, j: int, places: list[int]) -> list[tuple[int, int, list[tuple[float, ...]]]]:
        """(kind, place, rows by kind) of each movable piece of a table; what does not move is added to the rest."""
        choices, start = self.compiled.choices[t], int(self.compiled.start[t])
        never = (float("nan"),) * (self.phases + 1)
        here = _kind(choices[j])
        if here is not None:
            options = [-1, -1, -1]
            for i, choice in enumerate(choices):
                kind = _kind(choice)
                if kind is None or (not self.compiled.usable[start + i] and i != j):
                    continue
                known = options[kind]
                if i == j or known < 0 or (known != j and _total(choice) < _total(choices[known])):
                    options[kind] = i
            rows = [never if i < 0 else self._single(start, i, choices[i]) for i in options]
            self.owner.append((t, 0))
            self.options.append((options[0], options[1], options[2]))
            return [(here, places[0] if here != ALL else 0, rows)]
        self.still_fixed += self._vector(self.compiled.everywhere[start + j], choices[j].fixed_memory)
        made = []
        for group in choices[j].groups:
            row = self._vector(group.phases, group.memory)
            for i in range(group.first, group.first + group.copies):
                if choices[j].plain:
                    self.owner.append((t, i))
                    self.options.append(None)
                    made.append((group.scope, places[i], [row if k == group.scope else never for k in KINDS]))
                else:
                    width = self.size if group.scope == HOST else 1
                    self.still[places[i] * width : (places[i] + 1) * width] += row
        return made

    def _single(self, start: int, i: int, choice: Choice) -> tuple[float, ...]:
        if choice.groups:
            return self._vector(choice.groups[0].phases, choice.groups[0].memory)
        return self._vector(self.compiled.everywhere[start + i], choice.fixed_memory)

    def _add_up(self) -> None:
        """Loads of the ranks (ranks, rows) and of all ranks alike (rows,), from the pieces."""
        self.loads = self.still.copy()
        hosts = np.zeros((self.count[HOST], self.phases + 1))
        for kind, into in ((RANK, self.loads), (HOST, hosts)):
            here = self.kind == kind
            np.add.at(into, self.at[here], self.rows[kind][here])
        self.loads += np.repeat(hosts, self.size, axis=0)
        self._fix()

    def _fix(self) -> None:
        self.fixed: Floats = self.still_fixed + self.rows[ALL][self.kind == ALL].sum(axis=0)

    @property
    def value(self) -> float:
        """The objective, seconds; infinity where the memory does not suffice."""
        if float(self.loads[:, -1].max() + self.fixed[-1]) > 1.0:
            return float("inf")
        return float((self.loads.max(axis=0) + self.fixed)[:-1].sum())

    def run(self, budget: Budget, bound: float, stop: float = 0.0, cooling: Cooling = FAR) -> None:
        """Improve the incumbent in place until the budget is spent, or its gap to the bound is at most ``stop``."""
        number, self.cooling = 0, cooling
        while not budget.spent() and self.best.value > bound * (1 + stop):
            part = min(budget.work / budget.limit, 1.0)
            self.tau = bound * cooling.hot * (cooling.cold / cooling.hot) ** part
            self._round(number, budget)
            number += 1
            if number % EXACT == 0:
                self._add_up()
            if self.value < self.best.value * (1 - 1e-9):
                self._add_up()
                self._record(bound)

    def _round(self, number: int, budget: Budget) -> None:
        """One of the moves."""
        move = self.cooling.moves[number % len(self.cooling.moves)]
        if move == "ranks":
            self._pairs(RANK, budget, PARTNERS[number // 2 % len(PARTNERS)])
        elif move == "hosts":
            self._pairs(HOST, budget)
        elif move == "rank and host":
            self._ranks_and_hosts(budget)
        else:
            self._with_all(RANK if move == "rank and all" else HOST, budget)

    def _record(self, bound: float) -> None:
        value = self.value
        if value >= self.best.value:
            return
        best = self.best
        best.value, best.choice = value, list(best.choice)
        best.placement = [list(places) for places in best.placement]
        for (t, i), options, kind, place in zip(
            self.owner, self.options, self.kind.tolist(), self.at.tolist(), strict=True
        ):
            if options is None:
                best.placement[t][i] = place
                continue
            best.choice[t] = options[kind]
            best.placement[t] = (
                [-1] * self.compiled.choices[t][options[kind]].size if kind == ALL else [place]
            )
        tell(value, bound)

    def _pairs(self, kind: int, budget: Budget, partners: int = 1) -> None:
        """Pieces between two ranks or two hosts: random pairs, or the slowest places with some partners each."""
        count, most = self.count[kind], self.cooling.pieces
        if count < 2:
            return
        self._weigh()
        if partners >= count:
            partners = 1
        heavy = count // (partners + 1)
        order = self.random.permutation(count)
        if partners > 1:
            cost = (np.exp(self._exponent(self.loads)) @ self.price).reshape(count, -1).sum(axis=1)
            slow = np.argsort(-cost, kind="stable")
            order = np.concatenate([slow[:heavy], self.random.permutation(slow[heavy:])])
        first, second = np.repeat(order[:heavy], partners), order[heavy : heavy * (partners + 1)]
        drawn = self._drawn(kind, kind, most)
        items = np.concatenate([drawn[first], drawn[second]], axis=1)
        sides = (
            self._side(kind, first, items, slice(0, most), budget),
            self._side(kind, second, items, slice(most, None), budget),
        )
        self._split(items, sides, partners, (1 << most) - 1)

    def _with_all(self, kind: int, budget: Budget) -> None:
        """Tables between a rank or a host and all ranks; all taken back where the memory does not suffice."""
        pool = np.flatnonzero((self.kind == ALL) & self.can[kind])
        most = self.cooling.pieces if kind == RANK else FEWER
        drawn = self._drawn(kind, ALL, most)
        dealt = np.full(self.count[kind] * most, -1)
        some = self.random.permutation(pool)[: len(dealt)]
        dealt[self.random.permutation(len(dealt))[: len(some)]] = some
        if not len(some) and (drawn < 0).all():
            return
        self._weigh()
        items = np.concatenate([drawn, dealt.reshape(-1, most)], axis=1)
        places = np.arange(self.count[kind])
        before = self.kind.copy(), self.at.copy(), self.loads.copy(), self.fixed
        sides = (
            self._side(kind, places, items, slice(0, most), budget),
            self._side(ALL, places, items, slice(most, None), budget),
        )
        self._split(items, sides)
        self._fix()
        if not np.isfinite(self.value):
            self.kind, self.at, self.loads, self.fixed = before

    def _ranks_and_hosts(self, budget: Budget) -> None:
        """Tables between ranks of one half of the hosts and the hosts of the other half."""
        hosts = self.random.permutation(self.count[HOST])
        half = len(hosts) // 2
        if not half or not (self.can[RANK] & self.can[HOST]).any():
            return
        self._weigh()
        ranks = hosts[half : 2 * half] * self.size + self.random.integers(0, self.size, half)
        drawn = self._drawn(RANK, HOST, FEWER)[ranks], self._drawn(HOST, RANK, FEWER)[hosts[:half]]
        items = np.concatenate(drawn, axis=1)
        sides = (
            self._side(RANK, ranks, items, slice(0, FEWER), budget),
            self._side(HOST, hosts[:half], items, slice(FEWER, None), budget),
        )
        self._split(items, sides)

    def _weigh(self) -> None:
        """The tangent of Phi where the placement is now."""
        self.ref = self.loads.max(axis=0)
        self.ref[-1] = 1.0 - self.fixed[-1]
        self.scale = np.append(np.full(self.phases, 1.0 / self.tau), WEIGHT)
        total = np.exp(self._exponent(self.loads)).sum(axis=0)
        total[-1] = 1.0
        self.price = self.tau / total

    def _exponent(self, loads: Floats) -> Floats:
        made: Floats = np.clip((loads - self.ref) * self.scale, -STEEP, STEEP)
        return made

    def _drawn(self, kind: int, other: int, most: int) -> Ints:
        """Pieces on each place that could also be on the other kind, drawn at random; -1 for fewer (places, most)."""
        some = self.random.permutation(np.flatnonzero((self.kind == kind) & self.can[other]))
        some = some[np.argsort(self.at[some], kind="stable")]
        at = self.at[some]
        place = np.arange(len(at)) - np.searchsorted(at, np.arange(self.count[kind]))[at]
        drawn = np.full((self.count[kind], most), -1)
        drawn[at[place < most], place[place < most]] = some[place < most]
        return drawn

    def _side(self, kind: int, places: Ints, items: Ints, mine: slice, budget: Budget) -> Side:
        """What every split of the items (pairs, pieces) costs on this side, where ``mine`` are now."""
        rows = np.where((items >= 0)[:, :, None], self.rows[kind][items], 0.0)
        width = {RANK: 1, HOST: self.size, ALL: 1}[kind]
        budget.spend(SIDE_WORK + CELL_WORK * (1 << items.shape[1]) * len(items) * width * rows.shape[2])
        if kind == ALL:
            cost = rows[:, :, :-1].sum(axis=2, keepdims=True)
            none = np.zeros((len(items), 1))
            return Side(kind, places, _sums(none, cost)[:, :, 0], none[:, None])
        there = self.loads.reshape(-1, width, rows.shape[2])[places]
        base = there - rows[:, mine].sum(axis=1)[:, None]
        flat = ((base - self.ref) * self.scale).reshape(-1, rows.shape[2])
        sums = _sums(flat, np.repeat(rows * self.scale, width, axis=0))
        np.clip(sums, -STEEP, STEEP, out=sums)
        energy = np.exp(sums, out=sums) @ self.price.astype(np.float32)
        return Side(kind, places, energy.reshape(len(energy), -1, width).sum(axis=2), base)

    def _split(self, items: Ints, sides: tuple[Side, Side], partners: int = 1, now: int = 0) -> None:
        """Give each pair its best split; of several partners, a place takes the one with which it gains most."""
        energy = sides[0].energy + sides[1].energy[::-1]  # the reverse of a split's number is its complement
        best = energy.argmin(axis=0)
        if partners > 1:
            gain = energy[best, np.arange(len(best))] - energy[now]
            keep = gain.reshape(-1, partners).argmin(axis=1) + np.arange(len(best) // partners) * partners
            items, best = items[keep], best[keep]
            sides = (_some(sides[0], keep), _some(sides[1], keep))
        here = ((best[:, None] >> np.arange(items.shape[1])) & 1).astype(np.bool_)
        for side, mask in zip(sides, (here, ~here), strict=True):
            moved = mask & (items >= 0)
            pieces = items[moved]
            self.kind[pieces] = side.kind
            places = side.places if side.kind != ALL else np.zeros_like(side.places)
            self.at[pieces] = np.broadcast_to(places[:, None], items.shape)[moved]
            if side.kind != ALL:
                rows = np.where(moved[:, :, None], self.rows[side.kind][items], 0.0).sum(axis=1)
                width = side.base.shape[1]
                loads = self.loads.reshape(-1, width, rows.shape[1])
                loads[side.places] = side.base + rows[:, None]


def _kind(choice: Choice) -> int | None:
    """Where an option stands that is all on one rank, one host or all ranks; None for others."""
    if not choice.plain:
        return None
    if not choice.groups:
        return ALL
    single = len(choice.groups) == 1 and choice.groups[0].copies == 1
    return choice.groups[0].scope if single and not choice.fixed and not choice.fixed_memory else None


def _total(choice: Choice) -> float:
    """Seconds on each rank that an option is on, all phases together."""
    return choice.fixed + sum(group.load for group in choice.groups)


def _some(side: Side, keep: Ints) -> Side:
    return Side(side.kind, side.places[keep], side.energy, side.base[keep])


def _sums(base: Floats, rows: Floats) -> Singles:
    """``base`` (n, d) plus every subset of ``rows`` (n, pieces, d), shape (2**pieces, n, d)."""
    pieces = rows.shape[1]
    made = np.empty((1 << pieces, *base.shape), dtype=np.float32)
    made[0] = base
    for i in range(pieces):
        np.add(made[: 1 << i], rows[None, :, i].astype(np.float32), out=made[1 << i : 2 << i])
    return made
