"""Commands that carry a plan out: ``planner run`` and ``emit``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ir.errors import InputError
from planner.cli_support import JSON_OPTION, answer, load_plan, read_constraints, reports_errors, show
from planner.emit_cli import TARGETS, emission

if TYPE_CHECKING:
    from planner.plan import Plan


@click.command()
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
        load_plan(plan)
        if topology is None
        else compiled_for_run(plan, topology, read_constraints(constraints))
    )
    if loaded.decisions.parallelism is not None:
        run_decoder_plan(loaded, model, steps, lr, seed, as_json)
        return
    if loaded.decisions.serving is not None:
        raise InputError(
            "planner run trains, and this plan serves; load it and call plan.apply(model) in each process, or "
            "planner emit --target vllm"
        )
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
            spans=True,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict() | {"predicted_step": loaded.timeline.step}))
    else:
        show(render_run(loaded, result))
    if not result.accepted:
        sys.exit(1)


@click.command()
@click.argument("plan", type=click.Path())
@click.option(
    "--target",
    type=click.Choice(["torchrec", "torchao", "script", *TARGETS]),
    default="torchrec",
    show_default=True,
)
@click.option("--model", "model", help="Where the script finds the model; default the one that was compiled.")
@click.option("--output", "-o", type=click.Path(), help="Write here instead of printing.")
@JSON_OPTION
@reports_errors
def emit(plan: str, target: str, model: str | None, output: str | None, as_json: bool) -> None:
    """Write what runs the plan: a torchrec training script for torchrun, one for towers (script),
    torchao GEMM configurations, or a decoder's configuration for a trainer or a server."""
    from ir.plan import write_atomically

    loaded = load_plan(plan)
    text, use, limits = _emitted(loaded, target, model, output or "FILE")
    if output:
        write_atomically(output, text)
    if as_json:
        shown = None if output else text
        answer({"target": target, "path": output, "text": shown, "use": use, "limits": limits})
        return
    click.echo(f"written to {output}; {use}" if output else text, nl=bool(output))
    for limit in limits:
        click.echo(f"note: {limit}", err=True)


def _emitted(plan: Plan, target: str, model: str | None, path: str) -> tuple[str, str, list[str]]:
    """The file, what to do with it, and what it cannot say."""
    from codegen.script import emit_torchrec, script_limits
    from codegen.torchao import emit_torchao
    from codegen.tower_script import emit_towers
    from planner.run import source_of

    if target in TARGETS:
        made = emission(plan, target)
        return made.text, f"use: {made.command.format(path=path)}", list(made.limits)
    if plan.decisions.parallelism is not None or plan.decisions.serving is not None:
        raise InputError(
            f"{target} takes a recommender's plan, and {plan.model.name!r} is a decoder; choose --target "
            + ("vllm" if plan.decisions.serving is not None else "torchtitan, megatron or accelerate")
        )
    named = source_of(plan, model)
    if target == "torchao":
        return emit_torchao(plan, named), "import it and call quantize_model(model)", []
    text = (emit_torchrec if target == "torchrec" else emit_towers)(plan, named)
    limits = list(script_limits(plan)) if target == "torchrec" else []
    hosts = plan.topology.hosts
    nodes = f"--nnodes {hosts} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if hosts > 1 else ""
    return text, f"run: torchrun --nproc-per-node {plan.topology.host_size} {nodes}{Path(path)}", limits
