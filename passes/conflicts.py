"""Why a sharding problem has no plan: a minimal set of limits that conflict, and the smallest change that helps.

A limit is something the user set or left at its default: ``hbm_budget`` (device memory less the reserve),
``tables[GLOB].sharding_types``, ``.ranks`` and ``.min_column_width`` of each rule, ``min_column_width`` and
``allow_state_split``. Whether tables fit under some limits is asked of the assignment solver with bytes for
seconds: the smallest peak of any rank that it finds. Limits that can be left out while the rest still does not
fit are left out one after the other (the deletion filter of Chinneck and Dravnieks, ORSA J. on Computing 3(2),
1991); what remains is infeasible, and feasible without any one of its members.

The change named is the first of these that makes the whole problem fit: more of the device's own memory, one
limit lifted, the least number of hosts, several limits lifted. The solver finds peaks, it does not prove
them least, so "smallest" is within its gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cost_models.calibration import Calibration
from ir.constraints import Constraints, TableConstraint
from ir.errors import Diagnosis, InfeasibleError
from ir.program import Program
from ir.sharding import COLUMN_MULTIPLE
from ir.units import format_bytes
from passes.assignment import Problem, Solution, solve
from passes.sharding_prices import memory_limit, sharding_problem

MEMORY = "hbm_budget"
WORK = 2.0  # deterministic seconds of a question
MOST_TABLES = 200  # above, a question takes seconds and the solver's own words must do
MOST_HOSTS = 4096

Lift = Callable[[Constraints], Constraints]


def roomiest(problem: Problem) -> Solution | None:
    """The placement whose fullest rank holds the fewest bytes, as found; None when a table has no place."""
    options = tuple(
        tuple(
            replace(option, pieces=tuple(replace(p, load=(p.memory,), memory=0.0) for p in option.pieces))
            for option in menu
        )
        for menu in problem.options
    )
    stated = replace(problem, options=options, capacity=1.0, phases=("bytes",), limits=(), budgets=())
    try:
        return solve(stated, time_limit=WORK, effort="quick")
    except InfeasibleError:
        return None


def peak_bytes(solution: Solution) -> float:
    """Bytes on the fullest rank of a solution of :func:`roomiest`."""
    return float(solution.loads.max())


def explained(program: Program, calibration: Calibration, error: InfeasibleError) -> InfeasibleError:
    """``error`` that can say a minimal conflict and a relaxation that was tried; unchanged for many tables."""
    if len(program.model.tables) > MOST_TABLES:
        return error

    def diagnose() -> Diagnosis | None:
        asked = _Question(program, calibration)
        conflict = asked.conflict()
        if not conflict:
            return None
        change = asked.change(conflict)
        return conflict, describe(change, program) if change else error.relaxation, change

    return InfeasibleError(str(error), error.conflict, error.relaxation, diagnose=diagnose)


def describe(change: Mapping[str, Any], program: Program) -> str:
    """A change in the user's words."""
    constraints, topology = program.options.constraints, program.topology
    said = [f"without {' and '.join(change['without'])}"] if "without" in change else []
    if "memory_limit" in change:
        more = change["memory_limit"] - (constraints.memory_limit or topology.device.tiers[0].capacity)
        said.append(
            f"memory_limit of {change['memory_limit']} ({format_bytes(change['memory_limit'])}) a device, "
            f"{format_bytes(more)} more"
        )
    if "memory_reserve" in change:
        said.append(f"memory_reserve of {change['memory_reserve']} instead of {constraints.memory_reserve:g}")
    if "hosts" in change:
        said.append(f"{change['hosts']} hosts of {topology.host_size} ranks instead of {topology.hosts}")
    return " and ".join(said)


def relaxed(program: Program, change: Mapping[str, Any]) -> Program:
    """The program with a change applied."""
    constraints, lifts = program.options.constraints, _limits(program)
    for name in change.get("without", ()):
        constraints = lifts[name](constraints)
    constraints = replace(constraints, **{k: v for k, v in change.items() if k not in ("without", "hosts")})
    machine = program.topology.with_hosts(change["hosts"]) if "hosts" in change else program.topology
    return replace(program, topology=machine, options=replace(program.options, constraints=constraints))


def _limits(program: Program) -> dict[str, Lift]:
    """Every limit but memory, with what lifts it; defaults first, which are the first to be left out."""
    constraints = program.options.constraints
    found: dict[str, Lift] = {}
    if constraints.min_column_width > COLUMN_MULTIPLE:
        found["min_column_width"] = lambda c: replace(c, min_column_width=COLUMN_MULTIPLE)
    if program.workload.optimizer == "rowwise_adagrad" and not constraints.allow_state_split:
        found["allow_state_split"] = lambda c: replace(c, allow_state_split=True)
    for glob, rule in constraints.tables.items():
        for part in fields(TableConstraint):
            if getattr(rule, part.name) is not None:
                found[f"tables[{glob}].{part.name}"] = _without_rule(glob, part.name)
    return found


def _without_rule(glob: str, part: str) -> Lift:
    def lift(constraints: Constraints) -> Constraints:
        rule: TableConstraint = replace(constraints.tables[glob], **{part: None})
        return replace(constraints, tables={**constraints.tables, glob: rule})

    return lift


@dataclass(slots=True)
class _Question:
    """Whether the tables fit under some of the limits."""

    program: Program
    calibration: Calibration

    def peak(self, program: Program) -> float | None:
        """Bytes that the fullest rank needs, dense part included; None when a table has no option."""
        free = replace(program.options.constraints, memory_limit=2**62, memory_reserve=0.0)
        unlimited = replace(program, options=replace(program.options, constraints=free))
        try:
            stated = sharding_problem(unlimited, self.calibration)
        except InfeasibleError:
            return None
        found = roomiest(stated.problem)
        return None if found is None else peak_bytes(found) + stated.dense

    def fits(self, names: frozenset[str]) -> bool:
        """The tables fit with only the limits in ``names`` in force."""
        lifted = [name for name in _limits(self.program) if name not in names]
        needed = self.peak(relaxed(self.program, {"without": lifted}))
        if needed is None:
            return False
        return MEMORY not in names or needed <= memory_limit(self.program)

    def conflict(self) -> tuple[str, ...]:
        """A minimal set of limits under which nothing fits; empty where the limits are not the cause."""
        names = [*_limits(self.program), MEMORY]
        kept = frozenset(names)
        if self.fits(kept) or not self.fits(frozenset()):
            return ()
        for name in names:
            if not self.fits(kept - {name}):
                kept -= {name}
        return tuple(name for name in names if name in kept)

    def change(self, conflict: tuple[str, ...]) -> dict[str, Any]:
        """The first change that makes the whole problem fit; empty when none is found."""
        needed = self.needed()
        if needed is not None and (found := self._memory(needed)):
            return found
        lifts = list(_limits(self.program))
        everything = frozenset((*lifts, MEMORY))
        for name in (name for name in lifts if name in conflict):
            if self.fits(everything - {name}):
                return {"without": (name,)}
        if needed is not None and (hosts := self._hosts()):
            return {"hosts": hosts}
        gone = self._least(lifts, lambda names: self.fits(everything - names))
        if gone:
            return {"without": gone}
        gone = self._least(lifts, lambda names: self._without(names).needed() is not None)
        rest = self._without(frozenset(gone))
        needed = rest.needed()
        if not gone or needed is None:
            return {}
        more = rest._memory(needed) or ({"hosts": hosts} if (hosts := rest._hosts()) else {})
        return {"without": gone, **more} if more else {}

    def needed(self) -> float | None:
        """Bytes of the fullest rank with every limit but memory in force."""
        return self.peak(self.program)

    def _without(self, names: frozenset[str]) -> _Question:
        return replace(self, program=relaxed(self.program, {"without": sorted(names)}))

    @staticmethod
    def _least(names: list[str], enough: Callable[[frozenset[str]], bool]) -> tuple[str, ...]:
        """Names that suffice together and not without any of them; empty when all do not suffice."""
        gone = frozenset(names)
        if not enough(gone):
            return ()
        for name in names:
            if enough(gone - {name}):
                gone -= {name}
        return tuple(name for name in names if name in gone)

    def _memory(self, needed: float) -> dict[str, Any]:
        """More of the device's own memory, as a limit or as a smaller reserve."""
        constraints = self.program.options.constraints
        capacity = self.program.topology.device.tiers[0].capacity
        whole = math.ceil(needed * (1 + 1e-9)) + 1
        limit = math.ceil(whole / (1 - constraints.memory_reserve)) + 1
        if constraints.memory_limit is not None and limit <= capacity:
            return {"memory_limit": limit}
        held = constraints.memory_limit or capacity
        if constraints.memory_reserve > 0 and whole < held:
            return {"memory_reserve": math.floor((1 - (whole + 1) / held) * 1e6) / 1e6}
        return {}

    def _hosts(self) -> int:
        """The least number of hosts that suffices (by doubling, then halving), 0 for none."""
        topology, limit = self.program.topology, memory_limit(self.program)
        if len(topology.levels) < 2:
            return 0

        def enough(hosts: int) -> bool:
            needed = self.peak(relaxed(self.program, {"hosts": hosts}))
            return needed is not None and needed <= limit

        low, high = topology.hosts, 2 * topology.hosts
        while not enough(high):
            low, high = high, 2 * high
            if high > min(MOST_HOSTS, 64 * topology.hosts):
                return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high
