"""``planner whatif``: change an input of a plan, plan again, and see the difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ir.plan import Plan
    from planner.assumptions import Sensitivities


@click.command()
@click.argument("plan", type=click.Path())
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="hosts=8, link.inter=100Gbps, hbm=141GB, ...",
)
@click.option("--model", help="What the plan was compiled from, where the plan does not say.")
@click.option("--calibration", type=click.Path(), help="Constants from planner calibrate.")
@click.option("--output", "-o", type=click.Path(), help="Write the new plan here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def whatif(
    plan: str,
    settings: tuple[str, ...],
    model: str | None,
    calibration: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Plan again with some inputs of PLAN changed; without --set, how its seconds depend on each assumption."""
    from planner.cli_support import reports_errors

    reports_errors(_whatif)(
        plan=plan, settings=settings, model=model, calibration=calibration, output=output, as_json=as_json
    )


def _whatif(
    *,
    plan: str,
    settings: tuple[str, ...],
    model: str | None,
    calibration: str | None,
    output: str | None,
    as_json: bool,
) -> None:
    import json
    from dataclasses import asdict

    from planner.assumptions import sensitivity
    from planner.calibrate import load_calibration
    from planner.cli_progress import search_progress
    from planner.cli_support import show
    from planner.diff import diff_plans
    from planner.diff_render import render_diff
    from planner.plan import Plan
    from planner.what_if import parse_settings
    from planner.what_if import whatif as plan_again

    before = Plan.load(plan)
    constants = load_calibration(calibration) if calibration else None
    if not settings:
        found = sensitivity(before, model=model, calibration=constants)
        if as_json:
            rows = [asdict(row) for row in found.rows]
            click.echo(json.dumps({"seconds": found.seconds, "sensitivity": rows}))
        else:
            show(_sensitivity_tables(found))
        return
    with search_progress(hidden=as_json) as shown:
        after = plan_again(
            before, parse_settings(settings), model=model, calibration=constants, observers=shown
        )
    if output:
        after.save(output)
    difference = diff_plans(before, after)
    if as_json:
        start = {key: after.provenance.get(key, "") for key in ("start", "anew")}
        click.echo(json.dumps(difference.to_dict() | start))
    else:
        show(render_diff(difference))
        click.echo(start_words(before, after))
        if output:
            click.echo(f"\nwritten to {output}")


def start_words(before: Plan, after: Plan) -> str:
    """How the second plan was looked for."""
    from planner.what_if import in_towers

    if "anew" in after.provenance:
        return f"planned anew: {after.provenance['anew']}"
    same = (before.world_size, before.topology.host_size) == (after.world_size, after.topology.host_size)
    parts = ["shardings"]
    parts += ["formats"] if before.decisions.formats is not None else []
    parts += ["tiers"] if any(table.tiers is not None for table in before.table_plans) else []
    parts += ["towers"] if in_towers(before) else []
    have = ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]
    if same:
        return f"searched from the plan's {have}: no worse than leaving all as it is, where that still fits"
    return f"searched from the plan's {have}, placed on the new ranks"


def _sensitivity_tables(found: Sensitivities) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from ir.units import format_seconds
    from planner.render import grid, signed

    parts: list[RenderableType] = []
    for name, seconds in found.seconds.items():
        table = grid("assumption", ">value", ">10 % worse", ">10 % better")
        without = []
        for row in found.of(name):
            worse, better = signed(row.worse - seconds), signed(row.better - seconds)
            if worse == better == "0":
                without.append(row.name)
            else:
                table.add_row(row.name, row.value, worse, better)
        head = (
            f"modelled {name} {format_seconds(seconds)}: what a tenth of each assumption does, plan unchanged"
        )
        rest = [Text(f"no effect: {', '.join(without)}", style="dim")] if without else []
        parts += [Text("\n" * bool(parts) + head, style="bold"), table, *rest]
    return Group(*parts)
