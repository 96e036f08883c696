"""The cluster's command line: ``run``, ``calibrate``, ``check`` and ``sweep``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.cluster.launcher import Cluster, Result
from benchmarks.cluster.namespaces import sweep
from benchmarks.cluster.network import check_machine
from ir.errors import PlannerError
from ir.units import format_bytes


def _reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except PlannerError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the cluster is removed", err=True)
            sys.exit(130)

    return wrapper


def _sizes(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("--hosts", type=int, default=2, show_default=True),
        click.option("--ranks", type=int, default=2, show_default=True, help="Ranks a host."),
        click.option(
            "--inter", default="1Gbps", show_default=True, help="Speed of each host's network card."
        ),
        click.option(
            "--latency", default="0us", show_default=True, help="One way between hosts; needs netem."
        ),
        click.option("--timeout", type=float, default=900.0, show_default=True, help="Seconds for the run."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Hosts with slow links between them, emulated on this machine (Linux, root, iproute2)."""


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_sizes
@click.option("--module", "-m", is_flag=True, help="SCRIPT is a module name, as for python -m.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing of the script's output.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@_reports_errors
def run(
    hosts: int,
    ranks: int,
    inter: str,
    latency: str,
    timeout: float,
    module: bool,
    quiet: bool,
    script: str,
    args: tuple[str, ...],
) -> None:
    """Run SCRIPT with torchrun on every host; lines are prefixed by host and rank."""
    with Cluster(hosts, ranks, inter, latency) as cluster:
        result = cluster.run(
            script, args, module=module, timeout=timeout, on_line=None if quiet else click.echo
        )
    _finish(result)


def _finish(result: Result) -> None:
    for host, carried in enumerate(result.traffic):
        sent, received = format_bytes(carried.sent), format_bytes(carried.received)
        click.echo(f"host{host} sent {sent}, received {received}", err=True)
    click.echo(f"exit code {result.exit_code} after {result.seconds:.1f} s", err=True)
    sys.exit(result.exit_code)


@cli.command()
@_sizes
@click.option("--output", "-o", required=True, type=click.Path(), help="Topology YAML to write.")
@_reports_errors
def calibrate(hosts: int, ranks: int, inter: str, latency: str, timeout: float, output: str) -> None:
    """Measure the emulated cluster with ``planner calibrate`` and write its topology."""
    args = ["-o", str(Path(output).resolve())]
    with Cluster(hosts, ranks, inter, latency) as cluster:
        result = cluster.run("planner.calibrate_cli", args, module=True, timeout=timeout, on_line=click.echo)
    _finish(result)


@cli.command()
@click.option("--latency", is_flag=True, help="Also ask for latency emulation.")
@_reports_errors
def check(latency: bool) -> None:
    """Say whether this machine can emulate a cluster; exit code 2 when not."""
    check_machine(1.0 if latency else 0.0)
    click.echo("this machine can emulate a cluster")


@cli.command(name="sweep")
@_reports_errors
def sweep_command() -> None:
    """Remove what killed launchers left behind (every start does so, too)."""
    removed = sweep()
    for space in removed:
        click.echo(f"removed {space.name}")
    click.echo(f"{len(removed)} leftovers removed")
