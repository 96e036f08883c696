"""Starting choices against exhaustive search: layers of equal tables, and sizes swept one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.assignment import Option, Piece, Problem, solve
from passes.assignment.compiled import compile_problem
from passes.assignment.relaxation import average_bound
from passes.assignment.shelves import alike, shelf_choice
from passes.assignment.starts import WHOLE_SHARES, memory_choices, swept_choices


def machine(menus: list[tuple[Option, ...]], hosts: int, size: int) -> Problem:
    """Tables with these options, memory without limit, one phase."""
    return Problem(tuple(f"t{t}" for t in range(len(menus))), tuple(menus), hosts, size, 1e9, ("all",))


def menu(whole: float, half: float, host: float, copy: float) -> tuple[Option, ...]:
    """Whole on a rank, two halves, on a host, on all ranks."""
    return (
        Option("whole", (Piece("rank", (whole,), 1.0),)),
        Option("halves", (Piece("rank", (half,), 0.5, 2),)),
        Option("host", (Piece("host", (host,), 0.5),)),
        Option("copy", (Piece("all", (copy,), 1.0),)),
    )


def least_height(menus: list[tuple[Option, ...]], hosts: int, size: int) -> float:
    """Height of the best layers by trying every number of layers of each kind and every set of copies."""
    whole, half, host = (option.pieces[0].load[0] for option in menus[0][:3])
    ranks, best = hosts * size, math.inf
    copies = sorted(options[3].pieces[0].load[0] for options in menus)
    for a, b, c in itertools.product(range(len(menus) + 1), repeat=3):
        for out in range(len(menus) + 1):
            if a * ranks + b * (ranks // 2) + c * hosts + out >= len(menus):
                best = min(best, a * whole + b * half + c * host + sum(copies[:out]))
    return best


@settings(max_examples=25, deadline=None)
@given(
    tables=st.integers(2, 9),
    hosts=st.integers(1, 3),
    prices=st.tuples(st.floats(1, 2), st.floats(0.55, 1.2), st.floats(0.3, 1.5)),
    copies=st.lists(st.floats(0.05, 2), min_size=9, max_size=9),
)
def test_layers_are_the_lowest(
    tables: int, hosts: int, prices: tuple[float, float, float], copies: list[float]
) -> None:
    menus = [menu(*prices, copy) for copy in copies[:tables]]
    compiled = compile_problem(machine(menus, hosts, 2))
    chosen = shelf_choice(compiled, [0] * tables, alike(compiled))
    count = [chosen.count(j) for j in range(4)]
    height = sum(copies[t] for t, j in enumerate(chosen) if j == 3)
    for j, places in ((0, 2 * hosts), (1, hosts), (2, hosts)):
        height += math.ceil(count[j] / places) * prices[j]
    assert height <= least_height(menus, hosts, 2) * (1 + 1e-9)


def test_tables_that_differ_in_a_placed_piece_are_not_alike() -> None:
    menus = [menu(1.0, 0.6, 0.5, 0.4), menu(1.0, 0.6, 0.5, 0.3), menu(1.0, 0.7, 0.5, 0.4)]
    assert alike(compile_problem(machine(menus, 2, 2))) == [[0, 1]]


def test_a_quick_search_fills_the_machine_in_layers() -> None:
    """26 tables on 8 ranks: three whole ones a rank and two in quarters; all averages are lower elsewhere."""
    quarters = Option("quarters", (Piece("rank", (0.35,), 1.0, 4),))
    eighths = Option("eighths", (Piece("rank", (0.2,), 1.0, 8),))
    whole = Option("whole", (Piece("rank", (1.0,), 1.0),))
    solution = solve(machine([(whole, quarters, eighths)] * 26, 1, 8), effort="quick")
    # 24 whole ones leave 2 tables: 8 quarters, one a rank; any 25 whole ones stack four on a rank
    assert solution.objective <= 3.35 * (1 + 1e-9)


def test_the_sweep_tries_pieces_just_below_the_largest() -> None:
    """A dearer option on hosts packs without waste where the cheapest average stacks pieces."""
    ranks = Option("ranks", (Piece("rank", (0.5,), 1.0, 3),))
    hosts = Option("hosts", (Piece("host", (0.48,), 1.0, 1),))
    problem = machine([(ranks, hosts)] * 2, 2, 2)
    compiled = compile_problem(problem)
    assert [1, 1] in swept_choices(compiled, 0.6)
    assert solve(problem, effort="quick").objective == 0.48


@pytest.mark.parametrize("seed", range(6))
def test_choices_for_tight_memory_are_the_best_of_all(seed: int) -> None:
    """The least average of every choice that fits, tried one by one; equal tables and one large one."""
    rng = np.random.default_rng(seed)
    shapes = [
        (float(a), float(b)) for a, b in zip(rng.uniform(0.5, 4.0, 3), rng.uniform(2.5, 4.0, 3), strict=True)
    ]
    menus = []
    for load, size in [shapes[0]] * 3 + [shapes[1]] * 3 + [(2.0, 9.0)]:
        menus.append(
            (
                Option("fast", (Piece("rank", (load,), size),)),
                Option("half", (Piece("rank", (2.5 * load,), 0.5 * size),)),
                Option("slow", (Piece("rank", (9.0 * load,), 0.1 * size),)),
            )
        )
    problem = Problem(tuple("abcdefg"), tuple(menus), 1, 2, 6.0, ("all",))
    compiled = compile_problem(problem)
    bound, relaxed = average_bound(compiled)
    assert relaxed.price > 0
    flat = [np.arange(a, b) for a, b in itertools.pairwise(compiled.start)]
    allowed = compiled.usable & (compiled.total_biggest <= bound * (1 + 1e-9))
    averages = []
    for share in WHOLE_SHARES:
        least = math.inf
        for options in itertools.product(*flat):
            chosen = list(options)
            if compiled.mean_memory[chosen].sum() <= 6.0 * share and allowed[chosen].all():
                least = min(least, float(compiled.total_share[chosen].sum()))
        averages.append(least)
    made = [
        compiled.total_share[compiled.start[:-1] + np.array(c)].sum() for c in memory_choices(compiled, bound)
    ]
    assert made == pytest.approx(sorted({round(a, 9) for a in averages if math.isfinite(a)}), rel=2e-3)
