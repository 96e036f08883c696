"""The sharding pass warm: the search starts from where the tables lie, so that it never ends with a worse plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from ir.errors import InfeasibleError
from ir.format_plan import FormatPlan
from ir.plan import TablePlan
from ir.program import Program
from passes.assignment import Effort, solve
from passes.forced_sharding import start_of
from passes.reasons import explain_tables
from passes.search_share import search_limit
from passes.sharding import GOOD_ENOUGH, MANY_TABLES, Sharding, certify
from passes.sharding_plans import table_plan
from passes.sharding_prices import sharding_problem


@dataclass(frozen=True, slots=True)
class WarmSharding:
    """Sharding, and formats and tiers where they are asked for, from a plan of the same tables.

    Attributes:
        known: where its tables lie, in which formats and tiers.
        ranks: those that they lie on, (all, of a host); on others tables keep their options and are placed anew.
        formats: of its other tensors.
        unused: takes why the search did not start from the plan, where it did not.
        effort: of the search where neither formats nor tiers are asked for, see :func:`passes.assignment.solve`.
    """

    name: ClassVar[str] = "sharding"
    known: tuple[TablePlan, ...]
    ranks: tuple[int, int]
    calibration: Calibration | None = None
    formats: FormatPlan | None = None
    unused: list[str] = field(default_factory=list)
    effort: Effort = "warm"

    def run(self, program: Program) -> Program:
        """Decide ``tables`` and ``certificate``; raises InfeasibleError that names the limits."""
        calibration = self.calibration or default_calibration(program.topology)
        same = self.ranks == (program.topology.world_size, program.topology.host_size)
        constraints = program.options.constraints
        if constraints.formats is not None or constraints.tiers is not None:
            from passes.joint_plan import decide_jointly
            from passes.joint_warm import Known

            return decide_jointly(program, calibration, Known(self.known, self.formats, same, self.unused))
        try:
            stated = sharding_problem(program, calibration)
            start = start_of(stated, self.known, program.topology)
            if not same:
                start = (start[0], None)
            solution = solve(
                stated.problem,
                time_limit=search_limit(program),
                seed=program.options.seed,
                effort=self.effort,
                stop_gap=GOOD_ENOUGH if len(program.model.tables) > MANY_TABLES else 0.0,
                start=start,
            )
        except InfeasibleError:
            self.unused.append("no placement was found from there")
            return Sharding(self.calibration).run(program)  # looks further, and explains what conflicts
        plans = tuple(
            table_plan(program, table, options[choice], tuple(places))
            for table, options, choice, places in zip(
                program.model.tables, stated.options, solution.choice, solution.placement, strict=True
            )
        )
        plans = explain_tables(plans, stated.problem, solution)
        return replace(program, tables=plans, certificate=certify(program, solution, calibration))
