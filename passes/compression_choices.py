"""What the compression pass decides between: traffic, budget, class and priced codecs of every table."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration
from cost_models.codecs import at_bound, bound_of, predicted_error, predicted_ratio, speed_of
from cost_models.formats import qsnr_normal
from cost_models.placed import rank_seconds
from ir.compression import (
    CODECS,
    PHASE_OF,
    CodecName,
    CodecSpeed,
    CompressionRequest,
    Direction,
    EmbeddingSample,
    TableClass,
    torchrec_row_bytes,
)
from ir.plan import TablePlan
from ir.program import Program

# share of distinct vectors lost at the widest bound, and what is left of the bound: this project's choice
_CLASSES: tuple[tuple[float, TableClass, float], ...] = (
    (0.01, "wide", 1.0),
    (0.10, "middle", 0.5),
    (1.00, "narrow", 0.25),
)

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Traffic:
    """One table in one direction.

    Attributes:
        link: uncompressed seconds on each rank.
        raw: bytes of float32 that a holder sends to other ranks (forward).
        rows: vectors of a message.
        messages: that a holder sends.
        budget: relative squared error left for the codec.
    """

    plan: TablePlan
    direction: Direction
    sample: EmbeddingSample | None
    link: Seconds
    raw: float
    rows: float
    messages: int
    budget: float


def traffic_of(
    program: Program, request: CompressionRequest, direction: Direction, calibration: Calibration
) -> list[Traffic]:
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
            Traffic(
                plan=plan,
                direction=direction,
                sample=samples.get(plan.name),
                link=link,
                raw=4.0 * rows * peers * plan.dim * len(plan.features),
                rows=rows,
                messages=peers * len(plan.features),
                budget=budget_of(program, request, plan.name, direction),
            )
        )
    return found


def budget_of(program: Program, request: CompressionRequest, table: str, direction: Direction) -> float:
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


def class_of(sample: EmbeddingSample, budget: float) -> tuple[TableClass, float]:
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
class Choice:
    """A codec for one table, priced; seconds are of one holder."""

    codec: CodecName
    bound: float
    ratio: float
    error: float
    factor: float  # of the link seconds
    holder: float  # of coding on the rank that holds the table: one message a peer
    other: float  # of coding on any other rank: one message
    peers: int  # other ranks

    def seconds(self, link: float) -> float:
        """Of the table on its holder and of its messages on all others: what it adds to the ranks' work together."""
        return link * self.factor + self.holder + self.peers * self.other


NONE = Choice("none", 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0)


def choices_of(
    program: Program, request: CompressionRequest, speeds: Sequence[CodecSpeed], traffic: Traffic
) -> tuple[TableClass, list[Choice]]:
    """Codecs within the budget, priced; uncompressed first."""
    sample = traffic.sample
    if sample is None:
        return "narrow", [NONE]
    table_class, bound = class_of(sample, traffic.budget)
    found = [NONE]
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
        found.append(
            Choice(
                codec,
                used,
                ratio,
                error,
                1.0 / trusted,
                *_coding(traffic, speed, program.topology.world_size - 1),
                program.topology.world_size - 1,
            )
        )
    return table_class, found


def _coding(traffic: Traffic, speed: CodecSpeed, peers: int) -> tuple[float, float]:
    """Seconds on a holder, which deals with a message a peer, and on any other rank, which has one.

    Forward the holder encodes and the others decode, backward the other way around.
    """
    columns = len({shard.col for shard in traffic.plan.shards})
    features = len(traffic.plan.features)
    many, one = traffic.raw / columns, traffic.raw / peers
    at_holder, elsewhere = (
        (speed.encode, speed.decode) if traffic.direction == "forward" else (speed.decode, speed.encode)
    )
    fixed = speed.message / 2  # of either side
    return many / at_holder + traffic.messages * fixed, one / elsewhere + columns * features * fixed


def one_codec(
    program: Program, codec: CodecName, speed: CodecSpeed, traffic: Sequence[Traffic]
) -> list[Choice] | None:
    """The codec on every table, None where one cannot bear its error; its calls are one for all tables."""
    peers = program.topology.world_size - 1
    found = []
    for one in traffic:
        error = predicted_error(one.sample, codec, 0.0) if one.sample else np.inf
        if error > one.budget:
            return None
        ratio = 4.0 * one.plan.dim / torchrec_row_bytes(codec, one.plan.dim)
        # vectors are coded where they are looked up and decoded where they are used: an equal share a rank
        share = one.raw / peers
        found.append(
            Choice(
                codec,
                0.0,
                ratio,
                float(error),
                1.0 / ratio,
                share / speed.encode + speed.message / 2 / len(traffic),
                share / speed.decode + speed.message / 2 / len(traffic),
                1,
            )
        )
    return found
