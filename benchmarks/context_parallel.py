"""Served Llama 3 405B against published latencies, and prompts of 8K to 1M tokens over RDMA and TCP.

    python benchmarks/context_parallel.py [--quick] [--json] [--svg FILE]

Fits the five constants of ``cost_models.serving`` that are no measurement of a kernel or a link on the rows of
``planner/data/measured/context_parallel.json`` marked "fit" and on one figure of the paper's abstract (128K tokens
on 16 hosts), then judges the rows marked "judge": time to the first token, time between tokens, and pass-KV against
pass-Q. Then prices prompts of 8K to 1M tokens. "K" is 1,000 tokens (table 4 prints 128,000). ``--svg`` writes the
scaling plot; ``--quick`` leaves out nothing but the plot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import planner
from benchmarks._log_chart import log_chart
from benchmarks._report import Report
from cost_models.attention_choice import heuristic_empirical, heuristic_refined, heuristic_threshold
from cost_models.serving import Server, ServingRates
from ir.decoder import DecoderShape
from ir.serving import Exchange, ServingLayout
from ir.topology import Device, Level, Link, MemoryTier, Topology

DATA = Path(planner.__file__).parent / "data" / "measured" / "context_parallel.json"
K = 1000
FITTED = ("gemm_efficiency", "launch_seconds", "ring_seconds", "cached_seconds", "decode_merge")
# arXiv 2411.01783, abstract: 128K tokens in 3.8 s and 1M tokens in 77 s, 128 GPUs on 16 hosts
ABSTRACT = ((128 * K, 3.8, "fit"), (1000 * K, 77.0, "shown"))

LLAMA = DecoderShape(126, 16384, 53248, True, 128, 8, 128, 128_256, False, 2 * 16384, 16384)
# arXiv 2411.01783, section 4: H100 of 500 W with 96 GB HBM2e; FP8 at twice the bf16 rate, as on the data sheet
H100_500W = Device(
    "H100-500W",
    "gpu",
    {"bf16": 800e12, "fp8": 1600e12},
    (MemoryTier("hbm", 96 * 10**9, 2.4e12, 2.4e12),),
)
HOST = Level("host", 8, Link("nvlink4", 450e9))


def cluster(name: str, bits: float) -> Topology:
    """Hosts of 8 joined by ``bits`` bit/s a GPU."""
    return Topology(name, H100_500W, (HOST, Level("cluster", 16, Link(name, bits / 8))))


RDMA, TCP = cluster("rdma", 400e9), cluster("tcp", 100e9)
# the same section: about 3 GB/s a rank of 12.5 GB/s
TCP_SHARE = {"send_efficiency": (0.24, 0.24), "all_to_all_efficiency": (0.24, 0.24)}


@dataclass(frozen=True, slots=True)
class Row:
    """A published latency in seconds; ``exchange`` None: the planner's choice."""

    table: str
    use: str
    layout: ServingLayout
    new: int
    cached: int
    exchange: Exchange | None
    ttft: float | None
    ttit: float | None


def layout(tensor: int, context: int) -> ServingLayout:
    """As measured: row-wise FP8 feed-forward, bf16 cache."""
    return ServingLayout(tensor, context, 1, "fp8_row", "bf16")


def rows(data: dict[str, Any]) -> list[Row]:
    """Every published figure once; table 7 repeats two of table 6 (CP2's time between tokens differs)."""
    found = []
    for entry in data["table6_ms_bs1"]:
        tokens = int(entry["ctx"].removesuffix("K")) * K
        for key, context in (("TP8", 1), ("CP2+TP8", 2)):
            cell = entry[key]
            times = cell["TTFT"] / 1e3, cell["TTIT"] / 1e3
            found.append(Row("6", entry["use"], layout(8, context), tokens, 0, None, *times))
    shapes = {"CP2+TP8": (8, 2), "CP4+TP8": (8, 4), "TP16": (16, 1)}
    for key, degrees in shapes.items():
        cell = data["table7_ms_128K_bs1"][key]
        ttft = None if key == "CP2+TP8" else cell["TTFT"] / 1e3
        found.append(Row("7", cell["use"], layout(*degrees), 128 * K, 0, None, ttft, cell["TTIT"] / 1e3))
    for entry in data["table4_ttft_ms_CP4_128000"]:
        both: tuple[tuple[Exchange, str], ...] = (("pass_kv", "passKV"), ("pass_q", "passQ"))
        for exchange, key in both:
            seconds = entry[key] / 1e3
            found.append(
                Row("4", entry["use"], layout(8, 4), entry["T"], entry["P"], exchange, seconds, None)
            )
    found += [Row("abstract", use, layout(8, 16), tokens, 0, None, s, None) for tokens, s, use in ABSTRACT]
    return found


def modelled(row: Row, rates: ServingRates) -> tuple[float, float]:
    """Seconds to the first token and between tokens."""
    server = Server(LLAMA, RDMA, rates)
    exchange = row.exchange or server.exchange(row.layout, row.new, row.cached)
    ttft = sum(server.prefill(row.layout, row.new, row.cached, exchange).values())
    return ttft, sum(server.decode(row.layout, row.new + row.cached, 1).values())


def errors(row: Row, rates: ServingRates) -> list[float]:
    """Relative errors of the figures that the row has."""
    pairs = zip((row.ttft, row.ttit), modelled(row, rates), strict=True)
    return [found / wanted - 1 for wanted, found in pairs if wanted is not None]


def fit(table: Sequence[Row]) -> ServingRates:
    """Least squares of relative errors; both latencies are linear in 1 / efficiency and in the fixed seconds.

    A constant that would be below 0 is 0.
    """
    fitted = [row for row in table if row.use == "fit"]

    def rates(x: Sequence[float]) -> ServingRates:
        return replace(ServingRates(), **dict(zip(FITTED, (1 / x[0], *x[1:]), strict=True)))

    def residuals(x: Sequence[float]) -> Any:
        return np.array([error for row in fitted for error in errors(row, rates(x))])

    steps = (1.0, 1e-4, 1e-4, 1e-4, 1e-4)
    free = list(range(len(FITTED)))
    while True:
        start = [2.0, 0.0, 0.0, 0.0, 0.0]
        base = residuals(start)
        columns = []
        for i in free:
            moved = list(start)
            moved[i] += steps[i]
            columns.append((residuals(moved) - base) / steps[i])
        change = np.linalg.lstsq(np.array(columns).T, -base, rcond=None)[0]
        for i, delta in zip(free, change, strict=True):
            start[i] += float(delta)
        below = [i for i in free if i and start[i] < 0]
        if not below:
            return rates(start)
        free = [i for i in free if i not in below]


def regrets(data: dict[str, Any], rates: ServingRates, report: Report) -> None:
    """The planner's choice and the paper's heuristics on table 4."""
    server, four = Server(LLAMA, RDMA, rates), layout(8, 4)
    shape = server.head_shape(four)
    fast = server.ring_rates(four)[0]
    peak, wire = 800e12, 50e9
    rules = {
        "planner": lambda t, p: server.exchange(four, t, p, ("pass_kv", "pass_q")),
        "algorithm 1, achieved": lambda t, p: heuristic_threshold(
            shape, t, p, 4, fast.attention_flops, fast.send_bandwidth
        ),
        "algorithm 1, peaks": lambda t, p: heuristic_threshold(shape, t, p, 4, peak, wire),
        "algorithm 5, achieved": lambda t, p: heuristic_refined(
            shape, t, p, 4, fast.attention_flops, fast.send_bandwidth
        ),
        "algorithm 5, peaks": lambda t, p: heuristic_refined(shape, t, p, 4, peak, wire),
        "appendix D, as printed": heuristic_empirical,
    }
    entries = data["table4_ttft_ms_CP4_128000"]
    judged = [entry for entry in entries if entry["use"] == "judge"]
    for name, rule in rules.items():
        lost = []
        for entry in judged:
            times = {"pass_kv": entry["passKV"], "pass_q": entry["passQ"]}
            lost.append(times[rule(entry["T"], entry["P"])] / min(times.values()) - 1)
        right = sum(loss == 0 for loss in lost)
        report.note(
            f"table 4, {name}: {right} of {len(judged)} judged rows right, worst regret {max(lost):.1%}"
        )
        if name == "planner":
            report.claim(
                f"pass-KV or pass-Q: worst regret on the {len(judged)} judged rows held of table 4's 14",
                max(lost),
                0.005,
                "<=",
            )
    report.note(
        f"table 4 has {len(entries)} rows in the data set (the paper prints 14), {len(judged)} of them judged; the "
        "minimax rule was written with these rows known"
    )


def what_if(rates: ServingRates, report: Report) -> dict[str, list[tuple[float, float]]]:
    """Prompts of 8K to 1M tokens by hosts and network; the series of the plot."""
    slow = replace(rates, **TCP_SHARE)
    series: dict[str, list[tuple[float, float]]] = {}
    for power in range(8):
        tokens = 1000 * K if power == 7 else 8 * K * 2**power
        cells: dict[str, Any] = {"table": "what if", "tokens": tokens}
        for hosts in (1, 2, 4, 8, 16):
            for network, topology, reached in (("RDMA", RDMA, rates), ("TCP", TCP, slow)):
                if hosts == 1 and network == "TCP":
                    continue
                server = Server(LLAMA, topology, reached)
                one = layout(8, hosts)
                seconds = sum(server.prefill(one, tokens, 0, server.exchange(one, tokens, 0)).values())
                name = f"CP{hosts} {network}" if hosts > 1 else "TP8"
                series.setdefault(name, []).append((tokens, seconds))
                cells[name] = round(seconds, 2)
        wide = layout(16, 1)
        cells["TP16 RDMA"] = round(
            sum(Server(LLAMA, RDMA, rates).prefill(wide, tokens, 0, "none").values()), 2
        )
        report.row(**cells)
    return series


def published_points(table: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Full prompts that the paper prints: the series they belong to, tokens, seconds."""
    points = []
    for row in table:
        if row.ttft is not None and not row.cached and row.layout.tensor == 8 and row.exchange is None:
            name = f"CP{row.layout.context} RDMA" if row.layout.context > 1 else "TP8"
            points.append((name, float(row.new), row.ttft))
    return points


def main() -> int:
    """Run; exit code 0 when every claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="accepted; the whole run takes seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, help="write the scaling plot here")
    args = parser.parse_args()
    report = Report("context_parallel")
    data = json.loads(DATA.read_text())
    table = rows(data)
    rates = fit(table)
    judged: dict[str, list[float]] = {"ttft": [], "ttit": []}
    for row in table:
        found = modelled(row, rates)
        cells: dict[str, Any] = {
            "table": row.table,
            "use": row.use,
            "layout": f"TP{row.layout.tensor} CP{row.layout.context}",
            "new": row.new,
            "cached": row.cached,
            "exchange": row.exchange or "planned",
        }
        for name, wanted, seconds in zip(judged, (row.ttft, row.ttit), found, strict=True):
            cells[f"{name}_s"] = wanted
            cells[f"{name}_error"] = None if wanted is None else f"{seconds / wanted - 1:+.1%}"
            if wanted is not None and row.use == "judge":
                judged[name].append(abs(seconds / wanted - 1))
        report.row(**cells)
    for name, errors_of in judged.items():
        report.claim(
            f"judged rows: largest error of {name}, {len(errors_of)} figures", max(errors_of), 0.10, "<="
        )
    million = next(row for row in table if row.use == "shown")
    report.claim(
        "1M tokens on 16 hosts (abstract, not fitted): error", abs(errors(million, rates)[0]), 0.10, "<="
    )
    regrets(data, rates, report)
    for name in FITTED:
        stored, found_now = getattr(ServingRates(), name), getattr(rates, name)
        report.claim(f"stored {name}: difference to the fit", abs(stored / found_now - 1), 2e-3, "<=")
    report.note(
        "which constants the model has was settled with the judged rows in sight; their values were fitted without them"
    )
    report.note(
        "published times between tokens of CP2 at 128K contradict each other (66.63 and 60.23 ms); both are fitted"
    )
    series = what_if(rates, report)
    if args.svg is not None:
        args.svg.write_text(
            log_chart(series, published_points(table), "tokens of the prompt", "seconds to the first token")
        )
    return report.finish(args.json)


if __name__ == "__main__":
    raise SystemExit(main())
