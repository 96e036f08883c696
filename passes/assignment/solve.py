"""Min-max assignment with a proved bound: the front door of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from passes.assignment import infeasible
from passes.assignment.budget import Budget
from passes.assignment.compiled import HOST, Compiled, compile_problem
from passes.assignment.polish import Polisher
from passes.assignment.problem import Problem, Solution, evaluate
from passes.assignment.progress import tell
from passes.assignment.relaxation import average_bound
from passes.assignment.shelves import alike, shelf_choice
from passes.assignment.starts import (
    MANY_TABLES,
    memory_choices,
    relaxed_choices,
    roomy_choices,
    swept_choices,
    threshold_choice,
    uniform_choices,
)
from passes.assignment.target_search import SHORT_WALKS, Incumbent, TargetSearch
from passes.assignment.warm import Start, incumbent_of, thresholds_placed

Effort = Literal["quick", "warm", "normal", "thorough"]

PACKING_SHARE = 0.4  # of the work, with several phases; the rest polishes the phases
PACKING_TABLES = 400  # tables up to which the packing bound is computed (seconds at most)
WHOLE_TABLES = 64  # tables up to which it is computed with whole options
FEW_TABLES = 64  # tables up to which, with several phases, the first search has the whole work
FIRST_MANY = 0.2  # its share with more
SECOND = 0.8  # share of the work for placements fitted to the phases
# the same from a known start, without the first search: 856 tables on half the hosts take half the work for an objective
# 0.7 % above that of planning anew
WARM = 0.4
MOST_WORK = 12.0  # seconds that a normal effort spends at most with several phases
MANY_WORK = 30.0  # the same with thousands of tables, which are placed once and then polished
SEVERAL = 6.0  # times the work with several phases, which take longer to balance
POLISH_SHARE = 0.25  # of the work, with one phase, for polishing
EARLY_SHARE = 0.15  # of the packing's work, for polishing before walks (one phase, more than FEW tables)
FAR = 0.15  # relative gap above which a quick search goes on as a normal one
FAR_FEW, HANDFUL = 0.05, 10  # the same with few tables, but more than a handful, which it seldom helps
FEW = 40  # tables up to which a quick search settles in a few hundred packings, from more starts
FEW_PACKINGS = 150  # of them for each table, at most: there is little to choose
AVERAGES = "average load and largest piece"
OPTIMAL = 1e-6  # relative gap below which a solution is called optimal


def solve(
    problem: Problem,
    *,
    time_limit: float = 30.0,
    seed: int = 0,
    effort: Effort = "normal",
    stop_gap: float = 0.0,
    start: Start | None = None,
) -> Solution:
    """Choose an option for every table and a place for every piece.

    Args:
        problem: what to assign.
        time_limit: limit on deterministic work, about seconds; the wall clock is a safety net only.
        seed: of the search; the same input and seed give the same solution.
        effort: "quick" takes the first good packing, "normal" searches for a while that grows with the
            problem, "thorough" spends the whole limit unless the gap closes; "warm" is normal without the first search
            where there are many tables, several phases and a start near the bound.
        stop_gap: stop as soon as the proved gap is this small.
        start: a known placement; the solution is no worse, and polishing starts from it where it is the best.

    Raises:
        InputError: a malformed problem.
        InfeasibleError: nothing fits; the message names the limits in conflict.
    """
    compiled = compile_problem(problem)
    infeasible.check(compiled)
    bound, relaxed = average_bound(compiled)
    tell(float("inf"), bound)
    warm = incumbent_of(compiled, start, seed) if start is not None else Incumbent()
    best, work = warm, 0.0
    several = len(problem.phases) > 1 and effort != "quick"
    first = FIRST_MANY if several and compiled.tables > FEW_TABLES else 1.0
    near = warm.value <= bound * (1 + FAR)  # else what was good there is not here
    known = effort == "warm" and several and compiled.tables > FEW_TABLES and near
    first_start = warm if near else Incumbent()
    effort = "normal" if effort == "warm" else effort
    searches: tuple[Effort, ...] = ("quick", "normal") if effort == "quick" else (effort,)
    placed = False
    if several and not best.choice and compiled.tables > MANY_TABLES:
        best = thresholds_placed(compiled, seed)
        placed = bool(best.choice)  # packing thousands of tables over and over finds no better one
    for allowed in () if known or placed else searches:
        budget = Budget(min(time_limit, _allowance(compiled, allowed)) * first)
        found = _search(compiled, bound, relaxed.price, budget, seed, stop_gap, first_start)
        best, work = min(found, best, key=lambda known: known.value), work + budget.work
        if best.value <= bound * (1 + (FAR_FEW if HANDFUL < compiled.tables <= FEW else FAR)):
            break  # else a quick search that ends far from the bound has most likely missed something
    if not best.choice:
        raise infeasible.give_up(compiled)
    method = AVERAGES
    if effort != "quick" and best.value > bound * (1 + OPTIMAL):
        tell(best.value, bound)
        if several:
            from passes.assignment.by_phase import improve  # OR-Tools takes a second to load

            share = WARM if known else 1.0 if placed else SECOND
            budget = Budget(min(time_limit, _allowance(compiled, effort)) * share)
            proved, how = improve(compiled, best, budget, seed, stop_gap)
            work += budget.work
        else:
            proved, how = _tighten(compiled, bound, best.value, effort)
        if proved > bound:
            bound, method = proved, how
    tell(best.value, bound)
    return finish(problem, best, bound, method, work)


def _search(
    compiled: Compiled,
    bound: float,
    price: float,
    budget: Budget,
    seed: int,
    stop_gap: float,
    start: Incumbent,
) -> Incumbent:
    """Starts, walks over the choices, then polishing of the placement, within a budget."""
    search = TargetSearch(compiled, bound, price, budget, seed, _objective(compiled))
    starts = relaxed_choices(compiled, bound)
    starts += uniform_choices(compiled, starts[0])
    several = len(compiled.problem.phases) > 1
    if not several:
        starts += [choice for choice in roomy_choices(compiled, bound) if choice not in starts]
    thresholds = threshold_choice(compiled) if several else None
    if thresholds is not None:
        starts.insert(0, thresholds)
    search.budget = budget.slice(PACKING_SHARE if several else 1.0 - POLISH_SHARE)
    ordered = _ordered(search, starts)
    early = Incumbent()
    if not several and compiled.tables > FEW:
        early = _polished_early(search, price, seed, stop_gap)
    search.walks(ordered, stop_gap)
    budget.spend(search.budget.work)
    best = min(search.best, replace(start), early, key=lambda found: found.value)
    if best.choice and not budget.spent() and best.value > bound * (1 + max(stop_gap, OPTIMAL)):
        Polisher(compiled, bound, budget, seed).run(best, stop_gap)
    return best


def _polished_early(search: TargetSearch, price: float, seed: int, stop_gap: float) -> Incumbent:
    """The best packing so far, and where memory binds choices that use it up, polished briefly.

    Walks end at choices that pack well; some that do not are better once they are polished.
    """
    choices = memory_choices(search.compiled, search.bound) if price > 0 else []
    known = [replace(search.best), *(Incumbent(choice=choice) for choice in choices)]
    for k, here in enumerate(known):
        if here.choice:
            part = search.budget.slice(EARLY_SHARE / (len(known) - k))
            Polisher(search.compiled, search.bound, part, seed).run(here, stop_gap)
            search.budget.spend(part.work)
    return min(known, key=lambda found: found.value)


def _ordered(search: TargetSearch, starts: list[list[int]]) -> list[Sequence[int]]:
    """The starts to walk from; few tables in one phase have more, and one walk more that keeps them apart."""
    compiled = search.compiled
    if len(compiled.problem.phases) > 1 or compiled.tables > FEW:
        return search.start(starts)[:SHORT_WALKS]
    more = [choice for choice in swept_choices(compiled, search.bound) if choice not in starts]
    more.append(shelf_choice(compiled, starts[0], alike(compiled)))
    if compiled.tables <= HANDFUL:
        return search.start(starts + more)[:SHORT_WALKS]
    return [*search.start(starts)[:SHORT_WALKS], search.start(more)[0]]


def _tighten(compiled: Compiled, bound: float, value: float, effort: Effort) -> tuple[float, str]:
    """The best bound for one phase that the effort pays for, and what proved it."""
    from passes.assignment.packing_bound import PackingBound  # OR-Tools takes a second to load

    method = AVERAGES
    for integral, limit in ((False, PACKING_TABLES), (True, WHOLE_TABLES)):
        if compiled.tables > limit or (integral and effort != "thorough"):
            continue
        packed = PackingBound(compiled, integral).bound(bound, value, 14)
        if packed > bound:
            solver = "SCIP, whole options" if integral else "GLOP"
            bound, method = packed, f"linear program with dual feasible functions ({solver})"
    return bound, method


def _allowance(compiled: Compiled, effort: Effort) -> float:
    """Work that an effort may spend, seconds."""
    if effort == "thorough":
        return float("inf")
    pieces = 4.0 * compiled.tables
    packing = (1e-6 * pieces + 2e-5) * (SEVERAL if len(compiled.problem.phases) > 1 else 1.0)
    if effort == "normal":
        if compiled.tables > MANY_TABLES and len(compiled.problem.phases) > 1:
            return MANY_WORK
        return min(packing * 4000, MOST_WORK) if len(compiled.problem.phases) > 1 else packing * 4000
    # a few dozen tables settle in a few hundred packings, a hundred and more do not
    few = min(max(20 * compiled.problem.ranks, 320), 1500, FEW_PACKINGS * compiled.tables)
    return packing * (few if compiled.tables <= FEW else 2000)


def _objective(compiled: Compiled) -> Callable[[Sequence[int], list[list[int]]], float] | None:
    """The objective of a choice and a placement; None when it is the largest load (one phase)."""
    problem = compiled.problem
    phases = len(problem.phases)
    if phases == 1:
        return None
    fixed = [
        [
            np.array([sum(p.load[k] * p.count for p in o.pieces if p.scope == "all") for k in range(phases)])
            for o in options
        ]
        for options in problem.options
    ]

    def value(choice: Sequence[int], placement: list[list[int]]) -> float:
        ranks: list[int] = []
        hosts: list[int] = []
        rank_loads: list[tuple[float, ...]] = []
        host_loads: list[tuple[float, ...]] = []
        base = np.zeros(phases)
        for t, j in enumerate(choice):
            base += fixed[t][j]
            for group in compiled.choices[t][j].groups:
                where = placement[t][group.first : group.first + group.copies]
                if group.scope == HOST:
                    hosts += where
                    host_loads += [group.phases] * group.copies
                else:
                    ranks += where
                    rank_loads += [group.phases] * group.copies
        loads = np.zeros((problem.hosts, problem.host_size, phases))
        if hosts:
            np.add.at(loads, np.array(hosts), np.array(host_loads)[:, None, :])
        flat = loads.reshape(problem.ranks, phases)
        if ranks:
            np.add.at(flat, np.array(ranks), np.array(rank_loads))
        return float((flat.max(axis=0) + base).sum())

    return value


def finish(problem: Problem, best: Incumbent, bound: float, method: str, work: float) -> Solution:
    """Evaluate the incumbent from its definition and wrap it up."""
    placement = tuple(tuple(places) for places in best.placement)
    loads, memory = evaluate(problem, best.choice, placement)
    peaks = loads.max(axis=0)
    objective = float(peaks.sum())
    assert memory.max() <= problem.capacity * (1 + 1e-9), "a placement exceeds the memory of a rank"
    assert bound <= objective * (1 + 1e-9), "the bound exceeds a solution"
    bound = min(bound, objective)
    return Solution(
        choice=tuple(best.choice),
        placement=placement,
        objective=objective,
        phase_max=tuple(float(x) for x in peaks),
        lower_bound=bound,
        status="optimal" if objective - bound <= OPTIMAL * objective else "feasible",
        bound_method=method,
        loads=loads,
        memory=memory,
        work=work,
    )
