"""The sharding pass with one table held to some of its options, warm from a plan that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.placed import option_of, placed_units
from ir.errors import InfeasibleError, InputError
from ir.plan import TablePlan
from ir.program import Program
from ir.topology import Topology
from passes.assignment import solve
from passes.assignment.warm import Start
from passes.sharding import GOOD_ENOUGH, MANY_TABLES, certify, in_the_users_words
from passes.sharding_plans import table_plan
from passes.sharding_prices import PricedOption, ShardingProblem, sharding_problem

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class ForcedSharding:
    """Sharding with ``table`` held to the options called ``labels``, all other tables free.

    ``known`` is a placement of the same tables on the same topology; the search starts from it, with the
    table put in where it raises the objective least.
    """

    name: ClassVar[str] = "sharding"
    table: str
    labels: tuple[str, ...]
    known: tuple[TablePlan, ...] = ()
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide ``tables`` and ``certificate``; raises InputError and InfeasibleError."""
        calibration = self.calibration or default_calibration(program.topology)
        stated = self._narrowed(sharding_problem(program, calibration))
        few = len(program.model.tables) <= MANY_TABLES
        try:
            solution = solve(
                stated.problem,
                time_limit=program.options.time_limit,
                seed=program.options.seed,
                stop_gap=0.0 if few else GOOD_ENOUGH,
                start=start_of(stated, self.known, program.topology) if self.known else None,
            )
        except InfeasibleError as error:
            raise in_the_users_words(error, stated.dense) from None
        plans = tuple(
            table_plan(program, table, options[choice], tuple(places))
            for table, options, choice, places in zip(
                program.model.tables, stated.options, solution.choice, solution.placement, strict=True
            )
        )
        return replace(program, tables=plans, certificate=certify(program, solution, calibration))

    def _narrowed(self, stated: ShardingProblem) -> ShardingProblem:
        """The problem with the table's other options taken away."""
        at = stated.problem.names.index(self.table)
        kept = [i for i, made in enumerate(stated.options[at]) if made.option.label in self.labels]
        if not kept:
            offered = ", ".join(made.option.label for made in stated.options[at])
            raise InputError(
                f"table {self.table!r} has no option {' or '.join(self.labels)!r}; it has {offered}"
            )

        problem = replace(stated.problem, options=_narrow(stated.problem.options, at, kept))
        return replace(stated, problem=problem, options=_narrow(stated.options, at, kept))


def _narrow(
    items: tuple[tuple[Entry, ...], ...], at: int, kept: Sequence[int]
) -> tuple[tuple[Entry, ...], ...]:
    return (*items[:at], tuple(items[at][i] for i in kept), *items[at + 1 :])


def start_of(stated: ShardingProblem, known: Sequence[TablePlan], topology: Topology) -> Start:
    """Where the tables of a plan lie, in the terms of a problem; tables without their option are left open."""
    plans = {table.name: table for table in known}
    choice: list[int | None] = []
    places: list[list[int]] = []
    for name, options in zip(stated.problem.names, stated.options, strict=True):
        found = _position(options, plans[name]) if name in plans else None
        choice.append(found)
        places.append(places_of(plans[name], topology) if found is not None else [])
    return choice, places


def _position(options: tuple[PricedOption, ...], plan: TablePlan) -> int | None:
    wanted = option_of(plan)
    return next((i for i, made in enumerate(options) if made.option == wanted), None)


def places_of(plan: TablePlan, topology: Topology) -> list[int]:
    """Rank or host of each unit in column order, -1 for units that every rank shares."""
    made = []
    for unit, ranks in placed_units(plan, topology):
        made.append({"rank": ranks[0], "host": topology.host_of(ranks[0]), "all": -1}[unit.scope])
    return made
