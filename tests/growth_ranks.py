"""What one rank of the growth tests does: train through the phases of a plan while tables move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from codegen.checkpoint import load_checkpoint, save_checkpoint
from codegen.phased import PhasedModel
from codegen.runtime.batches import Batch
from codegen.runtime.format_modules import FormatLinear, GemmFormats, replace_modules
from codegen.runtime.gather import whole_weights
from codegen.runtime.growth.phases import PhasedTraining
from codegen.runtime.launch import Rank
from codegen.runtime.optimizers import make_optimizer
from codegen.torchrec import sharded_model
from ir.plan import Plan
from planner.zoo import build
from tests.checkpoint_rank import smooth

TABLES, ROWS, DIM, BATCH, LR, EPS = 4, 60, 16, 32, 0.05, 1e-3


def model() -> Any:
    """A small DLRM with hidden layers to prune, the same on every rank."""
    torch.manual_seed(0)
    tables = [{"name": f"t{n}", "rows": ROWS + n, "dim": DIM, "features": [f"f{n}"]} for n in range(TABLES)]
    return smooth(
        build("dlrm", tables=tables, dense_features=3, bottom=(24, DIM), top=(32, 16, 1), device="cpu").module
    )


def batch(plan: Plan, step: int) -> Batch:
    """The global batch of a step."""
    values = model().random_batch(BATCH, plan.workload, 100 + step)
    return Batch(values[:-1], values[-1])


def phased(place: Rank, plan: dict[str, Any]) -> dict[str, Any]:
    """All steps of the plan; whole weights at the end, losses, bytes received, and the shardings that were seen."""
    torch.set_num_threads(1)
    decided = Plan.from_dict(plan)
    growth = decided.decisions.growth
    assert growth is not None
    made = PhasedModel(decided, model(), lr=LR, eps=EPS, dense_optimizer="adagrad")
    began, widths, losses = [], [], []
    for step in range(growth.steps):
        if made.begin_step(step):
            began.append(step)
        widths.append(made.module.module.top[0].out_features)
        part = batch(decided, step).part(place.rank, place.world_size)
        made.zero_grad()
        loss = F.binary_cross_entropy_with_logits(made(*part.inputs), part.labels)
        loss.backward()
        made.step()
        losses.append(float(loss))
    weights = {name: value.tolist() for name, value in whole_weights(made.module).items()}
    return {"weights": weights, "began": began, "widths": widths, "losses": losses, "received": made.received}


def resumed(
    place: Rank,
    plan: dict[str, Any],
    then: dict[str, Any],
    flat: dict[str, Any],
    folder: str,
    stops: list[int],
) -> dict[str, Any]:
    """Steps up to each stop, saved and read by a new model of the plans in turn; at last into a flat plan's."""
    torch.set_num_threads(1)
    plans = [Plan.from_dict(plan), Plan.from_dict(then)]
    growth = plans[0].decisions.growth
    assert growth is not None
    start = 0
    for turn, stop in enumerate([*stops, growth.steps]):
        decided = plans[turn % 2]
        made = PhasedModel(decided, model(), lr=LR, eps=EPS, dense_optimizer="adagrad")
        if turn:
            assert load_checkpoint(decided, made, folder) == start
        for step in range(start, stop):
            made.begin_step(step)
            part = batch(decided, step).part(place.rank, place.world_size)
            made.zero_grad()
            F.binary_cross_entropy_with_logits(made(*part.inputs), part.labels).backward()
            made.step()
        save_checkpoint(decided, made, folder, stop)
        start = stop
    plain = sharded_model(Plan.from_dict(flat), model(), lr=LR, eps=EPS, dense_optimizer="adagrad")
    load_checkpoint(Plan.from_dict(flat), plain, folder)
    weights, same = whole_weights(made.module), whole_weights(plain.module)
    return {
        "weights": {name: value.tolist() for name, value in weights.items()},
        "same": all(torch.equal(same[name], value) for name, value in weights.items()),
    }


def alone(plan: Plan) -> dict[str, torch.Tensor]:
    """The unsharded model through the same phases."""
    growth = plan.decisions.growth
    assert growth is not None
    module = model()
    tables = [p for name, p in module.named_parameters() if "embedding_bags" in name]
    rest = [p for name, p in module.named_parameters() if "embedding_bags" not in name]
    of_tables = make_optimizer(plan.workload.optimizer, tables, LR, eps=EPS)
    of_rest = make_optimizer("adagrad", rest, LR, eps=EPS)
    layers = {path: m for path, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    narrow = {path: FormatLinear.of(layer, GemmFormats()) for path, layer in layers.items()}
    if any(phase.gemm_format for phase in growth.phases):
        replace_modules(module, narrow)
    phases = PhasedTraining(growth, module, of_rest)
    for step in range(growth.steps):
        phases.begin_step(step)
        format = growth.phases[phases.phase].gemm_format
        for layer in narrow.values():
            layer.formats = GemmFormats(format, format, format) if format else GemmFormats()
        whole = batch(plan, step)
        of_tables.zero_grad()
        of_rest.zero_grad()
        F.binary_cross_entropy_with_logits(module(*whole.inputs), whole.labels).backward()
        of_tables.step()
        of_rest.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def with_phases(plan: Plan, growth: Any) -> Plan:
    """The plan with another growth section."""
    return replace(plan, decisions=replace(plan.decisions, growth=growth))
