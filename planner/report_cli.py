"""``planner report``: the plan as one HTML page."""

from __future__ import annotations

import click

from planner.cli_support import JSON_OPTION, answer, load_plan, reports_errors


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--output", "-o", type=click.Path(), required=True, help="HTML file.")
@click.option("--measured", type=click.Path(), help="JSON of planner run --json, drawn beside the model.")
@click.option(
    "--sensitivity/--no-sensitivity", default=True, help="Price the plan under changed assumptions."
)
@click.option("--pareto", is_flag=True, help="Compile again under smaller memory budgets; takes a while.")
@click.option("--model", help="With --pareto: what the plan was compiled from, where the plan does not say.")
@JSON_OPTION
@reports_errors
def report(
    plan: str,
    output: str,
    measured: str | None,
    sensitivity: bool,
    pareto: bool,
    model: str | None,
    as_json: bool,
) -> None:
    """Write PLAN as one self-contained HTML page."""
    from planner.cli_progress import search_progress
    from planner.report import write_report
    from planner.report_pareto import BudgetPoint, memory_sweep

    loaded = load_plan(plan)
    sweep: tuple[BudgetPoint, ...] = ()
    if pareto and loaded.table_plans:
        with search_progress(hidden=as_json):
            sweep = memory_sweep(loaded, model=model)
    size = write_report(loaded, output, measured=measured, sensitivity=sensitivity, sweep=sweep)
    if as_json:
        answer({"report": output, "bytes": size, "pareto": [point.to_dict() for point in sweep]})
    else:
        click.echo(f"written to {output} ({size / 1e6:.1f} MB); open it in a browser")
