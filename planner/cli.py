"""The ``planner`` command. Exit codes: 0 done, 1 a negative verdict, 2 unusable input, 3 infeasible, 130 interrupted."""

from __future__ import annotations

import errno
import os
import sys

import click

from planner.calibrate_cli import calibrate
from planner.cli_compile import compile
from planner.cli_completion import completion
from planner.cli_lists import models, topologies
from planner.cli_plans import diff, explain, verify
from planner.cli_run import emit, run
from planner.cli_support import answer
from planner.doctor_cli import doctor, schema
from planner.formats_cli import formats
from planner.replan_cli import replan
from planner.report_cli import report
from planner.scale_cli import scale
from planner.sensitivity_cli import sensitivity
from planner.trace_cli import trace
from planner.whatif_cli import whatif

COMMANDS = (
    *(compile, explain, diff, verify, run, emit, report, trace, whatif, replan),
    *(models, topologies, calibrate, formats, scale, sensitivity, doctor, schema, completion),
)


def main() -> None:
    """The command line: wrong usage, interruption and an output that takes no more are said like every error."""
    try:
        try:
            code = cli.main(prog_name="planner", standalone_mode=False)
        finally:
            if sys.stdout is not None:  # as it is where the caller has closed it
                sys.stdout.flush()  # here, where a failure can still be said
    except click.ClickException as error:
        code = error.exit_code
        if "--json" in sys.argv:
            answer({"error": error.format_message(), "exit_code": code})
        else:
            error.show()
    except click.Abort:
        raise KeyboardInterrupt from None
    except OSError as error:
        code = _unwritten(error)
    sys.exit(code)


def _unwritten(error: OSError) -> int:
    """The exit code where standard output takes no more; raises any other error again."""
    if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
    if error.errno == errno.EPIPE:
        return 141  # 128 + SIGPIPE, as of any program whose reader has left
    click.echo(f"error: cannot write the output: {error.strerror}", err=True)
    return 2


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a negative verdict, 2 unusable input, 3 infeasible, 130 interrupted.",
)
@click.version_option(package_name="shardwright", prog_name="planner")
def cli() -> None:
    """Plan how a PyTorch model is sharded over a cluster, and run the plan.

    A first plan:   planner compile dlrm-dcnv2 --topology h100-16x8 -o plan.json
    """


for command in COMMANDS:
    cli.add_command(command)
