"""``planner trace``: a Chrome / Perfetto trace of the modelled step, and of a run here beside it."""

from __future__ import annotations

import click

from planner.cli_support import JSON_OPTION, answer, load_plan, reports_errors


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--output", "-o", type=click.Path(), required=True, help="Trace file (.json).")
@click.option("--measured", type=click.Path(), help="JSON of planner run --json, put beside the model.")
@click.option("--run", "here", is_flag=True, help="Also train here, profile a step, and put every op beside.")
@click.option("--model", help="What to train, where the plan does not say.")
@click.option("--batch", type=int, help="Global batch of the profiled step, instead of the plan's.")
@click.option("--calibration", type=click.Path(), help="Constants from planner calibrate.")
@JSON_OPTION
@reports_errors
def trace(
    plan: str,
    output: str,
    measured: str | None,
    here: bool,
    model: str | None,
    batch: int | None,
    calibration: str | None,
    as_json: bool,
) -> None:
    """Write the step of PLAN as a trace for ui.perfetto.dev or chrome://tracing."""
    from ir.errors import InputError
    from planner.calibrate import load_calibration
    from planner.report_measured import read_measured
    from planner.run import factory_of
    from planner.trace import write_plan_trace

    if measured is not None and here:
        raise InputError("--measured shows a run that was made, --run makes one; give one of them")
    loaded = load_plan(plan)
    profile = None
    if here:
        factory, arguments, options = factory_of(loaded, model)
        profile = {"factory": factory, "arguments": arguments, "options": options, "batch": batch}
    spans = read_measured(measured).spans if measured is not None else ()
    if measured is not None and not spans:
        raise InputError(
            f"measured run {measured} has no spans; make it again with this version's planner run"
        )
    constants = load_calibration(calibration) if calibration else None
    count = write_plan_trace(loaded, output, calibration=constants, profile=profile, spans=spans)
    if as_json:
        answer({"trace": output, "events": count})
    else:
        click.echo(f"{count} events written to {output}; open it in https://ui.perfetto.dev")
