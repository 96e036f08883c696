"""What the commands share: errors as one sentence, JSON answers, tables on a terminal, files as inputs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ir.errors import InfeasibleError, PlannerError

if TYPE_CHECKING:
    from ir.constraints import Constraints
    from planner.plan import Plan

JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


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


def answer(data: Any) -> None:
    """Print a record, or plain data, as one JSON object."""
    from dataclasses import is_dataclass

    from ir.reading import dump_record

    click.echo(json.dumps(dump_record(data) if is_dataclass(data) else data, allow_nan=False))


def load_plan(path: str) -> Plan:
    """A plan file; raises InputError."""
    from planner.plan import Plan

    loaded = Plan.load(path)
    assert isinstance(loaded, Plan)
    return loaded


def read_constraints(path: str | None) -> Constraints | None:
    """A YAML file of constraints; raises InputError."""
    from ir.constraints import Constraints
    from planner.api import load_yaml

    if path is None:
        return None
    found = load_yaml(path, "constraints")
    return Constraints.from_dict({} if found is None else found, f"constraints {path}")
