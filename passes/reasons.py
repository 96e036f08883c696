"""Why each table got its option: the runner-up, what it would cost, and a sentence.

The runner-up is the best other option with every other table left where it is; a full re-solve could
only do better, so ``delta`` is an upper bound on what forcing the runner-up costs.
"""

from __future__ import annotations

from dataclasses import replace

from ir.plan import Alternative, TablePlan
from ir.units import format_seconds
from passes.assignment import Problem, Solution, runner_up

# Below this relative difference two options cost the same for the step.
_TIE = 1e-6


def explain_tables(
    plans: tuple[TablePlan, ...], problem: Problem, solution: Solution
) -> tuple[TablePlan, ...]:
    """The table plans with ``reason`` and ``runner_up`` filled in."""
    explained = []
    for index, plan in enumerate(plans):
        terms = [_own_seconds(problem, index, j) for j in range(len(problem.options[index]))]
        spent = [sum(seconds.values()) for seconds in terms]
        found = runner_up(problem, solution, index, spent, _TIE * solution.objective)
        best = None
        if found is not None:
            label = problem.options[index][found[0]].label
            best = Alternative(label, found[1], found[1] - solution.objective, terms[found[0]], "")
        explained.append(
            replace(
                plan, runner_up=best, reason=_reason(solution, spent[solution.choice[index]], terms, best)
            )
        )
    return tuple(explained)


def _own_seconds(problem: Problem, index: int, position: int) -> dict[str, float]:
    """Seconds of one option by phase, summed over the ranks that hold it."""
    spread = {"rank": 1, "host": problem.host_size, "all": problem.hosts * problem.host_size}
    totals = [0.0] * len(problem.phases)
    for piece in problem.options[index][position].pieces:
        for k, load in enumerate(piece.load):
            totals[k] += load * piece.count * spread[piece.scope]
    return dict(zip(problem.phases, totals, strict=True))


def _reason(solution: Solution, own: float, terms: list[dict[str, float]], best: Alternative | None) -> str:
    if len(terms) == 1:
        return "the only option allowed"
    if best is None:
        return "the only option that fits in memory beside the other tables"
    delta = best.delta or 0.0
    if delta > _TIE * solution.objective:
        return f"{best.option} instead would lengthen the step by {format_seconds(delta)}"
    saved = sum(best.terms.values()) - own
    if saved > 0:
        return (
            f"not on the slowest rank, so the step is the same; {best.option} instead would take "
            f"{format_seconds(saved)} more device time"
        )
    return f"not on the slowest rank: {best.option} instead would give the same step"
