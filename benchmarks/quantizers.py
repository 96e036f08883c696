"""Speed of the quantizers, per CPU-second, beside torchao and AMD Quark in the same process.

    python benchmarks/quantizers.py [--quick] [--json]
    python benchmarks/quantizers.py --table      # the QSNR of every format on a standard normal

Every figure is millions of float32 elements per second of CPU time of this process (all threads), the best
of several runs on the same tensor of normal draws. "qdq" is quantise and dequantise, in one call where a
library has one. Rivals come from PyPI (``pip install torchao amd-quark``); one that cannot be imported is
said to be absent.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks._report import Report
from codegen.runtime import _native
from codegen.runtime.mx import fake_quantize, parse_format, qsnr, qsnr_many, quantize
from codegen.runtime.mx_fake import quantize_dequantize
from ir.formats import FORMATS, OCP_FORMATS

QDQ_TARGET = 200.0  # million elements per CPU-second
QSNR_TARGET = 100.0  # million elements per CPU-second, six formats together
ROW = 4096  # elements of a row: a multiple of every block, and wider than most tables
TABLE_ELEMENTS, TABLE_ROW = 2**24, 128

Runs = dict[str, Callable[[Tensor], Any]]


def torchao() -> tuple[Runs, Runs]:
    """torchao's emulated MX: qdq by format, and codes only. Raises ImportError when it is absent."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    elements = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp4_e2m1": torch.float4_e2m1fn_x2,
    }

    def qdq(x: Tensor, element: Any) -> Tensor:
        return MXTensor.to_mx(x, element, 32).dequantize(torch.float32)

    qdqs = {name: partial(qdq, element=element) for name, element in elements.items()}
    codes = {
        name: partial(MXTensor.to_mx, elem_dtype=element, block_size=32) for name, element in elements.items()
    }
    return qdqs, codes


def quark() -> tuple[Runs, Runs]:
    """AMD Quark's emulation: qdq by format. Raises ImportError when it is absent."""
    from quark.torch.kernel.hw_emulation.hw_emulation_interface import fake_quantize_mx, fake_quantize_mx6_mx9

    qdqs: Runs = {}
    names = {"mxfp8_e4m3": "fp8_e4m3", "mxfp8_e5m2": "fp8_e5m2", "mxint8": "int8"}
    names |= {"mxfp6_e3m2": "fp6_e3m2", "mxfp6_e2m3": "fp6_e2m3", "mxfp4_e2m1": "fp4"}
    for name, element in names.items():
        qdqs[name] = partial(
            fake_quantize_mx, axis=-1, block_size=32, scale_calculation_mode="floor", mx_element_dtype=element
        )
    for name, bits in (("mx9", 8), ("mx6", 5), ("mx4", 3)):
        qdqs[name] = partial(fake_quantize_mx6_mx9, axis=-1, block_size=16, quant_bit=bits, sub_block_size=2)
    return qdqs, {}


def rate(run: Callable[[Tensor], Any], x: Tensor, repeats: int) -> float:
    """Million elements per CPU-second, the best of ``repeats`` after one warm-up."""
    run(x[:8])
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        run(x)
        best = min(best, time.process_time() - started)
    return x.numel() / best / 1e6


def rivals(report: Report) -> dict[str, tuple[Runs, Runs]]:
    """What is installed; the rest is noted as absent."""
    found = {}
    for name, load in (("torchao", torchao), ("quark", quark)):
        try:
            found[name] = load()
        except Exception as error:  # a rival may fail in any way while it is imported
            report.note(f"{name} is absent: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    return found


def rival_cells(run: Callable[[Tensor], Any] | None, x: Tensor, ours: Tensor) -> tuple[float | None, str]:
    """A rival's speed, and whether its values are ours."""
    if run is None:
        return None, "-"
    try:
        theirs = run(x)
        return rate(run, x, 2), "equal" if torch.equal(theirs.reshape(ours.shape), ours) else "differ"
    except Exception as error:
        return None, f"fails: {type(error).__name__}"


def main() -> int:
    """Run the benchmark; the exit code is 0 when every claim holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 Mi elements instead of 64 Mi")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--table", action="store_true", help="measure the QSNR table of cost_models.formats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        return print_table()
    report = Report("quantizers")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2**22 if args.quick else 2**26) // ROW, ROW, generator=generator)
    small = x[: 2**20 // ROW] if args.quick else x[: 2**22 // ROW]  # for paths at a tenth of the speed
    if _native.reason():
        report.note(f"compiled kernels are not used: {_native.reason()}")
    found = rivals(report)
    slowest = qdq_rows(report, x, small, found)
    report.claim("qdq_slowest_format_Melem_per_cpu_s", slowest, QDQ_TARGET, ">=")
    together = qsnr_row(report, x, small, found)
    report.claim("qsnr_six_ocp_formats_Melem_per_cpu_s", together, QSNR_TARGET, ">=")
    return report.finish(args.json)


def qdq_rows(report: Report, x: Tensor, small: Tensor, found: dict[str, tuple[Runs, Runs]]) -> float:
    """One row a format; returns the slowest of ours."""
    slowest = float("inf")
    for name, format in FORMATS.items():
        if format.granularity == "element":
            continue
        run = partial(fake_quantize, format=name)
        speed = rate(run, x, 3)
        cells: dict[str, Any] = {"task": "qdq", "format": name, "ours": speed}
        slowest = min(slowest, speed)
        if format.granularity == "block":
            cells["ours_torch_path"] = rate(partial(quantize_dequantize, format=format), small, 2)
        cells["ours_codes"] = rate(partial(quantize, format=name), small, 2)
        values = fake_quantize(small, name)
        for rival, (qdqs, codes) in found.items():
            cells[rival], cells[f"{rival}_values"] = rival_cells(qdqs.get(name), small, values)
            if rival == "torchao":
                cells["torchao_codes"] = rate(codes[name], small, 2) if name in codes else None
        report.row(**cells)
    return slowest


def qsnr_row(report: Report, x: Tensor, small: Tensor, found: dict[str, tuple[Runs, Runs]]) -> float:
    """QSNR of the six OCP formats from one read, and from the rivals' values format by format."""
    speed = rate(partial(qsnr_many, formats=OCP_FORMATS), x, 3)
    cells: dict[str, Any] = {"task": "qsnr of 6", "format": "OCP MX", "ours": speed}
    for rival, (qdqs, _) in found.items():
        runs = [qdqs[name] for name in OCP_FORMATS if name in qdqs]

        def errors(x: Tensor, runs: list[Callable[[Tensor], Any]] = runs) -> list[Tensor]:
            return [(run(x) - x).square().sum(dtype=torch.float64) for run in runs]

        try:
            cells[rival] = rate(errors, small, 2)
            cells[f"{rival}_values"] = f"{len(runs)} formats"
        except Exception as error:
            cells[rival], cells[f"{rival}_values"] = None, f"fails: {type(error).__name__}"
    report.row(**cells)
    return speed


def print_table() -> int:
    """The constants of ``cost_models.formats.QSNR_NORMAL``."""
    x = torch.randn(TABLE_ELEMENTS // TABLE_ROW, TABLE_ROW, generator=torch.Generator().manual_seed(0))
    modes = [f"{name}:{mode}" for name in OCP_FORMATS for mode in ("even", "rceil", "ceil")]
    for name in [*FORMATS, *modes]:
        print(f'    "{parse_format(name).id}": {qsnr(x, name):.3f},')
    return 0


if __name__ == "__main__":
    sys.exit(main())
