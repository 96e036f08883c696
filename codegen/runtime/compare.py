"""A plan trained for real on this machine, beside the same model on one process.

Each rank is a gloo process that trains its slice of every global batch with the tables sharded as the
plan says. Afterwards rank 0 alone trains the unsharded model from the same weights on the whole
batches, and outputs, losses and updated weights are compared.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from codegen.dense import group_plan
from codegen.execution import Form, form_of, losses_of
from codegen.runtime.launch import DEFAULT_TIMEOUT, launch
from codegen.runtime.spans import Span, aligned
from codegen.torchrec_check import check, notes
from ir.errors import InputError
from ir.plan import Plan
from ir.workload import Optimizer

TOLERANCE = 1e-5  # relative, fp32: sums over ranks are added in another order
TOLERANCE_FP16 = 1e-3  # half tables: twice the rounding of an update, 2^-11, by FBGEMM and by torch
UPDATE_TOLERANCE = 1e-3  # relative to the largest update of a tensor, rounding of the weights left out
ROUNDING = 2.0  # errors of two float32 runs against float64, the largest of a tensor each
# Learning rates at which a few steps move weights far beyond their rounding, so that updates can be compared.
DEFAULT_LR: dict[Optimizer, float] = {"sgd": 1.0, "adagrad": 0.01, "rowwise_adagrad": 0.01, "adam": 0.001}
# The dense part is trained with plain SGD whatever the tables use: an element-wise adaptive optimizer divides
# a gradient by its own size, so that rounding of a gradient near zero becomes a step of full length.
DENSE_OPTIMIZER: Optimizer = "sgd"
DENSE_LR = 0.1
# eps of Adagrad and Adam on tables in a comparison. Their first step is g / (|g| + eps): with 1e-8 a gradient
# that cancels to its own rounding (1e-13 in a DLRM) can be a full step in one run and its opposite in the other.
EPS = 1e-6
WARM_UP = 2  # steps before times are taken: buffers and process groups are made in the first
_BYTES = 4  # of an fp32 weight


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest difference between the sharded and the unsharded run over a set of tensors.

    ``relative`` is taken tensor by tensor: max |a - b| / max |b|, b the unsharded one.
    """

    absolute: float
    relative: float
    where: str  # the tensor with the largest relative difference

    def join(self, other: Difference) -> Difference:
        """The worse of both."""
        worst = other if other.relative > self.relative else self
        return Difference(max(self.absolute, other.absolute), worst.relative, worst.where)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What :func:`run` measured."""

    nproc: int
    host_size: int
    steps: int
    global_batch: int
    optimizer: str  # of the tables
    lr: float  # of the tables
    dense_optimizer: str
    dense_lr: float
    eps: float  # of Adagrad and Adam
    seed: int
    outputs: Difference  # over all steps
    losses: Difference
    weights: Difference  # after the last step
    updates: Difference  # weights after the last step less those before the first, beyond rounding
    over_rounding: (
        float  # beyond the tolerance: error over the rounding of the unsharded run, both against float64
    )
    changed: int  # parameters (whole tensors) that training changed
    tensors: int  # parameters in all
    tolerance: float
    step_seconds: tuple[float, ...]  # each step on its slowest rank, warm-up left out
    unsharded_step_seconds: tuple[float, ...]  # one process with the whole batch
    peak_rss: tuple[int, ...]  # bytes, by rank, before the unsharded run
    sharded_losses: tuple[float, ...]
    unsharded_losses: tuple[float, ...]
    notes: tuple[str, ...] = ()
    form: Form = "torchrec"  # the runtime
    lossy: str = ""  # why results may differ by more than rounding; they are then shown, not judged
    spans: tuple[Span, ...] = ()  # of one step more, under the profiler; empty where they were not asked for

    @property
    def equal(self) -> bool:
        """Outputs, losses and weights agree within the tolerance, and there was something to agree on.

        A tensor beyond the tolerance agrees too if it is no farther from a float64 run than :data:`ROUNDING` times what
        the unsharded float32 run is: adaptive optimizers magnify the rounding of gradients that cancel.
        """
        within = all(d.relative <= self.tolerance for d in (self.outputs, self.losses, self.weights))
        within = within and self.updates.relative <= UPDATE_TOLERANCE
        return (within or 0 < self.over_rounding <= ROUNDING) and self.changed > 0

    @property
    def accepted(self) -> bool:
        """:attr:`equal`, or the plan loses something on purpose and training went on with finite losses."""
        finite = all(math.isfinite(loss) for loss in self.sharded_losses)
        return self.equal or bool(self.lossy and finite and self.changed > 0)

    @property
    def median_step(self) -> float:
        """Seconds of a step on the slowest rank, median after the warm-up."""
        return statistics.median(self.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        extra = {
            "equal": self.equal,
            "accepted": self.accepted,
            "median_step": self.median_step,
            "median_unsharded_step": statistics.median(self.unsharded_step_seconds),
        }
        return {**asdict(self), **extra}


def tolerance_of(plan: Plan) -> float:
    """Relative difference that rounding explains for the plan's tables."""
    return TOLERANCE_FP16 if any(t.dtype == "fp16" for t in plan.table_plans) else TOLERANCE


def run_plan(
    plan: Plan,
    factory: str,
    arguments: tuple[Any, ...] = (),
    options: dict[str, Any] | None = None,
    *,
    nproc: int | None = None,
    steps: int = 5,
    seed: int = 0,
    lr: float | None = None,
    batch: int | None = None,
    optimizer: Optimizer | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    on_step: Callable[[int, float], None] | None = None,
    spans: bool = False,
) -> RunResult:
    """Train ``steps`` steps under the plan on gloo processes and compare with the unsharded model.

    Args:
        plan: for as many ranks as ``nproc``; hosts are emulated.
        factory: ``"module:name"`` or ``"file.py:name"`` of a callable that gives the model (or an object
            with a ``module``); every process calls it with ``arguments`` and ``options``. It must use
            torch's global random state for its weights, or give meta tensors.
        arguments: positional, JSON data.
        options: by keyword, JSON data.
        nproc: processes; default and only value: the plan's world size.
        steps: timed and compared steps; two more are run first to warm up and are compared too.
        seed: of weights and batches.
        lr: learning rate of the tables; default :data:`DEFAULT_LR` of the optimizer.
        batch: global batch; default the workload's.
        optimizer: of the tables; default the workload's.
        timeout: seconds for the whole run.
        on_step: called with (step, loss of rank 0's slice) as the sharded run goes on.
        spans: run one step more under the profiler and say when each rank was in which phase.

    Raises:
        InputError: the plan does not fit the model, the processes or this machine's memory.
        LaunchError: a process failed.
    """
    nproc = plan.world_size if nproc is None else nproc
    name: Optimizer = optimizer or plan.workload.optimizer
    rate = DEFAULT_LR[name] if lr is None else lr
    size = plan.workload.global_batch if batch is None else batch
    if nproc != plan.world_size:
        raise InputError(
            f"the plan is for {plan.world_size} ranks, not {nproc}; run {plan.world_size} processes or compile "
            f"for local-{nproc}"
        )
    if steps < 1 or not (math.isfinite(rate) and rate > 0):
        raise InputError(f"steps must be at least 1 and lr positive, not {steps} and {rate!r}")
    if size % nproc:
        raise InputError(
            f"a global batch of {size} samples does not divide over {nproc} ranks; use a multiple of {nproc}"
        )
    if form_of(plan) == "torchrec":
        check(group_plan(plan), device="cpu", optimizer=name)
    _check_memory(plan, nproc)
    with tempfile.TemporaryDirectory(prefix="planner-run-") as folder:
        answers = launch(
            "codegen.runtime.compare_rank:train_and_compare",
            nproc,
            {
                "plan": plan.to_dict(),
                "model": {"factory": factory, "arguments": list(arguments), "options": options or {}},
                "steps": steps + WARM_UP,
                "batch": size,
                "seed": seed,
                "lr": rate,
                "optimizer": name,
                "spans": spans,
                "storage": folder,
            },
            host_size=plan.topology.host_size,
            timeout=timeout,
            on_message=(lambda rank, message: on_step(*message)) if on_step is not None else None,
        )
    seconds = [max(times) for times in zip(*(answer["seconds"] for answer in answers), strict=True)]
    first = answers[0]
    result = RunResult(
        nproc=nproc,
        host_size=plan.topology.host_size,
        steps=steps,
        global_batch=size,
        optimizer=name,
        lr=rate,
        dense_optimizer=DENSE_OPTIMIZER,
        dense_lr=DENSE_LR,
        eps=EPS,
        seed=seed,
        outputs=Difference(**first["outputs"]),
        losses=Difference(**first["losses"]),
        weights=Difference(**first["weights"]),
        updates=Difference(**first["updates"]),
        over_rounding=first["over_rounding"],
        changed=first["changed"],
        tensors=first["tensors"],
        tolerance=tolerance_of(plan),
        step_seconds=tuple(seconds[WARM_UP:]),
        unsharded_step_seconds=tuple(first["unsharded_seconds"][WARM_UP:]),
        peak_rss=tuple(answer["peak_rss"] for answer in answers),
        sharded_losses=tuple(first["sharded_losses"]),
        unsharded_losses=tuple(first["unsharded_losses"]),
        notes=notes(plan, name) if form_of(plan) == "torchrec" else (),
        form=form_of(plan),
        lossy=losses_of(plan),
        spans=aligned(part for answer in answers for part in answer.get("spans", ())),
    )
    return result if result.equal else replace(result, notes=(*result.notes, *_reading(first["reordered"])))


def _reading(reordered: Sequence[str]) -> tuple[str, ...]:
    """What TorchRec's own order of vectors may have changed, where the models differ."""
    return tuple(
        f"{path!r} returns its vectors in the order of its shards, not of its tables: if the model joins them by "
        "position (KeyedTensor.values()), it reads others than unsharded; join them by name (to_dict, regroup)"
        for path in reordered
    )


def _check_memory(plan: Plan, nproc: int) -> None:
    """Every process builds the whole model before it is sharded; say so before the machine swaps."""
    free = _free_memory()
    # each rank the whole model and its shards; rank 0 at the end: gathered, initial and reference
    # weights, a gradient and an optimizer state of the reference
    need = _BYTES * (plan.model.embedding_params + plan.model.dense_params) * (nproc + 1 + 5)
    if free is not None and need > free:
        raise InputError(
            f"the model {plan.model.name} needs about {need / 2**30:.0f} GiB to be trained and compared by {nproc} "
            f"processes here, of which {free / 2**30:.0f} GiB are free; cap its rows (row_cap) and compile again"
        )


def _free_memory() -> int | None:
    """Bytes that can be used without swapping, where the system says (Linux)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
