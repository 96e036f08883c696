"""``planner compile``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from ir.errors import InputError
from planner.cli_completion import model_names, topology_names
from planner.cli_progress import search_progress
from planner.cli_support import JSON_OPTION, read_constraints, reports_errors, show
from planner.decoders import decoder_pipeline, with_tokens


@click.command()
@click.argument("model", shell_complete=model_names)
@click.option(
    "--topology",
    "-t",
    required=True,
    shell_complete=topology_names,
    help="Preset (h100-16x8, local-2) or YAML file.",
)
@click.option("--workload", "-w", type=click.Path(), help="JSON file: batch, pooling, access statistics.")
@click.option("--constraints", "-c", type=click.Path(), help="YAML file: pins, limits, memory reserve.")
@click.option(
    "--calibration", type=click.Path(), help="Constants from planner calibrate; default beside the topology."
)
@click.option("--mode", type=click.Choice(["train", "inference"]), default="train", show_default=True)
@click.option(
    "--objective",
    type=click.Choice(["phases", "bottleneck"]),
    default="phases",
    show_default=True,
    help="Minimise the modelled embedding time, or the slowest rank's total.",
)
@click.option("--batch", type=int, help="Global batch, instead of the workload's.")
@click.option("--sequence", type=click.IntRange(min=1), help="Decoders: tokens of a sequence.")
@click.option("--global-tokens", type=click.IntRange(min=1), help="Decoders: tokens of a step.")
@click.option(
    "--time-limit",
    type=float,
    default=30.0,
    show_default=True,
    help="Work of all searches together, about seconds; they end sooner where there is little to find.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", "-o", type=click.Path(), help="Write the plan here.")
@click.option(
    "--print-ir-after", metavar="PASS", help="Print the IR after a pass (capture, sharding, ...) or all."
)
@click.option("--time-passes", is_flag=True, help="Print the wall time of each pass.")
@JSON_OPTION
@reports_errors
def compile(
    model: str,
    topology: str,
    workload: str | None,
    constraints: str | None,
    calibration: str | None,
    mode: Any,
    objective: Any,
    batch: int | None,
    sequence: int | None,
    global_tokens: int | None,
    time_limit: float,
    seed: int,
    output: str | None,
    print_ir_after: str | None,
    time_passes: bool,
    as_json: bool,
) -> None:
    """Compile MODEL for a topology and print (or write) the plan.

    MODEL is a zoo name (planner models), FILE.py:CALLABLE that returns an nn.Module, or a JSON table list.
    """
    from planner import api
    from planner.plan import Plan

    observers = []
    if print_ir_after:
        observers.append(_ir_printer(print_ir_after))
    clock = _PassClock()
    if time_passes:
        observers.append(clock)
    work = with_tokens(_read_workload(workload, batch, model), sequence, global_tokens)
    with search_progress(hidden=as_json or bool(print_ir_after)) as shown:
        plan: Plan = api.compile(
            model,
            topology,
            work,
            mode=mode,
            objective=objective,
            calibration=calibration,
            constraints=read_constraints(constraints),
            time_limit=time_limit,
            seed=seed,
            observers=[*observers, *shown],
        )
    if output:
        plan.save(output)
    if as_json:
        click.echo(plan.to_json(), nl=False)
    else:
        from planner.render import summary

        show(summary(plan))
        if output:
            click.echo(f"\nwritten to {output}; next: planner explain {output}")
    for line in clock.lines():
        click.echo(line, err=True)


class _PassClock:
    """An observer that notes the wall time between passes."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._times: list[tuple[str, float]] = []

    def __call__(self, name: str, program: Any) -> None:
        now = time.perf_counter()
        self._times.append((name, now - self._last))
        self._last = now

    def lines(self) -> list[str]:
        return [f"{name:<12} {seconds:8.3f} s" for name, seconds in self._times]


def _ir_printer(wanted: str) -> Callable[[str, Any], None]:
    from passes.pipeline import PIPELINE

    names = ["capture", *(step.name for step in (*PIPELINE, *decoder_pipeline()))]
    if wanted != "all" and wanted not in names:
        raise InputError(f"there is no pass {wanted!r}; choose one of {', '.join(names)} or all")

    def observer(name: str, program: Any) -> None:
        if wanted in ("all", name):
            from ir.printer import print_program

            click.echo(f"// IR after {name}")
            click.echo(print_program(program))

    return observer


def _read_workload(path: str | None, batch: int | None, model: str) -> Any:
    from dataclasses import replace

    from ir.reading import read_json
    from ir.workload import Workload

    work = Workload.from_dict(read_json(path, "workload"), f"workload {path}") if path else None
    if batch is None:
        return work
    if batch < 1:
        raise InputError(f"--batch must be at least 1, not {batch}")
    if work is None:
        from planner.models import resolve

        work = resolve(model).workload or Workload()
    return replace(work, global_batch=batch)
