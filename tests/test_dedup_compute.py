"""Compute on distinct rows as a plan decides, prices and runs it: sequences, attention and MLPs of one feature group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import planner
from codegen.dedup_compute import distinct_module
from codegen.runtime.dedup.distinct import distinct
from codegen.runtime.launch import launch
from ir.capture import capture
from ir.compression import CompressionRequest
from ir.constraints import Constraints, TableConstraint
from ir.dedup import DedupRequest
from ir.errors import InputError
from ir.sessions import SessionGroup, SessionStats
from ir.workload import FeatureStats, Workload
from tests import dedup_rank

RANK = f"{Path(__file__).with_name('dedup_rank.py')}:compute"
SESSIONS = SessionStats(6.0, (SessionGroup(("history", "profile"), 0.9), SessionGroup(("item",), 0.0)))
USER = {
    "to_padded_dense",
    "attention",
    "user_0",
    "user_1",
    "user_2",
}  # operations of the group, cat and reads left out


def work(batch: int) -> Workload:
    return Workload(batch, optimizer="sgd", sessions=SESSIONS, features={"history": FeatureStats(4.0)})


def compiled(batch: int, topology: str = "local-2", **asked: object) -> planner.Plan:
    types = {"*": TableConstraint(sharding_types=("table_wise",))}
    constraints = Constraints(tables=types, **asked)  # type: ignore[arg-type]
    return planner.compile(
        dedup_rank.ranker(), topology, work(batch), constraints=constraints, time_limit=0.2
    )


def test_operations_of_one_group_are_found_and_priced_on_distinct_rows() -> None:
    model = capture(dedup_rank.ranker())
    assert set(model.alone["user_2"]) == {"history", "profile"}
    assert model.alone["attention"] == ("history",)
    assert not {"top", "cat_1", "histories", "bags"} & set(model.alone)
    plan = compiled(2**16, "h100-1x8")
    section = plan.decisions.dedup
    assert section is not None
    group, item = section.groups
    assert group.chosen
    assert not item.chosen
    assert set(group.compute) >= USER
    assert item.compute == ()
    off = compiled(2**16, "h100-1x8", dedup=DedupRequest(enabled=False))
    forward = {
        event.name: [e.duration for e in made.timeline.events if e.name == event.name]
        for made in (off,)
        for event in made.timeline.events
    }
    assert sum(map(sum, forward.values())) > sum(e.duration for e in plan.timeline.events)
    assert plan.timeline.step < off.timeline.step
    # bytes and FLOP bound operations take their share of the samples, kernels' launches stay
    assert 0 < group.compute_seconds < off.timeline.step
    assert [finding for finding in planner.verify(plan) if not finding.ok] == []
    assert planner.Plan.from_dict(plan.to_dict()).digest == plan.digest
    assert "of compute" in plan.explain()


def test_the_verifier_knows_what_was_priced() -> None:
    plan = compiled(2**16, "h100-1x8")
    dearer = replace(plan, workload=replace(plan.workload, dedup_ops={**plan.workload.dedup_ops, "top": 2.0}))
    assert any(f.check == "dedup" and not f.ok for f in planner.verify(dearer))


def test_other_exchanges_hand_out_no_distinct_rows() -> None:
    plan = compiled(
        2**16, "h100-2x8", compression=CompressionRequest(codecs=("none", "fp16"), error_budget=1.0)
    )
    assert plan.workload.dedup_ops == {}


def chosen(plan: planner.Plan) -> planner.Plan:
    """Tiny batches: kernels' launches are worth more than they save, so the group is taken by hand."""
    section = plan.decisions.dedup
    assert section is not None
    model = capture(dedup_rank.ranker())
    compute = tuple(name for name, read in model.alone.items() if set(read) <= {"history", "profile"})
    groups = (replace(section.groups[0], chosen=True, compute=compute), *section.groups[1:])
    return replace(plan, decisions=replace(plan.decisions, dedup=replace(section, groups=groups)))


@pytest.mark.parametrize("first", [True, False], ids=["in the loader", "in the model"])
def test_a_sharded_run_on_distinct_rows_equals_the_unsharded_model(first: bool) -> None:
    plan = chosen(compiled(2 * dedup_rank.BATCH))
    for found in launch(RANK, 2, {"plan": plan.to_dict(), "first": first}, timeout=240):
        assert found["outputs"] < 1e-5
        assert found["weights"] < 1e-5
        assert (
            found["attended"] == found["most_distinct"] < dedup_rank.BATCH
        )  # attention saw distinct rows only


def test_other_modules_and_batches_are_refused() -> None:
    plan = chosen(compiled(2 * dedup_rank.BATCH))
    with pytest.raises(InputError, match="has no operation 'attention'"):
        distinct_module(plan, nn.Linear(2, 2))
    batch = dedup_rank.ranker().example_inputs(4)[1]
    with pytest.raises(InputError, match="under one inverse index"):
        distinct(batch, [("history", "other")], ("history",), ())


class Spilt(nn.Module):
    """The vectors of a sequence meet another operation before they are rows: the feature stays with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dedup_rank.ranker()
        self.scale = nn.Linear(dedup_rank.DIM, dedup_rank.DIM)

    def forward(self, dense: torch.Tensor, ids: object) -> torch.Tensor:
        jagged = self.inner.histories(ids)["history"]
        return self.scale(jagged.values()).sum(0) + self.inner.user(
            torch.cat([jagged.to_padded_dense(4).sum(1), self.inner.bags(ids)["profile"]], 1)
        )

    def example_inputs(self, samples: int) -> object:
        return self.inner.example_inputs(samples)


def test_features_whose_vectors_are_read_in_another_way_are_left_out() -> None:
    alone = capture(Spilt()).alone
    assert {feature for read in alone.values() for feature in read} == {"profile"}
