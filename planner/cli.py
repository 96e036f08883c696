"""The ``planner`` command. Exit codes: 0 done, 1 a negative verdict, 2 unusable input, 3 infeasible."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ir.errors import InfeasibleError, InputError, PlannerError
from planner.calibrate_cli import calibrate
from planner.decoders import decoder_pipeline, with_tokens
from planner.doctor_cli import doctor, schema
from planner.emit_cli import TARGETS, emit_decoder
from planner.formats_cli import formats
from planner.replan_cli import replan
from planner.report_cli import report
from planner.scale_cli import scale
from planner.sensitivity_cli import sensitivity
from planner.trace_cli import trace
from planner.whatif_cli import whatif

JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


def main() -> None:
    """Entry point: every planned error becomes one sentence and its exit code."""
    cli(prog_name="planner")


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print a PlannerError as one sentence (or a JSON object) and exit with its code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except PlannerError as error:
            fail(error, as_json=bool(kwargs.get("as_json")))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    return wrapper


def fail(error: PlannerError, as_json: bool) -> None:
    """Say what went wrong and exit."""
    if as_json:
        body: dict[str, Any] = {"error": str(error), "exit_code": error.exit_code}
        if isinstance(error, InfeasibleError):
            body |= {"conflict": list(error.conflict), "relaxation": error.relaxation}
        click.echo(json.dumps(body))
    else:
        click.echo(f"error: {error}", err=True)
        if isinstance(error, InfeasibleError):
            if error.conflict:
                click.echo(f"conflicting limits: {', '.join(error.conflict)}", err=True)
            if error.relaxation:
                click.echo(f"smallest relaxation: {error.relaxation}", err=True)
    sys.exit(error.exit_code)


def show(what: Any) -> None:
    """Print a rich renderable to standard output, coloured on a terminal only."""
    from rich.console import Console

    from planner.render import WIDTH

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(what)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardwright", prog_name="planner")
def cli() -> None:
    """Plan how a PyTorch model is sharded over a cluster, and run the plan.

    A first plan:   planner compile dlrm-dcnv2 --topology h100-16x8 -o plan.json
    """


@cli.command()
@click.argument("model")
@click.option("--topology", "-t", required=True, help="Preset (h100-16x8, local-2) or YAML file.")
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
@click.option("--time-limit", type=float, default=30.0, show_default=True, help="Solver work, about seconds.")
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
    plan: Plan = api.compile(
        model,
        topology,
        work,
        mode=mode,
        objective=objective,
        calibration=calibration,
        constraints=_read_constraints(constraints),
        time_limit=time_limit,
        seed=seed,
        observers=observers,
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


def _read_constraints(path: str | None) -> Any:
    from ir.constraints import Constraints
    from planner.api import load_yaml

    if path is None:
        return None
    return Constraints.from_dict(load_yaml(path, "constraints") or {}, f"constraints {path}")


def _load(path: str) -> Any:
    from planner.plan import Plan

    return Plan.load(path)


@cli.command()
@click.argument("plan", type=click.Path())
@click.argument("table", required=False)
@click.option("--rank", type=int, help="What one rank holds.")
@click.option("--all", "show_all", is_flag=True, help="List every table.")
@JSON_OPTION
@reports_errors
def explain(plan: str, table: str | None, rank: int | None, show_all: bool, as_json: bool) -> None:
    """Why: the whole PLAN, one TABLE, or one rank."""
    from ir.reading import dump_record
    from planner.explain import explain_plan, explain_rank, explain_table, find_table

    loaded = _load(plan)
    if table is not None:
        body = explain_table(loaded, table)
        data: Any = dump_record(find_table(loaded, table))
    elif rank is not None:
        body = explain_rank(loaded, rank)
        data = {
            **dump_record(loaded.memory[rank]),
            "tables": [t.name for t in loaded.table_plans if t.on_rank(rank)],
        }
    else:
        body = explain_plan(loaded, limit=10**9 if show_all else 20)
        data = {
            "certificate": {**dump_record(loaded.certificate), "gap": loaded.certificate.gap},
            "step_seconds": loaded.timeline.step,
            "tables": {
                t.name: {"option": t.option, "reason": t.reason, "seconds": t.terms}
                for t in loaded.table_plans
            },
            **(
                {"parallelism": dump_record(loaded.decisions.parallelism)}
                if loaded.decisions.parallelism is not None
                else {}
            ),
            **(
                {"serving": dump_record(loaded.decisions.serving)}
                if loaded.decisions.serving is not None
                else {}
            ),
        }
    if as_json:
        click.echo(json.dumps(data))
    else:
        show(body)


@cli.command()
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@click.option("--exit-code", is_flag=True, help="Exit with 1 when the plans differ.")
@JSON_OPTION
@reports_errors
def diff(before: str, after: str, exit_code: bool, as_json: bool) -> None:
    """What plan AFTER changes with respect to plan BEFORE."""
    from planner.diff import diff_plans, render_diff

    change = diff_plans(_load(before), _load(after))
    if as_json:
        click.echo(json.dumps(change.to_dict()))
    else:
        show(render_diff(change))
    if exit_code and not change.same:
        sys.exit(1)


@cli.command()
@click.argument("plan", type=click.Path())
@click.option("--model", "model", help="Also check that the plan is for this model.")
@JSON_OPTION
@reports_errors
def verify(plan: str, model: str | None, as_json: bool) -> None:
    """Check a plan's feasibility without the code that made it."""
    from planner.verification import verify as check

    tables = None
    if model is not None:
        from planner.models import resolve

        tables = resolve(model).model.tables
    findings = check(_load(plan), tables)
    good = all(finding.ok for finding in findings)
    if as_json:
        click.echo(
            json.dumps({"ok": good, "checks": {finding.check: list(finding.faults) for finding in findings}})
        )
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.check}")
            for fault in finding.faults[:5]:
                click.echo(f"       {fault}")
            if len(finding.faults) > 5:
                click.echo(f"       ... and {len(finding.faults) - 5} more")
        click.echo("the plan is feasible" if good else "the plan is NOT feasible")
    if not good:
        sys.exit(1)


@cli.command()
@click.argument("plan", type=click.Path())
@click.option(
    "--topology", "-t", help="Compile first: PLAN is a model (llama-tiny) and this its machine (local-4)."
)
@click.option("--constraints", "-c", type=click.Path(), help="With --topology: as of planner compile.")
@click.option("--nproc", type=int, help="Processes; default and only value: the ranks of the plan.")
@click.option("--model", "model", help="The model; default the one that was compiled, by name.")
@click.option("--steps", type=int, default=5, show_default=True, help="Timed steps, after two to warm up.")
@click.option("--batch", type=int, help="Global batch, instead of the plan's.")
@click.option("--lr", type=float, help="Default: small, but enough to move every weight beyond rounding.")
@click.option("--seed", type=int, default=0, show_default=True)
@JSON_OPTION
@reports_errors
def run(
    plan: str,
    topology: str | None,
    constraints: str | None,
    nproc: int | None,
    model: str | None,
    steps: int,
    batch: int | None,
    lr: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train a few steps of PLAN on real gloo processes and compare with the unsharded model."""
    from planner.run_llm import compiled_for_run, run_decoder_plan

    loaded = (
        _load(plan) if topology is None else compiled_for_run(plan, topology, _read_constraints(constraints))
    )
    if loaded.decisions.parallelism is not None:
        run_decoder_plan(loaded, model, steps, lr, seed, as_json)
        return
    from codegen.runtime.compare import run_plan
    from planner.run import factory_of, progress, render_run

    factory, arguments, options = factory_of(loaded, model)
    with progress(steps, hidden=as_json) as on_step:
        result = run_plan(
            loaded,
            factory,
            arguments,
            options,
            nproc=nproc,
            steps=steps,
            seed=seed,
            lr=lr,
            batch=batch,
            on_step=on_step,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict() | {"predicted_step": loaded.timeline.step}))
    else:
        show(render_run(loaded, result))
    if not result.equal:
        sys.exit(1)


@cli.command()
@JSON_OPTION
@reports_errors
def models(as_json: bool) -> None:
    """The models of the zoo."""
    from planner.render import grid
    from planner.zoo import decoder_descriptions, descriptions

    known = {**descriptions(), **decoder_descriptions()}
    if as_json:
        click.echo(json.dumps(known))
        return
    table = grid("name", "what")
    for name, text in known.items():
        table.add_row(name, text)
    show(table)


@cli.command()
@click.argument("name", required=False)
@JSON_OPTION
@reports_errors
def topologies(name: str | None, as_json: bool) -> None:
    """List the topology presets, or print one as YAML that --topology reads back."""
    from planner.presets import list_presets
    from planner.render import grid

    if name is None:
        if as_json:
            click.echo(json.dumps(dict(list_presets())))
            return
        table = grid("preset", "what")
        for pattern, text in list_presets():
            table.add_row(pattern, text)
        show(table)
        return
    from planner.api import topology

    data = topology(name).to_dict()
    if as_json:
        click.echo(json.dumps(data))
    else:
        import yaml

        click.echo(yaml.safe_dump(data, sort_keys=False), nl=False)


@cli.command()
@click.argument("plan", type=click.Path())
@click.option(
    "--target",
    type=click.Choice(["torchrec", "torchao", "script", *TARGETS]),
    default="torchrec",
    show_default=True,
)
@click.option("--model", "model", help="Where the script finds the model; default the one that was compiled.")
@click.option("--output", "-o", type=click.Path(), help="Write here instead of printing.")
@reports_errors
def emit(plan: str, target: str, model: str | None, output: str | None) -> None:
    """Write what runs the plan: a torchrec training script for torchrun, one for towers (script),
    torchao GEMM configurations, or a decoder's configuration for a trainer or a server."""
    from codegen.script import emit_torchrec
    from codegen.torchao import emit_torchao
    from codegen.tower_script import emit_towers
    from ir.plan import write_atomically

    loaded = _load(plan)
    if target in TARGETS:
        emit_decoder(loaded, target, output)
        return
    emitter = {"torchrec": emit_torchrec, "torchao": emit_torchao, "script": emit_towers}[target]
    text = emitter(loaded, model or loaded.provenance.get("model") or loaded.model.name)
    if output and target == "torchao":
        write_atomically(output, text)
        click.echo(f"written to {output}; import it and call quantize_model(model)")
    elif output:
        write_atomically(output, text)
        click.echo(
            f"written to {output}; run: torchrun --nproc-per-node {loaded.topology.host_size} {Path(output)}"
        )
    else:
        click.echo(text, nl=False)


cli.add_command(calibrate)
cli.add_command(formats)
cli.add_command(scale)
cli.add_command(whatif)
cli.add_command(trace)
cli.add_command(sensitivity)
cli.add_command(doctor)
cli.add_command(schema)
cli.add_command(replan)
cli.add_command(report)
