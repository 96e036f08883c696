"""``planner trace``: a Chrome / Perfetto trace of the modelled step, and of a run here beside it."""

from __future__ import annotations

import click


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--output", "-o", type=click.Path(), required=True, help="Trace file (.json).")
@click.option("--run", "measured", is_flag=True, help="Also train here, profile a step, and put it beside.")
@click.option("--model", help="What to train, where the plan does not say.")
@click.option("--batch", type=int, help="Global batch of the profiled step, instead of the plan's.")
@click.option("--calibration", type=click.Path(), help="Constants from planner calibrate.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def trace(
    plan: str,
    output: str,
    measured: bool,
    model: str | None,
    batch: int | None,
    calibration: str | None,
    as_json: bool,
) -> None:
    """Write the step of PLAN as a trace for ui.perfetto.dev or chrome://tracing."""
    import json

    from planner.calibrate import load_calibration
    from planner.cli import reports_errors
    from planner.plan import Plan

    @reports_errors
    def write(as_json: bool) -> None:
        from planner.run import factory_of
        from planner.trace import write_plan_trace

        loaded = Plan.load(plan)
        profile = None
        if measured:
            factory, arguments, options = factory_of(loaded, model)
            profile = {"factory": factory, "arguments": arguments, "options": options, "batch": batch}
        constants = load_calibration(calibration) if calibration else None
        count = write_plan_trace(loaded, output, calibration=constants, profile=profile)
        if as_json:
            click.echo(json.dumps({"trace": output, "events": count}))
        else:
            click.echo(f"{count} events written to {output}; open it in https://ui.perfetto.dev")

    write(as_json=as_json)
