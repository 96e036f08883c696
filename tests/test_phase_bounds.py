"""Bounds and placements for several phases against exhaustive search and their own rules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.assignment import Option, Piece, Problem, evaluate, solve
from passes.assignment.budget import Budget
from passes.assignment.compiled import compile_problem
from passes.assignment.dual_bound import DualBound
from passes.assignment.fitting import fit
from passes.assignment.overflow import Overflow
from passes.assignment.room_bound import RoomBound
from passes.assignment.room_dual import RoomDual
from passes.assignment.room_program import RoomProgram
from passes.assignment.whole_bound import whole_bound
from tests.test_assignment import drawn, exhaustive, placements, random_problem


def sized(sizes: list[float], ranks: int, phases: int = 2) -> Problem:
    """One option a table, one piece of equal load in every phase."""
    options = tuple((Option("whole", (Piece("rank", (x,) * phases, 1.0),)),) for x in sizes)
    names = tuple(f"t{i}" for i in range(len(sizes)))
    return Problem(names, options, 1, ranks, 100.0, tuple(f"p{k}" for k in range(phases)))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    phases=st.integers(2, 3),
    slack=st.sampled_from([0.6, 1.5, 4.0]),
    above=st.sampled_from([1.0, 1.001, 1.3, 3.0]),
)
def test_bounds_are_below_the_optimum(seed: int, phases: int, slack: float, above: float) -> None:
    """Whatever incumbent they start from; tight memory, hosts, pins and copies included."""
    hosts, size = (2, 2) if seed % 2 else (1, 3)
    problem = random_problem(seed, phases, 3, hosts, size, slack)
    optimum = exhaustive(problem)
    if math.isinf(optimum):
        return
    compiled = compile_problem(problem)
    bound, _ = RoomBound(compiled, optimum * above).run()
    assert bound <= optimum * (1 + 1e-9)
    assert DualBound(compiled, optimum * above).run(nodes=8)[0] <= optimum * (1 + 1e-9)
    assert whole_bound(compiled, optimum * above).bound <= optimum * (1 + 1e-9)


def test_the_dual_sees_what_whole_pieces_need() -> None:
    """Seven pieces of 0.4 on three ranks: averages say 0.93 a phase, but a rank holds three, 1.2."""
    problem = sized([0.4] * 7, 3)
    bound, _ = DualBound(compile_problem(problem), 3.0).run()
    assert bound == pytest.approx(2.4, rel=1e-3)


def test_the_dual_equals_the_linear_program_of_a_box() -> None:
    """Two algorithms for one program, where no row of a single table binds: many small tables, held rooms."""
    random = np.random.default_rng(3)
    options = tuple(
        (
            Option("rank", (Piece("rank", (float(a), float(b)), 1.0),)),
            Option("all", (Piece("all", (0.3 * float(b) / 4, 0.3 * float(a) / 4), 0.0),)),
        )
        for a, b in random.random((60, 2))
    )
    problem = Problem(tuple(f"t{i}" for i in range(60)), options, 1, 4, 1000.0, ("p", "q"))
    compiled = compile_problem(problem)
    rooms = np.array([0.09, 0.12])
    exact, dual = (kind(compiled, 60.0).solve(rooms, rooms) for kind in (RoomProgram, RoomDual))
    assert exact is not None
    assert dual is not None
    assert dual.value <= exact.value * (1 + 1e-6)
    assert dual.value == pytest.approx(exact.value, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_box_bounds_every_solution_whose_rooms_are_in_it(seed: int, data: st.DataObject) -> None:
    """Rooms are what placed pieces put on the slowest rank; any choice and placement is a witness."""
    problem = random_problem(seed, 2, 4, 2, 2, slack=3.0)
    compiled = compile_problem(problem)
    choice, placement = drawn(problem, data)
    loads, memory = evaluate(problem, choice, placement)
    if memory.max() > problem.capacity:
        return
    value = float(loads.max(axis=0).sum())
    fixed = compiled.everywhere[compiled.start[:-1] + np.array(choice)].sum(axis=0)
    rooms = (loads.max(axis=0) - fixed) / (2 * value)
    programs: tuple[RoomProgram | RoomDual, ...] = (
        RoomProgram(compiled, 2 * value),
        RoomDual(compiled, 2 * value),
    )
    for program, stretch in itertools.product(programs, (1.0, 1.1)):
        point = program.solve(rooms / stretch, np.minimum(rooms * stretch, 1.0))
        assert point is not None
        assert point.value <= 0.5 * (1 + 1e-9)


def test_equal_pieces_need_whole_places() -> None:
    """Nine pieces of 0.4 on four ranks: three share a rank, in each of two phases: 2.4, not 1.8."""
    problem = sized([0.4] * 9, 4)
    compiled = compile_problem(problem)
    bound, leaf = RoomBound(compiled, 2.6).run()
    assert bound == pytest.approx(2.4, rel=1e-3)
    assert leaf is not None
    assert leaf.low == pytest.approx([1.2 / 2.6] * 2, rel=1e-3)
    assert whole_bound(compiled, 2.6).bound == pytest.approx(2.4, rel=1e-3)
    assert solve(problem, time_limit=0.3).gap <= 1e-3


def test_what_all_ranks_carry_stands_beside_the_largest_piece() -> None:
    """One table copied to all ranks (1 s each) and one whole piece of 2 s: 3 s, though no average shows it."""
    options = (
        (Option("copy", (Piece("all", (1.0, 0.0), 1.0),)),),
        (Option("whole", (Piece("rank", (2.0, 0.0), 1.0),)),),
    )
    problem = Problem(("a", "b"), options, 1, 8, 10.0, ("p", "q"))
    bound, _ = RoomBound(compile_problem(problem), 4.0).run()
    assert bound == pytest.approx(3.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), fill=st.floats(0.1, 1.0), target=st.floats(0.2, 5.0))
def test_fitting_and_repair_keep_every_rule(seed: int, fill: float, target: float) -> None:
    problem = random_problem(seed, 2, 7, 2, 2, slack=2.0)
    compiled = compile_problem(problem)
    rng = np.random.default_rng(seed)
    usable = [np.flatnonzero(compiled.usable[a:b]) for a, b in itertools.pairwise(compiled.start)]
    choice = [int(rng.choice(some)) for some in usable]
    targets = np.full(2, target)
    places = fit(compiled, choice, targets, fill, Budget(10.0))
    if places is None:
        return
    repair = Overflow(compiled, choice, places, seed)
    before = repair.value
    value = repair.run(targets, 60, Budget(10.0))
    placement = tuple(tuple(row) for row in repair.place(places))
    loads, memory = evaluate(problem, choice, placement)
    assert value <= before * (1 + 1e-12)
    assert value == pytest.approx(loads.max(axis=0).sum())
    assert memory.max() <= problem.capacity * (1 + 1e-9)
    for options, j, row in zip(problem.options, choice, placement, strict=True):
        assert row in placements(options[j], 2, 2)


def test_repair_reaches_targets_that_a_perfect_packing_meets() -> None:
    """Pieces made by cutting full ranks, with two unlike phases: targets 3 % above are met."""
    rng = np.random.default_rng(5)
    cuts = [rng.dirichlet(np.ones(4), size=2).T for _ in range(12)]
    options = tuple(
        (Option("whole", (Piece("rank", (float(a), float(b)), 1.0),)),) for cut in cuts for a, b in cut
    )
    problem = Problem(tuple(f"t{i}" for i in range(48)), options, 2, 6, 100.0, ("p", "q"))
    targets = np.full(2, 1.08)
    places = fit(compile_problem(problem), [0] * 48, targets, 0.8, Budget(10.0))
    assert places is not None
    repair = Overflow(compile_problem(problem), [0] * 48, places, 0)
    assert repair.run(targets, 2000, Budget(10.0)) <= 2 * 1.08 * (1 + 1e-9)


def test_a_choice_with_nothing_to_place() -> None:
    """Found by random plans: every table on all ranks, as replicated tables without gradients are."""
    option = Option("everywhere", (Piece("all", (1.0, 2.0), 3.0),))
    problem = Problem(("a", "b"), ((option,), (option,)), 1, 2, 100.0, ("p", "q"))
    compiled = compile_problem(problem)
    places = fit(compiled, [0, 0], np.zeros(2), 0.8, Budget(1.0))
    assert places is not None
    repair = Overflow(compiled, [0, 0], places, 0)
    assert repair.run(np.zeros(2), 10, Budget(1.0)) == pytest.approx(2 * (1.0 + 2.0))


@pytest.mark.parametrize("tables", [30, 90])
def test_many_tables_are_repeatable_and_closer_than_before(tables: int) -> None:
    """Heavy-tailed pieces of equal length in one phase, as an exchange of outputs has; two runs are equal."""
    rng = np.random.default_rng(tables)
    options = []
    for _ in range(tables):
        work = float(rng.lognormal(0.0, 1.0))
        whole = Option("whole", (Piece("rank", (work, 1.0), 1.0),))
        spread = Option("spread", (Piece("host", (work / 4, 0.5), 0.25),))
        options.append((whole, spread))
    problem = Problem(tuple(f"t{i}" for i in range(tables)), tuple(options), 4, 4, 100.0, ("p", "q"))
    first, again = solve(problem, time_limit=0.6), solve(problem, time_limit=0.6)
    assert (first.choice, first.placement, first.lower_bound) == (
        again.choice,
        again.placement,
        again.lower_bound,
    )
    assert first.gap <= 0.12
