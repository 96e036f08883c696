"""A decoder's training plan carried out: on a process group, or trained here beside the whole model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from codegen.emission import trained
from codegen.runtime.compare import Difference
from codegen.runtime.launch import DEFAULT_TIMEOUT, launch
from codegen.runtime.llm.limits import check_runs
from codegen.runtime.spans import Span, aligned
from ir.errors import InputError
from ir.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from codegen.runtime.llm.engine import ParallelDecoder

TOLERANCE = 1e-5  # relative, fp32: sums over ranks and micro-batches are added in another order
DEFAULT_LR = 0.1  # plain SGD: an adaptive optimizer turns rounding of a tiny gradient into a full step
WARM_UP = 1  # steps before times are taken


def parallel_model(plan: Plan, module: nn.Module) -> ParallelDecoder:
    """``module`` on this rank of the default process group, as the plan lays it out.

    ``.step(tokens, targets)`` runs one global batch forward and backward and returns its mean loss;
    ``.parameters()`` go to an optimizer.

    Raises:
        InputError: no training plan of a decoder, another model or world size, or a layout that is not run.
    """
    from codegen.runtime.llm.engine import ParallelDecoder

    made, fed = trained(plan, "running")
    return ParallelDecoder(made, module, fed.sequence)


@dataclass(frozen=True, slots=True)
class DecoderRun:
    """What :func:`run_decoder` measured; differences are to the whole model on one process."""

    nproc: int
    layout: str
    steps: int
    seed: int
    lr: float
    losses: Difference  # over all steps
    gradients: Difference  # of the first step
    weights: Difference  # after the last step
    changed: int  # parameters (whole tensors) that training changed
    tensors: int  # parameters in all
    tolerance: float
    step_seconds: tuple[float, ...]  # each step on its slowest rank, warm-up left out
    reference_seconds: tuple[float, ...]
    peak_rss: tuple[int, ...]  # bytes, by rank, before the comparison
    parallel_losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    spans: tuple[Span, ...] = ()  # of one step more, under the profiler; empty where they were not asked for

    @property
    def equal(self) -> bool:
        """Losses, gradients and weights agree within the tolerance, and every tensor was trained."""
        within = all(d.relative <= self.tolerance for d in (self.losses, self.gradients, self.weights))
        return within and self.changed == self.tensors

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        medians = {
            "median_step": statistics.median(self.step_seconds),
            "median_reference_step": statistics.median(self.reference_seconds),
        }
        return {**asdict(self), "equal": self.equal, **medians}


def run_decoder(
    plan: Plan,
    factory: str,
    arguments: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
    *,
    steps: int = 3,
    seed: int = 0,
    lr: float = DEFAULT_LR,
    timeout: float = DEFAULT_TIMEOUT,
    on_step: Callable[[int, float], None] | None = None,
    spans: bool = False,
) -> DecoderRun:
    """Train a decoder on one gloo process a rank, as the plan says, and compare with the whole model.

    Args:
        plan: a training plan.
        factory, arguments, options: of the model, as :class:`codegen.runtime.models.ModelSpec` takes them.
        steps: timed steps, after one to warm up; all are compared.
        seed: of weights and batches.
        lr: of plain SGD.
        timeout: seconds for the whole run.
        on_step: called with (step, loss).
        spans: run one step more under the profiler and say when each rank was in which phase.

    Raises:
        InputError: the plan does not fit the model or this machine's memory, or is not run here.
        LaunchError: a process failed.
    """
    made, fed = trained(plan, "running")
    if steps < 1 or not (math.isfinite(lr) and lr > 0):
        raise InputError(f"steps must be at least 1 and lr positive, not {steps} and {lr!r}")
    if fed.dtype != "fp32":
        raise InputError(
            f"the plan computes in {fed.dtype}; a run on this machine compares in fp32, so compile with "
            "workload.llm.dtype fp32 (llama-tiny does)"
        )
    check_runs(made)
    _check_size(plan)
    answers = launch(
        "codegen.runtime.llm.rank:train_and_compare",
        plan.world_size,
        {
            "plan": plan.to_dict(),
            "model": {"factory": factory, "arguments": list(arguments), "options": options or {}},
            "steps": steps + WARM_UP,
            "seed": seed,
            "lr": lr,
            "spans": spans,
        },
        host_size=plan.topology.host_size,
        timeout=timeout,
        on_message=(lambda rank, message: on_step(*message)) if on_step is not None else None,
    )
    compared = [answer for answer in answers if "tensors" in answer]
    first = compared[0]
    losses = Difference(0.0, 0.0, "")
    for step, (mine, theirs) in enumerate(zip(answers[0]["losses"], first["reference_losses"], strict=True)):
        gap = abs(mine - theirs)
        losses = losses.join(Difference(gap, gap / abs(theirs), f"step {step}"))
    return DecoderRun(
        nproc=plan.world_size,
        layout=f"{made.layout.label}, {made.layout.details}",
        steps=steps,
        seed=seed,
        lr=lr,
        losses=losses,
        gradients=_worst([Difference(**answer["gradients"]) for answer in compared]),
        weights=_worst([Difference(**answer["weights"]) for answer in compared]),
        changed=len(first["changed"]),
        tensors=len({name for answer in compared for name in answer["tensors"]}),
        tolerance=TOLERANCE,
        step_seconds=tuple(map(max, zip(*(answer["seconds"][WARM_UP:] for answer in answers), strict=True))),
        reference_seconds=tuple(first["reference_seconds"][WARM_UP:]),
        peak_rss=tuple(answer["peak_rss"] for answer in answers),
        parallel_losses=tuple(answers[0]["losses"]),
        reference_losses=tuple(first["reference_losses"]),
        spans=aligned(part for answer in answers for part in answer.get("spans", ())),
    )


def _worst(differences: list[Difference]) -> Difference:
    worst = differences[0]
    for difference in differences[1:]:
        worst = worst.join(difference)
    return worst


def _check_size(plan: Plan) -> None:
    """Every process builds the whole model in fp32, and one of each stage trains it: say so before it swaps."""
    capacity = sum(tier.capacity for tier in plan.topology.device.tiers[:1]) * plan.world_size
    need = (
        4 * plan.model.dense_params * 6 * plan.world_size
    )  # weights, stage, gradients, reference and its gradients
    if need > capacity:
        raise InputError(
            f"{plan.model.name} needs about {need / 2**30:.0f} GiB to be trained and compared by {plan.world_size} "
            f"processes, {plan.topology.name} has {capacity / 2**30:.0f} GiB; run llama-tiny"
        )
