"""Modelled step times against measured ones.

    python benchmarks/fidelity.py [mlperf] [collectives] [--quick] [--json]

``mlperf``: fits the two constants of the GPU calibration that are not published measurements of single
kernels or collectives (``gemm_efficiency``, ``kernel_seconds``) on the rows of
``planner/data/measured/mlperf_dlrm.json`` marked "fit" (H100 1x8 and 8x8), and judges the model on the rows
marked "judge", the median of the rows of one configuration at a time. Rows marked "context" ran other
software; they are shown and not judged.

``collectives``: fits launch, hop, ramp, copy and efficiency of collectives on the rows of
``planner/data/measured/collectives.json`` marked "fit", judges on those marked "judge" (64 KiB and more), and prints
the designs of two papers beside what they replaced, by message size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import collective_measurements
from benchmarks._report import Report
from benchmarks.collective_designs import report_designs
from benchmarks.mlperf_plans import replay
from benchmarks.mlperf_replay import Configuration, configurations
from cost_models.calibration import GPU, Calibration

FITTED = ("gemm_efficiency", "kernel_seconds")
PUBLISHED = (
    "row_efficiency",
    "cache_speedup",
    "stream_efficiency",
    "fabric_efficiency",
    "network_efficiency",
    "collective_seconds",
)
TWO_PORTS = 2 * 25e9 / 8  # bytes/s of one of 8 GPUs that share two ports of 200 Gbit/s
START = {"gemm_efficiency": 0.8, "kernel_seconds": 5e-6}  # the fit does not depend on the stored values


def relative_error(config: Configuration, calibration: Calibration) -> float:
    """(modelled - measured) / measured step time."""
    return replay(config, calibration).step * 1e3 / config.step_ms - 1.0


def fit(configs: Sequence[Configuration], base: Calibration) -> Calibration:
    """``base`` with the fitted constants that minimise the squared relative errors, each row counting once.

    Gauss-Newton on the logarithms of the constants, which keeps them positive.
    """
    weights = np.sqrt([float(config.rows) for config in configs])

    def at(logs: np.ndarray) -> Calibration:
        return replace(base, **{name: float(np.exp(x)) for name, x in zip(FITTED, logs, strict=True)})

    def residuals(logs: np.ndarray) -> np.ndarray:
        return weights * np.array([relative_error(config, at(logs)) for config in configs])

    logs = np.log([START[name] for name in FITTED])
    for _ in range(50):
        here = residuals(logs)
        slopes = [(residuals(logs + step) - here) / 1e-5 for step in 1e-5 * np.eye(len(FITTED))]
        move = np.linalg.lstsq(np.stack(slopes, axis=1), -here, rcond=None)[0]
        logs = logs + np.clip(move, -0.5, 0.5)
        if np.abs(move).max() < 1e-9:
            break
    return at(logs)


def out_of_order(configs: Sequence[Configuration], modelled: Sequence[float]) -> int:
    """Pairs of systems that did the same job and are modelled in the wrong order."""
    wrong = 0
    for (a, x), (b, y) in combinations(zip(configs, modelled, strict=True), 2):
        if (a.benchmark, a.batch) == (b.benchmark, b.batch):
            wrong += (a.step_ms - b.step_ms) * (x - y) < 0
    return wrong


def mlperf(report: Report, quick: bool) -> None:
    """Fit, judge, and say both errors."""
    fitted = fit(configurations("fit"), GPU)
    groups = {use: configurations(use) for use in ("fit", "judge", "context")}
    for use, configs in groups.items():
        for config in configs:
            if config.known:
                step = replay(config, fitted).step * 1e3
                report.row(
                    use=use,
                    system=config.label,
                    fabric=config.fabric,
                    benchmark=config.benchmark,
                    batch=config.batch,
                    rounds=" ".join(config.rounds),
                    measured_ms=round(config.step_ms, 4),
                    modelled_ms=round(step, 4),
                    error=f"{step / config.step_ms - 1:+.1%}",
                )
    rows_error = [abs(replay(c, fitted).step * 1e3 / ms - 1) for c in groups["fit"] for ms in c.measured]
    judged = groups["judge"]
    modelled = [replay(config, fitted).step * 1e3 for config in judged]
    nvlink = [abs(relative_error(c, fitted)) for c in judged if c.fabric == "nvlink"]
    factors = [
        max(m / c.step_ms, c.step_ms / m)
        for c, m in zip(judged, modelled, strict=True)
        if c.fabric != "nvlink"
    ]
    drift = max(abs(getattr(GPU, name) / getattr(fitted, name) - 1) for name in FITTED)
    report.note(f"fitted: {', '.join(f'{name} {getattr(fitted, name):.4g}' for name in FITTED)}")
    if not quick:
        report.note(_spread(judged))
    for text in _other_readings(judged, fitted):
        report.note(text)
    report.claim("fit: mean absolute error", float(np.mean(rows_error)), 0.05, "<=")
    report.claim("judge: mean absolute error, NVLink configurations", float(np.mean(nvlink)), 0.15, "<=")
    report.claim("judge: largest factor, PCIe configurations", max(factors), 1.5, "<=")
    report.claim("judge: pairs of systems in the wrong order", out_of_order(judged, modelled), 0, "<=")
    report.claim("stored constants: largest difference to the fit", drift, 1e-3, "<=")


def _spread(judged: Sequence[Configuration]) -> str:
    """The judged error when a published constant is off by a fifth and the fit is repeated."""
    nvlink = [config for config in judged if config.fabric == "nvlink"]
    errors = {}
    for name in PUBLISHED:
        for factor in (0.8, 1.2):
            moved = fit(configurations("fit"), replace(GPU, **{name: getattr(GPU, name) * factor}))
            errors[f"{name} x{factor}"] = float(np.mean([abs(relative_error(c, moved)) for c in nvlink]))
    worst = max(errors, key=lambda key: errors[key])
    return (
        f"with one published constant moved by 20 % and the fit repeated, the judged NVLink error lies between "
        f"{min(errors.values()):.1%} and {errors[worst]:.1%} ({worst})"
    )


def _other_readings(judged: Sequence[Configuration], fitted: Calibration) -> list[str]:
    """What the model says where a row leaves the topology open and the other reading is taken."""
    texts = []
    for config in judged:
        if config.fabric in ("staged", "bridged"):
            step = replay(replace(config, fabric="pcie"), fitted).step * 1e3
            texts.append(
                f"{config.label} {config.fabric}: with peer access through PCIe switches it would take "
                f"{step:.1f} ms; measured {config.step_ms:.1f} ms"
            )
        if config.label == "A100 8x8" and config.benchmark == "dlrm_dcnv2":
            step = replay(replace(config, nic=TWO_PORTS), fitted).step * 1e3
            texts.append(
                f"{config.label} {config.benchmark}: its row says 2 x 200GbE, read here as one port a GPU "
                f"(rail-optimised); two ports a host would take {step:.2f} ms; measured {config.step_ms:.2f} ms"
            )
    return texts


def collectives(report: Report, quick: bool) -> None:
    """Fit, judge, and say both errors; then the published designs."""
    stored = collective_measurements.FITTED
    found = stored if quick else collective_measurements.fit()
    by_use = {use: collective_measurements.mean_error(use, found) for use in ("fit", "judge")}
    points = {one.id: one for one in collective_measurements.series()}
    for name, one in points.items():
        report.row(
            series=name,
            system=f"{one.generation} {one.hosts}x{one.host_size} {one.collective}",
            fit_points=len(one.fit),
            fit_error=f"{by_use['fit'][name]:.1%}",
            judged_points=len(one.judge),
            judged_error=f"{by_use['judge'][name]:.1%}",
        )
    for use in ("fit", "judge"):
        counts = [len(getattr(one, use)) for one in points.values()]
        mean = float(np.average(list(by_use[use].values()), weights=counts))
        report.claim(f"{use}: mean absolute error, all points of 64 KiB and more", mean, 0.12, "<=")
    report.claim("judge: mean over series", float(np.mean(list(by_use["judge"].values()))), 0.12, "<=")
    drift = max(abs(stored[name] / value - 1) for name, value in found.items())
    report.claim("stored collective constants: largest difference to the fit", drift, 2e-3, "<=")
    report.note(
        f"{len(stored)} constants for {len(points)} series; links have published bandwidths. Quick: not fitted anew."
    )
    report_designs(report)


SECTIONS = {"mlperf": mlperf, "collectives": collectives}


def main() -> int:
    """Run the sections; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="*", metavar="SECTION", help="default: all")
    parser.add_argument("--quick", action="store_true", help="without the sensitivity of the error")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = [name for name in args.section if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    report = Report("fidelity")
    for name in args.section or SECTIONS:
        SECTIONS[name](report, args.quick)
    return report.finish(args.json)


if __name__ == "__main__":
    raise SystemExit(main())
