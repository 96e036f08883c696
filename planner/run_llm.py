"""``planner run`` for decoders: train in the planned parallelism here, beside the whole model."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from ir.constraints import Constraints
from ir.errors import InputError
from ir.parallelism import SCHEDULES, ParallelismConstraints
from ir.plan import Plan
from ir.units import format_bytes, format_seconds
from planner.render import grid

if TYPE_CHECKING:
    from codegen.llm import DecoderRun


def compiled_for_run(model: str, topology: str, constraints: Constraints | None) -> Plan:
    """The plan of a model by name for a machine: the best that can be run here.

    The fastest modelled layout of a decoder may have a zero-bubble schedule that torch cannot run with the rest of it;
    unless schedules were asked for, the fastest of the others is taken then.
    """
    from codegen.runtime.llm.limits import check_runs
    from planner import api

    asked = constraints or Constraints()
    plan = api.compile(model, topology, constraints=asked)
    made, rules = plan.decisions.parallelism, asked.parallelism or ParallelismConstraints()
    if made is None or rules.schedules is not None:
        return plan
    try:
        check_runs(made)
    except InputError:
        whole = tuple(name for name in SCHEDULES if name != "zero_bubble")
        return api.compile(
            model, topology, constraints=replace(asked, parallelism=replace(rules, schedules=whole))
        )
    return plan


def decoder_factory(plan: Plan, model: str | None) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """How a process builds the plan's decoder: factory, arguments, options.

    Raises:
        InputError: the plan does not name a zoo model or ``file.py:callable``.
    """
    from planner.zoo import decoder_names

    source = model or plan.provenance.get("model", "")
    fed = plan.workload.llm
    if source in decoder_names() and fed is not None:
        return "planner.zoo:build", (source,), {"device": "cpu", "sequence": fed.sequence}
    if source.rpartition(":")[0].endswith(".py"):
        return source, (), {}
    raise InputError(
        f"the plan of {plan.model.name!r} does not say how to build the model; name a zoo model or "
        "file.py:callable with --model"
    )


def run_decoder_plan(
    plan: Plan, model: str | None, steps: int, lr: float | None, seed: int, as_json: bool
) -> None:
    """Train, compare, print; exits with 1 where the parallel run differs from the whole model."""
    from codegen.llm import DEFAULT_LR, run_decoder
    from planner.run import progress

    factory, arguments, options = decoder_factory(plan, model)
    with progress(steps, hidden=as_json) as on_step:
        result = run_decoder(
            plan,
            factory,
            arguments,
            options,
            steps=steps,
            seed=seed,
            lr=DEFAULT_LR if lr is None else lr,
            on_step=on_step,
            spans=True,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict() | {"predicted_step": plan.timeline.step}))
    else:
        from planner.cli_support import show

        show(render_decoder_run(plan, result))
    if not result.equal:
        sys.exit(1)


def render_decoder_run(plan: Plan, result: DecoderRun) -> RenderableType:
    """Times, and the differences to the whole model."""
    times = grid("step", ">time")
    times.add_row(f"predicted for {plan.topology.name}", format_seconds(plan.timeline.step))
    median = statistics.median(result.step_seconds)
    times.add_row(
        f"measured, {result.nproc} processes, median of {len(result.step_seconds)}", format_seconds(median)
    )
    times.add_row("one process, whole model", format_seconds(statistics.median(result.reference_seconds)))
    differences = grid("parallel against whole", ">absolute", ">relative", "where it is largest")
    for name in ("losses", "gradients", "weights"):
        found = getattr(result, name)
        differences.add_row(name, f"{found.absolute:.2e}", f"{found.relative:.2e}", found.where)
    verdict = "equal" if result.equal else "NOT EQUAL"
    return Group(
        Text(result.layout, style="bold"),
        times,
        Text(),
        differences,
        Text(
            f"{verdict} within {result.tolerance:g} relative; {result.changed} of {result.tensors} weight tensors "
            f"changed in training; peak memory {format_bytes(max(result.peak_rss))} a process"
        ),
    )
