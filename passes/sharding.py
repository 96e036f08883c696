"""Sharding: choose an option for every table and a place for every shard, with a proved gap.

Variables: one option per table (:mod:`passes.sharding_options`), one rank or host per unit of the
option. The objective is one of

    phases:      sum over phases p of  ( overhead_p + max over ranks r of  seconds that r's units add to p )
    bottleneck:  sum over phases of overhead_p  +  max over ranks r of  seconds that r's units add in all

Each phase (index exchange, lookup, output exchange, gradient exchange, update) ends in a collective that
waits for the slowest rank, so "phases" is the embedding time of the modelled step and the default.
"bottleneck", the objective of TorchRec's and NeuroShard's planners, is below it for the same plan; its
proved gap is smaller on large problems.

Limits, by the names that errors use: ``hbm_budget`` (weights, optimizer, gradients, buffers and the
dense part on each rank) and ``tables[NAME].sharding_types`` / ``tables[NAME].ranks`` (the user's).

With constraints on number formats or memory tiers these are chosen in the same problem, see
:mod:`passes.joint`.

Prices are :mod:`passes.sharding_prices`, the search and the bound :func:`passes.assignment.solve`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.embedding import phase_overheads
from ir.errors import InfeasibleError
from ir.plan import Certificate
from ir.program import Program
from ir.units import format_bytes
from passes.assignment import Solution, solve
from passes.reasons import explain_tables
from passes.search_share import search_limit
from passes.sharding_plans import table_plan
from passes.sharding_prices import ShardingProblem, sharding_problem

# With hundreds of tables the last per cent costs most of the search and is less than the cost model's
# error; with few it is cheap, and the plan may be proved optimal.
MANY_TABLES = 200
GOOD_ENOUGH = 0.01

_OBJECTIVES = {
    "phases": "embedding time of a step: sum over phases of the slowest rank, seconds",
    "bottleneck": "embedding time of the slowest rank, all phases together, seconds",
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """The sharding pass; ``calibration`` overrides the constants of the device kind."""

    name: ClassVar[str] = "sharding"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide ``tables`` and ``certificate``; raises InfeasibleError."""
        calibration = self.calibration or default_calibration(program.topology)
        constraints = program.options.constraints
        if constraints.formats is not None or constraints.tiers is not None:
            from passes.joint_plan import decide_jointly  # loads OR-Tools

            return decide_jointly(program, calibration)
        try:
            stated = sharding_problem(program, calibration)
            solution = _solved(program, stated)
        except InfeasibleError as error:
            from passes.conflicts import explained

            raise explained(program, calibration, error) from None
        plans = tuple(
            table_plan(program, table, options[choice], tuple(places))
            for table, options, choice, places in zip(
                program.model.tables, stated.options, solution.choice, solution.placement, strict=True
            )
        )
        plans = explain_tables(plans, stated.problem, solution)
        return replace(program, tables=plans, certificate=certify(program, solution, calibration))


def _solved(program: Program, stated: ShardingProblem) -> Solution:
    """The solver's answer; where it finds no placement, from one that was looked for by memory alone."""
    search = functools.partial(
        solve,
        stated.problem,
        time_limit=search_limit(program),
        seed=program.options.seed,
        stop_gap=GOOD_ENOUGH if len(program.model.tables) > MANY_TABLES else 0.0,
    )
    try:
        return search()
    except InfeasibleError as error:
        from passes.conflicts import peak_bytes, roomiest

        found = roomiest(stated.problem)
        if found is None or peak_bytes(found) > stated.problem.capacity:
            raise in_the_users_words(error, stated.dense) from None
    return search(start=(found.choice, found.placement))


def certify(program: Program, solution: Solution, calibration: Calibration) -> Certificate:
    """Objective and bound with the overheads that no assignment changes added to both."""
    overheads = phase_overheads(program.topology, program.workload, calibration, program.options.mode)
    fixed = sum(overheads.values())
    return Certificate(
        objective_name=_OBJECTIVES[program.options.objective],
        objective=solution.objective + fixed,
        lower_bound=min(solution.lower_bound, solution.objective) + fixed,
        status=solution.status,
        bound_method=solution.bound_method,
    )


def in_the_users_words(error: InfeasibleError, dense: int) -> InfeasibleError:
    """The solver's ``capacity`` is the user's ``hbm_budget`` less the dense part."""
    words = {"capacity": "hbm_budget"}
    beside = f" (beside {format_bytes(dense)} for the dense part)" if dense else ""
    conflict = tuple(words.get(name, name.replace("options[", "tables[")) for name in error.conflict)
    return InfeasibleError(f"{error}{beside}", conflict, error.relaxation)
