"""Min-max assignment with a proved bound: the front door of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from passes.assignment import infeasible
from passes.assignment.budget import Budget
from passes.assignment.compiled import Compiled, compile_problem
from passes.assignment.problem import Problem, Solution, evaluate
from passes.assignment.relaxation import average_bound
from passes.assignment.starts import relaxed_choices, uniform_choices
from passes.assignment.target_search import Incumbent, TargetSearch

Effort = Literal["quick", "normal", "thorough"]

OPTIMAL = 1e-6  # relative gap below which a solution is called optimal


def solve(
    problem: Problem,
    *,
    time_limit: float = 30.0,
    seed: int = 0,
    effort: Effort = "normal",
    stop_gap: float = 0.0,
) -> Solution:
    """Choose an option for every table and a place for every piece.

    Args:
        problem: what to assign.
        time_limit: limit on deterministic work, about seconds; the wall clock is a safety net only.
        seed: of the search; the same input and seed give the same solution.
        effort: "quick" takes the first good packing, "normal" searches for a while that grows with the
            problem, "thorough" spends the whole limit unless the gap closes.
        stop_gap: stop as soon as the proved gap is this small.

    Raises:
        InputError: a malformed problem.
        InfeasibleError: nothing fits; the message names the limits in conflict.
    """
    compiled = compile_problem(problem)
    infeasible.check(compiled)
    budget = Budget(min(time_limit, _allowance(compiled, effort)))
    bound, relaxed = average_bound(compiled)
    search = TargetSearch(compiled, bound, relaxed.price, budget, seed, _objective(problem))
    starts = relaxed_choices(compiled, bound)
    starts += uniform_choices(compiled, starts[0])
    search.walks(search.start(starts), stop_gap)
    if not search.best.choice:
        raise infeasible.give_up(compiled)
    return finish(problem, search.best, bound, "average load and largest piece", budget.work)


def _allowance(compiled: Compiled, effort: Effort) -> float:
    """Work that an effort may spend, seconds."""
    if effort == "thorough":
        return float("inf")
    pieces = 4.0 * compiled.tables
    packing = 1e-6 * pieces + 2e-5
    return packing * (150 if effort == "quick" else 3000)


def _objective(problem: Problem):  # type: ignore[no-untyped-def]
    if len(problem.phases) == 1:
        return None

    def value(choice: Sequence[int], placement: list[list[int]]) -> float:
        loads, _ = evaluate(problem, list(choice), tuple(tuple(p) for p in placement))
        return float(loads.max(axis=0).sum())

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
