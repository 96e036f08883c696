"""What the sharding pass decides between: every option of every table, priced, as an assignment problem."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.dense import planned_dense_memory
from cost_models.embedding import PHASES, unit_seconds
from cost_models.memory import unit_memory
from ir.errors import InfeasibleError
from ir.ops import EmbeddingTable
from ir.program import Program
from ir.sharding import ShardingOption, Unit, largest_units
from ir.units import format_bytes
from passes.assignment import Option, Piece, Problem
from passes.sharding_options import table_options


@dataclass(frozen=True, slots=True)
class PricedUnit:
    """``count`` equal units of an option, with what each adds to every rank that holds it."""

    unit: Unit  # its largest block only
    count: int
    seconds: dict[str, float]
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class PricedOption:
    """An option with its units in column order."""

    option: ShardingOption
    units: tuple[PricedUnit, ...]


@dataclass(frozen=True, slots=True)
class ShardingProblem:
    """The assignment problem of a program, and the options it was made of."""

    problem: Problem
    options: tuple[tuple[PricedOption, ...], ...]  # by table, in the order of the problem's options
    dense: int  # bytes of the dense part on every rank, taken from the capacity beforehand


def memory_limit(program: Program) -> int:
    """Bytes of device memory a plan may use on each rank."""
    constraints = program.options.constraints
    capacity = constraints.memory_limit or program.topology.device.tiers[0].capacity
    return int(capacity * (1 - constraints.memory_reserve))


def room_beside(dense: float, program: Program) -> float:
    """Bytes of each rank that a dense part of ``dense`` bytes leaves; raises InfeasibleError where there are none."""
    limit = memory_limit(program)
    if dense >= limit:
        raise InfeasibleError(
            f"the dense part alone needs {format_bytes(dense)} on every rank, the hbm_budget is "
            f"{format_bytes(limit)}; use a smaller batch, more ranks or less memory_reserve",
            conflict=("hbm_budget",),
            relaxation=f"{format_bytes(dense - limit)} more memory a rank",
        )
    return float(limit - dense)


def price_options(
    program: Program, table: EmbeddingTable, calibration: Calibration
) -> tuple[PricedOption, ...]:
    """Every option of a table with the cost of its units; equal units are priced once."""
    topology, workload, mode = program.topology, program.workload, program.options.mode
    return tuple(
        PricedOption(
            option,
            tuple(
                PricedUnit(
                    unit,
                    count,
                    unit_seconds(table, option, unit, topology, workload, calibration, mode),
                    unit_memory(table, option, unit, topology, workload, mode),
                )
                for unit, count in largest_units(option, table.rows, topology.world_size, topology.host_size)
            ),
        )
        for option in table_options(table, topology, workload, program.options.constraints)
    )


def sharding_problem(program: Program, calibration: Calibration) -> ShardingProblem:
    """State the sharding of a program as an assignment problem.

    With the objective "phases" a load has an entry a phase; with "bottleneck" it is their sum.

    Raises:
        InfeasibleError: a table without options, or a dense part that leaves no memory.
    """
    topology, model, constraints = program.topology, program.model, program.options.constraints
    dense = sum(planned_dense_memory(program).values())
    room = room_beside(dense, program)
    by_phase = program.options.objective == "phases"
    options = tuple(price_options(program, table, calibration) for table in model.tables)
    problem = Problem(
        names=tuple(table.name for table in model.tables),
        options=tuple(
            tuple(_solver_option(p, by_phase, constraints.for_table(table.name).ranks) for p in priced)
            for table, priced in zip(model.tables, options, strict=True)
        ),
        hosts=topology.hosts,
        host_size=topology.host_size,
        capacity=room,
        phases=PHASES if by_phase else ("all phases",),
    )
    return ShardingProblem(problem, options, dense)


def _solver_option(priced: PricedOption, by_phase: bool, allowed: tuple[int, ...] | None) -> Option:
    pieces = []
    for unit in priced.units:
        load = tuple(unit.seconds[phase] for phase in PHASES)
        pieces.append(
            Piece(
                unit.unit.scope,
                load if by_phase else (sum(load),),
                float(sum(unit.memory.values())),
                unit.count,
            )
        )
    return Option(
        label=priced.option.label,
        pieces=tuple(pieces),
        together=priced.option.together,
        allowed_ranks=allowed if priced.option.sharding_type == "table_wise" else None,
    )
