"""Parallelism of a decoder's training: degrees, schedule, recomputation, ZeRO level and stages.

The objective is the modelled step time among layouts that fit in memory; :mod:`passes.llm_layouts` lists the
legal ones, :mod:`passes.llm_search` proves the choice. This pass fills the whole plan of a decoder: the section
``parallelism``, memory, timeline and certificate; a decoder has no embedding tables to decide.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from cost_models.calibration import Calibration
from cost_models.compute import peak_flops
from cost_models.llm import ATTENTION_EFFICIENCY, Training, llm_calibration
from cost_models.timeline import TimedOp, schedule
from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.llm import DecoderModel
from ir.parallelism import Parallelism, ParallelismConstraints, RankedLayout, SearchReport
from ir.plan import Assumption, Certificate, RankMemory, Timeline
from ir.program import Program
from ir.units import format_bandwidth, format_seconds
from passes.llm_search import Candidate, search

# fp32 optimizer state of a parameter besides its fp32 master copy
_STATE_BYTES = {"sgd": 0, "adam": 8}

# terms of a step that are communication, by the mesh dimension that causes them
_NETWORK = ("tensor_parallel", "context_parallel", "pipeline_parallel", "data_parallel")


@dataclass(frozen=True, slots=True)
class LlmParallelism:
    """Choose how a decoder is trained.

    Attributes:
        calibration: constants of the cost models; default those of the device kind.
        tensor_exposed: share of the tensor-parallel collectives that the trainer does not hide behind its GEMMs; less
            than 1 for kernels that cut both into parts (asynchronous tensor parallelism).
    """

    name: ClassVar[str] = "llm_parallelism"
    calibration: Calibration | None = None
    tensor_exposed: float = 1.0

    def run(self, program: Program) -> Program:
        """Fill ``decisions.parallelism``, tables (none), memory, timeline and certificate.

        Raises:
            InputError: no decoder, or tokens that are no whole number of sequences.
            InfeasibleError: no legal layout fits.
        """
        training = replace(problem(program, self.calibration), tensor_exposed=self.tensor_exposed)
        limit = memory_limit(program)
        rules = program.options.constraints.parallelism or ParallelismConstraints()
        ranked, report = search(training, limit, rules)
        chosen = ranked[0]
        parallelism = _section(training, ranked, report)
        return replace(
            program,
            tables=(),
            memory=_memory(chosen, limit),
            timeline=_timeline(chosen),
            certificate=Certificate(
                objective_name="training step, seconds",
                objective=chosen.cost.step,
                lower_bound=chosen.cost.step,
                status="optimal",
                bound_method=(
                    f"every one of {report.legal} legal layouts was priced, holds too much, or has a bound at or "
                    "above a ranked one"
                ),
            ),
            decisions=replace(program.decisions, parallelism=parallelism),
            assumptions=assumptions(program, training),
        )


def problem(program: Program, calibration: Calibration | None = None) -> Training:
    """What the program trains; raises InputError where that is no decoder."""
    model, workload = program.model, program.workload
    if not isinstance(model, DecoderModel):
        raise InputError(f"{model.name} is no decoder; parallelism of layers is planned for decoders only")
    fed = workload.llm or LlmWorkload()
    return Training(
        shape=model.shape,
        sequence=fed.sequence,
        sequences=fed.sequences,
        topology=program.topology,
        calibration=calibration or llm_calibration(program.topology),
        dtype=fed.dtype,
        state_bytes=_STATE_BYTES[fed.optimizer],
    )


def memory_limit(program: Program) -> int:
    """Bytes a device may use: its capacity (or the user's limit) less the reserve."""
    constraints = program.options.constraints
    capacity = constraints.memory_limit or program.topology.device.tiers[0].capacity
    return int(capacity * (1 - constraints.memory_reserve))


def _section(training: Training, ranked: tuple[Candidate, ...], report: SearchReport) -> Parallelism:
    chosen = ranked[0]
    cost, world = chosen.cost, training.topology.world_size
    rate = training.flops / cost.step / world
    return Parallelism(
        model=training.shape,
        layout=chosen.layout,
        stages=chosen.stages,
        seconds=cost.terms,
        hidden=cost.hidden,
        bubble=cost.bubble,
        flops=training.flops,
        tflops=rate / 1e12,
        mfu=rate / peak_flops(training.topology.device, training.dtype),
        alternatives=tuple(
            RankedLayout(
                other.layout,
                other.cost.step,
                training.flops / other.cost.step / world / 1e12,
                other.fullest,
                difference(chosen, other),
            )
            for other in ranked[1:]
        ),
        search=report,
    )


def difference(chosen: Candidate, other: Candidate) -> str:
    """What the other layout pays more for, and what less, the two largest terms of each."""
    deltas = {name: other.cost.terms[name] - seconds for name, seconds in chosen.cost.terms.items()}
    worth = 1e-3 * chosen.cost.step
    more = sorted((d, name) for name, d in deltas.items() if d > worth)[::-1][:2]
    less = sorted((d, name) for name, d in deltas.items() if d < -worth)[:2]
    phrases = [f"{name} +{format_seconds(d)}" for d, name in more]
    phrases += [f"{name} -{format_seconds(-d)}" for d, name in less]
    return ", ".join(phrases) or "the same terms within 0.1 % of the step"


def _memory(chosen: Candidate, limit: int) -> tuple[RankMemory, ...]:
    layout = chosen.layout
    return tuple(
        RankMemory(rank, limit, chosen.memory[layout.stage_of(rank)]) for rank in range(layout.world)
    )


def _timeline(chosen: Candidate) -> Timeline:
    """The step of the slowest pipeline rank, each term summed over its micro-batches."""
    terms, hidden = chosen.cost.terms, chosen.cost.hidden
    work = ("gemm", "attention", "elementwise", "recompute")
    ops: list[TimedOp] = []
    last: tuple[str, ...] = ()
    for name in (*work, *_NETWORK[:3], "bubble", "data_parallel", "optimizer"):
        if terms[name] > 0:
            stream = name.removesuffix("_parallel") if name in _NETWORK else "compute"
            ops.append(TimedOp(name, stream, terms[name], last))
            last = (name,)
    # hidden transfers run beside the work, which comes first
    for name in _NETWORK:
        if hidden.get(name, 0.0) > 0:
            seconds = min(hidden[name], sum(terms[part] for part in work))
            stream = name.removesuffix("_parallel")
            ops.insert(0, TimedOp(f"{name}_hidden", stream, seconds))
    return schedule(ops)


def assumptions(program: Program, training: Training) -> tuple[Assumption, ...]:
    """The constants, the links and the workload that the step rests on."""
    calibration = training.calibration
    used = {"gemm_efficiency", "gemm_tile", "stream_efficiency", "kernel_seconds", "fabric_efficiency"}
    used |= {"network_efficiency", "collective_seconds"}
    listed = [
        Assumption(field.name, f"{getattr(calibration, field.name):g}", calibration.source)
        for field in fields(calibration)
        if field.name in used
    ]
    listed.append(
        Assumption("attention_efficiency", f"{ATTENTION_EFFICIENCY:g}", "arXiv 2411.01783, table 5, on H100")
    )
    for level in training.topology.levels:
        link = level.link
        text = f"{format_bandwidth(link.bandwidth)} a device and direction, {format_seconds(link.latency)}"
        listed.append(Assumption(f"link.{level.name}", text, link.source))
    listed.append(
        Assumption(
            "workload",
            f"{training.sequences} sequences of {training.sequence} tokens a step",
            program.workload.origin,
        )
    )
    listed.append(
        Assumption(
            "model FLOP", "6 a parameter and token, and causal attention", "arXiv 2411.01783, appendix A"
        )
    )
    return tuple(listed)
