"""``planner formats``: what each number format stores, keeps, and where it runs natively."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, get_args

import click

from cost_models.formats import bits_per_element, qsnr_lower_bound, qsnr_normal
from ir.errors import PlannerError
from ir.format_kernels import Architecture, kernels
from ir.formats import FORMATS, Format, parse_format


@click.command()
@click.argument("names", nargs=-1, metavar="[FORMAT]...")
@click.option(
    "--row-length",
    type=click.IntRange(1, 2**31),
    default=128,
    show_default=True,
    help="Elements along the quantised axis: what a row stores once is shared by as many.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def formats(names: tuple[str, ...], row_length: int, as_json: bool) -> None:
    """List number formats: bits per element, QSNR on a standard normal, and where kernels exist.

    FORMAT is an id with options, such as mxfp8_e4m3:rceil; without one every format is listed. An id
    whose QSNR is not tabulated is measured on the spot.
    """
    try:
        listed = [parse_format(name) for name in names] or list(FORMATS.values())
        rows = [describe(format, row_length) for format in listed]
    except PlannerError as error:
        click.echo(
            json.dumps({"error": str(error), "exit_code": error.exit_code}) if as_json else f"error: {error}",
            err=not as_json,
        )
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps({"row_length": row_length, "formats": rows}, indent=1, allow_nan=False))
    else:
        _print_table(rows, row_length)


def describe(format: Format, row_length: int) -> dict[str, Any]:
    """One format as plain data.

    ``qsnr_normal_db`` and ``qsnr_bound_db`` (for rows of ``row_length``) are decibels; None means lossless
    for the first where ``lossless`` is true, and otherwise that nothing is known or proved.
    """
    measured = qsnr_normal(format)
    if measured is None:
        measured = _measure(format)
    bound = qsnr_lower_bound(format, row_length)
    native: dict[str, list[str]] = {}
    for kernel in kernels(format):
        native.setdefault(kernel.operation, []).append(kernel.architecture)
    return {
        "id": format.id,
        "element": format.element_name,
        "shares_scale": f"{format.block}" if format.granularity == "block" else format.granularity,
        "scale": format.scale,
        "scale_mode": format.scale_mode,
        "rounding": format.rounding,
        "non_finite": format.non_finite,
        "bits_per_element": bits_per_element(format, row_length),
        "qsnr_normal_db": None if math.isinf(measured) else round(measured, 2),
        "lossless": math.isinf(measured),
        "qsnr_bound_db": None if bound is None or math.isinf(bound) else round(bound, 2),
        "kernels": native,
    }


def _measure(format: Format) -> float:
    """QSNR in dB on 2^20 draws of a standard normal; imports torch."""
    import torch

    from codegen.runtime.mx import qsnr

    x = torch.randn(2**13, 2**7, generator=torch.Generator().manual_seed(0))
    return qsnr(x, format, axis=-1)


def _print_table(rows: list[dict[str, Any]], row_length: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    table.add_column("format", no_wrap=True)
    table.add_column("scale for")
    for name in ("bits", "QSNR", "bound"):
        table.add_column(name, justify="right")
    table.add_column("gemm", overflow="fold")
    table.add_column("embedding", overflow="fold")
    for row in rows:
        shared = row["shares_scale"]
        table.add_row(
            row["id"],
            f"{shared} elements" if shared.isdigit() else "-" if shared == "element" else f"a {shared}",
            f"{row['bits_per_element']:.4g}",
            "exact" if row["lossless"] else f"{row['qsnr_normal_db']:.1f}",
            "-" if row["qsnr_bound_db"] is None else f"{row['qsnr_bound_db']:.1f}",
            _where(row["kernels"].get("gemm", [])),
            _where(row["kernels"].get("embedding", [])),
        )
    console = Console()
    console.print(table)
    console.print(
        f"bits per element in rows of {row_length}; QSNR in dB on a standard normal; no vector goes below the "
        "bound (dB); kernels by architecture: sm80 A100, sm90 H100, sm100 B200, cdna3 MI300X, cdna4 MI355X; "
        "-: emulated",
        style="dim",
    )


def _where(architectures: list[str]) -> str:
    if set(architectures) == set(get_args(Architecture)):
        return "everywhere"
    return " ".join(architectures) or "-"
