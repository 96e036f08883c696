"""Collectives: algorithm, chunk and hierarchy of each collective of the step, and the bucket of dense gradients.

Exchanges of ids and vectors run as NCCL (or gloo) and TorchRec run them; what another algorithm would take is
kept as the runner-up. The bucket of the dense gradients is tried from 1 MiB on in powers of two in the modelled step, in
which each all-reduce starts when its bucket is full and runs beside the rest of the backward pass. DDP's
default stays unless another bucket shortens the step by more than :data:`WORTH`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from cost_models.calibration import Calibration, default_calibration
from cost_models.collective.algorithms import Priced
from cost_models.collective.library import NCCL_ALGORITHMS
from cost_models.collective.planning import Communication, communication, dense_reduction
from cost_models.dense_prices import sharded_dense
from cost_models.embedding import PHASES
from cost_models.exchanged import exchanged_bytes
from cost_models.step import DenseReduction, step_timeline
from ir.collective_plan import (
    Band,
    CollectiveChoice,
    CollectivePlan,
    CollectiveRequest,
    Crossovers,
    Engine,
)
from ir.dtypes import nbytes
from ir.plan import Timeline
from ir.program import Program
from ir.schedules import Collective

WORTH = 1e-3  # of the step: below, DDP's default bucket stays
DEFAULT_BUCKET = 25 * 2**20  # bytes: DistributedDataParallel's default bucket_cap_mb
_BUCKETS = tuple(2**power for power in range(20, 30))  # 1 MiB to 512 MiB
_SIZES = tuple(2.0**power for power in range(8, 31))  # 256 B to 1 GiB
_BY_LEVEL = ("hierarchical", "overlapped", "doubling_on_top", "rail", "rail_bruck", "bruck", "double_tree")


@dataclass(frozen=True, slots=True)
class Collectives:
    """Fill ``decisions.collectives``, and ``timeline`` with the all-reduces that were decided."""

    name: ClassVar[str] = "collectives"
    calibration: Calibration | None = None

    def run(self, program: Program) -> Program:
        """Decide; a single rank and decoders, whose collectives their own pass prices, are left alone."""
        if program.tables is None or program.timeline is None or program.topology.world_size == 1:
            return program
        calibration = self.calibration or default_calibration(program.topology)
        net = communication(program.topology, calibration)
        request = program.options.constraints.collectives or CollectiveRequest()
        timeline, bucket = _buckets(program, calibration, net, request)
        choices = [*_exchanges(program, net), *_dense(program, timeline, net, request, bucket)]
        section = _section(program, calibration, net, request, timeline, bucket, choices)
        return replace(program, timeline=timeline, decisions=replace(program.decisions, collectives=section))


def _reduction(net: Communication, bucket: int, request: CollectiveRequest) -> DenseReduction:
    return dense_reduction(net, bucket, request.dense_engine == "scheduled", request.dense_algorithm)


def _remodel(program: Program, calibration: Calibration) -> Callable[[DenseReduction], Timeline]:
    """The step of ``program`` with other all-reduces; phases are read from its timeline."""
    assert program.timeline is not None
    lasted = {event.name: event.duration for event in program.timeline.events}
    phases = dict.fromkeys(PHASES, 0.0) | {name: lasted.get(name, 0.0) for name in PHASES}
    phases["input_dist"] = lasted.get("input_dist", lasted.get("input_dist_next", 0.0))
    split = sharded_dense(program.decisions.dense, program.topology, calibration, program.workload)
    fetched, host = lasted.get("fetch_rows_next", 0.0), lasted.get("framework", 0.0)

    def step(reduction: DenseReduction) -> Timeline:
        return step_timeline(
            program.model,
            phases,
            program.topology,
            program.workload,
            calibration,
            program.options.mode,
            program.decisions.formats,
            fetched,
            split or reduction,
            host,
        )

    return step


def _buckets(
    program: Program, calibration: Calibration, net: Communication, request: CollectiveRequest
) -> tuple[Timeline, int]:
    """The step with the best bucket, and that bucket."""
    step = _remodel(program, calibration)

    def at(bucket: int) -> Timeline:
        return step(_reduction(net, bucket, request))

    if request.bucket_bytes is not None:
        return at(request.bucket_bytes), request.bucket_bytes
    default = at(DEFAULT_BUCKET)
    gradients = program.model.dense_params * nbytes(program.workload.compute_dtype)
    if program.options.mode != "train" or not gradients:
        return default, DEFAULT_BUCKET
    # buckets beyond the first that holds everything are the same one bucket
    tried = [bucket for bucket in _BUCKETS if bucket < 2 * gradients]
    best = min(((at(bucket), bucket) for bucket in tried), key=lambda found: found[0].step, default=None)
    if best is None or best[0].step >= default.step * (1 - WORTH):
        return default, DEFAULT_BUCKET
    return best


def _choice(
    net: Communication,
    name: str,
    collective: Collective,
    size: float,
    engine: Engine = "library",
    count: int = 1,
    only: str = "",
) -> CollectiveChoice:
    found = net.ranked(collective, size, engine == "scheduled", only)
    engines: tuple[Engine, ...] = ("library", "scheduled")
    others = [(p, who) for who in engines for p in net.ranked(collective, size, who == "scheduled")]
    best = found[0]
    others = [(priced, who) for priced, who in others if priced.algorithm != best.algorithm]
    up, who = min(others, key=lambda item: item[0].seconds, default=(None, engine))
    hierarchy = tuple(level.fanout for level in net.setting.levels if level.fanout > 1)
    by_level = best.algorithm in _BY_LEVEL or best.algorithm in ("recursive_doubling", "halving_doubling")
    return CollectiveChoice(
        name=name,
        collective=collective,
        size=size,
        count=count,
        algorithm=best.algorithm,
        engine=engine,
        levels=hierarchy if by_level else (net.ranks,),
        chunk=best.chunk,
        seconds=best.seconds,
        terms=best.terms.to_dict(),
        runner_up=f"{up.algorithm} ({who})" if up else "",
        runner_up_seconds=up.seconds if up else 0.0,
        reason=_reason(best, up, only, len(found)),
    )


def _reason(best: Priced, up: Priced | None, asked: str, offered: int) -> str:
    terms = best.terms.to_dict()
    largest = max(terms, key=lambda name: terms[name], default="latency")
    text = f"{largest} is {terms.get(largest, 0.0) / max(best.seconds, 1e-30):.0%} of it"
    runs = "the only one that the library runs" if offered == 1 else f"fastest of {offered} of this engine"
    runs = "asked for" if asked else runs
    if up is None:
        return f"{runs}; {text}"
    change = up.seconds / max(best.seconds, 1e-30) - 1
    word = "longer" if change >= 0 else "less"
    if abs(change) < 0.005:
        return f"{runs}; {text}; {up.algorithm} would take as long"
    return f"{runs}; {text}; {up.algorithm} would take {abs(change):.0%} {word}"


def _exchanges(program: Program, net: Communication) -> Iterator[CollectiveChoice]:
    assert program.tables is not None
    moved = exchanged_bytes(program.tables, program.topology, program.workload)
    for (phase, collective), size in moved.items():
        if size <= 0:
            continue
        yield _choice(net, phase, collective, size)
        if phase == "output_dist" and program.options.mode == "train":
            back: Collective = "all_gather" if collective == "reduce_scatter" else collective
            yield _choice(net, "gradient_dist", back, size)


def _dense(
    program: Program, timeline: Timeline, net: Communication, request: CollectiveRequest, bucket: int
) -> Iterator[CollectiveChoice]:
    reduces = [event for event in timeline.events if event.name.startswith("all_reduce")]
    if not reduces:
        return
    gradients = program.model.dense_params * nbytes(program.workload.compute_dtype)
    size = min(float(bucket), gradients)
    engine, only = request.dense_engine, request.dense_algorithm
    yield _choice(net, "dense_all_reduce", "all_reduce", size, engine, len(reduces), only)


def _section(
    program: Program,
    calibration: Calibration,
    net: Communication,
    request: CollectiveRequest,
    timeline: Timeline,
    bucket: int,
    choices: list[CollectiveChoice],
) -> CollectivePlan:
    step = _remodel(program, calibration)
    reduces = [event for event in timeline.events if event.name.startswith("all_reduce")]
    free = step(DenseReduction(bucket, lambda size: {"transfer": 0.0})).step
    default = step(_reduction(net, DEFAULT_BUCKET, request)).step
    kinds = dict.fromkeys(choice.collective for choice in choices)
    engines: tuple[Engine, ...] = ("library", "scheduled")
    return CollectivePlan(
        bucket_bytes=bucket,
        buckets=len(reduces),
        dense_seconds=sum(event.duration for event in reduces),
        exposed_seconds=max(0.0, timeline.step - free),
        default_step_change=default - timeline.step,
        choices=tuple(choices),
        crossovers=tuple(crossovers(net, kind, engine) for kind in kinds for engine in engines),
        environment=_environment(net, choices),
    )


def crossovers(net: Communication, collective: Collective, engine: Engine) -> Crossovers:
    """Which algorithm is the fastest from which size on, at powers of two from 256 B to 1 GiB."""
    bands: list[Band] = []
    for size in _SIZES:
        best = net.ranked(collective, size, engine == "scheduled")[0].algorithm
        if not bands or bands[-1].algorithm != best:
            bands.append(Band(size if bands else 0.0, best))
    return Crossovers(collective, engine, tuple(bands))


def _environment(net: Communication, choices: list[CollectiveChoice]) -> dict[str, str]:
    dense = [c for c in choices if c.name == "dense_all_reduce" and c.engine == "library"]
    if net.kind != "gpu" or not dense:
        return {}
    return {"NCCL_ALGO": f"allreduce:{NCCL_ALGORITHMS[dense[0].algorithm].lower()}"}
