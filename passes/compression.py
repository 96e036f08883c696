"""Compression of the exchanges of pooled vectors and of their gradients: codec and bound of each table.

Two levels, after arXiv 2407.04272. Table-wise: the error budget gives the widest bound (relative squared
error bound^2 / 3 when errors are uniform); a table whose vectors fall together at that bound (homogenisation)
gets a half or a quarter of it, since vectors that become one can no longer be told apart by the layers above.
Iteration-wise: bounds start wider by the requested factor and decay to these.

Each table takes the codec that ends its own exchange soonest: message on the link, encoding at its holder,
decoding at a receiver. An exchange is compressed only if its slowest rank gains, the exchange of sizes
included; ratios are trusted ``ratio_margin`` less than predicted.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration, default_calibration
from cost_models.codecs import (
    at_bound,
    bound_of,
    default_speeds,
    predicted_error,
    predicted_ratio,
    speed_of,
)
from cost_models.collectives import network
from cost_models.formats import qsnr_normal
from cost_models.placed import rank_seconds
from ir.compression import (
    CODECS,
    PHASE_OF,
    CodecName,
    CodecSpeed,
    Compression,
    CompressionRequest,
    Direction,
    EmbeddingSample,
    ExchangeCompression,
    TableClass,
    TableCompression,
    torchrec_refuses,
    torchrec_row_bytes,
)
from ir.dtypes import nbytes
from ir.errors import InputError, did_you_mean
from ir.plan import TablePlan
from ir.program import Program
from ir.sharding import ROW_SPLIT

# share of distinct vectors lost at the widest bound, and what is left of the bound: this project's choice
_CLASSES: tuple[tuple[float, TableClass, float], ...] = (
    (0.01, "wide", 1.0),
    (0.10, "middle", 0.5),
    (1.00, "narrow", 0.25),
)

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Traffic:
    """One table in one direction.

    Attributes:
        link: uncompressed seconds on each rank.
        raw: bytes of float32 that a holder sends to other ranks (forward).
        rows: vectors of a message.
        messages: that a holder sends.
        budget: relative squared error left for the codec.
    """

    plan: TablePlan
    sample: EmbeddingSample | None
    link: Seconds
    raw: float
    rows: float
    messages: int
    budget: float


@dataclass(frozen=True, slots=True)
class CompressionBounds:
    """Fill ``decisions.compression`` when the constraints ask for it."""

    name: ClassVar[str] = "compression"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide codecs and bounds; raises InputError for samples of unknown tables or of another width."""
        request = program.options.constraints.compression
        if request is None:
            return program
        assert program.tables is not None, "sharding runs before compression"
        _check_samples(request, program.tables)
        calibration = self.calibration or default_calibration(program.topology)
        speeds = request.speeds or default_speeds(program.topology, calibration)
        directions: tuple[Direction, ...] = (
            ("forward", "backward") if program.options.mode == "train" else ("forward",)
        )
        split = next((t for t in program.tables if t.sharding_type in ROW_SPLIT), None)
        tables: list[TableCompression] = []
        exchanges: list[ExchangeCompression] = []
        for direction in directions:
            traffic = _traffic(program, request, direction, calibration)
            if request.engine == "torchrec":
                decided, exchange = _uniform(program, request, speeds, direction, traffic)
            elif split is not None:
                why = f"table {split.name!r} is {split.sharding_type}, which the compressed exchange does not run"
                decided, exchange = _uncompressed(direction, traffic, why)
            else:
                decided, exchange = _by_table(program, request, speeds, direction, traffic, calibration)
            tables += decided
            exchanges.append(exchange)
        section = Compression(request.engine, request.decay, tuple(tables), tuple(exchanges))
        return replace(program, decisions=replace(program.decisions, compression=section))


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


def _traffic(
    program: Program, request: CompressionRequest, direction: Direction, calibration: Calibration
) -> list[_Traffic]:
    """Every table that is exchanged at all."""
    topology, workload = program.topology, program.workload
    assert program.tables is not None
    samples = {s.table: s for s in request.samples if s.direction == direction}
    rows = workload.global_batch / topology.world_size
    found = []
    for plan in program.tables:
        if plan.sharding_type == "data_parallel" or topology.world_size == 1:
            continue
        link = rank_seconds((plan,), topology, workload, calibration, program.options.mode)[
            PHASE_OF[direction]
        ]
        peers = topology.world_size - 1
        found.append(
            _Traffic(
                plan=plan,
                sample=samples.get(plan.name),
                link=link,
                raw=4.0 * rows * peers * plan.dim * len(plan.features),
                rows=rows,
                messages=peers * len(plan.features),
                budget=_budget(program, request, plan.name, direction),
            )
        )
    return found


def _budget(program: Program, request: CompressionRequest, table: str, direction: Direction) -> float:
    """What the number formats have left of the error budget."""
    if direction == "backward":
        return request.gradient_budget
    spent = 0.0
    for pattern, error in request.format_error.items():
        if fnmatch.fnmatchcase(table, pattern):
            spent = error
    formats = program.decisions.formats
    format = formats.format_of(table) if formats is not None else None
    quality = qsnr_normal(format) if format is not None else None
    if quality is not None:
        spent += 10 ** (-quality / 10)
    return max(0.0, request.error_budget - spent)


def _class_of(sample: EmbeddingSample, budget: float) -> tuple[TableClass, float]:
    """The class of a table and its relative bound; the error sampled at it stays within the budget."""
    widest = bound_of(budget)
    if widest <= 0:
        return "narrow", 0.0
    lost = at_bound(sample, widest).homogenisation
    name, part = next((name, part) for most, name, part in _CLASSES if lost <= most)
    bound = widest * part
    while (error := predicted_error(sample, "eb_lz", bound)) > budget:
        bound *= min(0.999, (budget / error) ** 0.5)  # errors of point masses are not uniform in their bins
    return name, bound


@dataclass(frozen=True, slots=True)
class _Choice:
    """A codec for one table, priced; seconds are of one holder."""

    codec: CodecName
    bound: float
    ratio: float
    error: float
    factor: float  # of the link seconds
    encode: float
    decode: float  # of all that the holder's table brings to one receiver

    def seconds(self, link: float) -> float:
        """Of the table's own exchange."""
        return link * self.factor + self.encode + self.decode


_NONE = _Choice("none", 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def _choices(
    program: Program, request: CompressionRequest, speeds: Sequence[CodecSpeed], traffic: _Traffic
) -> tuple[TableClass, list[_Choice]]:
    """Codecs within the budget, priced; uncompressed first."""
    sample = traffic.sample
    if sample is None:
        return "narrow", [_NONE]
    table_class, bound = _class_of(sample, traffic.budget)
    wire = nbytes(program.workload.exchange_dtype)
    found = [_NONE]
    for codec in request.codecs:
        speed = speed_of(speeds, codec)
        used = bound if CODECS[codec].bounded else 0.0
        if codec == "none" or speed is None or (CODECS[codec].bounded and used <= 0):
            continue
        error = predicted_error(sample, codec, used)
        if error > traffic.budget * (1 + 1e-9):
            continue
        ratio = predicted_ratio(sample, codec, used, traffic.rows)
        trusted = ratio if CODECS[codec].format else max(1.0, ratio * (1 - request.ratio_margin))
        holders = len({shard.col for shard in traffic.plan.shards})
        found.append(
            _Choice(
                codec,
                used,
                ratio,
                error,
                4.0 / wire / trusted,
                encode=traffic.raw / holders / speed.encode + traffic.messages * speed.message / 2,
                decode=traffic.raw / (program.topology.world_size - 1) / speed.decode
                + len(traffic.plan.features) * speed.message / 2,
            )
        )
    return table_class, found


def _by_table(
    program: Program,
    request: CompressionRequest,
    speeds: Sequence[CodecSpeed],
    direction: Direction,
    traffic: Sequence[_Traffic],
    calibration: Calibration,
) -> tuple[list[TableCompression], ExchangeCompression]:
    """Each table its own codec; the exchange as it is if its slowest rank would not gain."""
    picked: list[tuple[_Traffic, TableClass, _Choice]] = []
    for one in traffic:
        table_class, choices = _choices(program, request, speeds, one)
        best = min(choices, key=lambda choice: choice.seconds(float(one.link.max(initial=0.0))))
        picked.append((one, table_class, best))
    world = program.topology.world_size
    link, coding = np.zeros(world), np.zeros(world)
    for one, _, choice in picked:
        holds = one.link > 0
        link += one.link * choice.factor
        # forward the holder encodes and all others decode; backward the other way around
        at_holder, elsewhere = choice.encode, choice.decode
        if direction == "backward":
            at_holder, elsewhere = _returned(choice, one, speeds)
        coding += np.where(holds, at_holder, elsewhere)
    before = _slowest(traffic, world)
    latency = network(program.topology, calibration).latency  # of the sizes that travel first
    after = link + coding + latency
    compressed = [choice.codec for _, _, choice in picked if choice.codec != "none"]
    slow = int(np.argmax(after)) if world else 0
    exchange = ExchangeCompression(
        direction,
        uncompressed=before,
        link=float(link[slow]),
        coding=float(coding[slow]) + latency,
        used=bool(compressed) and float(after.max(initial=0.0)) < before,
    )
    if compressed and not exchange.used:
        why = f"the slowest rank would need {float(after.max()):.3g} s compressed and needs {before:.3g} s as it is"
        return _uncompressed(direction, traffic, why)
    return [_record(direction, *entry) for entry in picked], exchange


def _returned(choice: _Choice, traffic: _Traffic, speeds: Sequence[CodecSpeed]) -> tuple[float, float]:
    """Seconds of gradients: decoding those of every rank at the holder, encoding one message elsewhere."""
    speed = speed_of(speeds, choice.codec)
    if speed is None or choice.codec == "none":
        return 0.0, 0.0
    holders = len({shard.col for shard in traffic.plan.shards})
    features = len(traffic.plan.features)
    peers = traffic.messages / features
    return (
        traffic.raw / holders / speed.decode + traffic.messages * speed.message / 2,
        traffic.raw / peers / speed.encode + features * speed.message / 2,
    )


def _slowest(traffic: Sequence[_Traffic], world: int) -> float:
    total = np.zeros(world)
    for one in traffic:
        total += one.link
    return float(total.max(initial=0.0))


def _record(
    direction: Direction, traffic: _Traffic, table_class: TableClass, choice: _Choice, why: str = ""
) -> TableCompression:
    link = float(traffic.link.max(initial=0.0))
    coding = choice.encode + choice.decode
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


def _verdict(traffic: _Traffic, choice: _Choice, link: float) -> str:
    if choice.codec == "none":
        if traffic.sample is None:
            return "no sample of its vectors"
        return f"no codec within {traffic.budget:.2g} of error ends its exchange sooner"
    saved = link - choice.seconds(link)
    return f"ends its exchange {saved:.3g} s sooner at {choice.ratio:.1f} times fewer bytes"


def _uncompressed(
    direction: Direction, traffic: Sequence[_Traffic], why: str
) -> tuple[list[TableCompression], ExchangeCompression]:
    total = _slowest(traffic, len(traffic[0].link) if traffic else 0)
    tables = [_record(direction, one, "narrow", _NONE, why) for one in traffic]
    return tables, ExchangeCompression(direction, total, total, 0.0, used=False)


def _uniform(
    program: Program,
    request: CompressionRequest,
    speeds: Sequence[CodecSpeed],
    direction: Direction,
    traffic: Sequence[_Traffic],
) -> tuple[list[TableCompression], ExchangeCompression]:
    """One fixed-rate codec for all tables, as TorchRec has one configuration a sharder."""
    before = _slowest(traffic, program.topology.world_size)
    split = any(one.plan.sharding_type in ROW_SPLIT for one in traffic)
    best: tuple[float, list[_Choice]] | None = None
    for codec in request.codecs:
        speed = speed_of(speeds, codec)
        if codec == "none" or speed is None or torchrec_refuses(codec, program.topology.device.kind, split):
            continue
        choices = _one_codec(program, codec, speed, traffic)
        if choices is None:
            continue
        total = sum(
            choice.seconds(float(one.link.max())) for one, choice in zip(traffic, choices, strict=True)
        )
        if best is None or total < best[0]:
            best = total, choices
    if best is None:
        return _uncompressed(
            direction, traffic, "no codec that TorchRec runs here is within every table's budget"
        )
    link = np.zeros(program.topology.world_size)
    coding = 0.0
    for one, choice in zip(traffic, best[1], strict=True):
        link += one.link * choice.factor
        coding += choice.encode + choice.decode
    after = float(link.max(initial=0.0)) + coding
    if after >= before:
        why = f"the slowest rank would need {after:.3g} s compressed and needs {before:.3g} s as it is"
        return _uncompressed(direction, traffic, why)
    records = [_record(direction, one, "wide", c) for one, c in zip(traffic, best[1], strict=True)]
    return records, ExchangeCompression(direction, before, float(link.max()), coding, used=True)


def _one_codec(
    program: Program, codec: CodecName, speed: CodecSpeed, traffic: Sequence[_Traffic]
) -> list[_Choice] | None:
    """The codec on every table, None where one cannot bear its error; its calls are one for all tables."""
    wire, world = nbytes(program.workload.exchange_dtype), program.topology.world_size
    found = []
    for one in traffic:
        error = predicted_error(one.sample, codec, 0.0) if one.sample else np.inf
        if error > one.budget:
            return None
        ratio = 4.0 * one.plan.dim / torchrec_row_bytes(codec, one.plan.dim)
        # vectors are coded where they are looked up and decoded where they are used: an equal share a rank
        share = one.raw / (world - 1)
        found.append(
            _Choice(
                codec,
                0.0,
                ratio,
                float(error),
                4.0 / wire / ratio,
                share / speed.encode + speed.message / 2 / len(traffic),
                share / speed.decode + speed.message / 2 / len(traffic),
            )
        )
    return found


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
