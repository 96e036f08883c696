"""Joint choices: options that use further resources and budgets.

The master program (:mod:`passes.assignment.column_generation`) gives the proved bound and the prices; its whole-number
solution, which knows averages only, is the choice that placing starts from; ruin and recreate
(:mod:`passes.assignment.polish`) then moves and re-chooses tables under the same limits and budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ir.errors import InfeasibleError
from passes.assignment.budget import Budget
from passes.assignment.column_generation import Frame, Menu, Relaxation, fits_alone
from passes.assignment.compiled import compile_problem
from passes.assignment.exact import improve
from passes.assignment.master import Column, Limits, Master, whole_choice
from passes.assignment.polish import Polisher
from passes.assignment.problem import Option, Problem, Solution, evaluate, evaluate_extra
from passes.assignment.solve import solve
from passes.assignment.target_search import Incumbent

KEPT = 12  # columns of a class that the search may choose from, with many tables
KEPT_FEW, FEW_TABLES = 40, 64  # and with few
WHOLE_CLASSES = 120  # classes up to which the whole-number program is solved; beyond, the point is rounded
TIGHTER = (1.0, 0.98, 0.95, 0.9, 0.8)  # of all limits: room left for placing whole pieces
LONGER = (1.0, 1.01, 1.03, 1.1, 1.3, 2.0)  # of the stretched step
WORK_A_TABLE = 0.03  # seconds of polishing a table, at least LEAST_WORK and at most MOST_WORK
LEAST_WORK, MOST_WORK = 0.5, 20.0
ATTEMPT = 0.5  # of the budget that is left, for polishing one attempt at most
RESHARD = 0.5  # of it, for sharding anew with one choice of the budgets' shares
SEARCH = 30.0  # seconds of work that one search for a sharding may spend at most
OVER = 1.8  # times its limit that such a search spends with few tables and several phases
EXACT = 1e-5  # gap above which small problems go on with CP-SAT
BUSY = 0.9  # of the step: with no resource busier than that, a longer step gains nothing


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """A placed solution of a joint problem."""

    problem: Problem  # with the columns that the search chose from
    solution: Solution  # its objective is the sum of phases
    step: float  # seconds: the longer of base + phases and every stretched resource
    relaxed: Relaxation
    start: tuple[int, ...] = ()  # the whole-number choice that polishing started from
    trials: int = 0


def solve_joint(
    frame: Frame,
    menus: Sequence[Menu],
    relaxed: Relaxation,
    *,
    budget: Budget | None = None,
    seed: int = 0,
    stop_gap: float = 0.0,
) -> Joint:
    """Choose and place under every limit, with the work that ``budget`` has left; default 30 seconds.

    Raises:
        InfeasibleError: no placement is found.
    """
    budget = budget if budget is not None else Budget(SEARCH)
    if not frame.limits and not frame.budgets and stop_gap == 0.0:
        return _plain(frame, menus, relaxed, budget, seed, stop_gap)
    kept = _kept(frame, menus, relaxed)
    best: Joint | None = None
    trials = 0
    for longer in LONGER if frame.step is None and any(frame.stretched) else (1.0,):
        for tight in TIGHTER:
            trials += 1
            found = _attempt(frame, menus, relaxed, kept, longer, tight, budget, seed, stop_gap)
            if found is None:
                continue
            if best is None or found.step < best.step:
                best = found
            if frame.step is None or best.step <= frame.step:
                break
        if best is not None and (best.step <= relaxed.bound * longer * (1 + 1e-6) or not _busy(frame, best)):
            break
    if best is None:
        raise InfeasibleError(
            "no placement found within the memory tiers and budgets, although their averages would allow one; "
            "allow more tiers, a larger budget or more hosts",
            conflict=("capacity", "tables"),
            relaxation="more capacity or bandwidth in some tier",
        )
    start_problem = best.problem
    if not best.solution.extra.any() and best.step > _enough(frame, relaxed, stop_gap):
        # with the budgets' shares that polishing came to, and those it started from
        for choice in dict.fromkeys((best.solution.choice, best.start)):
            costs = [start_problem.options[t][j].cost for t, j in enumerate(choice)]
            best = _resharded(frame, menus, best, costs, budget, seed, stop_gap)
    return replace(best, trials=trials)


def left(budget: Budget) -> float:
    """Seconds of work that a budget has left."""
    return max(0.0, budget.limit - budget.work)


def portion(budget: Budget, share: float, most: float = math.inf) -> Budget:
    """A budget of ``share`` of what is left, ``most`` seconds at most, with a wall clock of its own.

    Its work is to be added back with :meth:`Budget.spend`.
    """
    return Budget(min(most, share * left(budget)))


def searched(problem: Problem, budget: Budget, share: float, **options: Any) -> Solution:
    """:func:`solve` with a share of what ``budget`` has left; raises InfeasibleError.

    ``options`` are those of :func:`solve`.
    """
    most = share * left(budget)
    try:
        found = solve(problem, time_limit=min(SEARCH, most / OVER), **options)
    except InfeasibleError:
        budget.spend(min(SEARCH, most))  # nobody knows how much it was
        raise
    budget.spend(found.work)
    return found


def _enough(frame: Frame, relaxed: Relaxation, stop_gap: float) -> float:
    """The step at which the search may stop, seconds."""
    return (frame.base + (relaxed.bound - frame.base) * (1 + stop_gap)) * (1 + 1e-12)


def _busy(frame: Frame, joint: Joint) -> bool:
    """Whether some stretched resource is nearly as busy as the step is long."""
    used = joint.solution.extra.max(axis=0) if frame.limits else np.zeros(0)
    return any(s and u > BUSY * joint.step for s, u in zip(frame.stretched, used, strict=True))


def _bare(options: Sequence[tuple[Option, ...]]) -> tuple[tuple[Option, ...], ...]:
    """The options without further resources and budget shares; equal rows stay one object."""
    made: dict[int, tuple[Option, ...]] = {}
    for row in options:
        if id(row) not in made:
            made[id(row)] = tuple(
                replace(o, cost=(), pieces=tuple(replace(p, extra=()) for p in o.pieces)) for o in row
            )
    return tuple(made[id(row)] for row in options)


def _resharded(
    frame: Frame,
    menus: Sequence[Menu],
    joint: Joint,
    costs: Sequence[tuple[float, ...]],
    budget: Budget,
    seed: int,
    stop_gap: float,
) -> Joint:
    """The solver for sharding alone, with what each table takes of the budgets fixed; no worse than ``joint``.

    For solutions that use no further resource.
    """
    options: list[tuple[Option, ...]] = [()] * len(costs)
    made: dict[tuple[int, tuple[float, ...]], tuple[Option, ...]] = {}
    for c, menu in enumerate(menus):
        for t in menu.tables:
            key = c, costs[t]
            if key not in made:
                made[key] = tuple(
                    o for o in menu.options if o.cost == costs[t] and not any(any(p.extra) for p in o.pieces)
                )
            options[t] = made[key]
    fixed = replace(joint.problem, options=tuple(options))
    bare = replace(fixed, limits=(), budgets=(), options=_bare(options))
    try:
        found = searched(bare, budget, RESHARD, seed=seed, stop_gap=stop_gap)
    except InfeasibleError:
        return joint
    if found.objective >= joint.solution.objective:
        return joint
    best = Incumbent(choice=list(found.choice), placement=[list(p) for p in found.placement])
    solution = _finish(fixed, best, joint.solution.lower_bound, joint.solution.work + found.work)
    return replace(joint, problem=fixed, solution=solution, step=frame.base + solution.objective)


def _plain(
    frame: Frame, menus: Sequence[Menu], relaxed: Relaxation, budget: Budget, seed: int, stop_gap: float
) -> Joint:
    """Neither further limits nor budgets: the solver for sharding alone."""
    options: list[tuple[Option, ...]] = [()] * len(frame.names)
    for menu in menus:
        row = tuple(menu.options)
        for t in menu.tables:
            options[t] = row
    problem = Problem(frame.names, tuple(options), frame.hosts, frame.host_size, frame.capacity, frame.phases)
    found = searched(problem, budget, 1.0, seed=seed, stop_gap=stop_gap)
    return Joint(problem, found, frame.base + found.objective, relaxed)


def _kept(frame: Frame, menus: Sequence[Menu], relaxed: Relaxation) -> list[list[int]]:
    """Columns of each class worth choosing from, by reduced cost.

    Those in use, the best of each kind of piece and of the fewest bytes (what packs when whole pieces do not),
    then the least reduced costs.
    """
    by_class: list[list[tuple[float, int]]] = [[] for _ in menus]
    for k, made in enumerate(relaxed.columns):
        used = relaxed.values[k] > 1e-9
        by_class[made.owner].append((-1.0 if used else Master.reduced(made, relaxed.duals), k))
    kept = []
    for c, every in enumerate(by_class):
        # priced columns may be too large for any rank: they bound, but nobody can place them
        found = [item for item in every if fits_alone(menus[c].options[relaxed.index[item[1]][1]], frame)]
        found = sorted(found or every)
        first: dict[str, int] = {}
        for _, k in found:
            first.setdefault(menus[c].options[relaxed.index[k][1]].pieces[0].scope, k)
        lean = min(found, key=lambda item: (relaxed.columns[item[1]].memory, item))[1]
        wanted = [*(k for value, k in found if value < 0), *first.values(), lean, *(k for _, k in found)]
        few = sum(len(menu.tables) for menu in menus) <= FEW_TABLES
        most = max(KEPT_FEW if few else KEPT, len(first) + 1)
        kept.append(sorted(list(dict.fromkeys(wanted))[:most]))
    return kept


def _attempt(
    frame: Frame,
    menus: Sequence[Menu],
    relaxed: Relaxation,
    kept: list[list[int]],
    longer: float,
    tight: float,
    budget: Budget,
    seed: int,
    stop_gap: float,
) -> Joint | None:
    step = frame.step if frame.step is not None else relaxed.bound * longer
    limits = tuple(
        step if stretched else limit for limit, stretched in zip(frame.limits, frame.stretched, strict=True)
    )
    counts = _whole_counts(frame, menus, relaxed, kept, limits, tight)
    if counts is None:
        return None
    options: list[tuple[Option, ...]] = [()] * len(frame.names)
    choice = [0] * len(frame.names)
    for menu, columns, taken in zip(menus, kept, counts, strict=True):
        row = tuple(menu.options[relaxed.index[k][1]] for k in columns)
        filled = [i for i, n in enumerate(taken) for _ in range(n)]
        for t, chosen in zip(menu.tables, filled, strict=True):
            options[t], choice[t] = row, chosen
    problem = Problem(
        frame.names,
        tuple(options),
        frame.hosts,
        frame.host_size,
        frame.capacity,
        frame.phases,
        limits,
        frame.budgets,
    )
    compiled = compile_problem(problem)
    work = portion(budget, ATTEMPT, max(LEAST_WORK, min(MOST_WORK, WORK_A_TABLE * len(frame.names))))
    bound = max(relaxed.bound - frame.base, 1e-12)
    best = Incumbent(choice=choice)
    duals = relaxed.duals
    prices = (
        duals.memory * compiled.mean_memory + compiled.mean_extra @ duals.extra + compiled.cost @ duals.cost
    )
    Polisher(compiled, bound, work, seed, prices).run(best, stop_gap)
    budget.spend(work.work)
    if tight == TIGHTER[0] and best.value > bound * (1 + max(stop_gap, EXACT)):
        better = improve(compiled, best, budget, seed)
        if better is not None:
            found = _finish(problem, better, bound, work.work)
            if found.objective < best.value:
                best = replace(better, value=found.objective)
    if not best.placement:
        return None
    solution = _finish(problem, best, bound, work.work)
    busy = [float(solution.extra[:, e].max()) for e, stretched in enumerate(frame.stretched) if stretched]
    step = max([frame.base + solution.objective, *busy])
    return Joint(problem, solution, step, relaxed, tuple(choice))


def _finish(problem: Problem, best: Incumbent, bound: float, work: float) -> Solution:
    placement = tuple(tuple(places) for places in best.placement)
    loads, memory = evaluate(problem, best.choice, placement)
    extra, spent = evaluate_extra(problem, best.choice, placement)
    peaks = loads.max(axis=0)
    assert memory.max() <= problem.capacity * (1 + 1e-9), "a placement exceeds the memory of a rank"
    assert (extra <= np.asarray(problem.limits) * (1 + 1e-9)).all(), "a placement exceeds a limit of a rank"
    assert (np.asarray(spent) <= np.asarray(problem.budgets) * (1 + 1e-9)).all(), "a choice exceeds a budget"
    objective = float(peaks.sum())
    return Solution(
        choice=tuple(best.choice),
        placement=placement,
        objective=objective,
        phase_max=tuple(float(x) for x in peaks),
        lower_bound=min(bound, objective),
        status="feasible",
        bound_method="master program over priced columns (GLOP)",
        loads=loads,
        memory=memory,
        work=work,
        extra=extra,
        spent=spent,
    )


def _whole_counts(
    frame: Frame,
    menus: Sequence[Menu],
    relaxed: Relaxation,
    kept: list[list[int]],
    extra: tuple[float, ...],
    tight: float,
) -> list[list[int]] | None:
    """Tables of each class that take each kept column."""
    sizes = [len(menu.tables) for menu in menus]
    columns = [relaxed.columns[k] for ks in kept for k in ks]
    limits = replace(
        relaxed.limits,
        capacity=frame.capacity * tight,
        extra=tuple(limit * tight for limit in extra),
        stretched=(False,) * len(extra),
    )
    if len(menus) <= WHOLE_CLASSES:
        counts = whole_choice(sizes, len(frame.phases), limits, columns)
    else:
        counts = _rounded(sizes, kept, relaxed, columns, limits)
    if counts is None:
        return None
    made, at = [], 0
    for ks in kept:
        made.append(counts[at : at + len(ks)])
        at += len(ks)
    return made


def _rounded(
    sizes: Sequence[int],
    kept: list[list[int]],
    relaxed: Relaxation,
    columns: Sequence[Column],
    limits: Limits,
) -> list[int] | None:
    """The relaxation's point rounded by largest remainder, then repaired until sums keep the limits."""
    counts: list[int] = []
    for n, ks in zip(sizes, kept, strict=True):
        values = [relaxed.values[k] for k in ks]
        whole = [math.floor(v + 1e-9) for v in values]
        rest = sorted(range(len(ks)), key=lambda i: (whole[i] - values[i], i))
        for i in rest[: n - sum(whole)]:
            whole[i] += 1
        counts += whole
    weights = _weights(columns, limits)
    reduced = np.array([Master.reduced(made, relaxed.duals) for made in columns])
    owner = np.array([made.owner for made in columns])
    for _ in range(4 * len(columns)):
        over = np.maximum(0.0, np.array(counts) @ weights - 1.0 - 1e-12)
        if not over.any():
            return counts
        move = _relief(np.array(counts), weights, reduced, owner, over)
        if move is None:
            return None
        counts[move[0]] -= 1
        counts[move[1]] += 1
    return None


def _weights(columns: Sequence[Column], limits: Limits) -> np.ndarray:
    """Fractions of memory, further limits and budgets that one table takes of the average rank's."""
    return np.array(
        [
            [
                made.memory / limits.capacity,
                *(e / max(limit, 1e-300) for e, limit in zip(made.extra, limits.extra, strict=True)),
                *(c / max(budget, 1e-300) for c, budget in zip(made.cost, limits.budgets, strict=True)),
            ]
            for made in columns
        ]
    )


def _relief(
    counts: np.ndarray, weights: np.ndarray, reduced: np.ndarray, owner: np.ndarray, over: np.ndarray
) -> tuple[int, int] | None:
    """The change of one table's column that relieves what is exceeded at the least reduced cost."""
    best: tuple[float, int, int] | None = None
    for i in np.flatnonzero(counts > 0):
        for j in np.flatnonzero(owner == owner[i]):
            gain = float(np.minimum(weights[i] - weights[j], over)[over > 0].sum())
            if gain > 1e-15:
                price = (max(0.0, float(reduced[j] - reduced[i])) + 1e-15) / gain
                if best is None or price < best[0]:
                    best = price, int(i), int(j)
    return None if best is None else best[1:]
