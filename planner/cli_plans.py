"""Commands that read plans: ``planner explain``, ``diff`` and ``verify``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ir.errors import InputError
from planner.cli_completion import sharding_types, table_names
from planner.cli_progress import search_progress
from planner.cli_support import JSON_OPTION, answer, load_plan, reports_errors, show

if TYPE_CHECKING:
    from planner.plan import Plan


@click.command()
@click.argument("plan", type=click.Path())
@click.argument("table", required=False, shell_complete=table_names)
@click.option("--rank", type=int, help="What one rank holds.")
@click.option("--all", "show_all", is_flag=True, help="List every table.")
@click.option(
    "--why-not",
    metavar="OPTION",
    shell_complete=sharding_types,
    help="With TABLE: what row_wise, 'column_wise x4', rank=5 or host=1 would cost, or why it cannot be.",
)
@click.option("--model", help="With --why-not: what the plan was compiled from, where the plan does not say.")
@click.option(
    "--time-limit", type=float, help="With --why-not: solver work, about seconds; default the plan's."
)
@JSON_OPTION
@reports_errors
def explain(
    plan: str,
    table: str | None,
    rank: int | None,
    show_all: bool,
    why_not: str | None,
    model: str | None,
    time_limit: float | None,
    as_json: bool,
) -> None:
    """Why: the whole PLAN, one TABLE, or one rank; and why not."""
    from ir.reading import dump_record
    from planner.explain import explain_plan, explain_rank, explain_table, find_table

    loaded = load_plan(plan)
    if why_not is not None:
        if table is None:
            raise InputError(
                "--why-not asks about one table; name it: planner explain PLAN TABLE --why-not row_wise"
            )
        _why_not(loaded, table, why_not, model, time_limit, as_json)
        return
    if table is not None:
        body = explain_table(loaded, table)
        data: Any = dump_record(find_table(loaded, table))
    elif rank is not None:
        body = explain_rank(loaded, rank)
        data = {
            **dump_record(loaded.memory[rank]),
            "tables": [t.name for t in loaded.table_plans if t.on_rank(rank)],
        }
    else:
        body = explain_plan(loaded, limit=10**9 if show_all else 20)
        data = {
            "certificate": {**dump_record(loaded.certificate), "gap": loaded.certificate.gap},
            "step_seconds": loaded.timeline.step,
            "tables": {
                t.name: {"option": t.option, "reason": t.reason, "seconds": t.terms}
                for t in loaded.table_plans
            },
            **(
                {"parallelism": dump_record(loaded.decisions.parallelism)}
                if loaded.decisions.parallelism is not None
                else {}
            ),
            **(
                {"serving": dump_record(loaded.decisions.serving)}
                if loaded.decisions.serving is not None
                else {}
            ),
        }
    if as_json:
        click.echo(json.dumps(data))
    else:
        show(body)


def _why_not(
    plan: Plan, table: str, asked: str, model: str | None, time_limit: float | None, as_json: bool
) -> None:
    from planner.explain_why_not import why_not
    from planner.why_not_answer import render_why_not

    with search_progress(hidden=as_json):
        found = why_not(plan, table, asked, model=model, time_limit=time_limit)
    if as_json:
        answer(found)
    else:
        show(render_why_not(plan, found))


@click.command()
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@click.option("--exit-code", is_flag=True, help="Exit with 1 when the plans differ.")
@JSON_OPTION
@reports_errors
def diff(before: str, after: str, exit_code: bool, as_json: bool) -> None:
    """What plan AFTER changes with respect to plan BEFORE."""
    from planner.diff import diff_plans
    from planner.diff_render import render_diff

    change = diff_plans(load_plan(before), load_plan(after))
    if as_json:
        click.echo(json.dumps(change.to_dict()))
    else:
        show(render_diff(change))
    if exit_code and not change.same:
        sys.exit(1)


@click.command()
@click.argument("plan", type=click.Path())
@click.option("--model", "model", help="Also check that the plan is for this model.")
@JSON_OPTION
@reports_errors
def verify(plan: str, model: str | None, as_json: bool) -> None:
    """Check a plan's feasibility without the code that made it."""
    from planner.verification import verify as check

    tables = None
    if model is not None:
        from planner.models import resolve

        tables = resolve(model).model.tables
    findings = check(load_plan(plan), tables)
    good = all(finding.ok for finding in findings)
    if as_json:
        click.echo(
            json.dumps({"ok": good, "checks": {finding.check: list(finding.faults) for finding in findings}})
        )
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.check}")
            for fault in finding.faults[:5]:
                click.echo(f"       {fault}")
            if len(finding.faults) > 5:
                click.echo(f"       ... and {len(finding.faults) - 5} more")
        click.echo("the plan is feasible" if good else "the plan is NOT feasible")
    if not good:
        sys.exit(1)
