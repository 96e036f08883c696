"""Deduplication: exact round trips, the published formula on data, the decision, and sharded equality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import planner
from codegen.runtime.dedup import ikjt
from codegen.runtime.dedup.ikjt import InverseKeyedJaggedTensor
from codegen.runtime.dedup.sessions import session_batches
from codegen.runtime.launch import launch
from cost_models.dedup import dedupe_factor
from ir.constraints import Constraints, ShardingType, TableConstraint
from ir.dedup import DedupRequest
from ir.errors import InfeasibleError, InputError
from ir.session_stats import sessions_from_batches
from ir.sessions import SessionGroup, SessionStats

RANK = f"{Path(__file__).with_name('dedup_rank.py')}:train"
Rows = list[list[list[int]]]  # feature -> sample -> ids


def kjt(rows: Rows, weighted: bool = False) -> KeyedJaggedTensor:
    values = [i for feature in rows for ids in feature for i in ids]
    return KeyedJaggedTensor(
        keys=[f"f{n}" for n in range(len(rows))],
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor([len(ids) for feature in rows for ids in feature], dtype=torch.int32),
        weights=torch.tensor([0.5 * (i % 2) for i in values]) if weighted else None,
    )


def rows_of(batch: KeyedJaggedTensor) -> Rows:
    return [[list(t.tolist()) for t in batch[key].to_dense()] for key in batch.keys()]  # noqa: SIM118


batches = st.integers(1, 3).flatmap(
    lambda features: st.integers(1, 9).flatmap(
        lambda size: st.lists(
            st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=size, max_size=size),
            min_size=features,
            max_size=features,
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(batches, st.booleans(), st.booleans(), st.data())
def test_round_trips_are_exact_and_rows_distinct(
    rows: Rows, weighted: bool, collide: bool, data: st.DataObject
) -> None:
    batch = kjt(rows, weighted)
    together = data.draw(st.integers(1, len(rows)))
    groups = [[f"f{n}" for n in range(together)]]
    with pytest.MonkeyPatch.context() as patch:
        if collide:  # a hash that tells nothing apart must cost time only
            patch.setattr(ikjt, "_mix", lambda x: torch.zeros_like(x))
        made = InverseKeyedJaggedTensor.from_kjt(batch, groups)
    assert rows_of(made.to_kjt()) == rows
    again = InverseKeyedJaggedTensor.from_torchrec(made.to_torchrec())
    assert rows_of(again.to_kjt()) == rows
    if weighted:
        assert torch.equal(made.to_kjt().weights(), batch.weights())
    if not collide:
        joint = [tuple(tuple(rows[f][s]) for f in range(together)) for s in range(len(rows[0]))]
        assert made.groups[0].rows == len(set(joint))
        firsts = list(dict.fromkeys(joint))
        assert made.groups[0].inverse.tolist() == [firsts.index(row) for row in joint]


def test_bad_groups_are_named() -> None:
    batch = kjt([[[1], [2]], [[3], [4]]])
    with pytest.raises(InputError, match="no feature 'nope'"):
        InverseKeyedJaggedTensor.from_kjt(batch, [["nope"]])
    with pytest.raises(InputError, match="one group only"):
        InverseKeyedJaggedTensor.from_kjt(batch, [["f0"], ["f0"]])
    with pytest.raises(InputError, match="no inverse indices"):
        InverseKeyedJaggedTensor.from_torchrec(batch)
    made = InverseKeyedJaggedTensor.from_kjt(batch, [["f0"]]).to_torchrec()
    with pytest.raises(InputError, match="already deduplicated"):
        InverseKeyedJaggedTensor.from_kjt(made, [["f0"]])


def stream(
    sessions: int, length: int, stay: dict[str, float], seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ids from so large a space that two draws never agree by chance; (samples, 2) ids a feature."""
    random = np.random.default_rng(seed)
    ids = {}
    for name, keep in stay.items():
        changes = random.random((sessions, length)) >= keep
        changes[:, 0] = True
        version = np.cumsum(changes.reshape(-1)) - 1
        ids[name] = random.integers(0, 2**40, (int(version[-1]) + 1, 2))[version]
    return ids, np.repeat(np.arange(sessions), length)


def test_formula_holds_on_a_stream() -> None:
    stay = {"user": 0.95, "item": 0.1}
    ids, sessions = stream(400, 16, stay, 0)
    stats = sessions_from_batches([(ids, sessions)], group_features=False)
    assert stats.samples_per_session == 16
    for group in stats.groups:
        (name,) = group.features
        assert group.stay == pytest.approx(stay[name], abs=0.02)
        distinct = len(np.unique(ids[name], axis=0))  # numpy's own count, not ours
        assert len(sessions) / distinct == pytest.approx(dedupe_factor(16, group.stay), rel=1e-9)


def test_features_that_change_together_share_an_index() -> None:
    ids, sessions = stream(200, 12, {"a": 0.9, "item": 0.05}, 1)
    ids["b"] = ids["a"] + 7  # changes exactly when a does
    stats = sessions_from_batches([(ids, sessions)])
    assert sorted(sorted(group.features) for group in stats.groups) == [["a", "b"], ["item"]]


def test_sessions_scattered_by_time_are_found() -> None:
    ids, sessions = stream(50, 8, {"a": 0.9}, 2)
    order = np.random.default_rng(0).permutation(len(sessions))
    order = order[
        np.argsort(np.argsort(sessions)[order] % 8, kind="stable")
    ]  # interleave, keep each session's order
    mixed = sessions_from_batches([({"a": ids["a"][order]}, sessions[order])])
    whole = sessions_from_batches([(ids, sessions)])
    assert mixed.samples_per_session == whole.samples_per_session
    assert mixed.groups == whole.groups


def test_session_batches_keep_sessions_together() -> None:
    sessions = np.random.default_rng(0).integers(0, 40, 1000)
    seen = np.concatenate(list(session_batches(sessions, 64, drop_last=False)))
    assert sorted(seen.tolist()) == list(range(1000))
    runs = 1 + np.count_nonzero(np.diff(sessions[seen]))
    assert runs == len(np.unique(sessions))
    assert len(list(session_batches(sessions, 64))) == 1000 // 64


def compiled(workload: planner.Workload | None, constraints: Constraints | None = None) -> planner.Plan:
    return planner.compile("dlrm-dcnv2", "h100-2x8", workload, constraints=constraints, time_limit=0.3)


def features_of(plan: planner.Plan) -> list[str]:
    return [f for table in plan.table_plans for f in table.features]


def test_pass_takes_what_pays_and_the_step_gets_shorter() -> None:
    plain = compiled(None)
    names = features_of(plain)
    stats = SessionStats(16.5, (SessionGroup(tuple(names[:13]), 0.95), SessionGroup(tuple(names[13:]), 0.0)))
    workload = replace(plain.workload, sessions=stats)
    plan = compiled(workload)
    section = plan.decisions.dedup
    assert section is not None
    assert [group.chosen for group in section.groups] == [True, False]
    assert section.groups[0].factor == pytest.approx(1 / (1 - 0.95 * 15.5 / 16.5))
    assert plan.timeline.step < plain.timeline.step
    assert all(table.sharding_type != "data_parallel" for table in plan.table_plans)
    assert planner.Plan.from_dict(plan.to_dict()).digest == plan.digest
    assert all(finding.ok for finding in planner.verify(plan))
    off = compiled(workload, Constraints(dedup=DedupRequest(enabled=False)))
    assert off.decisions.dedup is None
    assert off.timeline.step == plain.timeline.step
    kept = compiled(workload, Constraints(dedup=DedupRequest(keep=(names[0],))))
    assert kept.decisions.dedup is not None
    assert names[0] not in {f for g in kept.decisions.dedup.chosen for f in g.features}


@pytest.mark.parametrize("types", [("table_wise",), ("column_wise", "table_wise")])
def test_sharded_run_on_deduplicated_batches_equals_the_unsharded_model(types: tuple[str, ...]) -> None:
    answers = launch(RANK, 2, {"types": list(types)}, timeout=240)
    for answer in answers:
        assert answer["factor"] > 1.5  # the batches that ran really were deduplicated
        assert answer["outputs"] < 1e-6
        assert answer["weights"] < 1e-6
        assert answer["moved"] > 1e-3  # the weights that agree are not the initial ones


def test_verifier_refuses_a_wrong_factor() -> None:
    plain = compiled(None)
    stats = SessionStats(16.5, (SessionGroup(tuple(features_of(plain)), 0.9),))
    plan = compiled(replace(plain.workload, sessions=stats))
    section = plan.decisions.dedup
    assert section is not None
    wrong = replace(section.groups[0], factor=99.0)
    bad = replace(plan, decisions=replace(plan.decisions, dedup=replace(section, groups=(wrong,))))
    assert any(f.check == "dedup" and not f.ok for f in planner.verify(bad))


def test_types_that_cannot_take_deduplicated_batches_are_refused() -> None:
    plain = planner.compile("dlrm-small", "local-2", constraints=pinned("row_wise"))
    stats = SessionStats(16.5, (SessionGroup(tuple(features_of(plain)), 0.99),))
    with pytest.raises(InfeasibleError, match="row_wise tables on a cpu with deduplicated"):
        planner.compile(
            "dlrm-small", "local-2", replace(plain.workload, sessions=stats), constraints=pinned("row_wise")
        )


def pinned(kind: ShardingType) -> Constraints:
    return Constraints(tables={"*": TableConstraint(sharding_types=(kind,))})
