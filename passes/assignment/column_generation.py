"""Columns made on demand: the master program over every option, priced until none would lower it.

Its value is the proved bound of a joint problem; :mod:`passes.assignment.joint` places what it chose from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from passes.assignment.compiled import average_row
from passes.assignment.master import MARGIN, PENALTIES, Column, Duals, Limits, Master
from passes.assignment.problem import Option

PRICING_ROUNDS = 40

Pricer = Callable[[Duals], list[tuple[int, Option]]]
"""For each class whose menu is not complete, at least the option of least reduced cost at these prices."""


@dataclass(slots=True)
class Menu:
    """A class of tables that share one list of options; the list grows by pricing."""

    tables: tuple[int, ...]  # positions of the tables
    options: list[Option]


@dataclass(frozen=True, slots=True)
class Frame:
    """The machine and the limits of a joint problem; ``stretched`` limits are seconds of the step."""

    names: tuple[str, ...]
    hosts: int
    host_size: int
    capacity: float
    phases: tuple[str, ...]
    limits: tuple[float, ...] = ()  # those that are stretched are ignored unless ``step`` is given
    stretched: tuple[bool, ...] = ()
    budgets: tuple[float, ...] = ()
    base: float = 0.0  # seconds of the step besides the phases
    step: float | None = None  # given: the step may last that long


@dataclass(frozen=True, slots=True, eq=False)
class Relaxation:
    """The master program's optimum."""

    bound: float  # seconds of the step (``base`` and the sum of the phases); no solution is below
    duals: Duals
    columns: tuple[Column, ...]
    values: tuple[float, ...]
    index: tuple[tuple[int, int], ...]  # (class, option) of each column
    exceeded: bool  # no point keeps every limit
    limits: Limits


def relax(frame: Frame, menus: Sequence[Menu], price: Pricer | None = None) -> Relaxation:
    """Solve the master program over all columns, priced-out ones included."""
    limits = _limits(frame, menus)
    master = Master([len(menu.tables) for menu in menus], len(frame.phases), limits)
    index: list[tuple[int, int]] = []
    for c, menu in enumerate(menus):
        columns = [column(option, c, frame) for option in menu.options]
        fitting = [o for o, option in enumerate(menu.options) if fits_alone(option, frame)]
        for o in fitting or range(len(columns)):
            master.add(columns[o])
            index.append((c, o))
    bound = -math.inf
    for penalty in PENALTIES:
        master.penalise(penalty)
        reached, master = _priced_out(master, penalty, menus, price, frame, index)
        bound = max(bound, reached)
        if not master.exceeded():
            break
    return Relaxation(
        bound=bound - MARGIN * abs(bound) if math.isfinite(bound) else 0.0,
        duals=master.duals(),
        columns=tuple(master.columns),
        values=tuple(float(v) for v in master.values()),
        index=tuple(index),
        exceeded=master.exceeded(),
        limits=limits,
    )


def _solved(master: Master, penalty: float) -> tuple[float, Master]:
    """The value, and the program that has it: from nothing where GLOP fails from its last basis."""
    value = master.solve()
    if math.isfinite(value):
        return value, master
    fresh = Master(master.sizes, master.phases, master.limits)
    for made in master.columns:
        fresh.add(made)
    fresh.require(list(master.largest))
    fresh.penalise(penalty)
    return fresh.solve(), fresh


def _priced_out(
    master: Master,
    penalty: float,
    menus: Sequence[Menu],
    price: Pricer | None,
    frame: Frame,
    index: list[tuple[int, int]],
) -> tuple[float, Master]:
    """Add columns until none has a negative reduced cost; the best bound of the rounds, and the program."""
    value, master = _solved(master, penalty)
    if price is None:
        return value, master
    bound = -math.inf
    for _ in range(PRICING_ROUNDS):
        duals = master.duals()
        least = np.zeros(len(menus))
        grown = False
        for c, option in price(duals):
            made = column(option, c, frame)
            reduced = Master.reduced(made, duals)
            least[c] = min(least[c], reduced)
            if reduced < -1e-7 * max(value, master.limits.scale):
                grown |= _added(master, made, menus[c], option, index)
        bound = max(bound, value + float(np.array(master.sizes) @ least))
        if not grown:
            break
        value, master = _solved(master, penalty)
    return bound, master


def _added(master: Master, made: Column, menu: Menu, option: Option, index: list[tuple[int, int]]) -> bool:
    """Put a column into the program unless it is there.

    Its option may be on the menu without being there: too large for any rank, it bounds although nobody can place it.
    """
    if option not in menu.options:
        menu.options.append(option)
    at = made.owner, menu.options.index(option)
    if at in index:
        return False
    index.append(at)
    master.add(made)
    return True


def _limits(frame: Frame, menus: Sequence[Menu]) -> Limits:
    fixed = frame.step is not None
    extra = tuple(
        (frame.step if fixed and stretched else limit) or 0.0
        for limit, stretched in zip(frame.limits, frame.stretched, strict=True)
    )
    least = sum(
        len(m.tables) * min(sum(map(sum, (p.load for p in o.pieces))) for o in m.options) for m in menus
    )
    return Limits(
        capacity=frame.capacity,
        extra=extra,
        stretched=tuple(stretched and not fixed for stretched in frame.stretched),
        budgets=frame.budgets,
        base=frame.base,
        scale=max(frame.base + least / (frame.hosts * frame.host_size), 1e-12),
    )


def fits_alone(option: Option, frame: Frame) -> bool:
    """Whether an empty rank takes the option's largest piece beside what it puts on every rank."""
    step = frame.step if frame.step is not None else math.inf
    limits = [step if s else limit for limit, s in zip(frame.limits, frame.stretched, strict=True)]
    whole = [p for p in option.pieces if p.scope == "all"]
    parts = [p for p in option.pieces if p.scope != "all"]
    if sum(p.memory * p.count for p in whole) + max((p.memory for p in parts), default=0.0) > frame.capacity:
        return False
    return all(
        sum(p.extra[e] * p.count for p in whole if p.extra)
        + max((p.extra[e] for p in parts if p.extra), default=0.0)
        <= limit
        for e, limit in enumerate(limits)
    )


def column(option: Option, owner: int, frame: Frame) -> Column:
    """An option as a column of the master program."""
    ranks = frame.hosts * frame.host_size
    share, memory, biggest, extra, choice = average_row(
        option, ranks, frame.hosts, len(frame.phases), len(frame.limits), len(frame.budgets)
    )
    return Column(owner, np.array(share), np.array(biggest), memory, np.array(extra), np.array(choice.cost))
