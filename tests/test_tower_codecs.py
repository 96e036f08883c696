"""Codecs that the planner chooses between the peers of towers: what they are priced at, and that faults are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import planner
from codegen.runtime.codecs import absolute_bound, encode
from cost_models.calibration import CPU
from cost_models.codecs import message_bytes, unmeasured
from ir.compression import CodecSpeed, CompressionRequest
from ir.towers import TowerRequest
from ir.workload import Workload
from planner.link_loads import link_loads
from tests.test_towers_pass import machine, tables

ROWS, DIM = 512, 64
SPEEDS = (CodecSpeed("eb_entropy", 4e8, 5e8, 2e-4), CodecSpeed("bf16", 1e9, 1e9, 1e-4))


def _vectors(kind: str) -> torch.Tensor:
    rng = np.random.default_rng(3)
    made = {
        "normal": rng.normal(size=(ROWS, DIM)),
        "uniform": rng.uniform(-1, 1, (ROWS, DIM)),
        "heavy tails": rng.standard_t(3, (ROWS, DIM)),
        "mostly zero": rng.normal(size=(ROWS, DIM)) * (rng.uniform(size=(ROWS, DIM)) < 0.1),
        "scales apart": rng.normal(size=(ROWS, DIM)) * 10 ** rng.uniform(-3, 1, DIM),
        "off centre": 1 + 0.1 * rng.normal(size=(ROWS, DIM)),
    }
    return torch.from_numpy(made[kind].astype(np.float32))


@pytest.mark.parametrize("bound", [0.3, 0.1, 0.02])
@pytest.mark.parametrize(
    "kind", ["normal", "uniform", "heavy tails", "mostly zero", "scales apart", "off centre"]
)
def test_no_vectors_need_more_than_unmeasured_ones_are_priced_at(kind: str, bound: float) -> None:
    vectors = _vectors(kind)
    sent = len(encode(vectors, "eb_entropy", absolute_bound(vectors, bound)))
    most = message_bytes(unmeasured("t", "forward", DIM), "eb_entropy", bound, ROWS)
    assert sent <= most
    if kind == "normal":
        assert most <= 1.05 * sent + 704  # a table of frequencies as large as they get


def _plan(engine: Any = "exchange", bandwidth: float = 2e7, **how: Any) -> planner.Plan:
    asked = planner.Constraints(
        towers=TowerRequest(module="projection", compression=2, always=True),
        compression=CompressionRequest(
            speeds=SPEEDS, error_budget=0.01 / 3, gradient_budget=0.01 / 3, engine=engine
        )
        if engine
        else None,
    )
    calibration = replace(CPU, posted_efficiency=0.8, posted_seconds=1e-3)
    return planner.compile(
        tables(8),
        machine(2, 2, bandwidth),
        Workload(4096),
        constraints=asked,
        calibration=calibration,
        time_limit=0.1,
        **how,
    )


def test_the_step_is_priced_with_the_codecs() -> None:
    """By hand: 1024 samples a rank, 2 of 4 vectors of 32 columns, one peer; bounds of a tenth of the rms."""
    plan, plain = _plan(), _plan(engine=None)
    section = plan.decisions.compression
    assert section is not None
    assert {row.table for row in section.tables} == {"tower 0", "tower 1"}
    assert {row.codec for row in section.tables} == {"eb_entropy"}
    assert [row.bound for row in section.tables] == pytest.approx([0.1] * 4, rel=2e-3)
    size = 1024 * 2 * 32 * 4
    bits = np.log2(np.sqrt(2 * np.pi * np.e) / 0.2)
    assert section.tables[0].ratio == pytest.approx(32 / bits, rel=0.03)
    link = size / (0.8 * 2e7)
    floor = 300e-6 + machine(2, 2, 2e7).inter_link.latency
    # one message each way, half of a message's cost on each of its sides
    coding = size / 4e8 + size / 5e8 + 2 * 1e-4 + floor
    for exchange, phase in zip(section.exchanges, ("peer", "peer_gradient"), strict=True):
        assert exchange.uncompressed == pytest.approx(link, rel=1e-6)
        assert exchange.link == pytest.approx(link / (0.85 * section.tables[0].ratio), rel=1e-6)
        assert exchange.coding == pytest.approx(coding, rel=0.02)
        lasts, before = (
            next(e.duration for e in p.timeline.events if e.name == phase) for p in (plan, plain)
        )
        assert before - lasts == pytest.approx(link - exchange.link - exchange.coding, rel=1e-6)
    assert plan.timeline.step < plain.timeline.step
    assert all(finding.ok for finding in planner.verify(plan)), planner.verify(plan)
    assert "tower 0" in plan.explain()
    assert planner.Plan.from_dict(plan.to_dict()).digest == plan.digest
    loads = [sum(load.parts.get("vectors to peers", 0.0) for load in link_loads(p)) for p in (plan, plain)]
    assert loads[1] / loads[0] == pytest.approx(section.tables[0].ratio, rel=1e-6)


def test_fast_links_and_other_engines_get_none() -> None:
    fast = _plan(bandwidth=1e10).decisions.compression
    assert fast is not None
    assert not any(exchange.used for exchange in fast.exchanges)
    library = _plan(engine="torchrec").decisions.compression
    assert library is not None
    assert not any(exchange.used for exchange in library.exchanges)
    assert "not between towers" in library.tables[0].verdict
    either = _plan(engine="fastest").decisions.compression
    assert either is not None
    assert either.engine == "exchange"
    assert either.uses("forward")


def test_the_verifier_finds_what_no_peer_could_do() -> None:
    plan = _plan()
    section = plan.decisions.compression
    assert section is not None

    def faults(**change: Any) -> str:
        broken = replace(plan, decisions=replace(plan.decisions, compression=replace(section, **change)))
        return " ".join(f for finding in planner.verify(broken) for f in finding.faults)

    first = section.tables[0]
    assert "exchanges no such table" in faults(tables=(replace(first, table="tower 2"), *section.tables[1:]))
    assert "exchanges no such table" in faults(tables=(replace(first, table="t0"), *section.tables[1:]))
    early = replace(section.exchanges[0], uncompressed=1e-6, link=1e-7, coding=1e-7)
    assert "takes" in faults(exchanges=(early, section.exchanges[1]))
    longer = replace(section.exchanges[0], coding=0.9 * section.exchanges[0].uncompressed)
    assert "less than its link and codecs take" in faults(exchanges=(longer, section.exchanges[1]))
