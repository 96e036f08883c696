"""Seconds of a plan as it is, on another machine and with other constants: what sensitivities are differences of.

Every kind of plan has its own: a step for training and for serving of recommenders (of its groups or towers where it
has them), a step for decoders in training, and for their serving the time to the first token and between tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ir.plan
from ir.errors import InputError
from ir.topology import Topology
from planner.what_if import program_of

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from ir.program import Program

LEAST_BUCKET = 2**16  # bytes: the smallest that can be asked for
ADAM_BYTES = 8  # optimizer state of a parameter: two fp32 moments

Price = Callable[[Topology, Any], dict[str, float]]
"""Seconds by name, on a machine with constants (``Calibration``, or ``ServingRates`` where decoders are served)."""


def priced(
    plan: ir.plan.Plan, model: Any = None, calibration: Calibration | None = None
) -> tuple[Any, Price, dict[str, float]]:
    """The constants of a plan, its price, and its seconds by name.

    Raises:
        InputError: as :func:`planner.what_if.model_of`.
    """
    from cost_models.calibration import default_calibration
    from cost_models.llm import llm_calibration
    from cost_models.serving_calibration import serving_rates

    step = {"step": plan.timeline.step}
    if plan.decisions.serving is not None:
        served = plan.decisions.serving.chosen
        seconds = {"time to the first token": served.ttft, "time between tokens": served.ttit}
        return serving_rates(plan.topology, calibration), _served(plan), seconds
    if plan.decisions.parallelism is not None:
        return calibration or llm_calibration(plan.topology), _decoder(plan), step
    constants = calibration or default_calibration(plan.topology)
    towers, dense = plan.decisions.towers, plan.decisions.dense
    if towers is not None and towers.applied:
        return constants, _towers(plan, model), step
    if dense is not None and dense.sparse is not None and dense.sparse.groups > 1:
        found = next(c for c in dense.sparse.candidates if c.groups == dense.sparse.groups)
        assert found.step_seconds is not None, "only groups that fit are chosen"
        return constants, _groups(plan, model), {"step": found.step_seconds}
    return constants, _tables(plan, model), step


def _decoder(plan: ir.plan.Plan) -> Price:
    from cost_models.llm import Training
    from cost_models.llm_step import step_cost

    made, fed = plan.decisions.parallelism, plan.workload.llm
    assert made is not None
    assert fed is not None
    state = ADAM_BYTES if fed.optimizer == "adam" else 0

    def price(topology: Topology, calibration: Any) -> dict[str, float]:
        training = Training(made.model, fed.sequence, fed.sequences, topology, calibration, fed.dtype, state)
        return {"step": step_cost(training, made.layout, made.stages).step}

    return price


def _served(plan: ir.plan.Plan) -> Price:
    from cost_models.serving import Server

    made = plan.decisions.serving
    assert made is not None
    asked, layout, exchange = made.request, made.chosen.layout, made.chosen.exchange

    def price(topology: Topology, rates: Any) -> dict[str, float]:
        server = Server(made.model, topology, rates)
        prefill = server.prefill(layout, asked.new, asked.cached, exchange)
        decode = server.decode(layout, asked.new + asked.cached, asked.batch)
        return {
            "time to the first token": sum(prefill.values()),
            "time between tokens": sum(decode.values()),
        }

    return price


def _stepped(program: Program, topology: Topology, calibration: Calibration) -> Program:
    """The program's flat tables on a machine, with its step; codecs are chosen again, as their gain is the link's."""
    from passes.collectives import Collectives
    from passes.compression import CompressionBounds
    from passes.step import StepTimeline

    coded = CompressionBounds(calibration).run(replace(program, topology=topology))
    return Collectives(calibration).run(StepTimeline(calibration).run(coded))


def _tables(plan: ir.plan.Plan, model: Any) -> Price:
    if not plan.table_plans:
        raise InputError("a plan without tables and layers has no step whose assumptions could be varied")
    program = _with_its_buckets(program_of(plan, model))

    def price(topology: Topology, calibration: Any) -> dict[str, float]:
        made = _stepped(program, topology, calibration)
        assert made.timeline is not None
        return {"step": made.timeline.step}

    return price


def _groups(plan: ir.plan.Plan, model: Any) -> Price:
    """Tables replicated over groups of ranks, synchronisation included."""
    from codegen.dense import group_plan
    from passes.dense_sparse import group_program, group_seconds

    program = _with_its_buckets(program_of(plan, model))
    dense = plan.decisions.dense
    assert dense is not None
    assert dense.sparse is not None
    count, every = dense.sparse.groups, dense.sparse.sync_every
    tables = group_plan(plan).table_plans

    def price(topology: Topology, calibration: Any) -> dict[str, float]:
        whole = _stepped(program, topology, calibration)
        one = replace(group_program(whole, count), tables=tables)
        return {"step": group_seconds(whole, one, count, every, calibration)[0]}

    return price


def _towers(plan: ir.plan.Plan, model: Any) -> Price:
    """Tables in towers, with what their modules leave of the layers above."""
    from passes.tower_candidate import tower_step
    from passes.tower_compression import peer_compression
    from passes.towers import Towers
    from planner.towers import price_over_arch

    program, decided = program_of(plan, model), plan.decisions.towers
    assert decided is not None
    source = model or plan.provenance.get("model") or plan.model.name
    over_arch = next(p.over_arch for p in price_over_arch((Towers(),), source) if isinstance(p, Towers))
    above = program.model
    if decided.module != "none" and over_arch is not None:
        above = over_arch(sum(t.vectors_out for t in decided.towers), decided.towers[0].columns_out)
    how = (plan.table_plans, decided.towers, decided.module)

    def price(topology: Topology, calibration: Any) -> dict[str, float]:
        there = replace(program, topology=topology)
        codecs = peer_compression(there, *how, calibration)
        return {"step": tower_step(there, *how, above, codecs, calibration)[0].step}

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
