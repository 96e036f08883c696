"""Choices of formats to start from: those that methods which know formats alone would make.

* one format for every tensor that may take it;
* greedy: from the least cost to the budgets, the narrowing that costs least for each byte (or second of the
  average rank) it saves, until none fits;
* the fewest bytes within the budgets (:mod:`passes.format_knapsack`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ir.errors import InfeasibleError
from passes.assignment import Option
from passes.assignment.column_generation import column
from passes.assignment.master import Duals
from passes.format_knapsack import KnapsackOption, solve_knapsack
from passes.joint import JointProblem

Formats = tuple[str, ...]
"""Of a table: weights and optimizer state; of a dense member: its tensors."""

Start = tuple[Formats, ...]
"""The formats of every table and dense member."""

KNAPSACK_MEMBERS = 200  # members up to which the knapsack is solved: a second


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The options of a table (or dense member) in one choice of formats."""

    options: tuple[Option, ...]
    cost: tuple[float, ...]  # shares of the budgets
    seconds: float  # the least of an option on the average rank, its memory at the price of the relaxation
    bytes: float  # the least of an option on the average rank


@dataclass(frozen=True, slots=True, eq=False)
class FormatGroups:
    """The options of a joint problem by formats; those that use further resources are left out."""

    problem: JointProblem
    groups: tuple[dict[Formats, Group], ...]  # of each menu
    owner: tuple[int, ...]  # menu of each table and dense member
    formats: tuple[dict[Option, Formats], ...]  # of each menu's options

    @classmethod
    def of(cls, problem: JointProblem, duals: Duals) -> FormatGroups | None:
        """The groups; None when some table has only options that use further resources."""
        owner = [0] * len(problem.frame.names)
        groups, named = [], []
        for c, menu in enumerate(problem.menus):
            for t in menu.tables:
                owner[t] = c
            formats = {
                o: problem.formats_of(c, o) for o in menu.options if not any(any(p.extra) for p in o.pieces)
            }
            if not formats:
                return None
            rows: dict[Formats, list[Option]] = {}
            for option, key in formats.items():
                rows.setdefault(key, []).append(option)
            groups.append({key: _group(problem, c, row, duals) for key, row in rows.items()})
            named.append(formats)
        return cls(problem, tuple(groups), tuple(owner), tuple(named))

    def menu(self, t: int) -> dict[Formats, Group]:
        """The groups of a table or dense member."""
        return self.groups[self.owner[t]]

    def start(self, picks: Sequence[Option]) -> Start:
        """The formats of chosen options."""
        return tuple(self.formats[self.owner[t]][option] for t, option in enumerate(picks))

    def within(self, start: Start) -> bool:
        """Whether the budgets allow the formats."""
        costs = [self.menu(t)[key].cost for t, key in enumerate(start)]
        return all(sum(spent) <= 1.0 for spent in zip(*costs, strict=True))


def _group(problem: JointProblem, c: int, row: list[Option], duals: Duals) -> Group:
    made = [column(option, c, problem.frame) for option in row]
    seconds = min(float(one.share.sum()) + duals.memory * one.memory for one in made)
    return Group(tuple(row), row[0].cost, seconds, min(one.memory for one in made))


def natural_starts(groups: FormatGroups) -> list[Start]:
    """The starts that the budgets allow, each once."""
    found = dict.fromkeys(start for start in _all(groups) if groups.within(start))
    return list(found)


def _all(groups: FormatGroups) -> Iterator[Start]:
    members = range(len(groups.owner))
    for name in sorted({name for menu in groups.groups for key in menu for name in key}):
        yield tuple(_uniform(groups.menu(t), name) for t in members)
    yield _greedy(groups, "bytes")
    yield _greedy(groups, "seconds")
    if len(members) <= KNAPSACK_MEMBERS:
        rows = [list(groups.menu(t).items()) for t in members]
        options = [[KnapsackOption(group.bytes, group.cost) for _, group in row] for row in rows]
        try:
            found = solve_knapsack(options, groups.problem.frame.budgets)
        except InfeasibleError:
            return  # the budgets hold with options that use further resources only
        yield tuple(row[i][0] for row, i in zip(rows, found.choice, strict=True))


def _uniform(menu: dict[Formats, Group], name: str) -> Formats:
    """The formats of a member that are all ``name``, or else its weights', or else those of least cost."""
    for named in (lambda key: set(key) == {name}, lambda key: key[0] == name, lambda key: True):
        among = [key for key in menu if named(key)]
        if among:
            return min(among, key=lambda key: (sum(menu[key].cost), menu[key].seconds))
    raise AssertionError("a menu has formats")


def _greedy(groups: FormatGroups, what: str) -> Start:
    """Narrowings in the order of cost for each byte or second saved, while they fit."""

    def saved(group: Group) -> float:
        return group.bytes if what == "bytes" else group.seconds

    chosen = [
        min(menu, key=lambda key, menu=menu: (sum(menu[key].cost), saved(menu[key])))  # type: ignore[misc]
        for menu in (groups.menu(t) for t in range(len(groups.owner)))
    ]
    costs = [groups.menu(t)[key].cost for t, key in enumerate(chosen)]
    left = [1.0 - sum(spent) for spent in zip(*costs, strict=True)]
    moves: list[tuple[float, int, Formats, Formats]] = []

    def offer(t: int) -> None:
        menu = groups.menu(t)
        now = menu[chosen[t]]
        for key, group in menu.items():
            if saved(group) < saved(now):
                rate = (sum(group.cost) - sum(now.cost)) / (saved(now) - saved(group))
                heapq.heappush(moves, (rate, t, chosen[t], key))

    for t in range(len(chosen)):
        offer(t)
    while moves:
        _, t, before, key = heapq.heappop(moves)
        menu = groups.menu(t)
        after = [
            room - new + old for room, new, old in zip(left, menu[key].cost, menu[before].cost, strict=True)
        ]
        if chosen[t] == before and min(after, default=0.0) >= 0.0:
            chosen[t], left = key, after
            offer(t)
    return tuple(chosen)
