"""Sharding: choose an option for every table and a place for every shard, with a proved gap.

Variables: one option per table (:mod:`passes.sharding_options`), one rank or host per unit of the
option. Objective: the embedding time of a step,

    sum over phases p of  ( overhead_p + max over ranks r of  sum of the seconds that r's units add to p )

because each phase (index exchange, lookup, output exchange, gradient exchange, update) ends in a
collective that waits for the slowest rank. Limits, by the names that errors use:
``hbm_budget`` (weights, optimizer, gradients, buffers and the dense part on each rank) and
``tables[NAME].sharding_types`` / ``tables[NAME].ranks`` (the user's constraints).

The search and the bound are :func:`passes.assignment.solve`'s; prices are
:mod:`cost_models.embedding` and :mod:`cost_models.memory`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.embedding import PHASES, phase_overheads, unit_seconds
from cost_models.memory import dense_memory, unit_memory
from ir.errors import InfeasibleError
from ir.ops import EmbeddingTable
from ir.plan import Certificate, Shard, TablePlan
from ir.program import Program
from ir.sharding import ShardingOption, Unit, units
from ir.units import format_bytes
from passes.assignment import Option, Piece, Problem, Solution, solve
from passes.reasons import explain_tables
from passes.sharding_options import table_options


@dataclass(frozen=True, slots=True)
class PricedUnit:
    """A unit with what it adds to each rank that holds it."""

    unit: Unit
    seconds: dict[str, float]
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class PricedOption:
    """An option with its units in column order."""

    option: ShardingOption
    units: tuple[PricedUnit, ...]


def memory_limit(program: Program) -> int:
    """Bytes of device memory a plan may use on each rank."""
    constraints = program.options.constraints
    capacity = constraints.memory_limit or program.topology.device.tiers[0].capacity
    return int(capacity * (1 - constraints.memory_reserve))


def price_options(
    program: Program, table: EmbeddingTable, calibration: Calibration
) -> tuple[PricedOption, ...]:
    """Every option of a table with the cost of its units; equal units are priced once."""
    topology, workload, mode = program.topology, program.workload, program.options.mode
    priced = []
    for option in table_options(table, topology, workload, program.options.constraints):
        by_width: dict[int, PricedUnit] = {}
        option_units = []
        for unit in units(option, table.rows, topology.world_size, topology.host_size):
            width = unit.blocks[0].cols
            if width not in by_width:
                by_width[width] = PricedUnit(
                    unit,
                    unit_seconds(table, option, unit, topology, workload, calibration, mode),
                    unit_memory(table, option, unit, topology, workload, mode),
                )
            option_units.append(replace(by_width[width], unit=unit))
        priced.append(PricedOption(option, tuple(option_units)))
    return tuple(priced)


def _solver_option(priced: PricedOption, allowed: tuple[int, ...] | None) -> Option:
    """Equal units become one piece with a count; widths are non-increasing, so order is kept."""
    counts = Counter(unit.unit.blocks[0].cols for unit in priced.units)
    pieces = []
    for width, count in counts.items():
        unit = next(unit for unit in priced.units if unit.unit.blocks[0].cols == width)
        load = tuple(unit.seconds[phase] for phase in PHASES)
        pieces.append(Piece(unit.unit.scope, load, float(sum(unit.memory.values())), count))
    return Option(
        label=priced.option.label,
        pieces=tuple(pieces),
        together=priced.option.together,
        allowed_ranks=allowed if priced.option.sharding_type == "table_wise" else None,
    )


def _shards(unit: Unit, place: int, world_size: int, host_size: int, copied: bool) -> list[Shard]:
    if copied:
        block = unit.blocks[0]
        return [Shard(rank, block.row, block.col, block.rows, block.cols) for rank in range(world_size)]
    first = {"rank": place, "host": place * host_size, "all": 0}[unit.scope]
    return [
        Shard(first + i, block.row, block.col, block.rows, block.cols) for i, block in enumerate(unit.blocks)
    ]


def _table_plan(
    program: Program, table: EmbeddingTable, priced: PricedOption, places: tuple[int, ...]
) -> TablePlan:
    topology = program.topology
    copied = priced.option.sharding_type == "data_parallel"
    shards: list[Shard] = []
    seconds = dict.fromkeys(PHASES, 0.0)
    memory: dict[str, int] = {}
    for unit, place in zip(priced.units, places, strict=True):
        placed = _shards(unit.unit, place, topology.world_size, topology.host_size, copied)
        shards += placed
        for phase in PHASES:
            seconds[phase] += unit.seconds[phase] * len(placed)
        for purpose, size in unit.memory.items():
            memory[purpose] = memory.get(purpose, 0) + size * len(placed)
    return TablePlan(
        name=table.name,
        rows=table.rows,
        dim=table.dim,
        dtype=table.dtype,
        features=table.features,
        pooling=table.pooling,
        module=table.module,
        parameter=table.parameter,
        sharding_type=priced.option.sharding_type,
        compute_kernel="dense" if copied else "fused",
        shards=tuple(shards),
        terms=seconds,
        memory=memory,
    )


@dataclass(frozen=True, slots=True)
class Sharding:
    """The sharding pass; ``calibration`` overrides the constants of the device kind."""

    name: ClassVar[str] = "sharding"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide ``tables`` and ``certificate``; raises InfeasibleError."""
        topology, model = program.topology, program.model
        calibration = self.calibration or default_calibration(topology)
        priced = [price_options(program, table, calibration) for table in model.tables]
        dense = sum(dense_memory(model, program.workload, topology, program.options.mode).values())
        capacity = memory_limit(program) - dense
        if capacity <= 0:
            raise InfeasibleError(
                f"the dense part alone needs {format_bytes(dense)} on every rank, the hbm_budget is "
                f"{format_bytes(memory_limit(program))}; use a smaller batch, more ranks or less memory_reserve",
                conflict=("hbm_budget",),
                relaxation=f"{format_bytes(dense - memory_limit(program))} more memory a rank",
            )
        constraints = program.options.constraints
        problem = Problem(
            names=tuple(table.name for table in model.tables),
            options=tuple(
                tuple(_solver_option(p, constraints.for_table(table.name).ranks) for p in options)
                for table, options in zip(model.tables, priced, strict=True)
            ),
            hosts=topology.hosts,
            host_size=topology.host_size,
            capacity=float(capacity),
            phases=PHASES,
        )
        try:
            solution = solve(problem, time_limit=program.options.time_limit, seed=program.options.seed)
        except InfeasibleError as error:
            raise _in_the_users_words(error, dense) from None
        plans = tuple(
            _table_plan(program, table, options[choice], tuple(places))
            for table, options, choice, places in zip(
                model.tables, priced, solution.choice, solution.placement, strict=True
            )
        )
        plans = explain_tables(plans, problem, solution)
        return replace(program, tables=plans, certificate=self._certificate(program, solution, calibration))

    def _certificate(self, program: Program, solution: Solution, calibration: Calibration) -> Certificate:
        """Objective and bound with the overheads that no assignment changes added to both."""
        overheads = phase_overheads(program.topology, program.workload, calibration, program.options.mode)
        fixed = sum(overheads.values())
        return Certificate(
            objective_name="embedding time of a step: sum over phases of the slowest rank, seconds",
            objective=solution.objective + fixed,
            lower_bound=min(solution.lower_bound, solution.objective) + fixed,
            status=solution.status,
            bound_method=solution.bound_method,
        )


def _in_the_users_words(error: InfeasibleError, dense: int) -> InfeasibleError:
    """The solver's ``capacity`` is the user's ``hbm_budget`` less the dense part."""
    words = {"capacity": "hbm_budget"}
    beside = f" (beside {format_bytes(dense)} for the dense part)" if dense else ""
    conflict = tuple(words.get(name, name.replace("options[", "tables[")) for name in error.conflict)
    return InfeasibleError(f"{error}{beside}", conflict, error.relaxation)
