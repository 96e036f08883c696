"""The assignment solver against exhaustive search, its own rules, and impossible inputs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import InfeasibleError, InputError
from passes.assignment import Option, Piece, Problem, Solution, alternatives, evaluate, runner_up, solve
from passes.assignment.packing_bound import dual_feasible


def expand(option: Option) -> list[Piece]:
    """Pieces one by one, as a placement lists them."""
    return [piece for piece in option.pieces for _ in range(piece.count)]


def placements(option: Option, hosts: int, size: int) -> list[tuple[int, ...]]:
    """Every legal placement of one option, by definition."""
    pieces = expand(option)
    ranges = [{"rank": range(hosts * size), "host": range(hosts), "all": [-1]}[p.scope] for p in pieces]
    made = []
    for places in itertools.product(*ranges):
        ranks = [r for r, p in zip(places, pieces, strict=True) if p.scope == "rank"]
        units = [(p.scope, r) for r, p in zip(places, pieces, strict=True) if p.scope != "all"]
        if option.together and len({r // size for r in ranks}) > 1:
            continue
        if option.distinct and len(set(units)) < len(units):
            continue
        if option.allowed_ranks is not None and not set(ranks) <= set(option.allowed_ranks):
            continue
        made.append(places)
    return made


def drawn(problem: Problem, data: st.DataObject) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Any choice of options, and any legal place for their pieces."""
    choice, placement = [], []
    for options in problem.options:
        j = data.draw(st.integers(0, len(options) - 1))
        legal = placements(options[j], problem.hosts, problem.host_size)
        choice.append(j)
        placement.append(legal[data.draw(st.integers(0, len(legal) - 1))])
    return choice, tuple(placement)


def exhaustive(problem: Problem) -> float:
    """Smallest objective over all choices and placements; infinity when none fits."""
    best = math.inf
    per_table = [
        [
            (j, places)
            for j, o in enumerate(options)
            for places in placements(o, problem.hosts, problem.host_size)
        ]
        for options in problem.options
    ]
    for combination in itertools.product(*per_table):
        loads, memory = evaluate(problem, [c[0] for c in combination], tuple(c[1] for c in combination))
        if memory.max() <= problem.capacity:
            best = min(best, float(loads.max(axis=0).sum()))
    return best


def assert_legal(problem: Problem, solution: Solution) -> None:
    """Every rule of the contract, from the placement alone."""
    loads = np.zeros((problem.ranks, len(problem.phases)))
    memory = np.zeros(problem.ranks)
    size = problem.host_size
    for options, j, places in zip(problem.options, solution.choice, solution.placement, strict=True):
        option, pieces = options[j], expand(options[j])
        assert len(places) == len(pieces)
        for piece, place in zip(pieces, places, strict=True):
            if piece.scope == "all":
                assert place == -1
                ranks = list(range(problem.ranks))
            elif piece.scope == "host":
                assert 0 <= place < problem.hosts
                ranks = list(range(place * size, (place + 1) * size))
            else:
                assert 0 <= place < problem.ranks
                ranks = [place]
            loads[ranks] += piece.load
            memory[ranks] += piece.memory
        on_ranks = [r for r, p in zip(places, pieces, strict=True) if p.scope == "rank"]
        if option.together:
            assert len({r // size for r in on_ranks}) <= 1
        if option.distinct:
            placed = [(p.scope, r) for r, p in zip(places, pieces, strict=True) if p.scope != "all"]
            assert len(set(placed)) == len(placed)
        if option.allowed_ranks is not None:
            assert set(on_ranks) <= set(option.allowed_ranks)
    assert memory.max() <= problem.capacity * (1 + 1e-9)
    assert solution.objective == pytest.approx(loads.max(axis=0).sum(), rel=1e-9)
    assert np.allclose(solution.loads, loads)
    assert np.allclose(solution.memory, memory)
    assert solution.lower_bound <= solution.objective * (1 + 1e-12)


def random_problem(seed: int, phases: int, tables: int, hosts: int, size: int, slack: float) -> Problem:
    """A small random instance with every kind of option."""
    rng = np.random.default_rng(seed)
    options = []
    for t in range(tables):
        work = rng.uniform(0.5, 3.0, phases)
        rows = float(rng.uniform(1, 4))

        def piece(scope: str, share: float, count: int = 1, w: np.ndarray = work, m: float = rows) -> Piece:
            return Piece(scope, tuple(float(x) for x in w * share), m * share, count)  # type: ignore[arg-type]

        menu = [Option("whole", (piece("rank", 1.0),))]
        menu.append(
            Option("halves", (piece("rank", 0.55, 2),), distinct=bool(t % 2), together=bool(t % 3 == 0))
        )
        menu.append(Option("host", (piece("host", 1.1 / size),)))
        if t % 2 == 0:
            menu.append(Option("copy", (piece("all", 0.45),)))
        if t == 1:
            menu = [Option("pinned", (piece("rank", 1.0),), allowed_ranks=(0, hosts * size - 1))]
        if t == 2:
            menu.append(Option("mixed", (piece("rank", 0.3), piece("all", 0.1), piece("rank", 0.35))))
        options.append(tuple(menu))
    need = sum(min(sum(p.memory * p.count for p in o.pieces) for o in menu) for menu in options)
    capacity = max(4.5, slack * need / (hosts * size) + 2.0)
    names = tuple(f"t{t}" for t in range(tables))
    return Problem(names, tuple(options), hosts, size, capacity, tuple(f"p{k}" for k in range(phases)))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("phases", [1, 2])
def test_against_exhaustive_search(seed: int, phases: int) -> None:
    hosts, size = (2, 2) if seed % 2 else (1, 3)
    problem = random_problem(seed, phases, 4, hosts, size, slack=1.5)
    optimum = exhaustive(problem)
    solution = solve(problem, effort="normal", time_limit=0.4)
    assert_legal(problem, solution)
    assert solution.lower_bound <= optimum * (1 + 1e-9)
    assert solution.objective >= optimum * (1 - 1e-9)
    # one phase is solved to optimality on these sizes; several phases stay close
    assert solution.objective <= optimum * (1.0 + (1e-9 if phases == 1 else 0.05))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    phases=st.integers(1, 3),
    tables=st.integers(3, 9),
    hosts=st.integers(1, 3),
    size=st.integers(1, 3),
)
def test_placements_are_legal_and_repeatable(
    seed: int, phases: int, tables: int, hosts: int, size: int
) -> None:
    problem = random_problem(seed, phases, tables, hosts, size, slack=2.0)
    try:
        first = solve(problem, effort="quick")
    except InfeasibleError:
        return
    assert_legal(problem, first)
    again = solve(problem, effort="quick")
    assert (first.choice, first.placement, first.objective) == (
        again.choice,
        again.placement,
        again.objective,
    )
    assert first.lower_bound == again.lower_bound


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), more=st.floats(1.0, 4.0))
def test_more_memory_never_raises_the_bound(seed: int, more: float) -> None:
    tight = random_problem(seed, 1, 6, 2, 2, slack=1.2)
    loose = Problem(tight.names, tight.options, 2, 2, tight.capacity * more, tight.phases)
    try:
        bound = solve(tight, effort="quick").lower_bound
    except InfeasibleError:
        return
    assert solve(loose, effort="quick").lower_bound <= bound * (1 + 1e-6)


def test_a_perfect_packing_is_found_and_proved() -> None:
    """Pieces made by cutting 6 full ranks into 4 parts each: the optimum is the average."""
    rng = np.random.default_rng(3)
    cuts = [np.diff(np.concatenate([[0.0], np.sort(rng.uniform(0.05, 0.95, 3)), [1.0]])) for _ in range(6)]
    pieces = [float(x) for cut in cuts for x in cut]
    options = tuple((Option("whole", (Piece("rank", (x,), 1.0),)),) for x in pieces)
    problem = Problem(tuple(f"t{i}" for i in range(24)), options, 1, 6, 100.0, ("time",))
    solution = solve(problem, effort="thorough", time_limit=2.0)
    assert solution.lower_bound == pytest.approx(1.0)
    assert solution.objective <= 1.02


@settings(max_examples=200, deadline=None)
@given(
    cuts=st.lists(st.floats(0.001, 0.999), min_size=0, max_size=8),
    extra=st.lists(st.floats(0.001, 1.0), max_size=6),
)
def test_functions_are_dual_feasible(cuts: list[float], extra: list[float]) -> None:
    """Sizes that fill one bin exactly have values of at most 1 under every function."""
    edges = [0.0, *sorted(cuts), 1.0]
    bin_ = np.diff(edges)
    values = dual_feasible(np.concatenate([bin_, extra]))[:, : len(bin_)]
    assert values.sum(axis=1).max() <= 1 + 1e-9


def test_packing_bound_proves_what_averages_cannot() -> None:
    """Nine pieces of 0.4 on four ranks: the average is 0.9, three must share a rank: 1.2."""
    options = tuple((Option("whole", (Piece("rank", (0.4,), 1.0),)),) for _ in range(9))
    problem = Problem(tuple(f"t{i}" for i in range(9)), options, 1, 4, 100.0, ("time",))
    assert solve(problem, effort="quick").lower_bound == pytest.approx(0.9)
    solution = solve(problem)
    assert solution.objective == pytest.approx(1.2)
    assert solution.lower_bound == pytest.approx(1.2, rel=2e-4)


def test_bound_counts_the_largest_piece() -> None:
    options = (
        (Option("whole", (Piece("rank", (5.0,), 1.0),)),),
        (Option("whole", (Piece("rank", (1.0,), 1.0),)),),
    )
    solution = solve(Problem(("big", "small"), options, 1, 4, 10.0, ("time",)))
    assert solution.status == "optimal"
    assert solution.objective == solution.lower_bound == 5.0


def test_memory_decides_between_options() -> None:
    """The fast option fits once only; the optimum takes it for the table that gains more."""
    fast = Option("fast", (Piece("all", (1.0,), 6.0),))
    options = (
        (fast, Option("slow", (Piece("all", (3.0,), 1.0),))),
        (fast, Option("slow", (Piece("all", (9.0,), 1.0),))),
    )
    solution = solve(Problem(("a", "b"), options, 1, 2, 8.0, ("time",)))
    assert solution.choice == (1, 0)
    assert solution.objective == 4.0


def test_a_table_larger_than_a_rank_is_named() -> None:
    options = ((Option("table_wise", (Piece("rank", (1.0,), 3 * 2**30),)),),)
    with pytest.raises(
        InfeasibleError, match=r"table 'huge' needs 3.* in its smallest option \(table_wise\)"
    ) as error:
        solve(Problem(("huge",), options, 1, 2, float(2**30), ("time",)))
    assert error.value.conflict == ("capacity", "options[huge]")
    assert "huge" in error.value.relaxation


def test_too_many_bytes_in_all_name_the_shortage() -> None:
    options = tuple((Option("table_wise", (Piece("rank", (1.0,), 0.8 * 2**30),)),) for _ in range(5))
    with pytest.raises(
        InfeasibleError, match=r"the tables need 4.* in their smallest options; 2 ranks have 2"
    ):
        solve(Problem(tuple("abcde"), options, 1, 2, float(2**30), ("time",)))


def test_pieces_that_cannot_be_packed_are_an_error_not_a_plan() -> None:
    """Three pieces of 60 % on two ranks: the total fits, the pieces do not."""
    options = tuple((Option("table_wise", (Piece("rank", (1.0,), 0.6),)),) for _ in range(3))
    with pytest.raises(InfeasibleError):
        solve(Problem(("a", "b", "c"), options, 1, 2, 1.0, ("time",)), effort="quick")


def test_a_pin_outside_the_machine_is_bad_input() -> None:
    options = ((Option("table_wise", (Piece("rank", (1.0,), 1.0),), allowed_ranks=(9,)),),)
    with pytest.raises(InputError, match="outside"):
        solve(Problem(("a",), options, 1, 2, 10.0, ("time",)))


@pytest.mark.parametrize("load", [(-1.0,), (float("nan"),), (1.0, 2.0)])
def test_bad_loads_are_bad_input(load: tuple[float, ...]) -> None:
    options = ((Option("table_wise", (Piece("rank", load, 1.0),)),),)
    with pytest.raises(InputError, match="table 'a'"):
        solve(Problem(("a",), options, 1, 2, 10.0, ("time",)))


@pytest.mark.parametrize("phases", [1, 2])
def test_alternatives_against_trying_every_place(phases: int) -> None:
    problem = random_problem(5, phases, 4, 2, 2, slack=3.0)
    solution = solve(problem, effort="quick")
    for table, options in enumerate(problem.options):
        found = alternatives(problem, solution, table)
        assert found[solution.choice[table]] == solution.objective
        for j, option in enumerate(options):
            tried = []
            for places in placements(option, 2, 2):
                choice, placement = list(solution.choice), list(solution.placement)
                choice[table], placement[table] = j, places
                loads, memory = evaluate(problem, choice, tuple(placement))
                if memory.max() <= problem.capacity:
                    tried.append(float(loads.max(axis=0).sum()))
            value = found[j]
            if not tried:
                assert value is None
                continue
            assert value is not None
            assert value >= min(tried) * (1 - 1e-9)
            if len(expand(option)) == 1 and j != solution.choice[table]:
                assert value == pytest.approx(min(tried))


@pytest.mark.parametrize("seed", range(6))
def test_the_runner_up_is_the_best_of_all_alternatives(seed: int) -> None:
    problem = random_problem(seed, 3, 6, 2, 2, slack=1.5)
    solution = solve(problem, effort="quick")
    tie = 1e-9 * solution.objective
    for table, options in enumerate(problem.options):
        spent = [sum(sum(piece.load) * piece.count for piece in option.pieces) for option in options]
        objectives = alternatives(problem, solution, table)
        ranked = sorted(
            (max(objective - solution.objective, tie), spent[j], j)
            for j, objective in enumerate(objectives)
            if objective is not None and j != solution.choice[table]
        )
        found = runner_up(problem, solution, table, spent, tie)
        if not ranked:
            assert found is None
            continue
        assert found is not None
        longer, cost, _ = ranked[0]
        assert max(found[1] - solution.objective, tie) == pytest.approx(longer, rel=1e-9)
        assert spent[found[0]] == pytest.approx(cost)
