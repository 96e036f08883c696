"""Classes of hosts and liftings: against exhaustive search, against every solution in a box, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.assignment import Option, Piece, Problem, evaluate, solve
from passes.assignment.budget import Budget
from passes.assignment.by_class import improve_by_class
from passes.assignment.compiled import compile_problem
from passes.assignment.host_bound import HostBound
from passes.assignment.host_classes import CLASSES
from passes.assignment.host_program import Box, HostProgram
from passes.assignment.room_bound import RoomBound
from passes.assignment.target_search import Incumbent
from tests.test_assignment import drawn, exhaustive


def exchanging(seed: int, tables: int, hosts: int, size: int, capacity: float = 100.0) -> Problem:
    """Tables on a rank, a host or everywhere; their outputs are equal in two phases, their lookups are not."""
    rng = np.random.default_rng(seed)
    options = []
    for _ in range(tables):
        ids, rows = (float(x) for x in rng.lognormal(0.0, 0.8, 2))
        whole = Option("whole", (Piece("rank", (ids, 4.0, 4.0, rows), 1.0),))
        host = Option("host", (Piece("host", (ids / size + 0.02, 1.0, 1.0, rows / size + 0.02), 0.5),))
        every = Option("every", (Piece("all", (0.1, float(rng.choice([0.5, 9.0])), 0.0, rows), 1.0),))
        two = Option("two", (Piece("rank", (ids / 2 + 0.05, 2.0, 2.0, rows / 2), 0.5, 2),), distinct=True)
        options.append((whole, host, every, two)[: 3 + seed % 2])
    names = tuple(f"t{i}" for i in range(tables))
    return Problem(names, tuple(options), hosts, size, capacity, ("ids", "out", "grad", "rows"))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    capacity=st.sampled_from([2.0, 100.0]),
    above=st.sampled_from([1.0, 1.001, 1.2, 2.0]),
)
def test_the_bound_is_below_the_optimum(seed: int, capacity: float, above: float) -> None:
    problem = exchanging(seed, 3, 2, 2, capacity)
    optimum = exhaustive(problem)
    if math.isinf(optimum):
        return
    bound, _ = HostBound(compile_problem(problem), optimum * above).run(40)
    assert bound <= optimum * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_box_bounds_every_solution_in_it(seed: int, data: st.DataObject) -> None:
    """Any choice and placement is a witness, whatever phases the liftings take."""
    problem = exchanging(seed, 9, 3, 2)
    choice, placement = drawn(problem, data)
    loads, _ = evaluate(problem, choice, placement)
    value = float(loads.max(axis=0).sum())
    compiled = compile_problem(problem)
    program = HostProgram(compiled, 2 * value)
    fixed = compiled.everywhere[compiled.start[:-1] + np.array(choice)].sum(axis=0)
    peaks = (loads.max(axis=0) - fixed) / (2 * value)
    rooms = np.zeros(program.phases)
    rooms[program.merged] = peaks
    assert program.phases == 3  # outputs and their gradients are one phase
    stretch = data.draw(st.sampled_from([1.0, 1.0 + 1e-4, 1.2]))
    held = np.arange(program.phases) == program.held
    inside = (program.steps[1] >= rooms[program.held]) & (program.steps[0] <= rooms[program.held])
    assert inside.sum() == 1  # a rank's load in the held phase is a sum of pieces
    low = np.where(held, program.steps[0][inside], rooms / stretch)
    high = np.where(held, program.steps[1][inside], np.minimum(rooms * stretch, 1.0))
    box = Box(low, high, np.zeros(CLASSES), np.full(CLASSES, 3.0))
    classes = program.classes(box)
    if len(classes.left) == CLASSES:
        taken = np.zeros(3)
        for options, j, row in zip(problem.options, choice, placement, strict=True):
            if options[j].label == "host":
                taken[row[0]] += options[j].pieces[0].load[1] / (2 * value)
        many = float((taken > classes.taken[0] + 1e-9).sum())
        box = replace(box, least=np.array([3.0 - many, many]), most=np.array([3.0 - many, many]))
    pairs = [(p, q) for p in range(3) for q in range(3) if p != q and np.isfinite(program.ratio[p, q])]
    some = (
        data.draw(st.lists(st.sampled_from(pairs), max_size=3, unique_by=lambda pair: pair[1]))
        if pairs
        else []
    )
    program.pairs = tuple(some)
    found = program.solve(box)
    assert found is not None
    assert found.value <= 0.5 * (1 + 1e-9)


def test_a_piece_that_fills_one_phase_leaves_the_other_open() -> None:
    """Two ranks; one piece of (8, 1), ten of about (1, 1): averages say 9 + 5.5.

    Beside the long piece a rank of c has room for c - 8 of both phases, so the other one takes the rest: 18.
    """
    loads = [(8.0, 1.0)] + [(1.0 + 1e-4 * i, 1.0 + 1e-4 * i) for i in range(-4, 6)]
    options = tuple((Option("whole", (Piece("rank", load, 1.0),)),) for load in loads)
    problem = Problem(tuple(f"t{i}" for i in range(11)), options, 1, 2, 100.0, ("p", "q"))
    compiled = compile_problem(problem)
    optimum = exhaustive(problem)
    assert optimum == pytest.approx(18.0, rel=1e-3)
    plain, _ = RoomBound(compiled, optimum * 1.05).run()
    bound, _ = HostBound(compiled, optimum * 1.05).run(200)
    assert plain < 15.1
    assert 17.0 < bound <= optimum


def long_tailed(seed: int, tables: int, hosts: int, size: int) -> Problem:
    """Half of the tables are cheap on all ranks; a quarter look up many more ids than rows."""
    rng = np.random.default_rng(seed)
    options = []
    for i in range(tables):
        rows = float(rng.lognormal(0.0, 1.0))
        ids = rows * float(rng.choice([0.7, 0.7, 0.7, 4.0]))
        whole = Option("whole", (Piece("rank", (ids, 4.0, 4.0, rows), 1.0),))
        host = Option("host", (Piece("host", (ids / size + 0.02, 1.0, 1.0, rows / size + 0.02), 0.5),))
        every = Option("every", (Piece("all", (0.0, 9.0 if i % 2 else 0.05, 0.0, 0.0), 1.0),))
        options.append((whole, host, every))
    names = tuple(f"t{i}" for i in range(tables))
    return Problem(names, tuple(options), hosts, size, 100.0, ("ids", "out", "grad", "rows"))


def test_hosts_with_host_pieces_take_fewer_whole_ones() -> None:
    """The solution polished from the classes is legal, repeatable, and closer to a closer bound."""
    problem = long_tailed(2, 120, 4, 4)
    compiled = compile_problem(problem)
    start = solve(problem, effort="quick", time_limit=0.2)
    plain, _ = RoomBound(compiled, start.objective).run()
    runs = []
    for _ in range(2):
        rows = [list(row) for row in start.placement]
        best = Incumbent(start.objective, start.objective, list(start.choice), rows)
        bound, placed = improve_by_class(compiled, best, plain, Budget(1.0), 0, 0.0)
        runs.append((bound, placed, best.value, best.choice, best.placement))
    assert runs[0] == runs[1]
    bound, placed, value, choice, places = runs[0]
    assert placed
    assert plain * 1.002 < bound <= value < start.objective
    loads, memory = evaluate(problem, choice, tuple(tuple(row) for row in places))
    assert loads.max(axis=0).sum() == pytest.approx(value)
    assert memory.max() <= problem.capacity
