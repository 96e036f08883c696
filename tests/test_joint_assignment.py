"""Joint problems (further resources, budgets, columns on demand) against exhaustive search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.assignment import Option, Piece
from ir.errors import InfeasibleError, InputError
from passes.assignment import evaluate
from passes.assignment.budget import Budget
from passes.assignment.column_generation import Frame, Menu, column, relax
from passes.assignment.joint import Joint, solve_joint
from passes.assignment.master import Column, Duals, Master
from passes.assignment.problem import evaluate_extra

Priced = list[tuple[int, Option]]


def instance(seed: int, *, tight: float = 0.6) -> tuple[Frame, list[Menu]]:
    """Three tables on two ranks; each option trades seconds for memory, a second resource and a budget."""
    rng = np.random.default_rng(seed)
    menus = []
    for t in range(3):
        work, size = float(rng.uniform(1, 3)), float(rng.uniform(1, 3))
        options = []
        for part, loss in itertools.product((1.0, 0.4), (0.0, 0.5, 1.0)):
            seconds = work * (1.0 - 0.4 * loss) * (1 + 0.2 * (1 - part))
            options.append(
                Option(
                    f"{part} {loss}",
                    (Piece("rank", (seconds, 0.3 * seconds), size * part, 1, (size * (1 - part),)),),
                    cost=(loss * size,),
                )
            )
        spread = Piece("all", (work * 0.6, 0.1 * work), size * 0.5, 1, (0.0,))
        options.append(Option("everywhere", (spread,), cost=(0.0,)))
        menus.append(Menu((t,), options))
    names = tuple(f"t{t}" for t in range(3))
    total = 6.0 * tight
    return Frame(names, 2, 1, total / 2 + 1.0, ("a", "b"), (total / 2,), (False,), (1.5,), base=0.2), menus


def exhaustive(frame: Frame, menus: list[Menu]) -> float:
    """Smallest step by trying every choice and place; infinity when none keeps the limits."""
    best = math.inf
    moves = [
        [(o, place) for o in menu.options for place in (range(2) if o.pieces[0].scope == "rank" else (-1,))]
        for menu in menus
    ]
    for combination in itertools.product(*moves):
        load, memory, extra, spent = np.zeros((2, 2)), np.zeros(2), np.zeros(2), 0.0
        for option, place in combination:
            (piece,) = option.pieces
            where = slice(None) if place < 0 else slice(place, place + 1)
            load[where] += piece.load
            memory[where] += piece.memory
            extra[where] += piece.extra[0]
            spent += option.cost[0]
        if memory.max() > frame.capacity or extra.max() > frame.limits[0] or spent > frame.budgets[0]:
            continue
        best = min(best, frame.base + float(load.max(axis=0).sum()))
    return best


def assert_keeps(frame: Frame, joint: Joint) -> None:
    """Every limit, recomputed from the placement."""
    solution = joint.solution
    loads, memory = evaluate(joint.problem, solution.choice, solution.placement)
    extra, spent = evaluate_extra(joint.problem, solution.choice, solution.placement)
    assert memory.max() <= frame.capacity * (1 + 1e-9)
    assert (extra <= np.asarray(frame.limits) * (1 + 1e-9)).all()
    assert all(s <= b * (1 + 1e-9) for s, b in zip(spent, frame.budgets, strict=True))
    assert joint.step == pytest.approx(frame.base + loads.max(axis=0).sum())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_bound_optimum_and_solution_are_in_order(seed: int) -> None:
    frame, menus = instance(seed)
    best = exhaustive(frame, menus)
    relaxed = relax(frame, menus)
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            solve_joint(frame, menus, relaxed, budget=Budget(0.1))
        return
    assert relaxed.bound <= best * (1 + 1e-9)
    joint = solve_joint(frame, menus, relaxed, budget=Budget(0.3))
    assert_keeps(frame, joint)
    # CP-SAT rounds loads to one part in a million
    assert best * (1 - 1e-9) <= joint.step <= best * (1 + 1e-4)


def test_columns_made_on_demand_reach_the_bound_of_all_columns() -> None:
    """One column a class and round, the one of least reduced cost, as the pass makes them."""
    for seed in (3, 5, 8):
        frame, menus = instance(seed)
        for menu in menus:  # those that fit a rank alone; the master program knows the others away
            menu.options[:] = [o for o in menu.options if o.pieces[0].memory <= frame.capacity]
        everything = relax(frame, menus).bound
        hidden = [[column(option, c, frame) for option in menu.options] for c, menu in enumerate(menus)]
        grown = [Menu(menu.tables, menu.options[-1:]) for menu in menus]

        def price(duals: Duals, hidden: list[list[Column]] = hidden, menus: list[Menu] = menus) -> Priced:
            """The best column of every class."""
            reduced = [[Master.reduced(made, duals) for made in columns] for columns in hidden]
            return [(c, menus[c].options[int(np.argmin(row))]) for c, row in enumerate(reduced)]

        priced = relax(frame, grown, price)
        assert priced.bound == pytest.approx(everything, rel=1e-5)
        assert max(len(menu.options) for menu in grown) > 1


def test_equal_tables_in_one_class_have_the_bound_of_separate_classes() -> None:
    options = [
        Option("fast", (Piece("rank", (1.0,), 4.0),), cost=(1.0,)),
        Option("lean", (Piece("rank", (2.0,), 1.0),), cost=(0.0,)),
    ]
    names = tuple(f"t{i}" for i in range(6))
    frame = Frame(names, 1, 3, 6.0, ("p",), (), (), (3.0,))
    together = relax(frame, [Menu(tuple(range(6)), list(options))]).bound
    apart = relax(frame, [Menu((i,), list(options)) for i in range(6)]).bound
    assert together == pytest.approx(apart, rel=1e-6)


def test_stretched_resources_lengthen_the_step() -> None:
    """One table: 1 s of work in memory, or 0.1 s and a resource that is busy for 0.7 s beside it."""
    options = [
        Option("near", (Piece("rank", (1.0,), 2.0, 1, (0.0,)),)),
        Option("far", (Piece("rank", (0.1,), 0.5, 1, (0.7,)),)),
    ]
    frame = Frame(("t",), 1, 1, 1.0, ("p",), (0.0,), (True,))
    menus = [Menu((0,), options)]
    relaxed = relax(frame, menus)
    joint = solve_joint(frame, menus, relaxed, budget=Budget(1.0))
    assert relaxed.bound == pytest.approx(0.7, rel=1e-4)
    assert joint.step == pytest.approx(0.7)


def test_a_wrong_number_of_resources_is_an_input_error() -> None:
    frame = Frame(("t",), 1, 1, 1.0, ("p",), (1.0, 1.0), (False, False))
    with pytest.raises(InputError, match="resources"):
        relax(frame, [Menu((0,), [Option("o", (Piece("rank", (1.0,), 1.0, 1, (1.0,)),))])])
