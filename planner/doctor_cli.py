"""``planner doctor`` and ``planner schema``."""

from __future__ import annotations

import json
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor(as_json: bool) -> None:
    """Versions, engines and what this machine can run; exit code 1 when it cannot plan."""
    from planner.doctor import diagnose

    found = diagnose()
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        from rich.console import Group
        from rich.text import Text

        from planner.cli import show
        from planner.render import grid

        about = grid("machine", "")
        for name, value in found.machine.items():
            about.add_row(name, value)
        packages = grid("package", "version")
        for name, value in found.packages.items():
            packages.add_row(name, value)
        checks = grid("", "what", "found", "to change that")
        for finding in found.findings:
            checks.add_row("yes" if finding.ok else "no", finding.name, finding.detail, finding.remedy)
        show(Group(about, Text(), packages, Text(), checks))
    sys.exit(0 if found.findings[0].ok else 1)


@click.command()
@click.argument("name")
def schema(name: str) -> None:
    """Print the JSON schema of a file: plan, topology, workload or constraints."""
    from planner.cli import reports_errors
    from planner.schema import json_schema

    reports_errors(lambda: click.echo(json.dumps(json_schema(name), indent=2)))()
