"""MLPerf Training DLRM submissions: what was measured, on which machine, and which model they trained.

All of them are NVIDIA HugeCTR in mixed precision: fp16 dense compute, fp16 exchange, fp32 tables, with the
element-wise part of a layer fused into its GEMM. ``benchmarks/mlperf_plans.py`` places their tables and
prices their steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from ir.ops import EmbeddingTable, Op
from ir.program import Model
from ir.topology import Level, Link, Topology
from ir.workload import FeatureStats, Workload
from planner.presets import preset

DIM = 128
SKEW = 1.1  # Zipf exponent of NVIDIA's own embedding benchmarks: hugectr_embark_models.json
STAGED_SYSTEMS = ("D54U-3U",)  # 4 PCIe GPUs on the root ports of two sockets, no PCIe switch (chassis)
BRIDGE = Link("nvlink-bridge", 300e9, 3.4e-6, "600 GB/s both ways: NVIDIA H100 data sheet, PCIe column")


def read(name: str) -> Any:
    """A JSON file of planner/data."""
    return json.loads(files("planner").joinpath("data", name).read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Configuration:
    """One machine, benchmark and batch, with the median of its measured rows.

    ``fabric`` is "nvlink", "pcie" (peer access through switches), "staged" (none: through host memory) or
    "bridged" (pairs joined by an NVLink bridge, staged between pairs).
    """

    accelerator: str
    nodes: int
    per_node: int
    benchmark: str
    batch: int
    fabric: str
    expert: str  # "nodp" for round v3.0, which did not replicate small tables
    measured: tuple[float, ...]  # step times of its rows, ms
    rounds: tuple[str, ...]
    nic: float | None = None  # bytes/s of one GPU between hosts, instead of the preset's

    @property
    def step_ms(self) -> float:
        """Median step time of its rows, ms."""
        return median(self.measured)

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return len(self.measured)

    @property
    def known(self) -> bool:
        """The topology has a preset."""
        return self.accelerator in (*_PRESET, "H100-PCIe")

    @property
    def label(self) -> str:
        """``"H100-SXM 8x8"``."""
        return f"{self.accelerator} {self.nodes}x{self.per_node}"


def _family(row: dict[str, Any]) -> str:
    name = row["accelerator"].replace("NVIDIA ", "")
    form = "-PCIe" if "PCI" in name.upper() else "-NVL" if "NVL" in name else ""
    chip = name.split("-")[0].split(" ")[0]
    small = "-40GB" if chip == "A100" and "40GB" in name else ""
    return f"{chip}{form}{small}"


def _fabric(row: dict[str, Any]) -> str:
    if "PCIe" not in _family(row):
        return "nvlink"
    if row["system"] not in STAGED_SYSTEMS:
        return "pcie"
    return "bridged" if "NVLINK" in row["interconnect"] else "staged"


def configurations(use: str) -> tuple[Configuration, ...]:
    """The rows with that ``use``, grouped by what was run; step time is the median of the group."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in read("measured/mlperf_dlrm.json")["results"]:
        if row["use"] == use and row.get("step_ms"):
            key = (_family(row), row["nodes"], row["gpus_per_node"], row["benchmark"], row["global_batch"])
            rest = (_fabric(row), "nodp" if row["round"] == "v3.0" else "")
            groups.setdefault((*key, *rest), []).append(row)
    return tuple(
        Configuration(
            *key,
            measured=tuple(row["step_ms"] for row in rows),
            rounds=tuple(sorted({row["round"] for row in rows})),
        )
        for key, rows in groups.items()
    )


_PRESET = {
    "pcie": "h100-pcie",
    "staged": "h100-pcie-staged",
    "bridged": "h100-pcie-staged",
    "A100": "a100",
    "A100-40GB": "a100-40g",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "GB200": "gb200",
    "V100": "v100",
}


def topology(config: Configuration) -> Topology:
    """The preset of a configuration; NVLink bridges join pairs."""
    family = _PRESET.get(config.fabric) or _PRESET[config.accelerator]
    made = preset(f"{family}-{config.nodes}x{config.per_node}")
    if config.fabric == "bridged":
        host = made.levels[0]
        pairs = (Level("pair", 2, BRIDGE), replace(host, fanout=host.fanout // 2))
        made = replace(made, levels=(*pairs, *made.levels[1:]))
    if config.nic is not None:
        outer = made.levels[-1]
        slower = replace(outer, link=replace(outer.link, bandwidth=config.nic))
        made = replace(made, levels=(*made.levels[:-1], slower))
    return made


def _linear(name: str, before: str, k: int, n: int, phase: str) -> Op:
    return Op(
        name,
        "gemm",
        inputs=(before,),
        flops=2.0 * k * n,
        params=k * n + n,
        activation_bytes=4.0 * n,
        phase=phase,
        gemm=(k, n),
    )


def _mlp(prefix: str, before: str, widths: Sequence[int], phase: str) -> list[Op]:
    made: list[Op] = []
    for i, (k, n) in enumerate(pairwise(widths)):
        made.append(_linear(f"{prefix}{i}", made[-1].name if made else before, k, n, phase))
    return made


@cache
def model(benchmark: str) -> Model:
    """The dense ops and tables of DLRM v1 ("dlrm_v1") or DLRM-DCNv2 ("dlrm_dcnv2"), activations fused."""
    if benchmark == "dlrm_v1":
        data = read("tables/criteo_terabyte_variants.json")["variants"]["mlperf_v1_cap40M"]
    else:
        data = read("tables/mlperf_dlrm_dcnv2.json")
    tables = tuple(EmbeddingTable(t["name"], t["rows"], t["dim"], (t["name"],)) for t in data["tables"])
    vectors = len(tables) + 1
    bottom = _mlp("bottom", "dense", (13, 512, 256, DIM), "bottom")
    ops = [Op("dense", "input", activation_bytes=4.0 * 13), *bottom]
    ops.append(Op("lookup", "lookup", activation_bytes=4.0 * DIM * len(tables), phase="top"))
    width = vectors * DIM
    ops.append(
        Op("cat", "reshape", inputs=("lookup", bottom[-1].name), activation_bytes=4.0 * width, phase="top")
    )
    if benchmark == "dlrm_v1":
        pairs = vectors * (vectors - 1) // 2
        ops.append(
            Op(
                "dot",
                "interaction",
                inputs=("cat",),
                flops=2.0 * vectors * vectors * DIM,
                activation_bytes=4.0 * (pairs + DIM),
                phase="top",
            )
        )
        width, last = pairs + DIM + 1, "dot"  # padded to 480
    else:
        last = "cat"
        for i in range(3):
            down = _linear(f"cross{i}_down", last, width, 512, "top")
            up = _linear(f"cross{i}_up", down.name, 512, width, "top")
            mix = Op(
                f"cross{i}",
                "elementwise",
                inputs=("cat", up.name, last),
                activation_bytes=4.0 * width,
                phase="top",
            )
            ops += [replace(down, params=width * 512), up, mix]
            last = mix.name
    return Model(benchmark, tables, (*ops, *_mlp("top", last, (width, 1024, 1024, 512, 256, 1), "top")))


@cache
def popularity(rows: int) -> tuple[Any, Any]:
    """Zipf probabilities of a table's rows, hottest first, as (probability, number of rows) of bins."""
    edges = np.unique(np.geomspace(1, rows + 1, 4000).astype(np.int64))
    ranks = (edges[:-1] + edges[1:] - 1) / 2.0
    counts = np.diff(edges).astype(np.float64)
    mass = ranks**-SKEW
    return mass / float((mass * counts).sum()), counts


def distinct(rows: int, draws: float) -> float:
    """Expected distinct rows among ``draws`` Zipf ids of a table."""
    probability, counts = popularity(rows)
    return float((counts * -np.expm1(-draws * probability)).sum())


def unique_fraction(rows: int, hot: float, batch: int) -> float:
    """Distinct rows over ids of one batch.

    MLPerf's multi-hot set maps each original id to ``hot - 1`` further ids drawn uniformly once, so a
    repeated original id repeats them all.
    """
    first = distinct(rows, batch)
    spread = rows * -np.expm1(-first * hot / rows)
    return float(min(1.0, max(spread, 1.0) / (batch * hot)))


@cache
def workload(benchmark: str, batch: int) -> Workload:
    """Multi-hot sizes of the benchmark, fp16 compute and exchange; Adagrad (DCNv2) or SGD (v1)."""
    if benchmark == "dlrm_v1":
        tables = read("tables/criteo_terabyte_variants.json")["variants"]["mlperf_v1_cap40M"]["tables"]
    else:
        tables = read("tables/mlperf_dlrm_dcnv2.json")["tables"]
    features = {
        t["name"]: FeatureStats(
            pooling_factor=t["pooling_factor"],
            unique_fraction=unique_fraction(t["rows"], t["pooling_factor"], batch),
        )
        for t in tables
    }
    return Workload(
        global_batch=batch,
        features=features,
        id_bytes=4,  # the benchmark's ids are int32
        optimizer="sgd" if benchmark == "dlrm_v1" else "adagrad",
        compute_dtype="fp16",
        exchange_dtype="fp16",
    )
