"""From measurements of a machine or cluster to a topology and the constants of the cost models.

:func:`measure_here` spawns gloo ranks on this machine; :func:`measure_torchrun` measures the cluster that torchrun
started this process on. :func:`topology_of` and :func:`calibration_of` turn the record into what
:func:`planner.compile` reads, :func:`save` writes both as YAML, and :func:`load_calibration` reads the constants back.

A link's bandwidth is what each rank gets while all of them send (the ranks of a host may share one card);
its latency comes from the fit ``T(S) = alpha + max(S - c, 0) / B + gamma sqrt(S)`` to the one-way times of single
messages, relative errors minimised and no term negative. The ramp gamma mends the middle sizes, which a plain
alpha-beta model misses on every public NCCL series; the credit c is what an idle link takes without pacing.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cost_models.calibration import CPU, Calibration
from cost_models.embedding import unit_seconds
from ir.compression import CodecSpeed
from ir.errors import InputError
from ir.ops import EmbeddingTable
from ir.plan import write_atomically
from ir.reading import as_mapping, dump_record, parse_record
from ir.sharding import ShardingOption, units
from ir.topology import Device, Level, Link, MemoryTier, Topology
from ir.workload import FeatureStats, Workload
from planner.calibrate_host import card_sharing as _card_sharing
from planner.calibrate_host import host_constants

Record = Mapping[str, Any]
OnStage = Callable[[str], None]

STAGES = (
    "memory",
    "gemm",
    "kernel_seconds",
    "lookup",
    "links",
    "collectives",
    "core_sharing",
    "codecs",
    "framework",
)
_DIGITS = 4  # significant digits written; repetitions differ in the second or third
_CREDITS = tuple(1024 * 2 ** (step / 4) for step in range(45))  # 1 KiB to 2 MiB, four an octave
_NEARBY = tuple(2 ** (step / 32) for step in range(-8, 9))  # factors of the best of those
_LINE = 64  # bytes one access to CPU memory moves


@dataclass(frozen=True, slots=True)
class LinkFit:
    """Seconds of one message of S bytes: ``alpha + max(S - credit, 0) / bandwidth + ramp sqrt(S)``.

    Attributes:
        alpha: seconds.
        bandwidth: bytes/s of a single long message.
        ramp: seconds per square root of a byte.
        credit: bytes that an idle link takes at once: buffers of the card, or the depth of a token bucket.
    """

    alpha: float
    bandwidth: float
    ramp: float
    credit: float = 0.0

    def seconds(self, size: float) -> float:
        """Seconds of a message of ``size`` bytes."""
        paced = max(size - self.credit, 0.0)
        return self.alpha + paced / self.bandwidth + self.ramp * math.sqrt(size)


def fit_link(points: Sequence[tuple[float, float]]) -> LinkFit:
    """Fit ``(bytes, seconds)`` points by least squares of relative errors, no coefficient negative.

    Raises:
        InputError: fewer than two sizes, or times that do not grow with the size.
    """
    sizes = sorted({size for size, _ in points})
    if len(sizes) < 2:
        raise InputError("a link needs times of at least two message sizes; measure more sizes")
    coarse = _best_fit(points, (0.0, *(c for c in _CREDITS if c < sizes[-2])))
    if coarse is None:
        raise InputError("the times of this link do not grow with the message size; measure larger messages")
    fine = _best_fit(points, [c for c in (coarse.credit * near for near in _NEARBY) if c < sizes[-2]])
    return fine or coarse


def _best_fit(points: Sequence[tuple[float, float]], credits: Sequence[float]) -> LinkFit | None:
    """The fit of least relative error; of equals the first."""
    fits = [_fit_with_credit(points, credit) for credit in credits]
    found = [fit for fit in fits if fit is not None]
    if not found:
        return None
    return min(found, key=lambda fit: sum((fit.seconds(size) / time - 1) ** 2 for size, time in points))


def _fit_with_credit(points: Sequence[tuple[float, float]], credit: float) -> LinkFit | None:
    """The best fit for one credit; None when none has a positive cost per byte."""
    size = np.array([point[0] for point in points], dtype=np.float64)
    time = np.array([point[1] for point in points], dtype=np.float64)
    features = [np.ones_like(size), np.maximum(size - credit, 0.0), np.sqrt(size)]
    columns = np.stack(features, axis=1) / time[:, None]
    best: tuple[float, LinkFit] | None = None
    # three columns: every active set is tried, which is exact and needs no solver
    for active in ([1], [0, 1], [1, 2], [0, 1, 2]):
        found, *_ = np.linalg.lstsq(columns[:, active], np.ones_like(time), rcond=None)
        solution = np.zeros(3)
        solution[active] = found
        if np.any(solution < 0) or solution[1] <= 0:
            continue
        error = float(np.sum((columns @ solution - 1) ** 2))
        if best is None or error < best[0]:
            alpha, inverse, ramp = (float(value) for value in solution)
            best = (error, LinkFit(alpha, 1 / inverse, ramp, credit))
    return best[1] if best else None


def measure_here(
    ranks: int, *, repeats: int = 5, timeout: float = 600.0, on_stage: OnStage | None = None
) -> Record:
    """Measure this machine as one host of ``ranks`` gloo ranks; raises InputError or LaunchError."""
    from codegen.runtime.launch import launch

    if not 1 <= ranks <= 256:
        raise InputError(f"calibration runs 1 to 256 ranks, not {ranks}")

    def heard(rank: int, message: Any) -> None:
        if rank == 0 and on_stage is not None:
            on_stage(message["stage"])

    records = launch(
        "codegen.runtime.measure:measure", ranks, {"repeats": repeats}, timeout=timeout, on_message=heard
    )
    first: Record = records[0]
    return first


def under_torchrun() -> bool:
    """True when torchrun started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))


def measure_torchrun(*, repeats: int = 5, on_stage: OnStage | None = None) -> tuple[int, Record]:
    """Measure the cluster this process is a rank of; ``(rank, record)``, the record the same on all ranks.

    Raises:
        InputError: hosts with different numbers of ranks.
    """
    import torch.distributed as dist

    from codegen.runtime.launch import Rank
    from codegen.runtime.measure import measure

    rank, world, host_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world % host_size:
        raise InputError(
            f"{world} ranks do not form hosts of {host_size}; give every host the same --nproc-per-node"
        )
    dist.init_process_group("gloo")
    try:
        place = Rank(rank, world, host_size, lambda message: on_stage(message["stage"]) if on_stage else None)
        record = measure(place, repeats)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return rank, record


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _points(level: Record) -> list[tuple[float, float]]:
    return [(point["bytes"], point["seconds"]) for point in level["points"]]


def _link(name: str, record: Record, level: str, what: str) -> Link:
    fit = fit_link(_points(record["links"][level]))
    exchanged = [_outside(row, record) / row["seconds"] for row in _collective(record, level, "all_to_all")]
    return Link(
        name=name,
        # whichever pattern got more through: both have every rank send and receive
        bandwidth=_round(max(record["links"][level]["flood"]["bandwidth"], *exchanged[-1:])),
        latency=_round(fit.alpha),
        source=f"measured by planner calibrate: {what}; a message alone reaches {_round(fit.bandwidth):.4g} bytes/s",
    )


def topology_of(record: Record, name: str) -> Topology:
    """The topology that was measured: one level, or two when there are several hosts."""
    source = "measured by planner calibrate, all ranks at once"
    peak = _round(_memory_peak(record))
    tier = MemoryTier(
        name="ddr",
        capacity=record["memory_bytes"],
        read_bandwidth=peak,
        write_bandwidth=peak,
        granule=_LINE,
        source=f"a rank's equal part of its host's memory; {source}",
    )
    flops: dict[str, float] = {}
    for row in record["gemm"]:
        flops[row["dtype"]] = max(flops.get(row["dtype"], 0.0), _round(row["flops"]))
    device = Device("cpu", "cpu", flops, (tier,), source=f"best product of several shapes, {source}")
    size, hosts = record["host_size"], record["world_size"] // record["host_size"]
    links = record["links"]
    if "intra" in links:
        inner = _link("loopback", record, "intra", "each rank to its neighbour in the host, all at once")
    else:
        inner = Link(
            "loopback",
            _round(record["memory"]["copy"] / 2),
            source="one rank a host: a copy in memory, not a network",
        )
    levels = [Level("host", size, inner)]
    if "inter" in links:
        what = "each rank to the next host, all at once, so a share of the host's network card"
        levels.append(Level("cluster", hosts, _link("network", record, "inter", what)))
    notes = (
        f"{record['threads']} threads a rank; medians of {record['repeats']} repetitions",
        "link bandwidths are per rank with every rank sending; the calibration file next to this one holds every point",
    )
    return Topology(name=name, device=device, levels=tuple(levels), notes=notes)


def calibration_of(record: Record, topology: Topology) -> Calibration:
    """The constants of the cost models, relative to the peaks that ``topology`` states.

    Constants that nothing here measures (bucket size, GEMM tile) keep their CPU defaults.
    """
    inner, outer = topology.intra_link, topology.inter_link
    floor = _floor(record)
    latency = inner.latency if topology.host_size > 1 else 0.0
    latency += outer.latency if topology.hosts > 1 else 0.0
    fabric = _reached(record, inner, "intra")
    network = _reached(record, outer, "inter")
    posted = _reached(record, outer, "inter", "posted") or _reached(record, inner, "intra", "posted")
    reached: dict[str, Any] = {
        "cache_speedup": max(record["memory"]["cache"] / _memory_peak(record), 1.0),
        "stream_efficiency": _stream_efficiency(record),
        "gemm_efficiency": _gemm_efficiency(record),
        "kernel_seconds": record["kernel_seconds"],
        "fabric_efficiency": fabric or network or CPU.fabric_efficiency,
        "network_efficiency": network or fabric or CPU.network_efficiency,
        "collective_seconds": max(floor - latency, 0.0),
        "core_sharing": record.get("core_sharing", 1.0),
        "card_sharing": _card_sharing(record),
        "posted_efficiency": posted or 0.0,
        "posted_seconds": _floor(record, "posted"),
    }
    constants: dict[str, Any] = {name: _round(value) for name, value in reached.items()}
    found = replace(CPU, **constants, source=f"measured by planner calibrate on {topology.name}")
    coded = record.get("codecs", {})
    found = replace(
        found,
        codec_speeds=tuple(CodecSpeed(**row) for row in coded.get("own", ())),
        library_codec_speeds=tuple(CodecSpeed(**row) for row in coded.get("library", ())),
    )
    found = replace(found, row_efficiency=_round(_row_efficiency(record, topology, found)))
    return replace(found, **host_constants(record, topology, found))


def _memory_peak(record: Record) -> float:
    """The best bytes/s of any streaming kernel: reads and writes share the memory bus of a CPU."""
    return max(float(record["memory"][kernel]) for kernel in ("read", "write", "copy", "add"))


def _row_efficiency(record: Record, topology: Topology, constants: Calibration) -> float:
    """The constant with which :mod:`cost_models.embedding` reproduces the measured lookups.

    Its seconds are inversely proportional to row_efficiency, so those at efficiency 1 over the measured
    ones (all widths together, forward and backward) are the constant. It can exceed 1 where a kernel
    moves less than that model charges.
    """
    alone = replace(topology, levels=(replace(topology.levels[0], fanout=1),))
    ideal = measured = 0.0
    for row in record["lookup"]:
        table = EmbeddingTable("calibration", row["rows"], row["dim"], ("ids",))
        work = Workload(
            global_batch=row["ids"] // row["pooling"],
            features={"ids": FeatureStats(row["pooling"], unique_fraction=row["distinct"] / row["ids"])},
            optimizer=row["optimizer"],
        )
        option = ShardingOption("table_wise", (row["dim"],))
        (unit,) = units(option, row["rows"], 1, 1)
        seconds = unit_seconds(
            table, option, unit, alone, work, replace(constants, row_efficiency=1.0), "train"
        )
        ideal += seconds["lookup_forward"] + seconds["lookup_backward"]
        measured += row["forward_seconds"] + row["backward_seconds"]
    return ideal / measured


def _stream_efficiency(record: Record) -> float:
    """Copy and add, which read and write, against the peak."""
    memory = record["memory"]
    return float(statistics.mean([memory["copy"], memory["add"]]) / _memory_peak(record))


def _gemm_efficiency(record: Record) -> float:
    """The median product over the best one, fp32."""
    rates = [row["flops"] for row in record["gemm"] if row["dtype"] == "fp32"]
    return float(statistics.median(rates) / max(rates))


def _collective(record: Record, level: str, op: str) -> list[Record]:
    return [row for row in record["collectives"] if row["level"] == level and row["op"] == op]


def _floor(record: Record, op: str = "all_to_all") -> float:
    """Seconds of the smallest all-to-all over all ranks; 0 with one rank."""
    rows = _collective(record, "inter", op) or _collective(record, "intra", op)
    return float(rows[0]["seconds"]) if rows else 0.0


def _outside(row: Record, record: Record) -> float:
    """Bytes of an all-to-all that each rank sends over the link: to other ranks, or to those of other hosts."""
    n, own = row["ranks"], 1 if row["level"] == "intra" else record["host_size"]
    return float(row["bytes"] * (n - own) / n)


def _reached(record: Record, link: Link, level: str, op: str = "all_to_all") -> float | None:
    """Fraction of the link that the largest all-to-all reaches, its floor taken off; None where there is none."""
    rows = _collective(record, level, op)
    if len(rows) < 2:
        return None
    seconds = max(rows[-1]["seconds"] - rows[0]["seconds"], 0.0)
    # more than all of the link would be the noise of the floor
    return float(min(_outside(rows[-1], record) / max(seconds, 1e-9) / link.bandwidth, 1.0))


def calibration_path(topology: str | Path) -> Path:
    """Where the constants of a topology file are kept: ``local.yaml`` has ``local.calibration.yaml``."""
    path = Path(topology)
    return path.with_name(f"{path.stem}.calibration{path.suffix or '.yaml'}")


def save(record: Record, path: str | Path, name: str | None = None) -> tuple[Topology, Calibration]:
    """Write the topology to ``path`` and the constants with every measured point beside it; raises InputError."""
    import yaml

    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"the topology file {path} must end in .yaml, or planner.topology cannot find it")
    topology = topology_of(record, name or path.stem)
    calibration = calibration_of(record, topology)
    fits = {}
    for level, rows in record["links"].items():
        fit = fit_link(_points(rows))
        fits[level] = dump_record(fit)
    beside = {"calibration": dump_record(calibration), "link_fits": _tidy(fits), "measured": _tidy(record)}
    write_atomically(path, yaml.safe_dump(topology.to_dict(), sort_keys=False))
    write_atomically(calibration_path(path), yaml.safe_dump(beside, sort_keys=False))
    return topology, calibration


def load_calibration(path: str | Path) -> Calibration:
    """Read the constants from a file that :func:`save` wrote; raises InputError that names a bad key."""
    from planner.api import load_yaml

    data = as_mapping(load_yaml(path, "calibration"), f"calibration {path}")
    if "calibration" not in data:
        raise InputError(f"{path} has no `calibration` section; write it with planner calibrate")
    return parse_record(Calibration, data["calibration"], f"calibration {path}")


def _tidy(data: Any) -> Any:
    """The record with floats to four significant digits."""
    if isinstance(data, Mapping):
        return {key: _tidy(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_tidy(value) for value in data]
    return _round(data) if isinstance(data, float) else data
