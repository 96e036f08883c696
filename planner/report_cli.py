"""``planner report``: the plan as one HTML page."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--output", "-o", type=click.Path(), required=True, help="HTML file.")
@click.option("--measured", type=click.Path(), help="JSON of planner run --json, drawn beside the model.")
@click.option(
    "--sensitivity/--no-sensitivity", default=True, help="Price the plan under changed assumptions."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def report(plan: str, output: str, measured: str | None, sensitivity: bool, as_json: bool) -> None:
    """Write PLAN as one self-contained HTML page."""
    from planner.cli import reports_errors
    from planner.plan import Plan
    from planner.report import write_report

    @reports_errors
    def write(as_json: bool) -> None:
        size = write_report(Plan.load(plan), output, measured=measured, sensitivity=sensitivity)
        if as_json:
            click.echo(json.dumps({"report": output, "bytes": size}))
        else:
            click.echo(f"written to {output} ({size / 1e6:.1f} MB); open it in a browser")

    write(as_json=as_json)
