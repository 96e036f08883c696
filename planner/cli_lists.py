"""Commands that list what is there: ``planner models`` and ``topologies``."""

from __future__ import annotations

import json

import click

from planner.cli_support import JSON_OPTION, reports_errors, show


@click.command()
@JSON_OPTION
@reports_errors
def models(as_json: bool) -> None:
    """The models of the zoo."""
    from planner.render import grid
    from planner.zoo import decoder_descriptions, descriptions

    known = {**descriptions(), **decoder_descriptions()}
    if as_json:
        click.echo(json.dumps(known))
        return
    table = grid("name", "what")
    for name, text in known.items():
        table.add_row(name, text)
    show(table)


@click.command()
@click.argument("name", required=False)
@JSON_OPTION
@reports_errors
def topologies(name: str | None, as_json: bool) -> None:
    """List the topology presets, or print one as YAML that --topology reads back."""
    from planner.presets import list_presets
    from planner.render import grid

    if name is None:
        if as_json:
            click.echo(json.dumps(dict(list_presets())))
            return
        table = grid("preset", "what")
        for pattern, text in list_presets():
            table.add_row(pattern, text)
        show(table)
        return
    from planner.api import topology

    data = topology(name).to_dict()
    if as_json:
        click.echo(json.dumps(data))
    else:
        import yaml

        click.echo(yaml.safe_dump(data, sort_keys=False), nl=False)
