"""What one process of :mod:`codegen.runtime.compare` does."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.execution import Running, executed, form_of, gathered
from codegen.formats import apply_formats, narrow_optimizer, sites
from codegen.runtime.batches import Batch, RandomBatches
from codegen.runtime.compare import (
    DENSE_LR,
    DENSE_OPTIMIZER,
    EPS,
    UPDATE_TOLERANCE,
    Difference,
    tolerance_of,
)
from codegen.runtime.gather import gather_rows, mean_over_ranks
from codegen.runtime.launch import Rank
from codegen.runtime.models import ModelSpec
from codegen.runtime.optimizers import make_optimizer
from codegen.runtime.spans import profiled
from codegen.torchrec import ShardedModel
from codegen.torchrec_check import collections_of, locate, widths_of
from ir.errors import InputError
from ir.plan import Plan
from ir.workload import Optimizer

Outputs = dict[str, Tensor]


def train_and_compare(
    place: Rank,
    plan: dict[str, Any],
    model: dict[str, Any],
    steps: int,
    batch: int,
    seed: int,
    lr: float,
    optimizer: Optimizer,
    spans: bool = False,
    storage: str = "",
) -> dict[str, Any]:
    """Train the sharded model with the other ranks; on rank 0, then compare with the unsharded one.

    The arguments are those of :func:`codegen.runtime.compare.run_plan` as JSON data, and a folder for the files of
    tables in memory tiers.
    """
    decided = Plan.from_dict(plan)
    spec = ModelSpec(model["factory"], tuple(model["arguments"]), model["options"])
    module, example = spec.build(seed)
    before = checksums(module)
    same_on_all_ranks(before, spec.factory)
    batches = RandomBatches(module, decided.table_plans, decided.workload, batch, example)
    names = table_parameters(decided, module)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    declared = orders_of_vectors(module)
    sharded = executed(
        decided,
        module,
        optimizer=optimizer,
        lr=lr,
        dense_optimizer=DENSE_OPTIMIZER,
        dense_lr=DENSE_LR,
        eps=EPS,
        **({"storage": storage} if form_of(decided) == "composed" else {}),
    )
    outputs: list[Outputs] = []
    losses: list[float] = []
    seconds: list[float] = []
    for step in range(steps):
        part = batches(step_seed(seed, step)).part(place.rank, place.world_size)
        dist.barrier()
        start = time.perf_counter()
        found, loss = train_step(sharded, part)
        seconds.append(time.perf_counter() - start)
        outputs.append({key: gather_rows(value) for key, value in found.items()})
        losses.append(mean_over_ranks(loss))
        if place.rank == 0:
            place.report([step, losses[-1]])
    weights = gathered(sharded, decided, names, shapes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    answer: dict[str, Any] = {
        "seconds": seconds,
        "peak_rss": peak * (1 if sys.platform == "darwin" else 1024),
    }
    if spans:  # one step more, which is not compared
        part = batches(step_seed(seed, steps)).part(place.rank, place.world_size)
        dist.barrier()
        answer["spans"] = profiled(place.rank, functools.partial(train_step, sharded, part))
    kept = orders_of_vectors(sharded.module).values()
    reordered = [path for path, names in declared.items() if names not in kept]
    del sharded, module
    if place.rank == 0:
        sharded_run = (outputs, losses, weights)
        answer |= _compare_alone(spec, decided, sharded_run, before, (batch, seed, lr, optimizer))
        answer["reordered"] = reordered
    return answer


@dataclass(frozen=True, slots=True)
class _Run:
    """What a training gave: outputs and loss of each step, weights before and after."""

    outputs: list[Outputs]
    losses: list[Tensor]
    initial: dict[str, Tensor]
    final: dict[str, Tensor]
    seconds: list[float]


def _train_alone(
    spec: ModelSpec,
    plan: Plan,
    before: Mapping[str, float],
    setting: tuple[int, int, float, Optimizer, int],
    dtype: torch.dtype | None,
) -> _Run:
    """Train the unsharded model on the batches of the sharded run, in ``dtype`` (None: in its own types)."""
    batch, seed, lr, optimizer, steps = setting
    module, example = spec.build(seed)
    if checksums(module) != before:
        raise InputError(
            f"{spec.factory} gave other weights when it was called again with seed {seed}, so nothing can be "
            "compared; let it draw its weights from torch's global random state"
        )
    batches = RandomBatches(module, plan.table_plans, plan.workload, batch, example)
    alone = unsharded_model(plan, module if dtype is None else module.to(dtype), optimizer, lr)
    narrow_alone(plan, alone)
    initial = {name: value.detach().clone() for name, value in module.named_parameters()}
    outputs, losses, seconds = [], [], []
    for step in range(steps):
        whole = batches(step_seed(seed, step))
        whole = whole if dtype is None else whole.to(dtype)
        start = time.perf_counter()
        found, loss = train_step(alone, whole)
        seconds.append(time.perf_counter() - start)
        outputs.append(found)
        losses.append(loss)
    return _Run(outputs, losses, initial, dict(module.state_dict()), seconds)


def _differences(found: _Run, expected: _Run) -> dict[str, dict[str, Difference]]:
    """Of every output, loss, weight and update of a run from those of another, by name."""
    made: dict[str, dict[str, Difference]] = {"outputs": {}, "losses": {}, "weights": {}, "updates": {}}
    steps = len(expected.losses)
    for step in range(steps):
        for key, value in expected.outputs[step].items():
            where = f"step {step} {key}".strip()
            made["outputs"][where] = difference(found.outputs[step][key], value, where)
        made["losses"][f"step {step}"] = difference(found.losses[step], expected.losses[step], f"step {step}")
    for name, value in expected.final.items():
        made["weights"][name] = difference(found.final[name], value, name)
        if name in expected.initial:
            moved = difference_of_updates(found.final[name], value, expected.initial[name], steps, name)
            made["updates"][name] = moved
    return made


def _compare_alone(
    spec: ModelSpec,
    plan: Plan,
    sharded_run: tuple[list[Outputs], list[float], dict[str, Tensor]],
    before: Mapping[str, float],
    setting: tuple[int, int, float, Optimizer],
) -> dict[str, Any]:
    """Train the unsharded model on the same batches, and the differences to it.

    What lies beyond the tolerance is judged once more, beside the unsharded model in float64: its own float32 run
    differs from that by rounding alone, and so may the sharded one.
    """
    outputs, losses, weights = sharded_run
    whole_setting = (*setting, len(losses))
    alone = _train_alone(spec, plan, before, whole_setting, None)
    sharded = _Run(outputs, [torch.tensor(loss) for loss in losses], alone.initial, weights, [])
    found = _differences(sharded, alone)
    limits = {"updates": UPDATE_TOLERANCE}
    beyond = {
        kind: [
            name for name, one in tensors.items() if not one.relative <= limits.get(kind, tolerance_of(plan))
        ]
        for kind, tensors in found.items()
    }
    excess = 0.0
    if any(beyond.values()) and plan.decisions.formats is not None:
        excess = math.inf  # narrow formats are not emulated in float64
    elif any(beyond.values()):
        with doubles_stay():
            exact = _train_alone(spec, plan, before, whole_setting, torch.float64)
        own, rounding = _differences(sharded, exact), _differences(alone, exact)
        excess = max(
            _ratio(own[kind][name].absolute, rounding[kind][name].absolute)
            for kind, names in beyond.items()
            for name in names
        )
    worst = {}
    for kind, tensors in found.items():
        joined = Difference(0.0, 0.0, "")
        for one in tensors.values():
            joined = joined.join(one)
        worst[kind] = asdict(joined)
    return {
        **worst,
        "over_rounding": excess,
        "changed": sum(not torch.equal(value, weights[name]) for name, value in alone.initial.items()),
        "tensors": len(alone.initial),
        "unsharded_seconds": alone.seconds,
        "sharded_losses": losses,
        "unsharded_losses": [float(loss) for loss in alone.losses],
    }


def _ratio(found: float, allowed: float) -> float:
    return found / allowed if allowed else (0.0 if found == 0 else float("inf"))


@contextlib.contextmanager
def doubles_stay() -> Iterator[None]:
    """``Tensor.float()`` leaves float64 as it is: TorchRec's collections and losses call it on what they return."""
    kept = torch.Tensor.float

    def wide(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else kept(self, *args, **kwargs)

    torch.Tensor.float = wide  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.float = kept  # type: ignore[method-assign]


def step_seed(seed: int, step: int) -> int:
    """Seed of the batch of a step: no two steps of a run share one."""
    return seed * 1_000_003 + step


def train_step(model: Running, batch: Batch) -> tuple[Outputs, Tensor]:
    """One step; returns the outputs and the mean loss over the samples of ``batch``, both detached."""
    found = flatten(model(*batch.inputs))
    loss = loss_of(found, batch)
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    model.step()
    return {key: value.detach() for key, value in found.items()}, loss.detach()


def unsharded_model(
    plan: Plan,
    module: nn.Module,
    optimizer: Optimizer,
    lr: float,
    dense: tuple[Optimizer, float] = (DENSE_OPTIMIZER, DENSE_LR),
    eps: float = EPS,
) -> ShardedModel:
    """``module`` as it is, with optimizers that do what the plan's sharded ones do.

    Args:
        plan: whose column blocks decide how many states row-wise Adagrad keeps.
        module: trained in place.
        optimizer: of the tables.
        lr: of the tables.
        dense: optimizer and learning rate of the rest.
        eps: of Adagrad and Adam.
    """
    collections = collections_of(module)
    tables, widths = [], []
    for table in plan.table_plans:
        collection, config = locate(table, collections)
        tables.append(collection.weight(config.name))
        widths.append((table.dim,) if table.sharding_type == "data_parallel" else widths_of(table))
    taken = {id(table) for table in tables}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in taken]
    made = [make_optimizer(optimizer, tables, lr, widths, eps)]
    if rest:
        made.append(make_optimizer(dense[0], rest, dense[1], eps=eps))
    return ShardedModel(module, tuple(made))


def narrow_alone(plan: Plan, alone: ShardedModel) -> None:
    """Put the unsharded model and its optimizer into the plan's formats, where its runtime emulates them."""
    formats = plan.decisions.formats
    if formats is None or form_of(plan) != "composed":
        return
    chosen = {tensor.name: tensor.format for tensor in formats.tensors if tensor.kind != "traffic"}
    known = sites(alone.module)
    apply_formats(alone.module, chosen, training=True, inplace=True, known=known)
    narrow_optimizer(alone.optimizers[0], alone.module, chosen, known)


def table_parameters(plan: Plan, module: nn.Module) -> dict[str, str]:
    """The parameter of each table of the plan by its name in the module."""
    collections = collections_of(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for table in plan.table_plans:
        collection, config = locate(table, collections)
        found[table.name] = names[id(collection.weight(config.name))]
    return found


def orders_of_vectors(module: nn.Module) -> dict[str, list[str]]:
    """The keys of what each of TorchRec's collections of bags returns, in order, by its path; sharded ones too."""
    found = ((path, getattr(child, "_embedding_names", None)) for path, child in module.named_modules())
    return {path: list(names) for path, names in found if names}


def flatten(output: Any) -> Outputs:
    """The tensors of a model's output by name; jagged ones by their values, keyed ones by key."""
    if isinstance(output, Tensor):
        return {"": output}
    if hasattr(output, "wait"):  # TorchRec returns some outputs lazily
        return flatten(output.wait())
    if hasattr(output, "to_dict"):
        output = output.to_dict()
    if hasattr(output, "values") and not isinstance(output, Mapping):
        return {"": output.values()}
    if isinstance(output, tuple | list):
        output = dict(enumerate(output))
    if not isinstance(output, Mapping):
        raise InputError(f"a model output of type {type(output).__name__} cannot be compared; return tensors")
    flat: Outputs = {}
    for key in sorted(output, key=str):
        for inner, tensor in flatten(output[key]).items():
            flat[f"{key}.{inner}".rstrip(".")] = tensor
    return flat


def loss_of(outputs: Outputs, batch: Batch) -> Tensor:
    """Binary cross entropy if the output is one logit a sample, else half the mean square a sample.

    Both are means over samples, so that the mean over equal slices is the loss of the whole batch.
    """
    values = list(outputs.values())
    if len(values) == 1 and values[0].shape in ((batch.size,), (batch.size, 1)):
        return F.binary_cross_entropy_with_logits(values[0].reshape(-1).float(), batch.labels)
    return torch.stack([value.float().square().sum() / (2 * batch.size) for value in values]).sum()


def difference(found: Tensor, expected: Tensor, where: str) -> Difference:
    """Largest differences between two tensors; NaN counts as infinitely far."""
    if found.shape != expected.shape:
        raise InputError(
            f"{where} has shape {tuple(found.shape)} when sharded, {tuple(expected.shape)} when not"
        )
    if not expected.numel():
        return Difference(0.0, 0.0, where)
    gap = float((found.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    gap = gap if gap == gap else float("inf")
    return Difference(gap, gap / scale if scale else (0.0 if gap == 0 else float("inf")), where)


def difference_of_updates(
    found: Tensor, expected: Tensor, initial: Tensor, steps: int, where: str
) -> Difference:
    """How far two runs moved a weight differently, relative to the farthest that one was moved.

    Weights are rounded in each step of each run by half a unit in the last place at most, which hides
    small updates; that much is taken off.
    """
    start = initial.double()
    move = float((expected.double() - start).abs().max())
    rounding = steps * torch.finfo(initial.dtype).eps * float(expected.double().abs().max())
    gap = difference(found.double() - start, expected.double() - start, where).absolute
    beyond = max(0.0, gap - rounding)
    return Difference(beyond, beyond / move if move else (0.0 if beyond == 0 else float("inf")), where)


def checksums(module: nn.Module) -> dict[str, float]:
    """A number for each parameter that differs when its values differ (practically)."""
    return {name: float(parameter.detach().double().sum()) for name, parameter in module.named_parameters()}


def same_on_all_ranks(sums: Mapping[str, float], factory: str) -> None:
    """Raise InputError unless every rank has built the same weights."""
    mine = torch.tensor(list(sums.values()), dtype=torch.float64)
    all_ranks = gather_rows(mine.reshape(1, -1))
    if not torch.equal(all_ranks, mine.expand_as(all_ranks)):
        raise InputError(
            f"{factory} gives different weights in each process; let it draw them from torch's global random state"
        )
