"""The problem in the form the solver works on: flat arrays for bounds, plain tuples for packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ir.errors import InputError
from passes.assignment.problem import Floats, Option, Problem

RANK, HOST = 0, 1


class Group(NamedTuple):
    """Identical pieces of an option that need a place."""

    scope: int  # RANK or HOST
    load: float  # seconds on each rank, all phases together
    memory: float  # bytes on each rank
    copies: int
    phases: tuple[float, ...]
    first: int  # index of the first piece in the option's placement
    extra: tuple[float, ...] = ()  # further resources on each rank


class Choice(NamedTuple):
    """An option as the packer sees it."""

    groups: tuple[Group, ...]
    fixed: float  # seconds that it adds to every rank, all phases together
    fixed_memory: float  # bytes that it adds to every rank
    together: bool
    distinct: bool
    allowed: frozenset[int] | None
    size: int  # entries of its placement
    plain: bool  # none of together, distinct, allowed
    fixed_extra: tuple[float, ...] = ()  # further resources that it takes on every rank
    cost: tuple[float, ...] = ()  # share of each budget


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """Arrays over all options of all tables, table by table (``start`` has the offsets, T + 1 entries).

    ``share`` is the load an option adds to the average rank (seconds, by phase), ``mean_memory`` the
    bytes; ``biggest`` is the largest load that a single rank is sure to get from it, by phase.
    """

    problem: Problem
    choices: tuple[tuple[Choice, ...], ...]
    start: NDArray[np.int64]
    table: NDArray[np.int64]
    share: Floats  # (N, K)
    total_share: Floats  # (N,)
    mean_memory: Floats  # (N,)
    everywhere: Floats  # (N, K): load that the option puts on every rank
    biggest: Floats  # (N, K): largest piece plus ``everywhere``
    total_biggest: Floats  # (N,)
    peak_memory: Floats  # (N,): bytes some rank needs for this option alone
    usable: NDArray[np.bool_]  # (N,): not dominated and fits an empty machine
    mean_extra: Floats  # (N, E): further resources taken on the average rank
    cost: Floats  # (N, B): shares of the budgets

    @property
    def tables(self) -> int:
        """Number of tables."""
        return len(self.choices)


def compile_option(
    option: Option, phases: int, what: str = "an option", limits: int = 0, budgets: int = 0
) -> Choice:
    """An option as the packer sees it; raises InputError on bad loads, resources or shares."""
    groups: list[Group] = []
    fixed = fixed_memory = 0.0
    fixed_extra = [0.0] * limits
    cursor = 0
    for piece in option.pieces:
        if len(piece.load) != phases:
            raise InputError(f"{what} has a load of {len(piece.load)} phases; the problem has {phases}")
        bad = not all(np.isfinite(x) and x >= 0 for x in (*piece.load, piece.memory))
        if bad or piece.count < 1:
            raise InputError(f"{what} has a negative, missing or infinite load, memory or count")
        total = sum(piece.load)
        extra = _vector(piece.extra, limits, what)
        if piece.scope == "all":
            fixed += total * piece.count
            fixed_memory += piece.memory * piece.count
            fixed_extra = [a + b * piece.count for a, b in zip(fixed_extra, extra, strict=True)]
            cursor += piece.count
            continue
        scope = HOST if piece.scope == "host" else RANK
        groups.append(Group(scope, total, piece.memory, piece.count, piece.load, cursor, extra))
        cursor += piece.count
    groups.sort(key=lambda g: (-g.load, g.first))
    allowed = None if option.allowed_ranks is None else frozenset(option.allowed_ranks)
    plain = not (option.together or option.distinct or allowed is not None)
    return Choice(
        tuple(groups),
        fixed,
        fixed_memory,
        option.together,
        option.distinct,
        allowed,
        cursor,
        plain,
        tuple(fixed_extra),
        _vector(option.cost, budgets, what),
    )


def _vector(values: tuple[float, ...], length: int, what: str) -> tuple[float, ...]:
    """``values``, zeros when there are none; raises InputError on a wrong length or a bad value."""
    if not values:
        return (0.0,) * length
    if len(values) != length or not all(np.isfinite(x) and x >= 0 for x in values):
        raise InputError(f"{what} takes {values} of {length} resources; give as many values, none negative")
    return values


def _impossible(choice: Choice, problem: Problem) -> bool:
    """An option that cannot be placed even on an empty machine (necessary conditions only)."""
    ranks, hosts = problem.ranks, problem.hosts
    if choice.allowed is not None:
        if not choice.allowed or min(choice.allowed) < 0 or max(choice.allowed) >= ranks:
            raise InputError(f"a pinned table names ranks outside 0..{ranks - 1}")
        ranks = len(choice.allowed)
    if choice.together:
        ranks = min(ranks, problem.host_size)
    spare = problem.capacity - choice.fixed_memory
    if spare < 0 or any(group.memory > spare for group in choice.groups):
        return True
    for e, limit in enumerate(problem.limits):
        if choice.fixed_extra[e] + max((g.extra[e] for g in choice.groups), default=0.0) > limit:
            return True
    if any(cost > budget for cost, budget in zip(choice.cost, problem.budgets, strict=True)):
        return True
    places = {RANK: ranks, HOST: hosts}
    if choice.distinct and any(group.copies > places[group.scope] for group in choice.groups):
        return True
    rank_bytes = sum(
        g.memory * g.copies * (problem.host_size if g.scope == HOST else 1) for g in choice.groups
    )
    limit = problem.ranks if any(g.scope == HOST for g in choice.groups) else ranks
    return rank_bytes > spare * limit * (1 + 1e-12)


def _dominated(choices: tuple[Choice, ...], index: int) -> bool:
    """Another option makes the same pieces and restricts their places less (or comes first)."""
    mine = choices[index]
    for other, theirs in enumerate(choices):
        if other == index or not theirs.plain or theirs.fixed != mine.fixed:
            continue
        same = tuple((g[:5], g.extra) for g in theirs.groups) == tuple((g[:5], g.extra) for g in mine.groups)
        same = same and (theirs.fixed_memory, theirs.fixed_extra) == (mine.fixed_memory, mine.fixed_extra)
        if same and theirs.cost == mine.cost and (not mine.plain or other < index):
            return True
    return False


def compile_problem(problem: Problem) -> Compiled:
    """Check the problem and lay it out.

    Raises:
        InputError: a table without options, loads of the wrong length, negative or infinite values.
    """
    if len(problem.names) != len(problem.options):
        raise InputError(f"{len(problem.names)} table names for {len(problem.options)} lists of options")
    if problem.hosts < 1 or problem.host_size < 1:
        raise InputError("a machine needs at least one host and one rank a host")
    phases = len(problem.phases)
    memo: dict[tuple[Option, ...], tuple[tuple[Choice, ...], list[bool]]] = {}
    choices: list[tuple[Choice, ...]] = []
    usable: list[bool] = []
    for name, options in zip(problem.names, problem.options, strict=True):
        if not options:
            raise InputError(f"table {name!r} has no option to choose from")
        known = memo.get(options)
        if known is None:
            made = tuple(
                compile_option(
                    o,
                    phases,
                    f"option {o.label!r} of table {name!r}",
                    len(problem.limits),
                    len(problem.budgets),
                )
                for o in options
            )
            fine = [not _impossible(c, problem) and not _dominated(made, i) for i, c in enumerate(made)]
            known = memo[options] = (made, fine)
        choices.append(known[0])
        usable += known[1]
    return _arrays(problem, tuple(choices), usable)


def _arrays(problem: Problem, choices: tuple[tuple[Choice, ...], ...], usable: list[bool]) -> Compiled:
    ranks, hosts, phases = problem.ranks, problem.hosts, len(problem.phases)
    rows: dict[int, list[tuple[list[float], float, list[float], list[float], float]]] = {}
    share, memory, fixed, biggest, peak, table = [], [], [], [], [], []
    extra = [_mean_extra(choice, ranks, hosts) for options in choices for choice in options]
    for t, options in enumerate(choices):
        key = id(options)
        if key not in rows:
            rows[key] = [
                _row(choice, problem.options[t][i], ranks, hosts, phases) for i, choice in enumerate(options)
            ]
        for row in rows[key]:
            share.append(row[0])
            memory.append(row[1])
            fixed.append(row[2])
            biggest.append(row[3])
            peak.append(row[4])
        table += [t] * len(options)
    counts = np.array([len(options) for options in choices], dtype=np.int64)
    shares = np.array(share).reshape(-1, phases)
    largest = np.array(biggest).reshape(-1, phases)
    return Compiled(
        problem=problem,
        choices=choices,
        start=np.concatenate([[0], np.cumsum(counts)]),
        table=np.array(table, dtype=np.int64),
        share=shares,
        total_share=shares.sum(axis=1),
        mean_memory=np.array(memory),
        everywhere=np.array(fixed).reshape(-1, phases),
        biggest=largest,
        total_biggest=np.array(
            [max((g.load for g in c.groups), default=0.0) + c.fixed for options in choices for c in options]
        ),
        peak_memory=np.array(peak),
        usable=np.array(usable),
        mean_extra=np.array(extra, dtype=np.float64).reshape(len(table), len(problem.limits)),
        cost=np.array([c.cost for options in choices for c in options], dtype=np.float64).reshape(
            len(table), len(problem.budgets)
        ),
    )


def _mean_extra(choice: Choice, ranks: int, hosts: int) -> list[float]:
    mean = list(choice.fixed_extra)
    for group in choice.groups if mean else ():
        part = group.copies / (hosts if group.scope == HOST else ranks)
        mean = [a + part * b for a, b in zip(mean, group.extra, strict=True)]
    return mean


def average_row(
    option: Option, ranks: int, hosts: int, phases: int, limits: int, budgets: int
) -> tuple[list[float], float, list[float], list[float], Choice]:
    """What an option adds to the average rank: seconds by phase, bytes, largest piece by phase, resources."""
    choice = compile_option(option, phases, f"option {option.label!r}", limits, budgets)
    share, memory, _, biggest, _ = _row(choice, option, ranks, hosts, phases)
    return share, memory, biggest, _mean_extra(choice, ranks, hosts), choice


def _row(
    choice: Choice, option: Option, ranks: int, hosts: int, phases: int
) -> tuple[list[float], float, list[float], list[float], float]:
    fixed = [sum(p.load[k] * p.count for p in option.pieces if p.scope == "all") for k in range(phases)]
    share, largest = list(fixed), [0.0] * phases
    memory = choice.fixed_memory
    for group in choice.groups:
        part = group.copies / (hosts if group.scope == HOST else ranks)
        memory += part * group.memory
        for k in range(phases):
            share[k] += part * group.phases[k]
            largest[k] = max(largest[k], group.phases[k])
    peak = choice.fixed_memory + max((g.memory for g in choice.groups), default=0.0)
    return share, memory, fixed, [a + b for a, b in zip(fixed, largest, strict=True)], peak
