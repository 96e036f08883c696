"""``planner doctor`` and ``planner schema``."""

from __future__ import annotations

import json
import sys

import click

from planner.cli_completion import schema_names
from planner.cli_support import JSON_OPTION, answer, reports_errors


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

        from planner.cli_support import show
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
@click.argument("name", required=False, shell_complete=schema_names)
@JSON_OPTION
@reports_errors
def schema(name: str | None, as_json: bool) -> None:
    """Print the JSON schema of a file (plan, topology, workload, constraints) or of a command's --json answer.

    Without NAME, list them.
    """
    from planner.schema import json_schema, names

    if name is not None:
        click.echo(json.dumps(json_schema(name), indent=None if as_json else 2))
    elif as_json:
        answer({known: json_schema(known) for known in names()})
    else:
        click.echo("\n".join(names()))
