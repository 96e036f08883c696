"""What one rank of the tests of checkpoints between runtimes does: some trainings, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from codegen.checkpoint import load_checkpoint, save_checkpoint
from codegen.execution import executed, form_of
from codegen.runtime.launch import Rank
from ir.errors import InputError
from ir.plan import Plan
from planner.zoo import build
from planner.zoo.multi_tower import with_towers
from tests.composed_plans import TOWERS_2X2, flat_plan, options, towered
from tests.composition_ranks import batch, cut

SIZE = 16


def model(modules: bool, seed: int) -> Any:
    """A small Wukong, with the tower modules of the plans or without."""
    torch.manual_seed(seed)
    flat = build("wukong-small", device="cpu", **options("wukong-small")).module
    towers = towered(flat_plan(2, 2, TOWERS_2X2), "wukong").decisions.towers
    assert towers is not None
    return with_towers(flat, towers) if modules else flat


def trainings(place: Rank, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each job: load a checkpoint or not, train, save; answers which runtime it was and steps counted, or why not."""
    torch.set_num_threads(1)
    answers = []
    for job in jobs:
        try:
            answers.append(_training(place, job))
        except InputError as error:  # all ranks refuse the same
            answers.append({"refused": str(error)})
    return answers


def _training(place: Rank, job: dict[str, Any]) -> dict[str, Any]:
    plan = Plan.from_dict(job["plan"])
    drawn = model(job["modules"], 0)
    made = executed(
        plan,
        model(job["modules"], job.get("seed", 0)),
        dist.group.WORLD,
        lr=0.05,
        eps=1e-3,
        **job.get("how", {}),
    )
    start = 0
    if job.get("load"):
        start = load_checkpoint(plan, made, job["load"], momentum=job.get("momentum"))
    for step in range(start, job.get("until", start)):
        mine = cut(batch(drawn, plan, SIZE, 1000 + step), place.rank, place.world_size)
        made.zero_grad()
        F.binary_cross_entropy_with_logits(made(*mine[:2]), mine[2]).backward()
        made.step()
        for folder in job.get("save", {}).get(str(step + 1), []):
            save_checkpoint(plan, made, folder, step + 1)
    if job.get("copy"):
        save_checkpoint(plan, made, job["copy"], start)
    return {"form": form_of(plan), "step": getattr(getattr(made, "lookup", None), "step", None)}


def kept(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint in a folder, put together by torch's own converter."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    step = max(folder.glob("step-*"))
    dcp_to_torch_save(step, folder / "whole.pt")
    found: dict[str, torch.Tensor] = torch.load(folder / "whole.pt", weights_only=True)
    return found
