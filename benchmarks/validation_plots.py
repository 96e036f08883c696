"""Draw each cost model beside what it is judged by: ``python -m benchmarks.validation_plots RESULTS [--out DIR]``.

RESULTS holds what other benchmarks printed with ``--json``, one file each: ``fidelity.json`` and so on (``make bench``
leaves them there). A benchmark that was not run leaves its picture as it is. Pictures go to ``docs/images/validation``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._ratio_chart import Point, ratio_chart

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images" / "validation"
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """A model's picture: the benchmark whose rows it draws, how, and the error that is aimed at."""

    name: str
    title: str
    results: str
    points: Callable[[Sequence[Row]], Iterator[Point]]
    band: float


def _pairs(rows: Sequence[Row], modelled: str, measured: str, group: Callable[[Row], str]) -> Iterator[Point]:
    """Points of the rows that have both numbers."""
    for row in rows:
        a, b = row.get(modelled), row.get(measured)
        if isinstance(a, float | int) and isinstance(b, float | int) and b > 0 and a > 0:
            yield Point(group(row), a / b, str(row.get("use", "judge")))


def _errors(rows: Sequence[Row], error: str, group: Callable[[Row], str]) -> Iterator[Point]:
    """Points of the rows that state a signed error such as "+3.1%"."""
    for row in rows:
        if row.get(error):
            yield Point(
                group(row), 1 + float(str(row[error]).rstrip("%")) / 100, str(row.get("use", "judge"))
            )


def _mlperf(rows: Sequence[Row]) -> Iterator[Point]:
    own = sorted((row for row in rows if "system" in row), key=lambda row: str(row["system"]))
    yield from _pairs(
        own, "modelled_ms", "measured_ms", lambda r: f"{r['system']} {r['benchmark']} ({r['fabric']})"
    )


def _collectives(_: Sequence[Row]) -> Iterator[Point]:
    """Every point of every series, which the rows of the benchmark only summarise."""
    from benchmarks.collective_measurements import FITTED, errors, machine, series

    for one in series():
        name = f"{one.id} ({one.collective})"
        library, setting = machine(one, FITTED)
        for points, use in ((one.fit, "fit"), (one.judge, "judge")):
            for error in errors(one, points, library, setting):
                yield Point(name, 1 + error, use)


def _upmem(rows: Sequence[Row]) -> Iterator[Point]:
    yield from _pairs(rows, "model_ms", "measured_ms", lambda r: str(r["what"]).split(" (no claim)")[0])


def _tiered(rows: Sequence[Row]) -> Iterator[Point]:
    yield from _pairs(rows, "ms_predicted", "ms_measured", lambda r: str(r["case"]))


def _llm(rows: Sequence[Row]) -> Iterator[Point]:
    yield from _pairs(
        rows, "modelled", "measured", lambda r: f"{r['gpus']} GPUs, {r['sequence']} tokens, {r['layout']}"
    )


def _context(rows: Sequence[Row]) -> Iterator[Point]:
    yield from _errors(rows, "ttft_error", lambda r: f"table {r['table']}: first token, {r['layout']}")
    yield from _errors(rows, "ttit_error", lambda r: f"table {r['table']}: between tokens, {r['layout']}")


def _cluster(rows: Sequence[Row]) -> Iterator[Point]:
    yield from _pairs(rows, "predicted_ms", "measured_ms", lambda r: f"{r['plan']}")


def _memory(rows: Sequence[Row]) -> Iterator[Point]:
    yield from _pairs(rows, "predicted_mb", "measured_mb", lambda r: str(r["plan"]))


PICTURES = (
    Picture("step", "Step of DLRM and DLRM-DCNv2: MLPerf submissions", "fidelity", _mlperf, 0.15),
    Picture(
        "collectives",
        "Collectives: NCCL measurements of 64 KiB and more",
        "fidelity_collectives",
        _collectives,
        0.12,
    ),
    Picture("upmem", "UPMEM: lookups and transfers", "upmem", _upmem, 0.25),
    Picture("tiered", "Tiered tables: step time on this machine", "tiered_runtime", _tiered, 0.20),
    Picture("llm", "Llama 3 405B in training: TFLOP/s a GPU", "llm", _llm, 0.07),
    Picture("context", "Context-parallel inference: latencies", "context_parallel", _context, 0.10),
    Picture("cluster", "Plans on the emulated cluster: step time", "cluster_fidelity", _cluster, 0.15),
    Picture("memory", "Peak memory of a rank", "peak_memory", _memory, 0.05),
)


def main() -> int:
    """Draw what there are results of."""
    parser = argparse.ArgumentParser(
        description="Draw modelled beside measured, from benchmarks' --json output."
    )
    parser.add_argument("results", type=Path, help="folder with NAME.json files")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        file = options.results / f"{picture.results}.json"
        if not file.exists():
            print(f"{picture.name}: no {file}", file=sys.stderr)
            continue
        points = list(picture.points(json.loads(file.read_text())["rows"]))
        if not points:
            print(f"{picture.name}: {file} has nothing to draw", file=sys.stderr)
            continue
        (options.out / f"{picture.name}.svg").write_text(ratio_chart(picture.title, points, picture.band))
        print(f"{picture.name}: {len(points)} points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
