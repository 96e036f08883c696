"""How the modelled step depends on each number that a plan rests on, the plan left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import ir.plan
from ir.errors import InputError
from ir.topology import Topology
from planner.what_if import program_of

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.program import Program

LEAST_BUCKET = 2**16  # bytes: the smallest that can be asked for
STEP = 0.10  # relative change of an assumption
ADAM_BYTES = 8  # optimizer state of a parameter: two fp32 moments

Price = Callable[[Topology, "Calibration"], float]
"""Seconds of the plan's step on a machine with constants."""

Vary = Callable[[float], tuple[Topology, "Calibration"]]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The modelled step of the same plan when one assumption is a tenth worse or better, seconds."""

    name: str
    value: str
    worse: float
    better: float


def sensitivity(
    plan: ir.plan.Plan, *, model: Any = None, calibration: Calibration | None = None
) -> tuple[Sensitivity, ...]:
    """The step under each assumption a tenth worse and better; largest effect first.

    Worse is a tenth less of a bandwidth, rate or efficiency, and a tenth more of a time. Decoders in training need no
    model, other plans that of which they were compiled.

    Raises:
        InputError: as :func:`planner.what_if.model_of`, or a plan whose step is not priced by its placement alone.
    """
    from cost_models.calibration import default_calibration

    if plan.decisions.parallelism is not None:
        from cost_models.llm import llm_calibration

        base, price = calibration or llm_calibration(plan.topology), _decoder_price(plan)
    elif _priced_alone(plan):
        base, price = calibration or default_calibration(plan.topology), _table_price(plan, model)
    else:
        raise InputError(
            "how the step depends on each assumption is told of training plans without towers and groups of tables; "
            "change an input with --set to see what becomes of this one"
        )
    # against the price of today's model, which need not be the one that an older plan was made by
    offset = plan.timeline.step - price(plan.topology, base)
    found = []
    for name, value, vary in _assumptions(plan.topology, base):
        steps = [price(*vary(factor)) + offset for factor in (1 - STEP, 1 + STEP)]
        found.append(Sensitivity(name, value, max(steps), min(steps)))
    return tuple(sorted(found, key=lambda s: s.better - s.worse))


def _decoder_price(plan: ir.plan.Plan) -> Price:
    from cost_models.llm import Training
    from cost_models.llm_step import step_cost

    made, fed = plan.decisions.parallelism, plan.workload.llm
    assert made is not None
    assert fed is not None
    state = ADAM_BYTES if fed.optimizer == "adam" else 0

    def price(topology: Topology, calibration: Calibration) -> float:
        training = Training(made.model, fed.sequence, fed.sequences, topology, calibration, fed.dtype, state)
        return step_cost(training, made.layout, made.stages).step

    return price


def _priced_alone(plan: ir.plan.Plan) -> bool:
    """Whether the step follows from the tables' placement: not with towers, groups, or without tables."""
    towers, dense = plan.decisions.towers, plan.decisions.dense
    grouped = dense is not None and dense.sparse is not None and dense.sparse.groups > 1
    return bool(plan.table_plans) and not grouped and not (towers is not None and towers.applied)


def _table_price(plan: ir.plan.Plan, model: Any) -> Price:
    program = _with_its_buckets(program_of(plan, model))

    def price(topology: Topology, calibration: Calibration) -> float:
        from passes.collectives import Collectives
        from passes.step import StepTimeline

        stepped = StepTimeline(calibration).run(replace(program, topology=topology))
        made = Collectives(calibration).run(stepped)
        assert made.timeline is not None
        return made.timeline.step

    return price


def _with_its_buckets(program: Program) -> Program:
    """The program held to the buckets of dense gradients that were decided."""
    from ir.collective_plan import CollectiveRequest

    section = program.decisions.collectives
    if section is None or section.bucket_bytes < LEAST_BUCKET:
        return program
    limits = program.options.constraints
    asked = replace(limits.collectives or CollectiveRequest(), bucket_bytes=section.bucket_bytes)
    options = replace(program.options, constraints=replace(limits, collectives=asked))
    return replace(program, options=options)


def _assumptions(topology: Topology, base: Calibration) -> Iterable[tuple[str, str, Vary]]:
    from ir.units import format_bandwidth

    def constant(name: str) -> Vary:
        return lambda factor: (topology, replace(base, **{name: getattr(base, name) * factor}))

    def link(index: int) -> Vary:
        level = topology.levels[index]

        def scaled(factor: float) -> tuple[Topology, Calibration]:
            other = replace(level, link=replace(level.link, bandwidth=level.link.bandwidth * factor))
            levels = (*topology.levels[:index], other, *topology.levels[index + 1 :])
            return replace(topology, levels=levels), base

        return scaled

    def memory(factor: float) -> tuple[Topology, Calibration]:
        first, *rest = topology.device.tiers
        scaled = replace(
            first,
            read_bandwidth=first.read_bandwidth * factor,
            write_bandwidth=first.write_bandwidth * factor,
        )
        return replace(topology, device=replace(topology.device, tiers=(scaled, *rest))), base

    for index, level in enumerate(topology.levels):
        yield f"link.{level.name}", format_bandwidth(level.link.bandwidth), link(index)
    tier = topology.device.tiers[0]
    yield f"bandwidth.{tier.name}", format_bandwidth(tier.read_bandwidth), memory
    for field in fields(base):
        value = getattr(base, field.name)
        if isinstance(value, float) and value:
            yield field.name, f"{value:g}", constant(field.name)
