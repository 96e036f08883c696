"""Splitting pairs of places: exact on two ranks, legal, repeatable and never worse on any machine."""

from __future__ import annotations

import random

import numpy as np
import pytest

from passes.assignment import Option, Piece, Problem, evaluate, solve
from passes.assignment.budget import Budget
from passes.assignment.compiled import compile_problem
from passes.assignment.pair_polish import PairPolish
from passes.assignment.problem import Solution
from passes.assignment.target_search import Incumbent
from tests.test_assignment import exhaustive, random_problem


def polished(problem: Problem, found: Solution, work: float, seed: int = 0) -> Incumbent:
    best = Incumbent(found.objective, found.objective, list(found.choice), [list(p) for p in found.placement])
    PairPolish(compile_problem(problem), best, seed).run(Budget(work), found.lower_bound)
    return best


def worst_start(problem: Problem) -> Solution:
    """Every table on the first rank, by its first option."""
    choice = (0,) * len(problem.options)
    placement = ((0,),) * len(problem.options)
    loads, memory = evaluate(problem, choice, placement)
    peaks = loads.max(axis=0)
    return Solution(
        choice,
        placement,
        float(peaks.sum()),
        tuple(peaks),
        float(peaks.sum()) / 4,
        "feasible",
        "",
        loads,
        memory,
    )


@pytest.mark.parametrize("seed", range(4))
def test_two_ranks_are_split_as_by_exhaustive_search(seed: int) -> None:
    draw = random.Random(seed)
    options = []
    for _ in range(4):  # at most three leave one side, so that every split is looked at
        load = (draw.uniform(1.0, 9.0), draw.uniform(1.0, 9.0))
        options.append((Option("rank", (Piece("rank", load, 1.0),)),))
    problem = Problem(tuple("abcd"), tuple(options), 1, 2, 100.0, ("forward", "backward"))
    best = polished(problem, worst_start(problem), 0.15)
    assert best.value == pytest.approx(exhaustive(problem), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_legal_and_repeatable(seed: int) -> None:
    problem = random_problem(seed, 3, 12, 2, 3, slack=3.0)
    found = solve(problem, effort="quick")
    best = polished(problem, found, 0.05, seed)
    loads, memory = evaluate(problem, best.choice, tuple(tuple(places) for places in best.placement))
    assert best.value <= found.objective
    assert best.value == pytest.approx(float(loads.max(axis=0).sum()), rel=1e-9)
    assert memory.max() <= problem.capacity * (1 + 1e-12)
    again = polished(problem, found, 0.05, seed)
    assert (again.choice, again.placement) == (best.choice, best.placement)


def test_hosts_swap_what_loads_all_their_ranks() -> None:
    """Two large and two small tables over hosts: the start has the large ones together."""
    sizes = (5.0, 5.0, 1.0, 1.0)
    options = tuple((Option("host", (Piece("host", (size, 0.1), 1.0),)),) for size in sizes)
    problem = Problem(tuple("abcd"), options, 2, 2, 100.0, ("forward", "backward"))
    placement = ((0,), (0,), (1,), (1,))
    loads, memory = evaluate(problem, (0, 0, 0, 0), placement)
    start = Solution((0,) * 4, placement, 10.2, (10.0, 0.2), 6.2, "feasible", "", loads, memory)
    best = polished(problem, start, 0.05)
    assert best.value == pytest.approx(6.2)
    assert np.ptp([best.placement[0][0], best.placement[1][0]]) == 1
