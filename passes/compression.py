"""Compression of the exchanges of pooled vectors and of their gradients: codec and bound of each table.

Two levels, after arXiv 2407.04272. Table-wise: the error budget gives the widest bound (relative squared
error bound^2 / 3 when errors are uniform); a table whose vectors fall together at that bound (homogenisation)
gets a half or a quarter of it, since vectors that become one can no longer be told apart by the layers above.
Iteration-wise: bounds start wider by the requested factor and decay to these.

The engine "fastest" decides under both engines and keeps the one whose exchanges and host work last less.

Each table takes the codec that ends its own exchange soonest: message on the link, encoding at its holder,
decoding at a receiver. An exchange is compressed only if its slowest rank gains, the exchange of sizes
included; ratios are trusted ``ratio_margin`` less than predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from cost_models.calibration import Calibration, default_calibration
from cost_models.codecs import default_speeds, library_speeds, speed_of
from cost_models.collectives import network
from cost_models.exchanged import packed_ids
from cost_models.placed import rank_seconds
from cost_models.shared import framework_seconds, phase_seconds, posted_share, shared_seconds
from ir.compression import (
    PHASE_OF,
    CodecName,
    CodecSpeed,
    Compression,
    CompressionRequest,
    Direction,
    Engine,
    ExchangeCompression,
    TableClass,
    TableCompression,
    torchrec_refuses,
)
from ir.errors import InputError, did_you_mean
from ir.plan import TablePlan
from ir.program import Program
from ir.sharding import ROW_SPLIT
from ir.units import format_seconds
from passes.compression_choices import NONE, Choice, Traffic, choices_of, one_codec, traffic_of

# TorchRec's quantised communication runs these as one kernel a direction
_SINGLE_KERNEL: tuple[CodecName, ...] = ("fp16", "bf16", "int8")


@dataclass(frozen=True, slots=True)
class CompressionBounds:
    """Fill ``decisions.compression`` when the constraints ask for it."""

    name: ClassVar[str] = "compression"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide codecs and bounds; raises InputError for samples of another model, or
        an exchange that is narrowed already."""
        request = program.options.constraints.compression
        if request is None:
            return program
        assert program.tables is not None, "sharding runs before compression"
        if program.workload.exchange_dtype != "fp32":
            raise InputError(
                f"the workload exchanges {program.workload.exchange_dtype} already; set exchange_dtype to fp32 and let "
                "compression choose among the codecs, fp16 and bf16 included"
            )
        _check_samples(request, program.tables)
        calibration = self.calibration or default_calibration(program.topology)
        wanted: tuple[Engine, ...] = (
            ("torchrec", "exchange") if request.engine == "fastest" else (request.engine,)
        )
        sections = [self._section(program, request, engine, calibration) for engine in wanted]
        section = min(sections, key=lambda made: _seconds(program, made, calibration))
        return replace(program, decisions=replace(program.decisions, compression=section))

    def _section(
        self, program: Program, request: CompressionRequest, engine: Engine, calibration: Calibration
    ) -> Compression:
        """Codecs and bounds under one engine."""
        speeds = request.speeds or default_speeds(program.topology, calibration)
        directions: tuple[Direction, ...] = (
            ("forward", "backward") if program.options.mode == "train" else ("forward",)
        )
        refused = _refused(program) if engine == "exchange" else ""
        tables: list[TableCompression] = []
        exchanges: list[ExchangeCompression] = []
        for direction in directions:
            traffic = traffic_of(program, request, direction, calibration)
            if engine == "torchrec":
                decided, exchange = _uniform(program, request, speeds, direction, traffic, calibration)
            elif refused:
                total = _uncompressed_seconds(program, direction, traffic, calibration)
                decided, exchange = _uncompressed(direction, traffic, refused, total)
            else:
                decided, exchange = _by_table(program, request, speeds, direction, traffic, calibration)
            tables += decided
            exchanges.append(exchange)
        return Compression(engine, request.decay, tuple(tables), tuple(exchanges))


def _seconds(program: Program, section: Compression, calibration: Calibration) -> float:
    """What engines differ in: their exchanges, ids included, and the host's own work."""
    used = [exchange for exchange in section.exchanges if exchange.used]
    kept = [exchange.uncompressed for exchange in section.exchanges if not exchange.used]
    tables = program.tables or ()
    types = len({table.sharding_type for table in tables} - {"data_parallel"})
    own = bool(used) and section.engine == "exchange"
    host = framework_seconds(len(tables), types, calibration, compressed=own)
    topology, workload, mode = program.topology, program.workload, program.options.mode
    ids = rank_seconds(tables, topology, workload, calibration, mode)["input_dist"]
    asked = phase_seconds("input_dist", ids, topology.host_size, calibration)
    if own:
        asked *= packed_ids(tables, topology, workload) * posted_share(topology, calibration)
    return sum(exchange.link + exchange.coding for exchange in used) + sum(kept) + host + asked


def _check_samples(request: CompressionRequest, tables: Sequence[TablePlan]) -> None:
    known = {table.name: table for table in tables}
    for sample in request.samples:
        table = known.get(sample.table)
        if table is None:
            raise InputError(
                f"a compression sample is of table {sample.table!r}, which the model does not have"
                f"{did_you_mean(sample.table, known)}"
            )
        if sample.dim != table.dim:
            raise InputError(
                f"the compression sample of table {sample.table!r} has {sample.dim} columns but the table has "
                f"{table.dim}; measure it on this model"
            )


def _refused(program: Program) -> str:
    """Why the compressed exchange does not run this program's tables; empty if it does."""
    weighted = {table.name for table in program.model.tables if table.weighted}
    for plan in program.tables or ():
        if plan.sharding_type in ROW_SPLIT:
            return f"table {plan.name!r} is {plan.sharding_type}, which the compressed exchange does not run"
        if plan.pooling not in ("sum", "mean") or plan.name in weighted:
            return (
                f"table {plan.name!r} is not a plain sum or mean of rows, which the compressed exchange needs"
            )
    return ""


def _by_table(
    program: Program,
    request: CompressionRequest,
    speeds: Sequence[CodecSpeed],
    direction: Direction,
    traffic: Sequence[Traffic],
    calibration: Calibration,
) -> tuple[list[TableCompression], ExchangeCompression]:
    """Each table its own codec; the exchange as it is if its slowest rank would not gain."""
    picked: list[tuple[Traffic, TableClass, Choice]] = []
    for one in traffic:
        table_class, choices = choices_of(program, request, speeds, one)
        best = min(choices, key=lambda choice: choice.seconds(float(one.link.max(initial=0.0))))
        picked.append((one, table_class, best))
    world = program.topology.world_size
    link, coding = np.zeros(world), np.zeros(world)
    for one, _, choice in picked:
        link += one.link * choice.factor
        coding += np.where(one.link > 0, choice.holder, choice.other)
    latency = network(program.topology, calibration).latency  # of the sizes that travel first
    size = program.topology.host_size
    exchange = ExchangeCompression(
        direction,
        uncompressed=_uncompressed_seconds(program, direction, traffic, calibration),
        link=posted_share(program.topology, calibration)
        * phase_seconds(PHASE_OF[direction], link, size, calibration),
        coding=shared_seconds(coding, size, calibration.core_sharing) + latency,
        used=any(choice.codec != "none" for _, _, choice in picked),
    )
    after = exchange.link + exchange.coding
    if exchange.used and after >= exchange.uncompressed:
        why = f"the slowest rank would need {after:.3g} s compressed and needs {exchange.uncompressed:.3g} s as it is"
        return _uncompressed(direction, traffic, why, exchange.uncompressed)
    return [_record(direction, *entry) for entry in picked], exchange


def _uncompressed_seconds(
    program: Program, direction: Direction, traffic: Sequence[Traffic], calibration: Calibration
) -> float:
    """Seconds of the exchange as it is: the part of its phase that grows with what is sent."""
    total = np.zeros(program.topology.world_size)
    for one in traffic:
        total += one.link
    return phase_seconds(PHASE_OF[direction], total, program.topology.host_size, calibration)


def _record(
    direction: Direction, traffic: Traffic, table_class: TableClass, choice: Choice, why: str = ""
) -> TableCompression:
    link = float(traffic.link.max(initial=0.0))
    coding = choice.holder + choice.other
    if not why:
        why = _verdict(traffic, choice, link)
    return TableCompression(
        table=traffic.plan.name,
        direction=direction,
        codec=choice.codec,
        bound=choice.bound,
        table_class=table_class,
        ratio=choice.ratio,
        error=choice.error,
        budget=traffic.budget,
        link=link * choice.factor,
        coding=coding,
        uncompressed=link,
        verdict=why,
    )


def _verdict(traffic: Traffic, choice: Choice, link: float) -> str:
    if choice.codec == "none":
        if traffic.sample is None:
            return "no sample of its vectors"
        return f"no codec within {traffic.budget:.2g} of error ends its exchange sooner"
    saved = link - choice.seconds(link)
    return f"ends its exchange {format_seconds(saved)} sooner at {choice.ratio:.1f} times fewer bytes"


def _uncompressed(
    direction: Direction, traffic: Sequence[Traffic], why: str, total: float
) -> tuple[list[TableCompression], ExchangeCompression]:
    tables = [_record(direction, one, "narrow", NONE, why) for one in traffic]
    return tables, ExchangeCompression(direction, total, total, 0.0, used=False)


def _uniform(
    program: Program,
    request: CompressionRequest,
    speeds: Sequence[CodecSpeed],
    direction: Direction,
    traffic: Sequence[Traffic],
    calibration: Calibration,
) -> tuple[list[TableCompression], ExchangeCompression]:
    """One fixed-rate codec for all tables, as TorchRec has one configuration a sharder."""
    before = _uncompressed_seconds(program, direction, traffic, calibration)
    library = library_speeds(program.topology, calibration)
    split = any(one.plan.sharding_type in ROW_SPLIT for one in traffic)
    best: tuple[float, list[Choice]] | None = None
    for codec in request.codecs:
        speed = speed_of(library if codec in _SINGLE_KERNEL else speeds, codec)
        if codec == "none" or speed is None or torchrec_refuses(codec, program.topology.device.kind, split):
            continue
        choices = one_codec(program, codec, speed, traffic)
        if choices is None:
            continue
        total = sum(
            choice.seconds(float(one.link.max())) for one, choice in zip(traffic, choices, strict=True)
        )
        if best is None or total < best[0]:
            best = total, choices
    if best is None:
        return _uncompressed(
            direction, traffic, "no codec that TorchRec runs here is within every table's budget", before
        )
    link = np.zeros(program.topology.world_size)
    coding = 0.0
    for one, choice in zip(traffic, best[1], strict=True):
        link += one.link * choice.factor
        coding += choice.holder + choice.other
    slowest = phase_seconds(PHASE_OF[direction], link, program.topology.host_size, calibration)
    after = slowest + coding
    if after >= before:
        why = f"the slowest rank would need {after:.3g} s compressed and needs {before:.3g} s as it is"
        return _uncompressed(direction, traffic, why, before)
    records = [_record(direction, one, "wide", c) for one, c in zip(traffic, best[1], strict=True)]
    return records, ExchangeCompression(direction, before, slowest, coding, used=True)


def compressed_phases(phases: dict[str, float], section: Compression | None) -> dict[str, float]:
    """Seconds of the phases of a step with each compressed exchange's share replaced by its own.

    A phase's overhead (latency) stays: ``after = before - uncompressed + link + coding``.
    """
    if section is None:
        return phases
    found = dict(phases)
    for exchange in section.exchanges:
        if exchange.used:
            found[exchange.phase] += exchange.link + exchange.coding - exchange.uncompressed
    return found
