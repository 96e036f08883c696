"""``planner replan``: go on after ranks were lost or added, or tables or traffic changed."""

from __future__ import annotations

import json
from dataclasses import replace

import click


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--topology", "-t", required=True, help="The machine from now on: preset or YAML file.")
@click.option("--lost", default="", metavar="RANKS", help="Ranks of the old machine that are gone: 4,5,6.")
@click.option("--workload", "-w", type=click.Path(), help="JSON file; default the plan's own workload.")
@click.option("--batch", type=int, help="Global batch from now on; it must divide over the ranks.")
@click.option(
    "--horizon", type=int, default=10_000, show_default=True, help="Steps over which moving must pay."
)
@click.option(
    "--time-limit", type=float, default=30.0, show_default=True, help="Work for a candidate, about seconds."
)
@click.option("--model", help="What the plan was compiled from, where the plan does not say.")
@click.option("--output", "-o", type=click.Path(), help="Write the new plan here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def replan(
    plan: str,
    topology: str,
    lost: str,
    workload: str | None,
    batch: int | None,
    horizon: int,
    time_limit: float,
    model: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Plan PLAN's model for another machine, trading bytes that move against the time of a step."""
    from ir.errors import InputError
    from ir.reading import read_json
    from ir.units import format_bytes, format_seconds
    from ir.workload import Workload
    from planner.cli_progress import search_progress
    from planner.cli_support import reports_errors, show
    from planner.plan import Plan
    from planner.render import grid
    from planner.replanning import replan as plan_again

    @reports_errors
    def run(as_json: bool) -> None:
        parts = [part.strip() for part in lost.split(",") if part.strip()]
        if not all(part.isdigit() for part in parts):
            raise InputError(f"--lost {lost} must list ranks, such as 4,5,6")
        fed = (
            Workload.from_dict(read_json(workload, "workload"), f"workload {workload}") if workload else None
        )
        if batch is not None and batch < 1:
            raise InputError(f"--batch must be at least 1, not {batch}")
        known = Plan.load(plan)
        if batch is not None:
            fed = replace(fed or replace(known.workload, dedup={}, dedup_ops={}), global_batch=batch)
        with search_progress(hidden=as_json):
            found = plan_again(
                known,
                topology,
                lost=[int(part) for part in parts],
                workload=fed,
                model=model,
                horizon=horizon,
                time_limit=time_limit,
            )
        if output:
            found.plan.save(output)
        if as_json:
            rows = [
                {
                    "candidate": c.name,
                    "step_seconds": c.plan.timeline.step,
                    "moved_bytes": c.moved,
                    "move_seconds": c.move_seconds,
                    "total_seconds": c.total,
                }
                for c in found.candidates
            ]
            click.echo(json.dumps({"horizon": horizon, "candidates": rows, "digest": found.plan.digest}))
            return
        table = grid("candidate", ">step", ">moves", ">move takes", f">{horizon:,} steps and the move")
        for c in found.candidates:
            table.add_row(
                c.name,
                format_seconds(c.plan.timeline.step),
                format_bytes(c.moved),
                format_seconds(c.move_seconds),
                format_seconds(c.total),
            )
        show(table)
        click.echo(f"\nchosen: {found.candidates[0].name}" + (f", written to {output}" if output else ""))

    run(as_json=as_json)
