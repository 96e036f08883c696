"""Put one table into a partial placement: the machine's state, and two ways to price a place.

Both prices do not decrease with the number of copies on one place, so the ``n`` cheapest entries of the
(copies, places) table are an optimal way to place ``n`` identical pieces under that price.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from passes.assignment.compiled import HOST, RANK, Choice, Group
from passes.assignment.problem import Floats, Problem

TIE = 1e-6  # weight of the total load among places of equal price: prefer the emptier one


class State:
    """Loads (ranks, phases) in seconds and memory (ranks,) in bytes, without some tables.

    ``extra`` (ranks, resources) holds what is used of the problem's ``limits``; None without limits.
    """

    def __init__(self, problem: Problem, loads: Floats, memory: Floats, extra: Floats | None = None) -> None:
        self.problem = problem
        self.loads, self.memory = loads, memory
        self.extra = extra if problem.limits else None
        if problem.limits and extra is None:
            self.extra = np.zeros((problem.ranks, len(problem.limits)))
        self.room: Floats = np.asarray(problem.limits) * (1 + 1e-12)

    def copy(self) -> State:
        """An independent copy."""
        extra = None if self.extra is None else self.extra.copy()
        return State(self.problem, self.loads.copy(), self.memory.copy(), extra)

    def fits(self, slack: float = 1e-12) -> bool:
        """Whether no rank exceeds its memory or another limit."""
        if float(self.memory.max()) > self.problem.capacity * (1 + slack):
            return False
        return self.extra is None or bool((self.extra <= self.room * (1 + slack)).all())

    def add(self, choice: Choice, places: Sequence[int], sign: float = 1.0) -> None:
        """Add (or with -1 take away) the placed pieces of an option; not what it puts on every rank."""
        size = self.problem.host_size
        for group in choice.groups:
            where = np.asarray(places[group.first : group.first + group.copies], dtype=np.int64)
            if group.scope == HOST:
                where = (where[:, None] * size + np.arange(size)).ravel()
            np.add.at(self.loads, where, sign * np.asarray(group.phases))
            np.add.at(self.memory, where, sign * group.memory)
            if self.extra is not None:
                np.add.at(self.extra, where, sign * np.asarray(group.extra))

    def add_everywhere(self, choice: Choice, sign: float = 1.0) -> None:
        """Add the memory and the further resources that an option takes on every rank."""
        if choice.fixed_memory:
            self.memory += sign * choice.fixed_memory
        if self.extra is not None:
            self.extra += sign * np.asarray(choice.fixed_extra)


class Price(Protocol):
    """Prices of the 1st, 2nd, ... copy of a piece on each place, shape (levels, places)."""

    def __call__(self, state: State, group: Group, levels: int) -> Floats:
        """Price a group on a state."""


def peak_price(state: State, group: Group, levels: int) -> Floats:
    """The objective that a place alone would cause: sum over phases of max(peak, its load)."""
    loads = _place_loads(state, group.scope)
    peaks = state.loads.max(axis=0)
    copies = np.arange(1, levels + 1)[:, None, None]
    after = loads[None] + copies * np.asarray(group.phases)[None, None]
    price: Floats = _over_phases(np.maximum(after, peaks[None, None])) + TIE * _over_phases(after)
    return price


def _over_phases(values: Floats) -> Floats:
    """Sums over the last axis, column by column: with a handful of phases several times faster than ``sum``."""
    total: Floats = values[..., 0].copy()
    for k in range(1, values.shape[-1]):
        total += values[..., k]
    return total


def _place_loads(state: State, scope: int) -> Floats:
    if scope == RANK:
        return state.loads
    shape = (state.problem.hosts, state.problem.host_size, state.loads.shape[1])
    hosts: Floats = state.loads.reshape(shape).max(axis=1)
    return hosts


def _free_memory(state: State, scope: int) -> Floats:
    free: Floats = state.problem.capacity - state.memory
    if scope == HOST:
        free = free.reshape(state.problem.hosts, state.problem.host_size).min(axis=1)
    return free


def insert(state: State, choice: Choice, price: Price) -> list[int] | None:
    """Places of an option's pieces (its fixed part is taken to be on the state already), or None.

    The state is left as it was.
    """
    if choice.fixed_memory and float(state.memory.max()) > state.problem.capacity:
        return None
    if any(choice.fixed_extra) and not state.fits():
        return None
    if not choice.groups:
        return [-1] * choice.size
    if not choice.together:
        return _insert(state, choice, price, choice.allowed)
    for host in _homes(state, choice, price):
        size = state.problem.host_size
        ranks = frozenset(range(host * size, (host + 1) * size))
        places = _insert(state, choice, price, ranks if choice.allowed is None else ranks & choice.allowed)
        if places is not None:
            return places
    return None


def _homes(state: State, choice: Choice, price: Price) -> list[int]:
    """Hosts by the price of the last piece of the first group there, cheapest first."""
    group, hosts, size = choice.groups[0], state.problem.hosts, state.problem.host_size
    levels = 1 if choice.distinct else -(-group.copies // size) + 1
    table = price(state, group, levels)
    free = _free_memory(state, RANK)
    table[np.arange(1, levels + 1)[:, None] * group.memory > free[None] * (1 + 1e-12)] = np.inf
    _close_full(state, group, table)
    by_host = np.sort(table.reshape(levels, hosts, size).transpose(1, 0, 2).reshape(hosts, -1), axis=1)
    if group.copies > by_host.shape[1]:
        return []
    last = by_host[:, group.copies - 1]
    return [int(host) for host in np.argsort(last, kind="stable") if np.isfinite(last[host])]


def _insert(state: State, choice: Choice, price: Price, allowed: frozenset[int] | None) -> list[int] | None:
    places = [-1] * choice.size
    used: set[int] = set()
    if len(choice.groups) > 1:
        state = state.copy()
    for group in choice.groups:
        where = _spread(state, choice, group, price, allowed, used)
        if where is None:
            return None
        places[group.first : group.first + group.copies] = where
        if choice.distinct:
            used.update(where)
        if len(choice.groups) > 1:
            one = Choice((group,), 0.0, 0.0, False, False, None, choice.size, True)
            state.add(one, places)
    return places


def _spread(
    state: State,
    choice: Choice,
    group: Group,
    price: Price,
    allowed: frozenset[int] | None,
    used: set[int],
) -> list[int] | None:
    problem = state.problem
    places = problem.hosts if group.scope == HOST else problem.ranks
    open_places = _open_places(problem, group.scope, allowed, used)
    room = places if open_places is None else int(open_places.sum())
    if room == 0 or (choice.distinct and room < group.copies):
        return None
    levels = 1 if choice.distinct else min(group.copies, -(-group.copies // room) + 2)
    table = price(state, group, levels)
    free = _free_memory(state, group.scope)
    if group.memory * levels > float(free.min()):
        table[np.arange(1, levels + 1)[:, None] * group.memory > free[None] * (1 + 1e-12)] = np.inf
    _close_full(state, group, table)
    if open_places is not None:
        table[:, ~open_places] = np.inf
    flat = table.ravel()
    if group.copies > flat.size:
        return None
    best = _smallest(flat, group.copies)
    if not np.isfinite(flat[best[-1]]):
        return None
    return [int(i) % places for i in best]


def _close_full(state: State, group: Group, table: Floats) -> None:
    """Close the places where a further resource would run out, in place; table (levels, places)."""
    if state.extra is None:
        return
    free = state.room - state.extra
    if group.scope == HOST:
        free = free.reshape(state.problem.hosts, state.problem.host_size, -1).min(axis=1)
    for e, need in enumerate(group.extra):
        if need > 0:
            table[np.arange(1, len(table) + 1)[:, None] * need > free[None, :, e]] = np.inf


def _smallest(values: Floats, count: int) -> NDArray[np.int64]:
    """Indices of the smallest values in order."""
    if count == 1:
        return np.array([int(values.argmin())])
    if count < len(values) // 4:
        some = np.argpartition(values, count)[:count]
        some.sort()
        chosen: NDArray[np.int64] = some[np.argsort(values[some], kind="stable")]
        return chosen
    return np.argsort(values, kind="stable")[:count]


def _open_places(
    problem: Problem, scope: int, allowed: frozenset[int] | None, used: set[int]
) -> NDArray[np.bool_] | None:
    if allowed is None and not used:
        return None
    count = problem.hosts if scope == HOST else problem.ranks
    open_places = np.ones(count, dtype=np.bool_)
    if allowed is not None:
        if scope == HOST:
            size = problem.host_size
            for host in range(count):
                open_places[host] = all(host * size + i in allowed for i in range(size))
        else:
            open_places[:] = False
            open_places[list(allowed)] = True
    if used:
        open_places[list(used)] = False
    return open_places
