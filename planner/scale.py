"""The scaling advisor: sizes of a Wukong along the paper's rule, each planned for a machine.

Zhang et al. 2024 (arXiv 2403.02545v4), table 5, grows depth l first, up to 8, and then n_F = n_L, k and
the MLP together; beyond the table this walk goes on in its manner, the MLP and (n, k) doubling in turn.
Relative LogLoss follows the paper's fit ``y = -100 + 99.56 x^-0.00071`` over x GFLOP a sample (forward
and backward), about 0.1 % for four times the compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from cost_models.calibration import Calibration
from ir.constraints import Constraints
from ir.errors import InfeasibleError, InputError
from ir.plan import Certificate, TablePlan
from ir.program import Model, Program
from ir.topology import Topology
from ir.workload import Workload

TRAIN_FACTOR = 3.0  # forward and backward: three times the forward FLOP


@dataclass(frozen=True, slots=True)
class WukongSize:
    """l, n_F = n_L, k and the width of the three MLP layers, and what grew since the size before."""

    layers: int
    vectors: int
    rank: int
    width: int
    grew: str = ""

    @property
    def label(self) -> str:
        """``"l8 n32 k24 3x2048"``."""
        return f"l{self.layers} n{self.vectors} k{self.rank} 3x{self.width}"


PUBLISHED = (  # arXiv 2403.02545v4, table 5
    WukongSize(2, 8, 24, 2048),
    WukongSize(4, 32, 24, 2048, "l, n"),
    WukongSize(8, 32, 24, 2048, "l"),
    WukongSize(8, 48, 48, 4096, "n, k, MLP"),
    WukongSize(8, 96, 96, 8192, "n, k, MLP"),
    WukongSize(8, 96, 96, 16384, "MLP"),
    WukongSize(8, 192, 192, 16384, "n, k"),
)


def sizes() -> Iterator[WukongSize]:
    """The walk: the published sizes, then the MLP and (n, k) doubled in turn, without end."""
    yield from PUBLISHED
    size = PUBLISHED[-1]
    while True:
        size = replace(size, width=2 * size.width, grew="MLP")
        yield size
        size = replace(size, vectors=2 * size.vectors, rank=2 * size.rank, grew="n, k")
        yield size


def knobs(size: WukongSize) -> tuple[WukongSize, ...]:
    """``size`` with one of l, n, k and the MLP doubled alone."""
    return (
        replace(size, layers=2 * size.layers, grew="l alone"),
        replace(size, vectors=2 * size.vectors, grew="n alone"),
        replace(size, rank=2 * size.rank, grew="k alone"),
        replace(size, width=2 * size.width, grew="MLP alone"),
    )


def relative_log_loss(gflop: float) -> float:
    """LogLoss in per cent relative to the paper's DLRM of 1.37 GFLOP; its fit over 0.5 to 108 GFLOP.

    The exponent is negative: with it the fit gives the published losses, with the positive one that the
    copied figures state it would rise with compute.
    """
    return -100 + 99.56 * math.pow(gflop, -0.00071)


@dataclass(frozen=True, slots=True)
class PlannedSize:
    """One row of the advice; ``step`` is None where no plan fits, and ``problem`` says why."""

    size: WukongSize
    gflop: float  # a sample, forward and backward
    dense_params: int
    log_loss: float  # per cent, relative
    alone: bool  # a knob grown by itself, off the paper's walk
    step: float | None = None  # seconds
    samples_per_second: float | None = None
    memory: int | None = None  # bytes on the fullest rank
    device_seconds: float | None = None  # of one device, for a million samples
    gap: float | None = None  # of the sharding decision, a fraction
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """The sizes within the budget, in the order of the walk, then the knobs of the last that fits."""

    topology: str
    devices: int
    global_batch: int
    budget_gflop: float
    rows: tuple[PlannedSize, ...]

    @property
    def best(self) -> PlannedSize | None:
        """The largest size of the walk that fits the machine."""
        fits = [row for row in self.rows if row.step is not None and not row.alone]
        return fits[-1] if fits else None


class _KeepSharding:
    """Shard once: the tables of all sizes are the same, and sharding minimises the embedding time alone.

    The first size's decision is optimal for the others to the same gap, as long as it fits beside their
    dense part; where it does not, the tables are sharded anew.
    """

    name: ClassVar[str] = "sharding"

    def __init__(self, calibration: Calibration | None) -> None:
        self.calibration = calibration
        self.found: tuple[tuple[TablePlan, ...], Certificate] | None = None

    def run(self, program: Program) -> Program:
        from passes.memory import MemoryAccounting
        from passes.sharding import Sharding

        if self.found is not None:
            kept = replace(program, tables=self.found[0], certificate=self.found[1])
            memory = MemoryAccounting().run(kept).memory
            if memory is not None and all(rank.total <= rank.limit for rank in memory):
                return kept
        program = Sharding(self.calibration).run(program)
        assert program.tables is not None
        assert program.certificate is not None
        if self.found is None:
            self.found = program.tables, program.certificate
        return program


def scale_wukong(
    topology: Topology | str | Path,
    budget_gflop: float,
    *,
    tables: str | None = None,
    global_batch: int | None = None,
    constraints: Constraints | None = None,
    calibration: Calibration | None = None,
    time_limit: float = 5.0,
    seed: int = 0,
    on_size: Callable[[WukongSize], None] | None = None,
) -> Advice:
    """Plan each size of the walk up to a budget, and each knob of the last one that fits.

    Args:
        topology: a topology, a preset name or a YAML path.
        budget_gflop: GFLOP a sample, forward and backward.
        tables: a table set as for ``planner compile``; without one, stand-ins for the paper's 627 B sparse
            parameters (:mod:`planner.zoo.wukong_internal`).
        global_batch: without one, the paper's 262,144 or the table set's.
        constraints: as for :func:`planner.compile`.
        time_limit: solver work for sharding, about seconds; it is done once.
        on_size: called before each size is planned.

    Raises:
        InputError: a budget below the smallest size, or unusable inputs.
    """
    from passes.pipeline import pipeline
    from passes.sharding import Sharding
    from planner import api

    if not budget_gflop > 0:
        raise InputError(f"the budget must be a positive number of GFLOP a sample, not {budget_gflop}")
    machine = api.topology(topology)
    keep = _KeepSharding(calibration)
    passes = tuple(keep if isinstance(step, Sharding) else step for step in pipeline(calibration))

    batch = 0

    def planned(size: WukongSize, alone: bool = False) -> PlannedSize | None:
        nonlocal batch
        model, work = captured_at(size, tables)
        gflop = TRAIN_FACTOR * model.dense_flops / 1e9
        if gflop > budget_gflop and not alone:
            return None
        if on_size is not None:
            on_size(size)
        batch = global_batch or -(-work.global_batch // machine.world_size) * machine.world_size
        row = PlannedSize(size, gflop, model.dense_params, relative_log_loss(gflop), alone)
        try:
            plan = api.compile(
                model,
                machine,
                replace(work, global_batch=batch),
                constraints=constraints,
                passes=passes,
                time_limit=time_limit,
                seed=seed,
            )
        except InfeasibleError as error:
            return replace(row, problem=error.relaxation or str(error))
        step = plan.timeline.step
        return replace(
            row,
            step=step,
            samples_per_second=batch / step,
            memory=max(rank.total for rank in plan.memory),
            device_seconds=1e6 * step * machine.world_size / batch,
            gap=plan.certificate.gap,
        )

    rows = _walk(planned)
    if not rows:
        raise InputError(
            f"{budget_gflop:g} GFLOP a sample is below the smallest size of the walk ({PUBLISHED[0].label})"
        )
    fits = [row for row in rows if row.step is not None]
    last = fits[-1].size if fits else rows[0].size
    rows += [row for size in knobs(last) if (row := planned(size, alone=True)) is not None]
    return Advice(machine.name, machine.world_size, batch, budget_gflop, tuple(rows))


def _walk(planned: Callable[[WukongSize], PlannedSize | None]) -> list[PlannedSize]:
    """Sizes up to the budget; two in a row that do not fit the machine end the walk too."""
    rows: list[PlannedSize] = []
    for size in sizes():
        row = planned(size)
        if row is None:
            break
        rows.append(row)
        if len(rows) > 1 and rows[-1].step is None and rows[-2].step is None:
            break
    return rows


def captured_at(size: WukongSize, tables: str | None) -> tuple[Model, Workload]:
    """The model in the IR, and its workload."""
    from ir.capture import capture
    from planner.zoo.tables import zoo_tables
    from planner.zoo.wukong import build_wukong
    from planner.zoo.wukong_internal import build_wukong_internal

    if tables is None:
        module, work = build_wukong_internal(
            layers=size.layers,
            fmb=size.vectors,
            lcb=size.vectors,
            rank=size.rank,
            width=size.width,
            embeddings="plain",
        )
    else:
        records, _ = zoo_tables(tables, dim=None, row_cap=None, global_batch=1, optimizer="adagrad")
        module, work = build_wukong(
            tables=tables,
            bottom=(512, 256, records[0].dim),
            layers=size.layers,
            fmb=size.vectors,
            lcb=size.vectors,
            rank=size.rank,
            hidden=(size.width,) * 3,
            top=(*(size.width,) * 3, 1),
            embeddings="plain",
        )
    return capture(module, name=f"wukong {size.label}"), work
