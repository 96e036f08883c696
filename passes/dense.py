"""Dense parallelism: replicate the dense part, split it over all ranks or those of each host, or split wide layers.

Each layout is priced with the sharding it leaves room for: the tables are placed once beside the smallest dense
part (a relaxation of all others), and once more beside each larger one that this placement does not fit with. Of
the layouts that fit, the modelled step decides; within :data:`WORTH` the simpler one stays. Without a request the
dense part is replicated where it fits beside the tables, and split where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.dense import (
    DenseLayout,
    dense_units,
    make_layout,
    message_bytes,
    planned_dense_memory,
    unit_params,
    wire_bytes,
)
from cost_models.dense_tensor import tensor_message_bytes, tensor_pairs, tensor_wire_bytes
from cost_models.embedding import stored_bytes
from ir.dense_plan import STRATEGIES, DenseCandidate, DensePlan, DenseRequest, DenseStrategy
from ir.dtypes import nbytes
from ir.errors import InfeasibleError, InputError
from ir.program import Program
from ir.units import format_bytes, format_seconds
from passes.base import Pass
from passes.collectives import Collectives
from passes.compression import CompressionBounds
from passes.memory import MemoryAccounting
from passes.sharding import Sharding
from passes.sharding_prices import memory_limit
from passes.step import StepTimeline

WORTH = 1e-3  # of the step: below, the simpler layout stays
TRIAL = 0.25  # of the time limit, for the tables beside one candidate
_UNITS = (
    2**20,
    8 * 2**20,
    32 * 2**20,
    128 * 2**20,
)  # bytes gathered together, tried where none are asked for


@dataclass(frozen=True, slots=True)
class DenseParallelism:
    """Fill ``decisions.dense``; left empty where nothing is asked and the replicated dense part fits.

    ``placing`` places the tables that layouts are priced with; default :class:`passes.sharding.Sharding`.
    """

    name: ClassVar[str] = "dense"
    calibration: Calibration | None = None
    placing: Pass | None = None

    def run(self, program: Program) -> Program:
        """Decide.

        Raises:
            InputError: a request for inference.
            InfeasibleError: no layout asked for fits.
        """
        request = program.options.constraints.dense
        if program.options.mode != "train":
            if request is not None:
                raise InputError(
                    "dense parallelism is of training; leave out constraints.dense for inference"
                )
            return program
        if program.topology.world_size == 1 or (request is None and _fits_replicated(program)):
            return program
        calibration = self.calibration or default_calibration(program.topology)
        asked = request or DenseRequest()
        plans = list(_plans(program, asked))
        steps = _steps(program, plans, calibration, self.placing or Sharding(calibration))
        if not any(step is not None for step in steps):
            raise _nothing_fits(program, plans, asked)
        chosen = _choose(program, plans, steps, request is None)
        return replace(program, decisions=replace(program.decisions, dense=chosen))


def _table_bytes(program: Program) -> float:
    """Weights of all tables: what any sharding has to hold."""
    return sum(table.rows * stored_bytes(table.dtype, table.dim) for table in program.model.tables)


def _fits_replicated(program: Program) -> bool:
    """Whether DDP leaves room for the tables' weights, or a split would not help."""
    dense = sum(planned_dense_memory(program).values())
    room = memory_limit(program) - _table_bytes(program) / program.topology.world_size
    return dense < room or not program.model.dense_params


def _allowed(program: Program, request: DenseRequest) -> tuple[DenseStrategy, ...]:
    """The strategies to weigh, the simplest first.

    Raises:
        InputError: tp by name beside what only other runtimes than TorchRec's run.
    """
    asked = program.options.constraints
    beside = [name for name in ("towers", "compression", "tiers") if getattr(asked, name) is not None]
    if request.strategies is None:
        # the split that nobody asked for stays one that every emitter writes
        plain = bool(beside) or asked.dense is None
        return tuple(name for name in STRATEGIES if name != "tp" or not plain)
    if beside and "tp" in request.strategies:
        raise InputError(
            f"tensor parallelism runs beside TorchRec's tables, without {beside[0]}; leave tp out of dense.strategies, or "
            f"{beside[0]} out of the constraints"
        )
    return tuple(name for name in STRATEGIES if name in request.strategies)


def _layouts(program: Program, request: DenseRequest) -> Iterator[DenseLayout]:
    topology = program.topology
    units = (request.unit_bytes,) if request.unit_bytes is not None else _UNITS
    reshards = (False, True) if request.reshard_after_forward is None else (request.reshard_after_forward,)
    for strategy in _allowed(program, request):
        if strategy == "tp":
            continue
        if strategy == "hsdp" and 1 in (topology.hosts, topology.host_size):
            continue  # the same as fsdp, or as ddp
        if strategy == "ddp":
            yield make_layout("ddp", topology)
            continue
        for reshard in reshards:
            for unit in units:
                yield make_layout(strategy, topology, reshard, unit)


def _plans(program: Program, request: DenseRequest) -> Iterator[DensePlan]:
    """Every layout as a decision; of unit sizes that make the same units, one."""
    item = nbytes(program.workload.compute_dtype)
    if "tp" in _allowed(program, request):
        yield from _tensor_plans(program, request)
    seen = set()
    for layout in _layouts(program, request):
        units = dense_units(program.model, layout.unit_bytes, item) if layout.shard > 1 else ()
        key = (layout.strategy, layout.reshard_after_forward, units)
        if key in seen:
            continue
        seen.add(key)
        sizes, rest = unit_params(program.model, units)
        size = (sum(sizes) + rest) * item
        yield DensePlan(
            strategy=layout.strategy,
            shard=layout.shard,
            replicas=layout.replicas,
            reshard_after_forward=layout.reshard_after_forward,
            unit_bytes=layout.unit_bytes,
            units=units,
            message_bytes=round(message_bytes(layout, size)),
            wire_bytes=round(wire_bytes(layout, size)),
        )


def _tensor_plans(program: Program, request: DenseRequest) -> Iterator[DensePlan]:
    """Every set of pairs above a size that the ranks of a host can split."""
    topology, workload = program.topology, program.workload
    if topology.host_size == 1:
        return
    item, params = nbytes(workload.compute_dtype), program.model.dense_params
    samples = workload.global_batch / topology.world_size
    seen = set()
    for least in (request.unit_bytes,) if request.unit_bytes is not None else (0, *_UNITS):
        pairs = tensor_pairs(program.model, topology.host_size, math.ceil(least / item))
        if not pairs or pairs in seen:
            continue
        seen.add(pairs)
        plan = DensePlan(
            strategy="tp",
            shard=1,
            replicas=topology.world_size,
            unit_bytes=least,
            tensor=topology.host_size,
            pairs=pairs,
        )
        yield replace(
            plan,
            message_bytes=round(tensor_message_bytes(plan, params, samples, item)),
            wire_bytes=round(tensor_wire_bytes(plan, params, samples, item)),
        )


def with_dense(program: Program, plan: DensePlan) -> Program:
    """``program`` under ``plan``."""
    return replace(program, decisions=replace(program.decisions, dense=plan))


def _bytes(program: Program, plan: DensePlan) -> int:
    return sum(planned_dense_memory(with_dense(program, plan)).values())


def _steps(
    program: Program, plans: list[DensePlan], calibration: Calibration, placing: Pass
) -> list[float | None]:
    """Seconds of the modelled step under each plan; None where it does not fit."""
    limit = TRIAL * program.options.time_limit
    trial = replace(program, options=replace(program.options, time_limit=limit))
    order = sorted(range(len(plans)), key=lambda i: _bytes(program, plans[i]))
    steps: list[float | None] = [None] * len(plans)
    placed: Program | None = None
    for i in order:
        candidate = with_dense(program, plans[i])
        if placed is not None:
            candidate = replace(placed, decisions=replace(placed.decisions, dense=plans[i]))
            candidate = MemoryAccounting().run(candidate)
        if placed is None or not _within(candidate):
            try:
                candidate = MemoryAccounting().run(placing.run(with_dense(trial, plans[i])))
            except InfeasibleError:
                break  # larger dense parts fit even less
        placed = candidate
        timed = StepTimeline(calibration).run(CompressionBounds(calibration).run(candidate))
        timed = Collectives(calibration).run(timed)
        assert timed.timeline is not None
        steps[i] = timed.timeline.step
    return steps


def _within(program: Program) -> bool:
    return program.memory is not None and all(rank.total <= rank.limit for rank in program.memory)


def _choose(program: Program, plans: list[DensePlan], steps: list[float | None], unasked: bool) -> DensePlan:
    best = min(step for step in steps if step is not None)
    order = sorted(range(len(plans)), key=lambda i: STRATEGIES.index(plans[i].strategy))
    found, step = next(
        (plans[i], s) for i in order if (s := steps[i]) is not None and s <= best * (1 + WORTH)
    )
    candidates = tuple(
        DenseCandidate(p.strategy, p.reshard_after_forward, p.unit_bytes, _bytes(program, p), s)
        for p, s in zip(plans, steps, strict=True)
    )
    words = []
    if unasked:
        words.append("the replicated dense part does not fit beside the tables")
    others = [
        (s, p) for p, s in zip(plans, steps, strict=True) if s is not None and p.strategy != found.strategy
    ]
    if others:
        other, up = min(others, key=lambda pair: pair[0])
        words.append(f"{up.strategy} would take {format_seconds(other)} instead of {format_seconds(step)}")
    too_large = [c for c in candidates if c.step_seconds is None and c.strategy != found.strategy]
    if too_large:
        smallest = min(too_large, key=lambda c: c.memory)
        words.append(
            f"{smallest.strategy} does not fit: its dense part takes {format_bytes(smallest.memory)} a rank"
        )
    return replace(found, candidates=candidates, reason="; ".join(words) or "the only layout asked for")


def _nothing_fits(program: Program, plans: list[DensePlan], asked: DenseRequest) -> InfeasibleError:
    """Which layout is the smallest, and what is missing."""
    limit = memory_limit(program)
    if not plans:
        return InfeasibleError(
            f"{', '.join(_allowed(program, asked))} does not exist on {program.topology.name}: hsdp needs several hosts of "
            "several ranks, tp hosts of several ranks and pairs of linear layers that divide by them; allow fsdp or ddp",
            conflict=("dense.strategies",),
            relaxation="dense.strategies: fsdp",
        )
    smallest = min(plans, key=lambda plan: _bytes(program, plan))
    need = _bytes(program, smallest)
    tables = _table_bytes(program) / program.topology.world_size
    missing = need + tables - limit
    named = asked.strategies or STRATEGIES
    left_out = [
        name for name in STRATEGIES if name not in named and name != "tp"
    ]  # tp needs activations instead
    advice = f"or allow {' or '.join(left_out)} in dense.strategies" if left_out else "or more ranks"
    relaxation = f"{format_bytes(missing)} more memory a rank" if missing > 0 else "more memory a rank"
    return InfeasibleError(
        f"the dense part alone needs {format_bytes(need)} on every rank as {smallest.strategy}, its smallest layout "
        f"asked for, and the tables {format_bytes(tables)}; the hbm_budget is {format_bytes(limit)}; use a smaller "
        f"batch, less memory_reserve {advice}",
        conflict=("hbm_budget", *(("dense.strategies",) if left_out else ())),
        relaxation=relaxation,
    )
