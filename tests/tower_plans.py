"""What the test of ``plan.apply`` runs in other processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from codegen.runtime.batches import cut
from codegen.runtime.launch import Rank
from codegen.runtime.towers.coded import CodedMove
from codegen.towers_torchrec import torchrec_towers
from planner import Plan
from planner.zoo import build
from planner.zoo.multi_tower import with_towers


def coded(place: Rank, plan: dict[str, Any], row_cap: int, codec: str, relative: float) -> dict[str, Any]:
    """Outputs with a codec between peers less those without, and the bytes it sent."""
    decided = Plan.from_dict(plan)
    assert decided.decisions.towers is not None
    torch.manual_seed(5)
    flat = build("dlrm-small", device="cpu", row_cap=row_cap)
    model = with_towers(flat.module, decided.decisions.towers)
    alone = copy.deepcopy(model)
    dense, ids, _ = model.random_batch(400, flat.workload, 1)
    move = CodedMove(codec, relative, dim=16)
    made = decided.apply(model, dist.group.WORLD, move=move)
    start = 200 * place.rank
    out = made(dense[start : start + 200], cut(ids, start, 200))
    expected = alone(dense, ids)[start : start + 200]
    error = float((out - expected).detach().abs().max())
    out.mean().backward()
    return {"error": error, "plain": move.plain_bytes, "sent": move.sent_bytes}


def train(place: Rank, plan: dict[str, Any], row_cap: int) -> dict[str, Any]:
    """Six steps on one batch; the first outputs beside those of the whole model."""
    decided = Plan.from_dict(plan)
    assert decided.decisions.towers is not None
    torch.manual_seed(5)
    flat = build("dlrm-small", device="cpu", row_cap=row_cap)
    model = with_towers(flat.module, decided.decisions.towers)
    alone = copy.deepcopy(model)
    dense, ids, labels = model.random_batch(40, flat.workload, 1)
    made = decided.apply(model, dist.group.WORLD, lr=0.1)
    start, size = [(0, 13), (13, 27)][place.rank]
    mine = (dense[start : start + size], cut(ids, start, size))
    expected = alone(dense, ids)[start : start + size].detach()
    losses = []
    for step in range(6):
        out = made(*mine)
        if step == 0:
            first = float((out.detach() - expected).abs().max())
        loss = F.binary_cross_entropy_with_logits(out, labels[start : start + size])
        made.zero_grad()
        loss.backward()
        made.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    return {"outputs": first, "first": losses[0], "last": losses[-1], "moved": list(made.moved)}


def torchrec(place: Rank, plan: dict[str, Any], row_cap: int) -> dict[str, Any]:
    """TorchRec's towers: outputs before and after a step less those of the whole model, SGD everywhere."""
    decided = Plan.from_dict(plan)
    assert decided.decisions.towers is not None
    torch.manual_seed(5)
    flat = build("dlrm-small", device="cpu", row_cap=row_cap)
    model = with_towers(flat.module, decided.decisions.towers)
    alone = copy.deepcopy(model)
    dense, ids, labels = model.random_batch(40, flat.workload, 1)
    made = torchrec_towers(decided, model, optimizer="sgd", lr=0.5)
    each = 40 // place.world_size
    start = each * place.rank
    mine = (dense[start : start + each], cut(ids, start, each))
    errors = []
    for _ in range(3):
        whole, out = alone(dense, ids), made(*mine)
        errors.append(float((out - whole[start : start + each]).detach().abs().max()))
        alone.zero_grad()
        F.binary_cross_entropy_with_logits(whole, labels).backward()
        made.zero_grad()
        F.binary_cross_entropy_with_logits(out, labels[start : start + each]).backward()
        made.step()
        with torch.no_grad():
            for parameter in alone.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    return {"errors": errors, "moved": float((alone(dense, ids) - whole).detach().abs().max())}
