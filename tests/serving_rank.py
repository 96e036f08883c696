"""One rank of tests/test_serving_run.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from codegen.runtime.launch import Rank
from codegen.serving import measure_drift, served_decoder
from ir.plan import Plan
from planner.zoo import build


def serve(place: Rank, plans: dict[str, Any], sizes: dict[str, int], prompts: list[int]) -> dict[str, Any]:
    """Largest difference to the whole model, and drift, of each plan; prompts follow one another."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    whole = build("llama-tiny", **sizes, device="cpu").module
    found: dict[str, Any] = {}
    for name, data in plans.items():
        plan = Plan.from_dict(data)
        assert plan.decisions.serving is not None
        batch = plan.decisions.serving.request.batch
        ids = torch.randint(
            sizes["vocab"], (batch, sizes["sequence"]), generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            wanted = whole(ids)
        served, at, gaps = served_decoder(plan, whole, exact=True), 0, []
        for length in prompts:
            at += length
            gaps.append((served.prefill(ids[:, at - length : at]) - wanted[:, at - 1]).abs().max())
        for _ in range(3):
            at += 1
            gaps.append((served.decode(ids[:, at - 1]) - wanted[:, at - 1]).abs().max())
        found[name] = {
            "gap": float(torch.stack(gaps).max()),
            "scale": float(wanted.abs().max()),
            **asdict(measure_drift(plan, whole, ids[:, :40])),
        }
    return found
