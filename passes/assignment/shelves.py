"""Starting choices for tables that are alike: layers of equal pieces that fill every place, at the least height.

A layer puts one piece of the same kind on every rank (or host), so it takes ``places / copies`` whole tables
and is as high as its piece. The layers of least height that take ``n`` equal tables are a covering knapsack,
solved exactly by recursion over ``n``; tables that are cheap enough on every rank are left out of the layers,
cheapest first. The shelves of Coffman, Garey, Johnson and Tarjan (1980, Performance bounds for level-oriented
two-dimensional packing algorithms) with one class of equal items a shelf.
"""

from __future__ import annotations

import math

import numpy as np

from passes.assignment.compiled import HOST, Choice, Compiled


def alike(compiled: Compiled) -> list[list[int]]:
    """Tables whose placed pieces are the same in every option, where there is more than one.

    What the options put on all ranks may differ, and so may their memory.
    """
    keys: dict[int, int] = {}  # by identity of the options: compile_problem shares equal ones
    known: dict[tuple[object, ...], int] = {}
    classes: dict[int, list[int]] = {}
    for t, options in enumerate(compiled.choices):
        if id(options) not in keys:
            key = tuple(tuple((g.scope, g.phases, g.copies) for g in choice.groups) for choice in options)
            keys[id(options)] = known.setdefault(key, len(known))
        classes.setdefault(keys[id(options)], []).append(t)
    return [members for members in classes.values() if len(members) > 1]


def shelf_choice(compiled: Compiled, base: list[int], classes: list[list[int]]) -> list[int]:
    """``base`` with the tables of each class in the layers of least height, all phases together."""
    made = list(base)
    for members in classes:
        sizes = [_layer(compiled, choice) for choice in compiled.choices[members[0]]]
        copies = sorted((_cheapest_everywhere(compiled, t), t) for t in members)
        heights, first = _layers(sizes, len(members))
        before = np.concatenate([[0.0], np.cumsum([cost for (cost, _), _ in copies])])
        whole = int(np.argmin(before + np.array(heights[::-1])))  # tables on every rank
        for (_, option), t in copies[:whole]:
            made[t] = option
        left = [t for _, t in copies[whole:]]
        while left:
            option, taken = first[len(left)]
            for t in left[:taken]:
                if option >= 0 and compiled.usable[compiled.start[t] + option]:
                    made[t] = option
            left = left[taken:]
    return made


def _layer(compiled: Compiled, choice: Choice) -> tuple[float, int] | None:
    """Height of the layers of one kind, and the tables that they take; None without layers."""
    if len(choice.groups) != 1 or not choice.plain or choice.fixed > 0:
        return None
    group, problem = choice.groups[0], compiled.problem
    places = problem.hosts if group.scope == HOST else problem.ranks
    deep = math.ceil(group.copies / places)
    return deep * group.load, deep * places // group.copies


def _cheapest_everywhere(compiled: Compiled, t: int) -> tuple[float, int]:
    """The cheapest option that loads every rank alike, (infinity, 0) without one."""
    found = [
        (choice.fixed, j)
        for j, choice in enumerate(compiled.choices[t])
        if not choice.groups and compiled.usable[compiled.start[t] + j]
    ]
    return min(found, default=(math.inf, 0))


def _layers(sizes: list[tuple[float, int] | None], tables: int) -> tuple[list[float], list[tuple[int, int]]]:
    """Least height for 0, 1, ... tables, and the first layer (option, tables it takes) of each."""
    heights, first = [0.0], [(-1, 0)]
    for count in range(1, tables + 1):
        best = (math.inf, -1, count)
        for option, size in enumerate(sizes):
            if size is not None:
                taken = min(size[1], count)
                best = min(best, (size[0] + heights[count - taken], option, taken))
        heights.append(best[0])
        first.append((best[1], best[2]))
    return heights, first
