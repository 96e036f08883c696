"""Shell completion: the script for a shell, and what completes the names that only the planner knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from planner.cli_support import JSON_OPTION, answer, reports_errors

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
FILES = CompletionItem("", type="file")  # the shell completes paths


def _starting(names: Any, incomplete: str, files: bool = False) -> list[CompletionItem]:
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found if found or not files else [FILES]


def model_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the zoo, else files."""
    from planner.zoo import decoder_descriptions, descriptions

    return _starting({**descriptions(), **decoder_descriptions()}, incomplete, files=True)


def topology_names(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Patterns of presets up to what one has to fill in, else files."""
    from planner.presets import list_presets

    stems = (pattern.partition("{")[0].partition("<")[0] for pattern, _ in list_presets())
    return _starting(dict.fromkeys(stems), incomplete, files=True)


def table_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Tables of the plan that was named before."""
    from ir.errors import PlannerError
    from ir.plan import Plan

    try:
        return _starting(Plan.load(context.params["plan"]).tables, incomplete)
    except (PlannerError, KeyError, TypeError):
        return []


def sharding_types(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What ``--why-not`` can ask for."""
    from ir.constraints import SHARDING_TYPES

    return _starting((*SHARDING_TYPES, "rank=", "host="), incomplete)


def schema_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and commands with a published schema."""
    from planner.schema import names

    return _starting(names(), incomplete)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@JSON_OPTION
@reports_errors
def completion(shell: str, as_json: bool) -> None:
    """Print the script that completes planner's commands, options, models, tables and presets.

    bash:  planner completion bash > ~/.local/share/bash-completion/completions/planner

    zsh:   planner completion zsh > "${fpath[1]}/_planner"

    fish:  planner completion fish > ~/.config/fish/completions/planner.fish
    """
    from planner.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(cli, {}, "planner", "_PLANNER_COMPLETE")
    script = made.source_template % made.source_vars()
    if as_json:
        answer({"shell": shell, "script": script})
    else:
        click.echo(script)
