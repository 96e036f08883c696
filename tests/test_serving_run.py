"""Serving plans carried out on gloo: the layout against the whole model, the formats against fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import planner
from codegen.runtime.launch import launch
from ir.errors import InputError
from ir.serving import CacheFormat, ServingRequest, WeightFormat
from planner.models import resolve
from planner.plan import Plan
from planner.zoo import build

SIZES = {"layers": 4, "hidden": 64, "ffn": 128, "heads": 8, "kv_heads": 2, "vocab": 96, "sequence": 64}
FORMATS: dict[str, tuple[WeightFormat, CacheFormat]] = {
    "bf16": ("bf16", "bf16"),
    "fp8 weights": ("fp8_row", "bf16"),
    "fp8 cache": ("bf16", "fp8"),
}


def served(context: int, weights: WeightFormat, cache: CacheFormat, **request: Any) -> Plan:
    wishes = ServingRequest(
        new=40, batch=2, tensor=1, context=context, pipeline=1, weights=(weights,), cache=(cache,), **request
    )
    model = resolve("llama-tiny", **SIZES).model
    topology = planner.topology("h100-1x2") if weights == "fp8_row" else planner.topology("local-2")
    return planner.compile(model, topology, mode="inference", constraints=planner.Constraints(serving=wishes))


def test_two_ranks_serve_what_one_model_computes() -> None:
    """Two prompts of odd lengths one after the other and three decoded tokens; then each plan's formats."""
    plans = {name: served(2, *formats) for name, formats in FORMATS.items()}
    answers = launch(
        f"{Path(__file__).with_name('serving_rank.py')}:serve",
        2,
        {"plans": {name: plan.to_dict() for name, plan in plans.items()}, "sizes": SIZES, "prompts": [17, 6]},
    )
    for answer in answers:
        for found in answer.values():
            assert found["gap"] <= 1e-5 * found["scale"]
        wide, weights, cache = (answer[name] for name in FORMATS)
        # 8 bits of precision, 4 of e4m3: unit roundoffs 2^-9 and 2^-4, which some tens of roundings add up to
        assert 0 < wide["relative"] < 0.05
        assert wide["relative"] < weights["relative"] < 0.25
        assert wide["relative"] < cache["relative"] < 0.25
        assert wide["agreed"] >= 0.8
        assert wide["cache_bytes"] * 2 == wide["exact_bytes"]
        assert cache["cache_bytes"] * 4 == cache["exact_bytes"]


def test_layouts_that_are_not_run_are_refused(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        whole = build("llama-tiny", **SIZES, device="cpu").module
        with pytest.raises(InputError, match="serves on 2 ranks"):
            served(2, "bf16", "bf16").apply(whole)
        decoder = served(1, "bf16", "bf16").apply(whole)
        assert decoder.prefill(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 96)
        with pytest.raises(InputError, match="64 positions"):
            decoder.prefill(torch.zeros(2, 60, dtype=torch.int64))
    finally:
        torch.distributed.destroy_process_group()
