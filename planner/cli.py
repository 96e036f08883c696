"""The ``planner`` command. Exit codes: 0 done, 1 a negative verdict, 2 unusable input, 3 infeasible."""

from __future__ import annotations

import click

from planner.calibrate_cli import calibrate
from planner.cli_compile import compile
from planner.cli_completion import completion
from planner.cli_lists import models, topologies
from planner.cli_plans import diff, explain, verify
from planner.cli_run import emit, run
from planner.cli_support import fail, reports_errors, show
from planner.cli_support import read_constraints as _read_constraints
from planner.doctor_cli import doctor, schema
from planner.formats_cli import formats
from planner.replan_cli import replan
from planner.report_cli import report
from planner.scale_cli import scale
from planner.sensitivity_cli import sensitivity
from planner.trace_cli import trace
from planner.whatif_cli import whatif

__all__ = ["_read_constraints", "cli", "fail", "main", "reports_errors", "show"]

COMMANDS = (
    *(compile, explain, diff, verify, run, emit, report, trace, whatif, replan),
    *(models, topologies, calibrate, formats, scale, sensitivity, doctor, schema, completion),
)


def main() -> None:
    """Entry point: every planned error becomes one sentence and its exit code."""
    cli(prog_name="planner")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardwright", prog_name="planner")
def cli() -> None:
    """Plan how a PyTorch model is sharded over a cluster, and run the plan.

    A first plan:   planner compile dlrm-dcnv2 --topology h100-16x8 -o plan.json
    """


for command in COMMANDS:
    cli.add_command(command)
