"""Serving plans as people read them: where a rank stands, and what another machine changes."""

from __future__ import annotations

import itertools

import pytest

import planner
from ir.errors import InputError
from ir.serving import ServingRequest


@pytest.fixture(scope="module")
def plan() -> planner.Plan:
    """Eight ranks a replica on 20 devices: two replicas and four devices that idle."""
    asked = ServingRequest(new=8000, tensor=2, context=2, pipeline=2)
    limits = planner.Constraints(serving=asked)
    return planner.compile("llama3-8b", "h100-5x4", mode="inference", constraints=limits)


def test_every_rank_stands_where_the_mesh_puts_it(plan: planner.Plan) -> None:
    mesh = list(
        itertools.product(range(2), range(2), range(2), range(2))
    )  # replica, pipeline, context, tensor
    for rank, (replica, pipeline, context, tensor) in enumerate(mesh):
        said = plan.explain(rank=rank)
        where = f"replica {replica}, tensor {tensor}, context {context}, pipeline {pipeline}"
        assert where in " ".join(said.split())
        assert f"(host {rank // 4})" in said
    assert "serves nothing" in plan.explain(rank=16)
    with pytest.raises(InputError, match=r"ranks 0\.\.19"):
        plan.explain(rank=20)
    with pytest.raises(InputError, match="has no tables"):
        plan.explain(table="C20")


def test_a_smaller_machine_serves_fewer_tokens(plan: planner.Plan) -> None:
    fewer = planner.whatif(plan, {"hosts": "2"})
    text = plan.diff(fewer)
    assert "2 replicas" in text
    assert "1 replica\n" in f"{text}\n"
    rates = next(line.split() for line in text.splitlines() if line.startswith("tokens/s"))
    assert rates[-2:] == ["-50.0", "%"]
    assert "embedding" not in text
    assert "tables change" not in text
